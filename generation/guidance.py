"""Classifier-free guidance (arXiv:2306.17806): the model reads the prompt and a negative prompt side by side, as twice the rows.

Axis letters: B rows, T tokens read, S cache slots, P the prompt's bucket, V vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.cache import Cache
from jaxmodels.generation.processors_base import Sequences, kind
from jaxmodels.model import check_ids


class GuidedCache(Cache, kw_only=True):
    """A cache of 2B rows: B that are continued, then the same after the negative prompt, whose newest logits are `unconditional` [B,V]."""

    unconditional: jax.Array

    def plain(self) -> Cache:
        return Cache(self.layers, self.positions, self.index, self.fresh)

    def conditional(self) -> Cache:
        return self.plain().take(jnp.arange(len(self.unconditional)))

    def take(self, rows: jax.Array) -> GuidedCache:
        return _guided(self.plain().take(self._both(rows)), self.unconditional[rows])

    def reorder(self, rows: jax.Array, start: jax.Array, stop: jax.Array) -> GuidedCache:
        return _guided(self.plain().reorder(self._both(rows), start, stop), self.unconditional[rows])

    def _both(self, rows: jax.Array) -> jax.Array:
        return jnp.concatenate([rows, rows + len(self.unconditional)])


@struct.dataclass
class Guidance:
    """Log-probabilities p after the prompt and u after the negative prompt become u + scale (p - u)."""

    scale: Any
    kind: str = kind("Guidance")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        if sequences.unconditional is None:
            raise ValueError("guidance compares two prompts: the sequences hold no unconditional logits [B,V]")
        unconditional = jax.nn.log_softmax(sequences.unconditional)
        return self.scale * (jax.nn.log_softmax(logits) - unconditional) + unconditional


def guided(forward: Any) -> Any:
    """`forward(tokens [B,T], real [B,T], cache)` that also takes a GuidedCache: the same tokens follow both prompts."""

    def both(tokens: jax.Array, real: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        if not isinstance(cache, GuidedCache):
            return forward(tokens, real, cache)
        logits, new = forward(jnp.concatenate([tokens, tokens]), jnp.concatenate([real, real]), cache.plain())
        return logits[: len(tokens)], _guided(new, logits[len(tokens) :])

    return both


def read_both(forward: Any, prompt: tuple[jax.Array, jax.Array], negative: tuple[Any, Any], cache: Cache) -> tuple[jax.Array, GuidedCache]:
    """The logits [B,V] after the prompt and the cache; prompt and negative: ids and whether they are real, [B,P] each."""
    ids, real = (jnp.concatenate([a, jnp.asarray(b)]) for a, b in zip(prompt, negative))
    logits, cache = forward(ids, real, cache)
    return logits[: len(prompt[0])], _guided(cache, logits[len(prompt[0]) :])


def negative_prompt(ids: Any, real: Any, negative_ids: Any, mask: Any, vocab_size: int, cache: Cache | None) -> tuple[Any, Any]:
    """ids [B,T'] and whether they are real of the negative prompt; without one each row's last real token of ids [B,T]."""
    if cache is not None:
        raise ValueError("guidance_scale needs the whole conversation as input_ids: a cache holds nothing of the negative prompt")
    xp: Any = jnp if isinstance(ids, jax.core.Tracer) or isinstance(negative_ids, jax.core.Tracer) else np
    if negative_ids is None:
        last = ids.shape[1] - 1 - real[:, ::-1].argmax(1)
        return xp.take_along_axis(ids, last[:, None], 1), xp.ones((len(ids), 1), bool)
    negative_ids = xp.asarray(negative_ids)
    real = xp.ones(negative_ids.shape, bool) if mask is None else xp.asarray(mask) != 0
    if negative_ids.ndim != 2 or len(negative_ids) != len(ids) or real.shape != negative_ids.shape:
        raise ValueError(
            f"negative_prompt_ids have shape {negative_ids.shape} and their mask {real.shape}; expected [B,T'] with B = {len(ids)}"
        )
    check_ids(xp.where(real, negative_ids, 0), vocab_size)
    return negative_ids.astype(np.int32), real


def _guided(cache: Cache, unconditional: jax.Array) -> GuidedCache:
    return GuidedCache(cache.layers, cache.positions, cache.index, cache.fresh, unconditional=unconditional)
