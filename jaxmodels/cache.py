"""What a model remembers between calls: a pytree in, a pytree out.

A cache holds one state per layer (in a scanned model one per stack of layers, with a leading [layers] axis), the position of
the token in every slot, and one write index for all rows. Only a state knows its memory layout.

Axis letters: B batch, S slots, T new tokens, K kv heads, H head dim, L stacked layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax


@struct.dataclass
class KV:
    """Keys and values of full attention: [B,S,K,H] on CPU, [B,K,S,H] (`heads_first`) on accelerators, perhaps with a leading L."""

    k: jax.Array
    v: jax.Array
    heads_first: bool = struct.field(pytree_node=False, default=False)

    def update(self, k: jax.Array, v: jax.Array, step: Any) -> tuple[KV, jax.Array, jax.Array, jax.Array]:
        """Write k, v [B,T,K,H] at the step's slots; also returns all keys and values [B,S,K,H] and their positions [B,S]."""
        axis = 2 if self.heads_first else 1
        swap = lambda x: jnp.swapaxes(x, 1, 2) if self.heads_first else x

        def put(old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
            new = swap(new).astype(old.dtype)
            if step.layer is None:
                whole = lax.dynamic_update_slice_in_dim(old, new, step.index, axis)
                return whole, whole
            start = [step.layer, 0, 0, 0, 0]
            start[axis + 1] = step.index
            whole = lax.dynamic_update_slice(old, new[None], start)
            return whole, lax.dynamic_index_in_dim(whole, step.layer, 0, keepdims=False)

        (keys, all_k), (values, all_v) = put(self.k, k), put(self.v, v)
        state = self.replace(k=keys, v=values)
        if step.fresh:
            return state, k, v, step.key_positions
        return state, swap(all_k), swap(all_v), step.key_positions

    def resize(self, slots: int) -> KV:
        """The same tokens in `slots` slots; dropped are the last ones."""
        axis = self.k.ndim - 2 if self.heads_first else self.k.ndim - 3
        return self.replace(k=_resize(self.k, slots, axis), v=_resize(self.v, slots, axis))

    def take(self, rows: jax.Array) -> KV:
        """The rows [B'] of the batch, in that order."""
        axis = self.k.ndim - 4
        return self.replace(k=jnp.take(self.k, rows, axis), v=jnp.take(self.v, rows, axis))


@struct.dataclass
class Cache:
    """`layers`: the states; `positions` [B,S] int32, -1 where a slot holds no token; `index` [] int32, the next slot to write;
    `fresh`: nothing was written yet, so a first chunk need not look at the slots."""

    layers: tuple[Any, ...]
    positions: jax.Array
    index: jax.Array
    fresh: bool = struct.field(pytree_node=False, default=False)

    @property
    def slots(self) -> int:
        return self.positions.shape[1]

    @property
    def lengths(self) -> jax.Array:
        """Tokens seen per row, [B]."""
        return self.positions.max(1) + 1

    def advance(self, positions: jax.Array) -> Cache:
        """Note the new tokens at `positions` [B,T] in the next slots; the states are updated by their layers."""
        new = lax.dynamic_update_slice_in_dim(self.positions, positions, self.index, 1)
        return self.replace(positions=new, index=self.index + positions.shape[1], fresh=False)

    def resize(self, slots: int) -> Cache:
        """Room for `slots` slots in all; a smaller number drops the last slots."""
        layers = tuple(state.resize(slots) for state in self.layers)
        return self.replace(layers=layers, positions=_resize(self.positions, slots, 1, -1), index=jnp.minimum(self.index, slots))

    def take(self, rows: jax.Array) -> Cache:
        """The rows [B'] of the batch, in that order, repeats allowed: beams, several samples of a prompt."""
        return self.replace(layers=tuple(state.take(rows) for state in self.layers), positions=self.positions[rows])

    def forget(self, emptied: jax.Array) -> Cache:
        """Empty the slots where `emptied` [B,S] is true: rejected drafts, tokens written after a row was finished."""
        return self.replace(positions=jnp.where(emptied, -1, self.positions))


class LayerSpec(Protocol):
    """What a config declares of one layer's memory."""

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> Any: ...


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """A full-attention layer with `heads` kv heads of `head_dim`."""

    heads: int
    head_dim: int

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> KV:
        shape = (batch, self.heads, slots, self.head_dim) if heads_first else (batch, slots, self.heads, self.head_dim)
        shape = shape if layers is None else (layers, *shape)
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), heads_first)


def segments(kinds: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Factor a list of layer kinds into (start, period, repeats): from the left, the repetition that covers most, or one layer."""
    found, i = [], 0
    while i < len(kinds):
        period, repeats = 1, 1
        for p in range(1, (len(kinds) - i) // 2 + 1):
            r = 1
            while list(kinds[i + r * p : i + (r + 1) * p]) == list(kinds[i : i + p]):
                r += 1
            if r > 1 and r * p > period * repeats:
                period, repeats = p, r
        found.append((i, period, repeats))
        i += period * repeats
    return found


def init_cache(model: Any, batch: int, slots: int, dtype: Any = None) -> Cache:
    """An empty cache for `model` with `slots` slots per row; `dtype` defaults to the model's compute dtype."""
    kinds = model.config.layer_kinds
    platform = jax.default_backend() if model.rules is None else model.rules.platform
    states = []
    for start, period, repeats in segments(kinds) if model.scan_layers else [(i, 1, 1) for i in range(len(kinds))]:
        for kind in kinds[start : start + period]:
            layers = None if repeats == 1 else repeats
            spec: LayerSpec = model.config.layer_spec(kind)
            states.append(spec.init(batch, slots, dtype or model.dtype, layers=layers, heads_first=platform != "cpu"))
    return Cache(tuple(states), jnp.full((batch, slots), -1, jnp.int32), jnp.int32(0), fresh=True)


def _resize(x: jax.Array, size: int, axis: int, fill: int = 0) -> jax.Array:
    if size <= x.shape[axis]:
        return lax.slice_in_dim(x, 0, size, axis=axis)
    pad = [(0, 0, 0)] * x.ndim
    pad[axis] = (0, size - x.shape[axis], 0)
    return lax.pad(x, jnp.asarray(fill, x.dtype), pad)
