"""Attention over positions, chosen by name.

Masks compare positions, never columns: a query at position p sees the keys at positions 0..p, and -1 marks a slot that
holds no token. So left padding, buckets and ragged second turns cannot change a number.

Axis letters: B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.ops.linear import einsum

Weights = jax.Array | None
Attention = Callable[..., tuple[jax.Array, Weights]]  # its arguments: register_attention


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


def splash(*args: Any, **kwargs: Any) -> tuple[jax.Array, Weights]:
    """The kernel for TPU, jaxmodels.ops.splash; nobody else waits for Pallas to be imported."""
    from jaxmodels.ops.splash import splash

    return splash(*args, **kwargs)


IMPLEMENTATIONS: dict[str, Attention] = {"eager": eager, "xla": xla, "splash": splash}
ON_MESH = {"splash"}  # implementations that also take `rules=`
HF_NAMES = {"sdpa": "xla"}  # what HF configs call the compiler's own attention
UNPROVEN = {"cudnn": "its numbers and compiled text can be shown on an NVIDIA GPU alone, and have not been"}


def register_attention(name: str, function: Attention, on_mesh: bool = False) -> None:
    """Make `function(q [B,T,N,H], k [B,S,K,H], v, q_positions [B,T], k_positions [B,S], scale)` available by name; it returns the
    output [B,T,N,H] and the weights [B,N,T,S] or None.

    on_mesh: it also takes `rules=`, the model's sharding rules or None, as a kernel must that the compiler cannot split over devices."""
    IMPLEMENTATIONS[name] = function
    (ON_MESH.add if on_mesh else ON_MESH.discard)(name)


def resolve_attention(name: str | None) -> str:
    """The registered name for a config's or a caller's choice; None is `xla`. ValueError lists what is possible."""
    name = HF_NAMES.get(name or "xla", name or "xla")
    if name not in IMPLEMENTATIONS:
        why = f" ({UNPROVEN[name]})" if name in UNPROVEN else ""
        raise ValueError(f"attn_implementation {name!r} is not registered{why}; possible are {', '.join(sorted(IMPLEMENTATIONS))}")
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
    rules: Any = None,
) -> tuple[jax.Array, Weights]:
    """Causal attention of q [B,T,N,H] over k, v [B,S,K,H], positions [B,T] and [B,S]; scale defaults to H**-0.5. Kernels split by `rules`.

    Returns [B,T,N,H] in q.dtype and, from `eager` alone, the weights [B,N,T,S]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"rules": rules} if implementation in ON_MESH else {}
    return IMPLEMENTATIONS[implementation](q, k, v, q_positions, k_positions, scale, **options)
