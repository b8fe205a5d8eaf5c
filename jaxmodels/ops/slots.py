"""Where keys and values lie in a layer's memory.

Axis letters: B batch, S slots, T new tokens, K kv heads, H head dim, L stacked layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def kv_axes(heads_first: bool) -> tuple[str | None, ...]:
    """The logical axes of a memory, [B,K,S,H] with the heads first, else [B,S,K,H]."""
    return ("batch", "act_kv_heads", None, None) if heads_first else ("batch", None, "act_kv_heads", None)


def swap_heads(x: jax.Array, heads_first: bool) -> jax.Array:
    """Between [B,S,K,H], as attention takes it, and the memory layout."""
    return jnp.swapaxes(x, 1, 2) if heads_first else x


def at_layer(x: jax.Array, layer: jax.Array | None) -> jax.Array:
    """One layer's of [L, ...]; without a number x is one layer's."""
    return x if layer is None else lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)


def put_layer(x: jax.Array, new: jax.Array, layer: jax.Array | None) -> jax.Array:
    """x with `new` for that layer, at_layer's inverse."""
    return new.astype(x.dtype) if layer is None else lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), layer, 0)


def write_slots(x: jax.Array, new: jax.Array, start: Any, heads_first: bool, layer: jax.Array | None) -> jax.Array:
    """x with new [B,T,K,H] in the slots from `start` on, in x's memory."""
    new, axis = swap_heads(new, heads_first).astype(x.dtype), 2 if heads_first else 1
    if (space := jax.typeof(x).memory_space) != jax.typeof(new).memory_space:
        new = jax.device_put(new, space)
    if layer is None:
        return lax.dynamic_update_slice_in_dim(x, new, start, axis)
    place: list[Any] = [layer, 0, 0, 0, 0]
    place[axis + 1] = start
    return lax.dynamic_update_slice(x, new[None], place)


def resized(x: jax.Array, size: int, axis: int, fill: int = 0) -> jax.Array:
    """x cut, or filled up with `fill`, at the axis' end."""
    if size <= x.shape[axis]:
        return lax.slice_in_dim(x, 0, size, axis=axis)
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis], 0)
    return lax.pad(x, jnp.asarray(fill, x.dtype), pad)
