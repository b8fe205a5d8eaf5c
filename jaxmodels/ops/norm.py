"""Normalisations, computed in float32 and rounded where torch rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] over its root mean square, rounded to x.dtype, times weight [D] (arXiv:1910.07467, in Llama's order of rounding)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return weight.astype(x.dtype) * y.astype(x.dtype)
