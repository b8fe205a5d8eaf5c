"""Attention over positions, chosen by name.

Masks compare positions, never columns: a query at position p sees the keys at positions 0..p, and -1 marks a slot that
holds no token. So left padding, buckets and ragged second turns cannot change a number.

Axis letters: B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.ops.linear import einsum

Weights = jax.Array | None
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, Weights]]


def causal_mask(q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    """bool [B,1,T,S]: which of the keys at [B,S] the queries at [B,T] see."""
    keys = k_positions[:, None, None, :]
    return (keys >= 0) & (keys <= q_positions[:, None, :, None])


def eager(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, k_positions: jax.Array, scale: float
) -> tuple[jax.Array, Weights]:
    """Written out, as torch's eager attention rounds: also returns the weights [B,N,T,S]."""
    B, T, N, H = q.shape
    K = k.shape[2]
    logits = einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k) * scale
    mask = causal_mask(q_positions, k_positions)
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, -1).astype(q.dtype)
    out = einsum("bkgts,bskh->btkgh", weights, v).astype(q.dtype)
    return out.reshape(B, T, N, -1), weights.reshape(B, N, T, -1)


def xla(
    q: jax.Array, k: jax.Array, v: jax.Array, q_positions: jax.Array, k_positions: jax.Array, scale: float
) -> tuple[jax.Array, Weights]:
    """jax.nn.dot_product_attention, compiled by XLA."""
    mask = causal_mask(q_positions, k_positions)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="xla")

    if q.dtype == jnp.float32:
        return attend(q, k, v), None
    # XLA:CPU lacks some of the batched bfloat16 products in it
    wide = lambda *x: attend(*(a.astype(jnp.float32) for a in x)).astype(q.dtype)
    return lax.platform_dependent(q, k, v, cpu=wide, default=attend), None


IMPLEMENTATIONS: dict[str, Attention] = {"eager": eager, "xla": xla}
HF_NAMES = {"sdpa": "xla"}  # what HF configs call the compiler's own attention


def register_attention(name: str, function: Attention) -> None:
    """Make `function(q [B,T,N,H], k [B,S,K,H], v, q_positions [B,T], k_positions [B,S], scale) -> (out [B,T,N,H], weights or None)` available by name."""
    IMPLEMENTATIONS[name] = function


def resolve_attention(name: str | None) -> str:
    """The registered name for a config's or a caller's choice; None is `xla`. ValueError lists what is possible."""
    name = HF_NAMES.get(name or "xla", name or "xla")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation {name!r} is not registered; possible are {', '.join(sorted(IMPLEMENTATIONS))}")
    return name


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    *,
    scale: float | None = None,
    implementation: str = "xla",
) -> tuple[jax.Array, Weights]:
    """Causal attention of q [B,T,N,H] over k, v [B,S,K,H], positions [B,T] and [B,S]; scale defaults to H**-0.5.

    Returns [B,T,N,H] in q.dtype and, from `eager` alone, the weights [B,N,T,S]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q, k, v, q_positions, k_positions, scale)
