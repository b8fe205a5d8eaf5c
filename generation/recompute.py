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


def recomputes(cache: Cache) -> bool:
    """Whether it is a transcript: the text is read again in every step."""
    return isinstance(cache.layers[0], Transcript)


def reread(model: Any, params: Any, cache: Cache, tokens: jax.Array, real: jax.Array, **options: Any) -> tuple[Any, Cache]:
    """The model's output for the whole text with tokens [B,T] where `real`, the newest column last; and the text."""
    positions = jnp.where(real, cache.lengths[:, None] + jnp.cumsum(real, 1, dtype=jnp.int32) - 1, -1)
    after = cache.advance(positions)
    ids = lax.dynamic_update_slice_in_dim(cache.layers[0].ids, tokens, cache.index, 1)
    turned = lambda x: jnp.roll(x, -after.index, 1)
    inputs = _inputs(turned(ids), turned(after.positions >= 0), "decoder_" if model.config.is_encoder_decoder else "")
    source = cache.layers[0].source
    inputs |= {} if source is None else _inputs(source[0], source[1], "")
    return model.apply({"params": params}, **inputs, **options), after.replace(layers=(Transcript(ids, source),))


def _inputs(ids: jax.Array, real: jax.Array, prefix: str) -> dict[str, jax.Array]:
    return {f"{prefix}input_ids": jnp.where(real, ids, 0), f"{prefix}attention_mask": real}
