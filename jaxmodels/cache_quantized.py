"""Keys and values in few bits, as KIVI keeps them (arXiv:2402.02750): every group of numbers as integers above its smallest number in steps
of a scale, and the newest slots in full beside them.

A group of keys is some slots of one channel, for keys have channels that are large everywhere; one of values is channels of one slot.

Axis letters: B batch, S slots (a multiple of R), n slots of whole groups, G slots of a group, R slots kept in full, T new tokens,
K kv heads, H head dim, P bytes of H codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.cache import KVSpec, LayerSpec
from jaxmodels.ops.slots import at_layer, kv_axes, put_layer, resized, swap_heads, write_slots

BACKENDS = {"quanto": {0: False, -1: True}, "hqq": {1: False, 0: True}}  # how they call grouping by channel


@dataclasses.dataclass(frozen=True)
class QuantizedCache:
    """HF's `cache_implementation="quantized"`: full-attention layers keep keys and values in `nbits` (8, 4 or 2), beside the newest
    residual_length slots in full; layers of other kinds are small and stay as they are.

    q_group_size: numbers that share a scale, of one slot at most head_dim. axis_key and axis_value, as the backend counts them: for
    quanto 0 groups channels of a slot, -1 slots of a channel. The defaults are KIVI's, -1 for keys and 0 for values; HF's 0 and 0."""

    nbits: int = 4
    axis_key: int | None = None
    axis_value: int | None = None
    q_group_size: int = 64
    residual_length: int = 128
    backend: str = "quanto"

    def __post_init__(self) -> None:
        if self.nbits not in (8, 4, 2):
            raise ValueError(f"nbits is {self.nbits!r}; expected 8, 4 or 2")
        if self.q_group_size < 1 or self.residual_length < 1 or self.residual_length % self.q_group_size:
            raise ValueError(
                f"residual_length={self.residual_length} and q_group_size={self.q_group_size}: slots leave the residual in whole groups, "
                "so it must be a multiple of them"
            )
        axes = BACKENDS.get(self.backend.lower())
        if axes is None:
            raise ValueError(f"backend is {self.backend!r}; expected quanto or HQQ, after which axis_key and axis_value are read")
        for name in ("axis_key", "axis_value"):
            if getattr(self, name) is not None and getattr(self, name) not in axes:
                raise ValueError(f"{name} is {getattr(self, name)!r}; backend {self.backend} has {' and '.join(map(str, axes))}")

    def by_channel(self) -> tuple[bool, bool]:
        """Whether keys, and values, are grouped by channel."""
        axes = BACKENDS[self.backend.lower()]
        return axes.get(self.axis_key, True), axes.get(self.axis_value, False)  # type: ignore[arg-type]

    def layer_spec(self, spec: LayerSpec) -> LayerSpec:
        return QuantizedKVSpec(spec, self) if isinstance(spec, KVSpec) else spec


@dataclasses.dataclass(frozen=True)
class QuantizedKVSpec:
    """The full-attention layer `full` in few bits."""

    full: KVSpec
    cache: QuantizedCache

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> QuantizedKV:
        R, lead = self.cache.residual_length, () if layers is None else (layers,)
        slots = -(-slots // R) * R
        stores = [self._store((*lead, batch), slots, dtype, heads_first, by_channel) for by_channel in self.cache.by_channel()]
        columns = jnp.full((*lead, R), -1, jnp.int32)
        return QuantizedKV(stores[0], stores[1] if self.full.values else None, columns, heads_first)

    def _store(self, lead: tuple[int, ...], slots: int, dtype: Any, heads_first: bool, by_channel: bool) -> Store:
        cache, K, H = self.cache, self.full.heads, self.full.head_dim
        group = cache.q_group_size if by_channel else min(cache.q_group_size, H)
        if not by_channel and H % group:
            raise ValueError(f"q_group_size={group} does not divide the head dimension {H}; groups of one slot's channels must")
        shape = lambda slots, last: (*lead, K, slots, last) if heads_first else (*lead, slots, K, last)
        few = shape(slots // group, H) if by_channel else shape(slots, H // group)
        codes = jnp.zeros(shape(slots, -(-H * cache.nbits // 8)), jnp.uint8)
        recent = jnp.zeros(shape(cache.residual_length, H), dtype)
        return Store(codes, jnp.zeros(few, dtype), jnp.zeros(few, dtype), recent, cache.nbits, group, cache.q_group_size, by_channel)


class Store(struct.PyTreeNode):
    """Keys or values. `codes` uint8 [B,S,K,P]; `least` and `scale` of the groups, [B,S/G,K,H] by channel, else [B,S,K,H/group];
    `recent` [B,R,K,H]: slot c in place c % R. Perhaps heads before slots; perhaps with a leading L."""

    codes: jax.Array
    least: jax.Array
    scale: jax.Array
    recent: jax.Array
    nbits: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    unit: int = struct.field(pytree_node=False)  # slots that are written together
    by_channel: bool = struct.field(pytree_node=False)

    def read(self, columns: jax.Array, layer: jax.Array | None, heads_first: bool) -> jax.Array:
        """All slots [B,S,K,H], those of `columns` [R] in full."""
        codes, least, scale, recent = (
            swap_heads(at_layer(x, layer), heads_first) for x in (self.codes, self.least, self.scale, self.recent)
        )
        x = dequantize(codes, least, scale, self.nbits, self.by_channel, recent.shape[-1]).astype(recent.dtype)
        blocks = x.reshape(x.shape[0], -1, *recent.shape[1:])  # [B,S/R,R,K,H]
        full = columns == jnp.arange(x.shape[1]).reshape(-1, len(columns))  # [S/R,R]
        return jnp.where(full[None, :, :, None, None], recent[:, None], blocks).reshape(x.shape)

    def write(self, new: jax.Array, whole: jax.Array, columns: jax.Array, real: jax.Array, step: Any, heads_first: bool) -> Store:
        """With new [B,T,K,H] from slot step.index on. `whole`: all slots [B,S,K,H] with them; `columns` [R]: the slots that `recent`
        then holds; real [B,S]: slots that hold a token, others do not count in a group."""
        T, G, S = new.shape[1], self.unit, whole.shape[1]
        units = min((T + G - 2) // G + 1, S // G)  # that T slots can touch
        first = step.index // G
        start = jnp.minimum(first, S // G - units)
        cut = lambda x: lax.dynamic_slice_in_dim(x, start * G, units * G, 1)
        parts = quantize(cut(whole), cut(real), self.nbits, self.group, self.by_channel)

        def put(old: jax.Array, new: jax.Array, slots: int) -> jax.Array:
            """Units of `slots` slots; those before the first stay."""
            was = lax.dynamic_slice_in_dim(swap_heads(at_layer(old, step.layer), heads_first), start * slots, units * slots, 1)
            keep = (start + jnp.arange(units * slots) // slots < first)[:, None, None]
            return write_slots(old, jnp.where(keep, was, new.astype(old.dtype)), start * slots, heads_first, step.layer)

        few = G // self.group if self.by_channel else G
        codes, least, scale = (
            put(old, new, n) for old, new, n in zip((self.codes, self.least, self.scale), parts, (G, few, few), strict=True)
        )
        if T == 1:
            recent = write_slots(self.recent, new, step.index % len(columns), heads_first, step.layer)
        else:
            old = swap_heads(at_layer(self.recent, step.layer), heads_first)
            chosen = jnp.take(new, jnp.clip(columns - step.index, 0, T - 1), axis=1)
            kept = jnp.where((columns >= step.index)[:, None, None], chosen.astype(old.dtype), old)
            recent = put_layer(self.recent, swap_heads(kept, heads_first), step.layer)
        return self.replace(codes=codes, least=least, scale=scale, recent=recent)

    def resize(self, slots: int, heads_first: bool) -> Store:
        axis = self.codes.ndim - (2 if heads_first else 3)
        few = slots // self.group if self.by_channel else slots
        sized = lambda x, n: resized(x, n, axis)
        return self.replace(codes=sized(self.codes, slots), least=sized(self.least, few), scale=sized(self.scale, few))


class QuantizedKV(struct.PyTreeNode):
    """Keys and values of full attention in few bits; v is None where values are made of the keys. `columns` [R] int32: the slots that the
    stores hold in full, -1 for none. All perhaps with a leading L."""

    k: Store
    v: Store | None
    columns: jax.Array
    heads_first: bool = struct.field(pytree_node=False, default=False)

    @property
    def axes(self) -> QuantizedKV:
        axes = kv_axes(self.heads_first)
        named = lambda store: None if store is None else store.replace(codes=axes, least=axes, scale=axes, recent=axes)
        return QuantizedKV(named(self.k), named(self.v), (None,), self.heads_first)  # type: ignore[arg-type]

    def update(self, k: jax.Array, v: jax.Array | None, step: Any) -> tuple[QuantizedKV, jax.Array, Any, jax.Array]:
        """As KV's: the new tokens see themselves and the newest slots before them in full, older ones as their codes say."""
        T, layer, columns = k.shape[1], step.layer, at_layer(self.columns, step.layer)
        S = self.k.codes.shape[-2 if self.heads_first else -3]
        last = step.index + T - 1
        held = last - (last - jnp.arange(len(columns))) % len(columns)  # the newest slot for every place
        after = jnp.where(held >= step.index, held, columns)
        real = jnp.pad(step.key_positions, ((0, 0), (0, S - step.key_positions.shape[1])), constant_values=-1) >= 0

        def one(store: Store, new: jax.Array) -> tuple[Store, jax.Array]:
            if step.fresh:
                whole = jnp.pad(new, ((0, 0), (0, S - T), (0, 0), (0, 0)))
            else:
                whole = store.read(columns, layer, self.heads_first)
                whole = lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), step.index, 1)
            store = store.write(new, whole, after, real, step, self.heads_first)
            return store, new if step.fresh else whole[:, : step.key_positions.shape[1]]

        new_k, k = one(self.k, k)
        new_v, v = (None, None) if self.v is None else one(self.v, v)  # type: ignore[arg-type]
        return QuantizedKV(new_k, new_v, put_layer(self.columns, after, layer), self.heads_first), k, v, step.key_positions

    def resize(self, slots: int) -> QuantizedKV:
        R = self.columns.shape[-1]
        sized = lambda store: None if store is None else store.resize(-(-slots // R) * R, self.heads_first)
        return self.replace(k=sized(self.k), v=sized(self.v))

    def take(self, rows: jax.Array) -> QuantizedKV:
        axis = self.columns.ndim - 1
        return self.replace(**jax.tree.map(lambda x: jnp.take(x, rows, axis), {"k": self.k, "v": self.v}))

    def gather(self, order: jax.Array) -> QuantizedKV:
        raise ValueError("slots in few bits are rounded in groups and stay where they are: a quantized cache cannot be made compact")


def quantize(x: jax.Array, real: jax.Array, nbits: int, group: int, by_channel: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B,n,K,H] -> codes uint8 [B,n,K,P], and the groups' smallest numbers and scales in x.dtype: [B,n/group,K,H], or [B,n,K,H/group].
    Slots where real [B,n] is false get a code and do not widen their group's range."""
    B, n, K, H = x.shape
    shape, axis = ((B, n // group, group, K, H), 2) if by_channel else ((B, n, K, H // group, group), 4)
    y = x.astype(jnp.float32).reshape(shape)
    counted = real.reshape(*shape[:3], 1, 1) if by_channel else real[:, :, None, None, None]
    low = jnp.where(counted, y, jnp.inf).min(axis, keepdims=True)
    high = jnp.where(counted, y, -jnp.inf).max(axis, keepdims=True)
    some = low <= high
    low, high = jnp.where(some, low, 0).astype(x.dtype).astype(jnp.float32), jnp.where(some, high, 0)
    levels = 2**nbits - 1
    scale = ((high - low) / levels).astype(x.dtype).astype(jnp.float32)
    codes = jnp.clip(jnp.round((y - low) / jnp.where(scale == 0, 1, scale)), 0, levels).astype(jnp.uint8).reshape(x.shape)
    squeezed = lambda x, dtype: jnp.squeeze(x, axis).astype(dtype)
    return _pack(codes, nbits), squeezed(low, x.dtype), squeezed(scale, x.dtype)


def dequantize(codes: jax.Array, least: jax.Array, scale: jax.Array, nbits: int, by_channel: bool, head_dim: int) -> jax.Array:
    """float32 [B,n,K,H] of what `quantize` gives."""
    x = _unpack(codes, nbits)[..., :head_dim].astype(jnp.float32)
    B, n, K, H = x.shape
    shape, axis = ((B, least.shape[1], -1, K, H), 2) if by_channel else ((B, n, K, least.shape[-1], -1), 4)
    low, scale = (jnp.expand_dims(a.astype(jnp.float32), axis) for a in (least, scale))
    return (x.reshape(shape) * scale + low).reshape(x.shape)


def _pack(codes: jax.Array, nbits: int) -> jax.Array:
    """[...,H] -> [...,P]: byte p holds channels p, p + P, …, the first in its lowest bits."""
    per = 8 // nbits
    P = -(-codes.shape[-1] // per)
    parts = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, per * P - codes.shape[-1])]).reshape(*codes.shape[:-1], per, P)
    shifts = (jnp.arange(per, dtype=jnp.uint8) * nbits)[:, None]
    return (parts << shifts).sum(-2, dtype=jnp.uint8)


def _unpack(codes: jax.Array, nbits: int) -> jax.Array:
    parts = [codes >> i & (2**nbits - 1) for i in range(0, 8, nbits)]
    return jnp.concatenate(parts, -1)
