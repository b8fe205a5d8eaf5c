"""Dropout by a key."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def dropout(key: jax.Array, x: jax.Array, rate: Any) -> jax.Array:
    """x with a share `rate` of its numbers set to 0 and the rest made larger by it. At a rate of 1 nothing is left, and no gradient comes
    back. ValueError for a concrete rate that is not in [0, 1]."""
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"dropout of {rate}: expected a share from 0 to 1")
    left = jnp.asarray(1 - rate, x.dtype)
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / jnp.where(left > 0, left, 1), 0)
