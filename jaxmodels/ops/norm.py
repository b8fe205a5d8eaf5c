"""Normalisations, computed in float32 and rounded where torch rounds. A gradient keeps what they are given and computes them again.

Axis letters: D hidden."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] over its root mean square, rounded to x.dtype, times weight [D] (arXiv:1910.07467, in Llama's order of rounding)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return weight.astype(x.dtype) * y.astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm_once(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """As rms_norm, rounded once, after the weight [D] (Gemma's and OLMo 2's order)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * y).astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def layer_norm(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float) -> jax.Array:
    """x [..., D] less its mean, over its standard deviation, times weight [D], plus bias [D], rounded once (arXiv:1607.06450)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    y = y if weight is None else y * weight.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)
