"""What a model remembers between calls: a pytree in, a pytree out.

A cache holds one state per layer (in a scanned model one per stack of layers, with a leading [layers] axis), the position of
the token in every slot, and one write index for all rows. Only a state knows its memory layout.

Axis letters: B batch, S slots, T new tokens, K kv heads, H head dim, C channels, W a convolution's window, L stacked layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.cache_sliding import SlidingKV
from jaxmodels.ops.slots import at_layer, kv_axes, put_layer, resized, swap_heads, write_slots

MOVED = 16  # slots that `reorder` moves at a time


class KV(struct.PyTreeNode):
    """Keys and values of full attention: [B,S,K,H] on CPU, [B,K,S,H] (`heads_first`) on accelerators, perhaps with a leading L.
    v is None where values are made of the keys."""

    k: jax.Array
    v: jax.Array | None
    heads_first: bool = struct.field(pytree_node=False, default=False)

    @property
    def axes(self) -> KV:
        """The logical axes of every leaf, a leading L aside."""
        axes = kv_axes(self.heads_first)
        return KV(axes, None if self.v is None else axes, self.heads_first)  # type: ignore[arg-type]

    def update(self, k: jax.Array, v: jax.Array | None, step: Any) -> tuple[KV, jax.Array, Any, jax.Array]:
        """Write k, v [B,T,K,H] at the step's slots; also returns all keys and values [B,S,K,H] and their positions [B,S]."""
        write = lambda old, new: write_slots(old, new, step.index, self.heads_first, step.layer)
        state = self.replace(k=write(self.k, k), v=None if v is None else write(self.v, v))
        if not step.fresh:
            k, v = jax.tree.map(lambda x: swap_heads(at_layer(x, step.layer), self.heads_first), (state.k, state.v))
        return state, k, v, step.key_positions

    def resize(self, slots: int) -> KV:
        """The same tokens in `slots` slots; dropped are the last ones."""
        axis = self.k.ndim - 2 if self.heads_first else self.k.ndim - 3
        return jax.tree.map(lambda x: resized(x, slots, axis), self)

    def take(self, rows: jax.Array) -> KV:
        """The rows [B'] of the batch, in that order."""
        axis = self.k.ndim - 4
        return jax.tree.map(lambda x: jnp.take(x, rows, axis), self)

    def take_slots(self, rows: jax.Array, start: jax.Array, slots: int) -> KV:
        """`take` in the slots from start to start + slots - 1 alone."""
        axis = self.k.ndim - 4
        place = axis + 2 if self.heads_first else axis + 1

        def moved(x: jax.Array) -> jax.Array:
            part = jnp.take(lax.dynamic_slice_in_dim(x, start, slots, place), rows, axis)
            return lax.dynamic_update_slice_in_dim(x, part, start, place)

        return jax.tree.map(moved, self)

    def gather(self, order: jax.Array) -> KV:
        """In row b's slot s what is in its slot order[b, s]; order [B,S]."""
        order = order[:, None, :, None] if self.heads_first else order[:, :, None, None]
        axis = self.k.ndim - (2 if self.heads_first else 3)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, order.reshape((1,) * (x.ndim - 4) + order.shape), axis), self)


class CrossKV(struct.PyTreeNode):
    """Keys and values of an encoder's tokens, computed once: k, v as in KV, positions [B,S], -1 for padding; all perhaps with a
    leading L."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    heads_first: bool = struct.field(pytree_node=False, default=False)

    @property
    def axes(self) -> CrossKV:
        axes = kv_axes(self.heads_first)
        return CrossKV(axes, axes, ("batch", None), self.heads_first)  # type: ignore[arg-type]

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    def room(self, slots: int) -> CrossKV:
        """Empty, for an encoder's output of `slots` tokens."""
        empty = lambda x, axis: jnp.zeros((*x.shape[: x.ndim + axis], slots, *x.shape[x.ndim + axis + 1 :]), x.dtype)
        axis = -2 if self.heads_first else -3
        return self.replace(k=empty(self.k, axis), v=empty(self.v, axis), positions=empty(self.positions, -1))

    def write(self, k: jax.Array, v: jax.Array, positions: jax.Array, layer: jax.Array | None) -> CrossKV:
        """Take in k, v [B,S,K,H] at positions [B,S]."""
        k, v = (swap_heads(x, self.heads_first) for x in (k, v))
        return self.replace(
            k=put_layer(self.k, k, layer), v=put_layer(self.v, v, layer), positions=put_layer(self.positions, positions, layer)
        )

    def read(self, layer: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys, values [B,S,K,H] and positions [B,S]."""
        k, v = (swap_heads(at_layer(x, layer), self.heads_first) for x in (self.k, self.v))
        return k, v, at_layer(self.positions, layer)

    def take(self, rows: jax.Array) -> CrossKV:
        return jax.tree.map(lambda x: jnp.take(x, rows, self.positions.ndim - 2), self)


class EncoderDecoderKV(struct.PyTreeNode):
    """A decoder layer's memory of its own tokens and of the encoder's."""

    own: Any
    cross: CrossKV

    @property
    def axes(self) -> EncoderDecoderKV:
        return EncoderDecoderKV(self.own.axes, self.cross.axes)

    def resize(self, slots: int) -> EncoderDecoderKV:
        """Room for `slots` tokens of the decoder."""
        return self.replace(own=self.own.resize(slots))

    def take(self, rows: jax.Array) -> EncoderDecoderKV:
        return self.replace(own=self.own.take(rows), cross=self.cross.take(rows))

    def take_slots(self, rows: jax.Array, start: jax.Array, slots: int) -> EncoderDecoderKV:
        """As KV's: rows that share all other slots have read the same encoder's output."""
        return self.replace(own=self.own.take_slots(rows, start, slots))

    def gather(self, order: jax.Array) -> EncoderDecoderKV:
        return self.replace(own=self.own.gather(order))


class Recurrent(struct.PyTreeNode):
    """What a recurrent layer carries from token to token, of a size that does not grow: `windows` [B,W,C], the last inputs of its short
    convolutions, and `state` [B,...] float32. All perhaps with a leading L. `names`: the logical axes of each window and of the state.

    Padding is for the layer to leave out: what it writes here must be what the row's real tokens made."""

    windows: tuple[jax.Array, ...]
    state: jax.Array
    names: tuple[tuple[str | None, ...], ...] = struct.field(pytree_node=False)

    @property
    def axes(self) -> Recurrent:
        return self.replace(windows=self.names[:-1], state=self.names[-1])

    def read(self, step: Any) -> tuple[tuple[jax.Array | None, ...], jax.Array | None]:
        """The windows and the state; None each where nothing was written yet."""
        if step.fresh:
            return (None,) * len(self.windows), None
        return tuple(at_layer(x, step.layer) for x in self.windows), at_layer(self.state, step.layer)

    def write(self, windows: Sequence[jax.Array], state: jax.Array, step: Any) -> Recurrent:
        put = lambda old, new: put_layer(old, new, step.layer)
        return self.replace(windows=tuple(map(put, self.windows, windows)), state=put(self.state, state))

    def resize(self, slots: int) -> Recurrent:
        return self

    def take(self, rows: jax.Array) -> Recurrent:
        axis = self.state.ndim - len(self.names[-1])
        return jax.tree.map(lambda x: jnp.take(x, rows, axis), self)


class Cache(struct.PyTreeNode):
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
        """Note the new tokens at `positions` [B,T] in the next slots; the states are updated by their layers. ValueError when the slots
        do not suffice and `index` is concrete; inside jit the caller sees to it."""
        written = 0 if isinstance(self.index, jax.core.Tracer) else int(np.asarray(self.index))
        if written + positions.shape[1] > self.slots:
            raise ValueError(
                f"no room for {positions.shape[1]} new tokens: {written} of {self.slots} slots are written; cache.resize(slots) adds more"
            )
        new = lax.dynamic_update_slice_in_dim(self.positions, positions, self.index, 1)
        return self.replace(positions=new, index=self.index + positions.shape[1], fresh=False)

    def resize(self, slots: int) -> Cache:
        """Room for `slots` slots in all; a smaller number drops the last slots."""
        layers = tuple(state.resize(slots) for state in self.layers)
        return self.replace(layers=layers, positions=resized(self.positions, slots, 1, -1), index=jnp.minimum(self.index, slots))

    def take(self, rows: jax.Array) -> Cache:
        """The rows [B'] of the batch, in that order, repeats allowed: beams, several samples of a prompt."""
        return self.replace(layers=tuple(state.take(rows) for state in self.layers), positions=self.positions[rows])

    def reorder(self, rows: jax.Array, start: jax.Array, stop: jax.Array) -> Cache:
        """`take` of as many rows [B] as there are, where row rows[b] holds what row b does in all slots but start to stop - 1: only these
        are moved, in place, and nothing where the rows stay."""
        block = MOVED if self.slots % MOVED == 0 else self.slots
        stays = (rows == jnp.arange(len(rows))).all()
        part = [i for i, state in enumerate(self.layers) if hasattr(getattr(state, "own", state), "take_slots")]
        whole = [i for i in range(len(self.layers)) if i not in part]
        layers = list(self.layers)

        def move(i: jax.Array, states: list[Any]) -> list[Any]:
            return [state.take_slots(rows, i * block, block) for state in states]

        moved = lax.fori_loop(start // block, jnp.where(stays, 0, -(-stop // block)), move, [layers[i] for i in part])
        own = lambda state: state.replace(own=state.own.take(rows)) if hasattr(state, "own") else state.take(rows)
        take = lambda states: [own(state) for state in states]  # what is read of an encoder stays: see take_slots
        taken = lax.cond(stays, lambda states: states, take, [layers[i] for i in whole])
        for i, state in zip((*part, *whole), (*moved, *taken)):
            layers[i] = state
        return self.replace(layers=tuple(layers), positions=self.positions[rows])

    @property
    def recurrent(self) -> bool:
        """Whether a layer's state cannot give back a token that it has read."""
        return any(isinstance(state, Recurrent) for state in self.layers)

    def crop(self, max_length: int) -> Cache:
        """The first max_length tokens of every row, or all but its last so many where the number is negative; slots that no row needs any
        more are free again. ValueError where a layer has lost what the shorter text sees: a window that moved on, a recurrent state."""
        now = self.lengths
        lengths = jnp.maximum(now + max_length, 0) if max_length < 0 else jnp.minimum(now, max_length)
        held = self._held(lengths)
        if held is not None and (isinstance(held, jax.core.Tracer) or not held):
            raise ValueError(
                f"layers over a window keep nothing from before it, so this cache cannot be cropped to {max_length} (inside jit, where the "
                "lengths are not known, never): keep an earlier cache, which is not used up"
            )
        kept = (self.positions >= 0) & (self.positions < lengths[:, None])
        return self.rewind(lengths, jnp.where(kept.any(0), jnp.arange(1, self.slots + 1, dtype=jnp.int32), 0).max())

    def rewind(self, lengths: jax.Array, index: jax.Array) -> Cache:
        """Without the tokens at positions lengths [B] and above (rejected drafts, what a row read after its end); `index` []: the next slot
        to write, no token is left in it or behind. Layers over a window need `spare` slots for this: ValueError where they have lost what
        the shorter text sees; inside jit, where the lengths are not known, the caller sees to it."""
        if self.recurrent:
            raise ValueError("a recurrent state cannot forget tokens: go on from a cache from before them")
        held = self._held(lengths)
        if held is not None and not isinstance(held, jax.core.Tracer) and not held:
            raise ValueError(
                "layers over a window have lost tokens that come into it again when so many are taken back: `spare(tokens)` before these "
                "are read keeps as many more, or keep an earlier cache, which is not used up"
            )
        layers = tuple(state.rewind(lengths) if hasattr(state, "rewind") else state for state in self.layers)
        return self.replace(layers=layers, positions=jnp.where(self.positions < lengths[:, None], self.positions, -1), index=index)

    def spare(self, tokens: int) -> Cache:
        """Layers over a window keep `tokens` more, so that `rewind` can take back as many."""
        wide = lambda state: state.spare(tokens, self.slots) if hasattr(state, "spare") else state
        return self.replace(layers=tuple(map(wide, self.layers)))

    def compact(self) -> Cache:
        """Every row's tokens in its first slots, none empty between them."""
        order = jnp.argsort(self.positions < 0, axis=1, stable=True)
        layers = tuple(state.gather(order) if hasattr(state, "gather") else state for state in self.layers)
        positions = jnp.take_along_axis(self.positions, order, 1)
        return self.replace(layers=layers, positions=positions, index=(positions >= 0).sum(1, dtype=jnp.int32).max())

    def _held(self, lengths: jax.Array) -> jax.Array | None:
        """bool []: whether layers over a window have what texts of lengths [B] see; None where there are no such layers."""
        held = [state.holds(lengths, self.lengths) for state in self.layers if hasattr(state, "holds")]
        return jnp.array(held).all() if held else None


class LayerSpec(Protocol):
    """What a config declares of one layer's memory."""

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> Any: ...


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """A full-attention layer with `heads` kv heads of `head_dim`; no `values` where they are made of the keys."""

    heads: int
    head_dim: int
    values: bool = True

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> KV:
        last = (self.heads, slots, self.head_dim) if heads_first else (slots, self.heads, self.head_dim)
        shape = (batch, *last) if layers is None else (layers, batch, *last)
        return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype) if self.values else None, heads_first)


@dataclasses.dataclass(frozen=True)
class SlidingKVSpec:
    """A layer that attends to the last `window` tokens, with `heads` kv heads of `head_dim`."""

    heads: int
    head_dim: int
    window: int

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> SlidingKV:
        W = min(self.window, slots)
        kv = KVSpec(self.heads, self.head_dim).init(batch, W, dtype, layers=layers, heads_first=heads_first)
        lead = () if layers is None else (layers,)
        positions, skipped = jnp.full((*lead, batch, W), -1, jnp.int32), jnp.zeros((*lead, batch), bool)
        return SlidingKV(kv.k, kv.v, positions, skipped, jnp.zeros(lead, jnp.int32), self.window, heads_first)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class RecurrentSpec:
    """A recurrent layer. `windows`: the inputs that each short convolution looks back at, their channels and the channels' logical axis;
    `state`: sizes and logical axes of what is carried in float32."""

    windows: tuple[tuple[int, int, str | None], ...]
    state: tuple[tuple[int, str | None], ...]

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> Recurrent:
        lead = (batch,) if layers is None else (layers, batch)
        windows = tuple(jnp.zeros((*lead, *window[:2]), dtype) for window in self.windows)
        names = (*(("batch", None, axis) for *_, axis in self.windows), ("batch", *(axis for _, axis in self.state)))
        return Recurrent(windows, jnp.zeros((*lead, *(size for size, _ in self.state)), jnp.float32), names)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderSpec:
    """A decoder layer of an encoder-decoder model: `own` of its self-attention, and cross-attention with `heads` kv heads of `head_dim`.
    The encoder's keys and values find room when there are any."""

    own: LayerSpec
    heads: int
    head_dim: int

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> EncoderDecoderKV:
        kv = KVSpec(self.heads, self.head_dim).init(batch, 0, dtype, layers=layers, heads_first=heads_first)
        positions = jnp.zeros((batch, 0) if layers is None else (layers, batch, 0), jnp.int32)
        own = self.own.init(batch, slots, dtype, layers=layers, heads_first=heads_first)
        return EncoderDecoderKV(own, CrossKV(kv.k, kv.v, positions, heads_first))  # type: ignore[arg-type]


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


def init_cache(model: Any, batch: int, slots: int, dtype: Any = None, implementation: Any = None) -> Cache:
    """An empty cache for `model` with `slots` slots per row; `dtype` defaults to the model's compute dtype. `implementation`: a name of
    HF's `cache_implementation`, or a QuantizedCache, SinkCache or OffloadedCache; see jaxmodels.caches."""
    from jaxmodels.caches import layer_specs

    specs = layer_specs(model.config, implementation)
    kinds = model.config.layer_kinds
    platform = jax.default_backend() if model.rules is None else model.rules.platform
    states = []
    for start, period, repeats in segments(kinds) if model.scan_layers else [(i, 1, 1) for i in range(len(kinds))]:
        for kind in kinds[start : start + period]:
            layers = None if repeats == 1 else repeats
            states.append(specs[kind].init(batch, slots, dtype or model.dtype, layers=layers, heads_first=platform != "cpu"))
    cache = Cache(tuple(states), jnp.full((batch, slots), -1, jnp.int32), jnp.int32(0), fresh=True)
    return cache if model.rules is None else lax.with_sharding_constraint(cache, cache_shardings(cache, model.rules))


def cache_shardings(cache: Cache, rules: Any) -> Cache:
    """Where every leaf of a cache, or of its shapes, lives under the rules: rows and kv heads are split, slots are not."""

    def place(leaf: Any, axes: tuple[str | None, ...]) -> Any:
        return rules.sharding((None,) * (len(leaf.shape) - len(axes)) + axes, leaf.shape)

    def places(state: Any) -> Any:
        if isinstance(state, EncoderDecoderKV):
            return EncoderDecoderKV(places(state.own), places(state.cross))
        found, kind = jax.tree.map(place, state, state.axes), getattr(state, "memory_kind", None)
        return found if kind is None else jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), found)

    layers = tuple(map(places, cache.layers))
    return cache.replace(layers=layers, positions=place(cache.positions, ("batch", None)), index=place(cache.index, ()))
