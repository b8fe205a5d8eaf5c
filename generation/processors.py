"""Logits processors: small pytree dataclasses, each usable alone as `processor(sequences, logits) -> logits`.

Their values are arrays, so another value compiles nothing; which processors there are is structure. Sorting a vocabulary takes as
long as a small model's step on CPU: thresholds are found among the largest `PREFIX` logits, and by bisection where these are not enough.

Axis letters: B rows, W columns of tokens, V vocabulary, E end-of-sequence ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

PREFIX = 128
GROUP = 32


@struct.dataclass
class Sequences:
    """The tokens of every row so far. `tokens` [B,W] int32 and `real` [B,W] bool (false: padding, or not yet written); `width` [] the
    columns written; `length` [] the tokens that HF counts, padding of the prompt included; `new` [] those that were generated."""

    tokens: jax.Array
    real: jax.Array
    width: Any
    length: Any
    new: Any

    @classmethod
    def of(cls, input_ids: Any, attention_mask: Any = None, new: int = 0) -> Sequences:
        """From input_ids [B,T], of which the last `new` columns were generated."""
        tokens = jnp.asarray(input_ids, jnp.int32)
        real = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        return cls(tokens, real, np.int32(tokens.shape[1]), np.int32(tokens.shape[1]), np.int32(new))

    def append(self, tokens: jax.Array, real: jax.Array) -> Sequences:
        """One more column, [B] each, in the room that there is."""
        put = lambda whole, column: lax.dynamic_update_slice_in_dim(whole, column[:, None].astype(whole.dtype), self.width, 1)
        return Sequences(put(self.tokens, tokens), put(self.real, real), self.width + 1, self.length + 1, self.new + 1)

    def last(self) -> tuple[jax.Array, jax.Array]:
        """The newest column: tokens [B,1] and whether they are real [B,1]."""
        get = lambda whole: lax.dynamic_slice_in_dim(whole, self.width - 1, 1, 1)
        return get(self.tokens), get(self.real)


class LogitsProcessor(Protocol):
    """A pytree that turns logits [B,V] float32 into others; -inf forbids a token. It says its `kind`, see there."""

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array: ...


def kind(name: str) -> Any:
    """A static field that names a processor's class. To jaxlib (0.10.2) the tree structures of two dataclasses with the same number of
    leaves and the same static fields are equal, whatever the classes: now and then jit would run the one's program for the other."""
    return struct.field(pytree_node=False, default=name)


@struct.dataclass
class Temperature:
    """Divide by `temperature` > 0."""

    temperature: Any
    kind: str = kind("Temperature")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return logits / self.temperature


@struct.dataclass
class TopK:
    """Keep the `top_k` largest, and what equals the smallest of them."""

    top_k: Any
    kind: str = kind("TopK")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _keep(logits, logits >= _cutoff(logits, jnp.ones_like, self.top_k))


@struct.dataclass
class TopP:
    """Keep the most probable tokens whose probabilities add up to `top_p`, at least one (arXiv:1904.09751); equal ones stay together."""

    top_p: Any
    kind: str = kind("TopP")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        top = logits.max(-1, keepdims=True)
        total = jnp.exp(logits - top).sum(-1, keepdims=True)
        return _keep(logits, (logits >= _cutoff(logits, lambda x: jnp.exp(x - top) / total, self.top_p)) | (logits == top))


@struct.dataclass
class MinP:
    """Keep the tokens at least `min_p` times as probable as the most probable one (arXiv:2407.01082)."""

    min_p: Any
    kind: str = kind("MinP")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _keep(logits, jnp.exp(logits - logits.max(-1, keepdims=True)) >= self.min_p)


@struct.dataclass
class RepetitionPenalty:
    """Positive logits of the row's tokens are divided by `penalty`, negative ones multiplied (arXiv:1909.05858)."""

    penalty: Any
    kind: str = kind("RepetitionPenalty")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        V = logits.shape[1]
        rows = jnp.arange(logits.shape[0])[:, None]
        ids = jnp.where(sequences.real, sequences.tokens, V)  # V: nothing is read or written there
        found = logits.at[rows, ids].get(mode="fill", fill_value=0)
        return logits.at[rows, ids].set(jnp.where(found < 0, found * self.penalty, found / self.penalty), mode="drop")


@struct.dataclass
class MinLength:
    """No end-of-sequence token before `min_length` tokens, the prompt included. `eos_token_id` [E], -1 for none."""

    min_length: Any
    eos_token_id: Any
    kind: str = kind("MinLength")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _forbid(logits, self.eos_token_id, sequences.length < self.min_length)


@struct.dataclass
class MinNewTokens:
    """No end-of-sequence token before `min_new_tokens` generated ones. `eos_token_id` [E], -1 for none."""

    min_new_tokens: Any
    eos_token_id: Any
    kind: str = kind("MinNewTokens")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _forbid(logits, self.eos_token_id, sequences.new < self.min_new_tokens)


def build_processors(config: Any, eos_token_id: np.ndarray) -> tuple[LogitsProcessor, ...]:
    """The processors that a filled GenerationConfig makes active, in HF's order; `eos_token_id` [E] with -1 for none."""
    inactive = lambda value, *off: not isinstance(value, jax.core.Tracer) and value in (None, *off)
    ends = bool((eos_token_id >= 0).any())
    found: list[LogitsProcessor] = []
    if not inactive(config.repetition_penalty, 1.0):
        found.append(RepetitionPenalty(_float(config.repetition_penalty)))
    if not inactive(config.min_length, 0) and ends and config.min_new_tokens is None:
        found.append(MinLength(_int(config.min_length), eos_token_id))
    if not inactive(config.min_new_tokens, 0) and ends:
        found.append(MinNewTokens(_int(config.min_new_tokens), eos_token_id))
    if config.do_sample:
        if not inactive(config.temperature, 1.0):
            found.append(Temperature(_float(config.temperature)))
        if not inactive(config.top_k, 0):
            found.append(TopK(_int(config.top_k)))
        if not inactive(config.top_p, 1.0):
            found.append(TopP(_float(config.top_p)))
        if not inactive(config.min_p):
            found.append(MinP(_float(config.min_p)))
    return tuple(found)


def _float(x: Any) -> Any:
    return x.astype(jnp.float32) if isinstance(x, jax.core.Tracer) else np.float32(x)


def _int(x: Any) -> Any:
    return x.astype(jnp.int32) if isinstance(x, jax.core.Tracer) else np.int32(x)


def _keep(logits: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, logits, -jnp.inf)


def _forbid(logits: jax.Array, ids: Any, when: jax.Array) -> jax.Array:
    """-inf at the ids [E] (those below 0 left out) while `when`."""
    ids = jnp.where(jnp.asarray(ids) < 0, logits.shape[1], jnp.asarray(ids))
    return logits.at[:, ids].min(jnp.where(when, -jnp.inf, jnp.inf), mode="drop")


def _largest(logits: jax.Array, k: int) -> jax.Array:
    """The k largest of each row [B,V] in descending order: they lie in the k groups with the largest maxima."""
    B, V = logits.shape
    if 2 * k * GROUP >= V:
        return lax.top_k(logits, min(k, V))[0]
    groups = jnp.pad(logits, ((0, 0), (0, -V % GROUP)), constant_values=-jnp.inf).reshape(B, -1, GROUP)
    best = lax.top_k(groups.max(-1), k)[1]
    return lax.top_k(jnp.take_along_axis(groups, best[:, :, None], 1).reshape(B, -1), k)[0]


def _cutoff(logits: jax.Array, weigh: Callable[[jax.Array], jax.Array], limit: Any) -> jax.Array:
    """[B,1]: the smallest x such that the logits above x weigh less than `limit` together. `weigh` acts on each logit."""
    top = _largest(logits, PREFIX)
    weights = weigh(top)
    inside = jnp.cumsum(weights, -1) - weights < limit
    quick = jnp.min(jnp.where(inside, top, jnp.inf), -1, keepdims=True)
    if top.shape[1] == logits.shape[1]:
        return quick
    enough = ~inside[:, -1] | (top.min(-1) == -jnp.inf)  # a slice of `top` would make XLA:CPU sort instead
    return lax.cond(enough.all(), lambda: quick, lambda: _bisect(logits, weigh(logits), limit))


def _bisect(logits: jax.Array, weights: jax.Array, limit: Any) -> jax.Array:
    """`_cutoff` over all logits: halving the range of their bits, which as signed integers order as the floats do."""
    flip = lambda bits: jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = flip(lax.bitcast_convert_type(logits, jnp.int32))

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # rounded down, without overflow
        light = jnp.where(bits > middle, weights, 0).sum(-1, keepdims=True) < limit
        return jnp.where(light, low, middle + 1), jnp.where(light, middle, high)

    ends = bits.min(-1, keepdims=True), bits.max(-1, keepdims=True)
    return lax.bitcast_convert_type(flip(lax.fori_loop(0, 32, halve, ends)[1]), jnp.float32)
