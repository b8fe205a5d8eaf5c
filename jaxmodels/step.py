"""What one forward pass hands to every layer, and how a layer turns, remembers and attends with it.

Axis letters: B batch, T new tokens, S cache slots, D hidden, N query heads, K kv heads, H head dim, R the part of it that turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.cache import Cache
from jaxmodels.cache_sink import SinkKV, attend_to_sinks
from jaxmodels.ops.attention import attention
from jaxmodels.ops.rope import RopeParameters, inverse_frequencies, rope_table, rotate


class Rope(struct.PyTreeNode):
    """cos and sin [B,T,1,R] for the new tokens; with a cache also their frequencies [R/2]. Where these change with a row's length,
    [B,R/2], keys are `late`: cached unrotated and turned when they are read. That makes attention over a cache exact; what a second layer
    cached before the frequencies changed still comes from a first layer under the old ones, so there cached = uncached while they stay."""

    new: tuple[jax.Array, jax.Array]
    frequencies: jax.Array | None
    late: bool = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False, default=1.0)
    interleaved: bool = struct.field(pytree_node=False, default=False)  # pairs are (2i, 2i + 1)


class Packed(struct.PyTreeNode):
    """In the place of an attention_mask: rows that hold several documents one after the other. segment_ids [B,T] int: 0 for padding,
    another number than its neighbours' for each document. Every document has positions from 0 and sees itself alone."""

    segment_ids: jax.Array


class Source(struct.PyTreeNode):
    """What a decoder reads: an encoder's output [B,S,D] for tokens at positions [B,S], -1 for padding."""

    hidden: jax.Array
    positions: jax.Array


class Step(struct.PyTreeNode):
    """What one forward pass hands to every layer."""

    positions: jax.Array  # [B,T], -1 for padding
    key_positions: jax.Array  # [B,S] with the new tokens; S = T without a cache or into a fresh one
    index: jax.Array | None = None  # the cache slot of the first new token
    packed: jax.Array | None = (
        None  # [B,T] where rows hold several documents: positions so far apart that a window of T keeps them separate
    )
    rope: Any = None  # Rope, or what else the family's layers look up by position
    source: Source | None = None  # of cross-attention; None where the cache holds its keys and values
    layer: jax.Array | None = None  # the place in stacked states, None when a state is one layer's
    number: Any = 0  # the layer's place among all, an int or traced
    fresh: bool = struct.field(pytree_node=False, default=False)  # the cache held nothing: new keys are all keys
    dtype: Any = struct.field(pytree_node=False, default=None)  # of the computation, where x may have another
    rules: Any = struct.field(pytree_node=False, default=None)
    attention: str | None = struct.field(pytree_node=False, default=None)
    early_exit: int | None = struct.field(pytree_node=False, default=None)  # the first layer that does not run
    output_hidden_states: bool = struct.field(pytree_node=False, default=False)
    output_attentions: bool = struct.field(pytree_node=False, default=False)
    output_router_logits: bool = struct.field(pytree_node=False, default=False)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return x if self.rules is None else self.rules.constrain(x, axes)

    def lookup(self, position_ids: jax.Array | None, size: int | None = None) -> jax.Array:
        """Rows [B,T] of a table of learned positions; padding reads the first, which no token sees. ValueError for concrete positions
        beyond `size` rows; traced ones cannot be looked at, and read nan."""
        rows = jnp.maximum(self.positions if position_ids is None else jnp.broadcast_to(position_ids, self.positions.shape), 0)
        if size is not None and rows.size and not isinstance(rows, jax.core.Tracer) and rows.is_fully_addressable and rows.max() >= size:
            raise ValueError(f"a token is at position {int(rows.max())}, and the model has learned {size} positions, from 0")
        return rows

    def make_rope(self, rope: RopeParameters, head_dim: int, position_ids: jax.Array | None, dtype: Any, interleaved: bool = False) -> Rope:
        """The rotation of this step; `position_ids` [B,T] turn by other positions than the masks compare. `dtype`: of cos and sin."""
        if rope.length_dependent and self.packed is not None:
            raise ValueError(
                f"rope type {rope.rope_type!r} turns by a row's length; packed rows have several: give every document its own row"
            )
        turned = self.positions if position_ids is None else jnp.broadcast_to(position_ids, self.positions.shape)
        lengths = self.key_positions.max(1) + 1 if position_ids is None else turned.max(1) + 1
        frequencies, scale = inverse_frequencies(rope, head_dim, lengths)
        late = rope.length_dependent and self.index is not None
        kept = None if self.index is None else frequencies
        return Rope(rope_table(frequencies, scale, turned, dtype), kept, late, scale, interleaved)


def begin(
    shape: tuple[int, int], attention_mask: jax.Array | Packed | None, cache: Cache | None, **static: Any
) -> tuple[Step, Cache | None]:
    """The step for [B,T] new tokens and the cache with their positions noted (its states not yet written)."""
    B, T = shape
    if isinstance(attention_mask, Packed):
        return _begin_packed(shape, attention_mask.segment_ids, cache, **static), None
    real = jnp.ones((B, T), bool)
    if attention_mask is not None:
        columns = attention_mask.shape[-1]
        if attention_mask.shape != (B, columns) or columns < T or (cache is None and columns > T):
            raise ValueError(f"attention_mask has shape {attention_mask.shape}; expected {(B, T)}, 1 for real tokens and 0 for padding")
        real = attention_mask[:, -T:].astype(bool)  # HF's loops pass the whole history's mask; the cache knows the rest
    seen = 0 if cache is None else cache.lengths[:, None]
    positions = jnp.where(real, seen + jnp.cumsum(real, 1, dtype=jnp.int32) - 1, -1)
    if cache is None:
        return Step(positions, positions, **static), None
    after = cache.advance(positions)
    keys = positions if cache.fresh else after.positions
    return Step(positions, keys, cache.index, fresh=cache.fresh, **static), after


def _begin_packed(shape: tuple[int, int], ids: jax.Array, cache: Cache | None, **static: Any) -> Step:
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids are {ids.dtype} {ids.shape}; expected integers {shape}, 0 for padding and a number per document")
    if cache is not None:
        raise ValueError("packed rows cannot be continued from a cache: give every document its own row")
    T = shape[1]
    columns, real = jnp.arange(T), ids > 0
    starts = real & (ids != jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1])
    begun = jax.lax.cummax(jnp.where(starts, columns, 0), axis=1)
    positions = jnp.where(real, columns - begun, -1)
    return Step(positions, positions, packed=jnp.where(real, columns + T * jnp.cumsum(starts, 1), -1), **static)


def remember(q: jax.Array, k: jax.Array, v: Any, state: Any, step: Step, rope: Rope | None = None) -> tuple:
    """Rotate q [B,T,N,H] and k [B,T,K,H] and write k and v to the state -> q, all keys [B,S,K,H] and values and their positions [B,S],
    the state."""
    late = rope is not None and rope.late
    if rope is not None:
        q = rotate(q, rope.new, rope.interleaved)
        k = k if late else rotate(k, rope.new, rope.interleaved)
    k_positions = step.key_positions
    if state is not None:
        state, k, v, k_positions = state.update(k, v, step)
    if late:
        table = rope_table(rope.frequencies, rope.scale, k_positions, k.dtype)  # type: ignore[union-attr,arg-type]
        k = rotate(k, table, rope.interleaved)  # type: ignore[union-attr]
    return q, k, v, k_positions, state


def attend(q: jax.Array, k: jax.Array, v: jax.Array, state: Any, step: Step, rope: Rope | None = None, **options: Any) -> tuple:
    """Rotate, remember, attend: q [B,T,N,H], k and v [B,T,K,H] -> out [B,T,N*H], the state with k and v, the weights or None.

    options: those of jaxmodels.ops.attention.attention, such as scale and window."""
    if isinstance(state, SinkKV):
        out, state, weights = attend_to_sinks(q, k, v, state, step, rope, **options)
        weights = weights if step.output_attentions else None
    else:
        q, k, v, k_positions, state = remember(q, k, v, state, step, rope)
        out, weights = look(q, k, v, k_positions, step, **options)
    return out.reshape(*out.shape[:2], -1), state, weights


def look(q: jax.Array, k: jax.Array, v: jax.Array, k_positions: jax.Array, step: Step, **options: Any) -> tuple:
    """Attention of the step's queries over keys at positions [B,S] -> out [B,T,N,H], the weights or None."""
    positions = step.positions
    if step.packed is not None:
        positions, k_positions, T = step.packed, step.packed, q.shape[1]
        options["window"] = min(options.get("window") or T, T)
    out, weights = attention(q, k, v, positions, k_positions, implementation=step.attention, rules=step.rules, **options)
    return out, weights if step.output_attentions else None


def cross_attend(q: jax.Array, project: Callable[[jax.Array], tuple], state: Any, step: Step, **options: Any) -> tuple:
    """q [B,T,N,H] attends to the encoder's tokens: out [B,T,N*H], the state with their keys and values, the weights or None.

    `project`: hidden [B,S,D] -> k, v [B,S,K,H], called and remembered where the step has a source; otherwise the state's count."""
    if step.source is None:
        k, v, positions = state.read(step.layer)
    else:
        (k, v), positions = project(step.source.hidden), step.source.positions
        state = None if state is None else state.write(k, v, positions, step.layer)
    options = {"causal": False, "implementation": step.attention, "rules": step.rules, **options}
    out, weights = attention(q, k, v, step.positions, positions, **options)
    return out.reshape(*out.shape[:2], -1), state, weights if step.output_attentions else None
