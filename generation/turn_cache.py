"""The cache that `generate` returns, and takes to go on.

Axis letters: B rows, N new tokens, U tokens that the model has not read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.cache import KV, Cache
from jaxmodels.cache_offloaded import OffloadedKV
from jaxmodels.generation.assisted import Memory
from jaxmodels.generation.guidance import GuidedCache
from jaxmodels.generation.sampling import State


class TurnCache(Cache, kw_only=True):
    """A cache after `generate`. The model has not read each row's newest token, `token` [B], where `unread` [B] is true: the next
    `generate` with this cache does so first, a loop of one's own must. After beam search nothing of the answer is read: both [B,N].
    `memory`: what a draft model has read."""

    token: jax.Array
    unread: jax.Array
    memory: Memory | None = None

    def advance(self, positions: jax.Array) -> Cache:
        return self.plain().advance(positions)  # whoever calls the model decides what it reads

    def take(self, rows: jax.Array) -> TurnCache:
        taken = self.plain().take(rows)
        return turn(taken, self.token[rows], self.unread[rows], None if self.memory is None else self.memory.take(rows))

    def crop(self, max_length: int) -> Cache:
        return self.plain().crop(max_length)  # of what was read: the newest token goes in any case

    def plain(self) -> Cache:
        return Cache(self.layers, self.positions, self.index)


def turn(cache: Cache, token: jax.Array, unread: jax.Array, memory: Memory | None = None) -> TurnCache:
    """The cache for a next turn, whose newest token of each row the model has not read where `unread`, [B] or [B,U] both."""
    return TurnCache(cache.layers, cache.positions, cache.index, token=token, unread=unread, memory=memory)


def columns(x: jax.Array) -> jax.Array:
    """[B,U] of [B,U] or [B]."""
    return x[:, None] if x.ndim == 1 else x


def conditional(cache: Cache) -> Cache:
    """The prompt's own cache, without the one that guidance reads beside it."""
    return cache.conditional() if isinstance(cache, GuidedCache) else cache


def takes_back(state: Any) -> bool:
    """Whether tokens that a layer has read leave no trace when their slots are emptied."""
    return isinstance(getattr(state, "own", state), KV | OffloadedKV)


def before_beams(state: State, B: int, rows: int) -> Cache:
    """What `rows` results of B prompts have in common: the cache as it was after the prompt."""
    cache = conditional(state.cache)
    beams, copies, read = len(cache.positions) // B, rows // B, state.sequences.new - 1
    of_beams, of_prompts = (jnp.repeat(jnp.arange(0, n, step), copies) for n, step in ((B * beams, beams), (B, 1)))
    states = tuple(now.take(of_beams) if then is None else then.take(of_prompts) for now, then in zip(cache.layers, state.prompt))
    positions = cache.positions[of_beams]
    positions = jnp.where(positions < (positions.max(1, keepdims=True) + 1 - read), positions, -1)
    return cache.replace(layers=states, positions=positions, index=cache.index - read)
