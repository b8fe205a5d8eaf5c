"""Low-rank additions to a linear layer and to an embedding (LoRA, arXiv:2106.09685; DoRA, 2402.09353).

Axis letters: `...` leading axes, B rows of the batch, I in, O out, V vocabulary, r rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.ops.linear import einsum, linear


def adapted_linear(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, adapter: Mapping[str, Any], drop: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """linear(x [..., I], weight [O,I], bias [O]) with `adapter`: lora_A [r,I], lora_B [O,r] and lora_scale [], or with a leading B one of
    each for every row of x; with lora_magnitude [O] (DoRA) the rows of the weight have that length. drop: the adapter's dropout on x."""
    A, B, scale = adapter["lora_A"], adapter["lora_B"], adapter["lora_scale"]
    y, dropped = linear(x, weight, bias), x if drop is None else drop(x)
    if A.ndim == 3:
        return y + _by_row(dropped, A, B, scale).astype(y.dtype)
    low = linear(linear(dropped, A), B) * scale.astype(x.dtype)
    if "lora_magnitude" not in adapter:
        return y + low
    length = adapter["lora_magnitude"] / jax.lax.stop_gradient(row_norms(weight, A, B, scale))  # its gradient is left out, paper §4.3
    return y + (length - 1).astype(x.dtype) * linear(dropped, weight) + length.astype(x.dtype) * low


def _by_row(x: jax.Array, A: jax.Array, B: jax.Array, scale: jax.Array) -> jax.Array:
    """x [B·n, ..., I] for adapters [B,r,I], [B,O,r], [B]: n neighbouring rows (beams, samples) share one. float32 [B·n, ..., O]."""
    left = len(x) % len(A)
    if left:
        raise ValueError(f"{len(A)} rows of adapters cannot be shared by {len(x)} rows of input")
    wide = x.reshape(len(A), -1, x.shape[-1])
    low = einsum("bti,bri->btr", wide, A.astype(x.dtype)).astype(x.dtype)
    y = einsum("btr,bor->bto", low, B.astype(x.dtype)) * scale[:, None, None]
    return y.reshape(*x.shape[:-1], B.shape[1])


def row_norms(weight: jax.Array, A: jax.Array, B: jax.Array, scale: Any) -> jax.Array:
    """float32 [O]: the lengths of the rows of weight [O,I] + scale·B·A."""
    return jnp.linalg.norm(weight.astype(jnp.float32) + scale * (B.astype(jnp.float32) @ A.astype(jnp.float32)), axis=1)


def adapted_embedding(x: jax.Array, ids: jax.Array, adapter: Mapping[str, Any]) -> jax.Array:
    """Rows x [..., O] of an embedding at `ids` [...] with lora_embedding_A [r,V], lora_embedding_B [O,r] and lora_scale []."""
    low = adapter["lora_embedding_A"].T[ids].astype(x.dtype)
    return x + linear(low, adapter["lora_embedding_B"]) * adapter["lora_scale"].astype(x.dtype)
