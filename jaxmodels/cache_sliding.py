"""The memory of a layer that looks back over a window: a ring of each row's last tokens.

Axis letters: B batch, W window, S slots, T new tokens, K kv heads, H head dim, L stacked layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.ops.slots import at_layer, kv_axes, put_layer, swap_heads


class SlidingKV(struct.PyTreeNode):
    """Keys and values of the last W real tokens of each row, a ring whose column `next` is overwritten next.

    k, v as in KV with S = W slots; positions [B,W]; skipped [B]: rows that have seen padding since the ring was last put in order,
    whose oldest token may not be at `next`; next []. All perhaps with a leading L."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    skipped: jax.Array
    next: jax.Array
    window: int = struct.field(pytree_node=False)
    heads_first: bool = struct.field(pytree_node=False, default=False)

    @property
    def axes(self) -> SlidingKV:
        axes = kv_axes(self.heads_first)
        return self._with(axes, axes, ("batch", None), ("batch",), ())  # type: ignore[arg-type]

    def update(self, k: jax.Array, v: jax.Array, step: Any) -> tuple[SlidingKV, jax.Array, jax.Array, jax.Array]:
        """Take in k, v [B,T,K,H]; also returns keys, values [B,S,K,H] and positions [B,S] of what the new tokens may see."""
        if k.shape[1] == 1 and not step.fresh:
            state = self._turn(k, v, step)
            return (state, *state._tokens(step.layer))
        k, v, positions = k.astype(self.k.dtype), v.astype(self.v.dtype), step.positions
        if not step.fresh:
            pairs = zip(self._tokens(step.layer), (k, v, positions))
            k, v, positions = (jnp.concatenate(pair, 1) for pair in pairs)
        return self._fill(k, v, positions, step.layer), k, v, positions

    def _tokens(self, layer: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        k, v = (swap_heads(at_layer(x, layer), self.heads_first) for x in (self.k, self.v))
        return k, v, at_layer(self.positions, layer)

    def _fill(self, k: jax.Array, v: jax.Array, positions: jax.Array, layer: jax.Array | None) -> SlidingKV:
        """The newest W real tokens of k, v [B,T,K,H] at positions [B,T], oldest first."""
        missing = max(0, self.positions.shape[-1] - positions.shape[1])
        k, v = (jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0))) for x in (k, v))
        positions = jnp.pad(positions, ((0, 0), (missing, 0)), constant_values=-1)
        newest = jnp.argsort(positions, 1)[:, -self.positions.shape[-1] :]
        k, v = (swap_heads(jnp.take_along_axis(x, newest[..., None, None], 1), self.heads_first) for x in (k, v))
        new = (k, v, jnp.take_along_axis(positions, newest, 1), jnp.zeros(len(newest), bool), jnp.int32(0))
        old = (self.k, self.v, self.positions, self.skipped, self.next)
        return self._with(*(put_layer(a, b, layer) for a, b in zip(old, new)))

    def _with(self, *leaves: jax.Array) -> SlidingKV:
        k, v, positions, skipped, next = leaves
        return SlidingKV(k, v, positions, skipped, next, self.window, self.heads_first)

    def _turn(self, k: jax.Array, v: jax.Array, step: Any) -> SlidingKV:
        """One token a row, in place. A row whose token is padding keeps what it has."""
        real, layer = step.positions[:, 0] >= 0, step.layer
        late = jnp.any(at_layer(self.skipped, layer) & real)  # a row goes on after padding: only then its columns are out of order
        state = lax.cond(late, lambda state: state._fill(*state._tokens(layer), layer), lambda state: state, self)
        column = at_layer(state.next, layer)

        def write(ring: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            start, shape = [jnp.int32(0)] * new.ndim, new.shape
            start[axis] = column
            if layer is not None:
                start, shape = [layer, *start], (1, *shape)
            old = lax.dynamic_slice(ring, start, shape).reshape(new.shape)
            new = jnp.where(real.reshape(-1, *(1,) * (new.ndim - 1)), new.astype(ring.dtype), old)
            return lax.dynamic_update_slice(ring, new.reshape(shape), start)

        axis = 2 if self.heads_first else 1
        return self._with(
            write(state.k, swap_heads(k, self.heads_first), axis),
            write(state.v, swap_heads(v, self.heads_first), axis),
            write(state.positions, step.positions, 1),
            put_layer(state.skipped, at_layer(state.skipped, layer) | ~real, layer),
            put_layer(state.next, (column + 1) % self.positions.shape[-1], layer),
        )

    def resize(self, slots: int) -> SlidingKV:
        """Room for the newest min(window, slots) tokens."""
        if self.next.ndim:
            return jax.vmap(lambda state: state.resize(slots))(self)
        W = min(self.window, slots)
        k, v, positions = self._tokens(None)
        heads, B = k.shape[2:], len(positions)
        shapes = [(B, heads[0], W, heads[1]) if self.heads_first else (B, W, *heads)] * 2
        empty = self._with(*(jnp.zeros(s, x.dtype) for s, x in zip(shapes, (k, v))), jnp.full((B, W), -1), self.skipped, self.next)
        return empty._fill(k, v, positions, None)

    def spare(self, tokens: int, slots: int) -> SlidingKV:
        """Room for `tokens` more than the window: as many can be taken back. In a cache of so many slots."""
        return self.replace(window=self.window + tokens).resize(slots).replace(window=self.window)

    def rewind(self, lengths: jax.Array) -> SlidingKV:
        """Without what is at positions lengths [B] and above."""
        gone = self.positions >= lengths[:, None]
        return self._with(self.k, self.v, jnp.where(gone, -1, self.positions), self.skipped | gone.any(-1), self.next)

    def holds(self, lengths: jax.Array, now: jax.Array) -> jax.Array:
        """bool []: whether `rewind` from lengths `now` [B] leaves every row the whole window."""
        oldest = jnp.where(self.positions < 0, now[:, None], self.positions).min(-1)
        return ((lengths >= now) | (oldest <= jnp.maximum(lengths - self.window, 0))).all()

    def take(self, rows: jax.Array) -> SlidingKV:
        axis = self.next.ndim
        pick = lambda x: jnp.take(x, rows, axis)
        return self._with(pick(self.k), pick(self.v), pick(self.positions), pick(self.skipped), self.next)
