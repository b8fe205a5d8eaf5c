"""`use_cache=False`: no keys or values are kept; the model reads the whole text again for every new token.

Axis letters: B rows, S slots, T new tokens, E tokens of an encoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.cache import Cache


class Transcript(struct.PyTreeNode):
    """In the place of a cache's states: the tokens [B,S], and of an encoder-decoder what the encoder reads, ids and reality [B,E]."""

    ids: jax.Array
    source: tuple[jax.Array, jax.Array] | None

    @property
    def axes(self) -> Transcript:
        return Transcript(*jax.tree.map(lambda x: ("batch", None), (self.ids, self.source)))

    def take(self, rows: jax.Array) -> Transcript:
        return jax.tree.map(lambda x: x[rows], self)


def transcript(batch: int, slots: int, source: tuple[jax.Array, jax.Array] | None) -> Cache:
    """An empty one, as a cache whose slots are those of the text."""
    states = (Transcript(jnp.zeros((batch, slots), jnp.int32), source),)
    return Cache(states, jnp.full((batch, slots), -1, jnp.int32), jnp.int32(0))


def written(cache: Cache, tokens: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array, Cache]:
    """With tokens [B,T] where `real`: all of the text [B,S], and which of it is real."""
    positions = jnp.where(real, cache.lengths[:, None] + jnp.cumsum(real, 1, dtype=jnp.int32) - 1, -1)
    (state,), after = cache.layers, cache.advance(positions)
    ids = lax.dynamic_update_slice_in_dim(state.ids, tokens, cache.index, 1)
    return ids, after.positions >= 0, after.replace(layers=(state.replace(ids=ids),))


def recomputes(cache: Any) -> bool:
    return isinstance(cache.layers[0], Transcript)
