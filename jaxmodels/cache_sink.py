"""Attention to the first tokens of a row and to its newest ones, for streams without end (arXiv:2309.17453).

A query at position p sees the first n tokens and the last window - n, its own among them, as if these stood side by side: where tokens
between were dropped, the first ones are turned to right before the others. Rotation counts differences alone, so it is they that turn, not
the window.

Axis letters: B batch, S slots of the window, T new tokens, n first tokens, N query heads, K kv heads, H head dim, L stacked layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.cache import KVSpec, LayerSpec, SlidingKV, SlidingKVSpec
from jaxmodels.ops.attention import attention, visible
from jaxmodels.ops.rope import rope_table, rotate
from jaxmodels.ops.slots import at_layer, kv_axes, put_layer, swap_heads


@dataclasses.dataclass(frozen=True)
class SinkCache:
    """HF 4's SinkCache: full-attention layers see window_length tokens, of which the first num_sink_tokens of the row are always among
    them. For models with rotary positions, or none."""

    window_length: int = 256
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.num_sink_tokens < self.window_length:
            raise ValueError(
                f"num_sink_tokens={self.num_sink_tokens} of window_length={self.window_length}: expected at least 1, and less than all"
            )

    def layer_spec(self, spec: LayerSpec) -> LayerSpec:
        return SinkKVSpec(spec, self) if isinstance(spec, KVSpec) and spec.values else spec


@dataclasses.dataclass(frozen=True)
class SinkKVSpec:
    """The full-attention layer `full`, attending to the first and the newest tokens."""

    full: KVSpec
    cache: SinkCache

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> SinkKV:
        W, n = self.cache.window_length, self.cache.num_sink_tokens
        first = self.full.init(batch, n, dtype, layers=layers, heads_first=heads_first)
        ring = SlidingKVSpec(self.full.heads, self.full.head_dim, W - n).init(batch, slots, dtype, layers=layers, heads_first=heads_first)
        return SinkKV(first.k, first.v, ring, n)  # type: ignore[arg-type]


class SinkKV(struct.PyTreeNode):
    """Keys, not rotated, and values of the first `sinks` tokens of each row, [B,n,K,H] in KV's layout and perhaps with a leading L; and the
    newest tokens."""

    k: jax.Array
    v: jax.Array
    ring: SlidingKV
    sinks: int = struct.field(pytree_node=False)

    @property
    def axes(self) -> SinkKV:
        axes = kv_axes(self.ring.heads_first)
        return SinkKV(axes, axes, self.ring.axes, self.sinks)  # type: ignore[arg-type]

    @property
    def window(self) -> int:
        return self.ring.window + self.sinks

    def update(self, k: jax.Array, v: jax.Array, step: Any) -> tuple:
        raise ValueError("this model places its keys itself; the sink cache is for those whose layers call jaxmodels.layers.attend")

    def take_in(self, k: jax.Array, rotated: jax.Array, v: jax.Array, step: Any) -> tuple[SinkKV, jax.Array, jax.Array, jax.Array]:
        """Note k, v [B,T,K,H]; also returns keys, values [B,S,K,H] and positions [B,S] of the window, the first tokens left out."""
        first = jnp.equal(step.positions[:, None], jnp.arange(self.sinks)[:, None])  # [B,n,T]

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            chosen = jnp.take_along_axis(new, first.argmax(-1)[..., None, None], 1).astype(old.dtype)
            before = swap_heads(at_layer(old, step.layer), self.ring.heads_first)
            return put_layer(old, swap_heads(jnp.where(first.any(-1)[..., None, None], chosen, before), self.ring.heads_first), step.layer)

        ring, keys, values, positions = self.ring.update(rotated, v, step)
        return SinkKV(write(self.k, k), write(self.v, v), ring, self.sinks), keys, values, jnp.where(positions < self.sinks, -1, positions)

    def read(self, layer: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Keys, values [B,n,K,H] and positions [B,n] of the first tokens."""
        k, v = (swap_heads(at_layer(x, layer), self.ring.heads_first) for x in (self.k, self.v))
        places = jnp.arange(self.sinks)
        return k, v, jnp.where(places <= at_layer(self.ring.positions, layer).max(1, keepdims=True), places, -1)

    def resize(self, slots: int) -> SinkKV:
        return self.replace(ring=self.ring.resize(slots))

    def spare(self, tokens: int, slots: int) -> SinkKV:
        return self.replace(ring=self.ring.spare(tokens, slots))

    def rewind(self, lengths: jax.Array) -> SinkKV:
        return self.replace(ring=self.ring.rewind(lengths))

    def holds(self, lengths: jax.Array, now: jax.Array) -> jax.Array:
        return self.ring.holds(lengths, now)

    def take(self, rows: jax.Array) -> SinkKV:
        pick = lambda x: jnp.take(x, rows, self.ring.next.ndim)
        return self.replace(k=pick(self.k), v=pick(self.v), ring=self.ring.take(rows))


def attend_to_sinks(q: jax.Array, k: jax.Array, v: jax.Array, state: SinkKV, step: Any, rope: Any, **options: Any) -> tuple:
    """q [B,T,N,H] and k not yet rotated, v [B,T,K,H] -> out [B,T,N,H], the state with k and v, the weights or None."""
    if step.rope is None or options.get("bias") is not None or (rope is not None and rope.late):
        raise ValueError(
            "the sink cache moves tokens to other positions by turning keys: this model's positions are not rotary, or its rotation "
            "depends on a row's length; choose another cache_implementation"
        )
    T, positions = q.shape[1], step.positions
    options |= {"implementation": step.attention, "rules": step.rules}

    def turned(x: jax.Array, at: jax.Array) -> jax.Array:
        if rope is None:
            return x
        return rotate(x, rope_table(rope.frequencies, rope.scale, at, rope.new[0].dtype), rope.interleaved)

    plain = lambda x: x if rope is None else rotate(x, rope.new, rope.interleaved)
    near = plain(q)
    state, keys, values, k_positions = state.take_in(k, plain(k), v, step)
    if step.fresh and state.window >= T:
        return _with_state(attention(near, plain(k), v, positions, positions, **options), state)
    first, first_values, places = state.read(step.layer)
    values = jnp.concatenate([first_values, values], 1)
    if T == 1:
        dropped = jnp.maximum(positions - (state.window - 1), 0)
        places = jnp.where(places >= 0, places + dropped, -1)
        keys = jnp.concatenate([turned(first, places), keys], 1)
        near_ones = jnp.where(k_positions > positions - state.ring.window, k_positions, -1)  # a spare ring holds more
        k_positions = jnp.concatenate([places, near_ones], 1)
        return _with_state(attention(near, keys, values, positions, k_positions, **options), state)
    # every query has the first tokens elsewhere: two rotations of it side by side, one for either kind of key
    far = turned(q, jnp.clip(positions, 0, state.window - 1))
    H = q.shape[-1]
    wide = lambda x, before, after: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))
    both = jnp.concatenate([wide(turned(first, places), H, 0), wide(keys, 0, H)], 1)
    seen = [visible(positions, places), visible(positions, k_positions, state.ring.window)]
    bias = jnp.where(jnp.concatenate(seen, -1), 0, jnp.finfo(jnp.float32).min)  # [B,1,T,n+S]
    k_positions = jnp.concatenate([places, k_positions], 1)
    options["scale"] = H**-0.5 if options.get("scale") is None else options["scale"]
    out = attention(jnp.concatenate([near, far], -1), both, values, positions, k_positions, bias=bias, **options)
    return _with_state(out, state)


def _with_state(found: tuple, state: SinkKV) -> tuple:
    return found[0], state, found[1]
