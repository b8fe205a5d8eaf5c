"""Processors that look at which tokens there are: repetition, n-grams, forbidden, forced and favoured tokens, lengths.

Where a row has padding, a processor sees its real tokens alone, so that padding changes no number (transformers' n-gram and bias
processors take pads for tokens).

Axis letters: B rows, W columns of tokens, T columns of the encoder's or the prompt's ids, V vocabulary, E token ids, Q sequences of
tokens, L tokens in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.generation.processors_base import Sequences, drop, forbid, kind, only, room


@struct.dataclass
class RepetitionPenalty:
    """Positive logits of the row's tokens are divided by `penalty`, negative ones multiplied (arXiv:1909.05858)."""

    penalty: Any
    kind: str = kind("RepetitionPenalty")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _penalize(logits, sequences.tokens, sequences.real, self.penalty)


@struct.dataclass
class HammingDiversity:
    """Subtract `diversity_penalty` for each time that `used` [B,V] says a token was chosen in this step (arXiv:1610.02424)."""

    diversity_penalty: Any
    used: Any = None
    kind: str = kind("HammingDiversity")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return logits if self.used is None else logits - self.diversity_penalty * self.used


@struct.dataclass
class EncoderRepetitionPenalty:
    """The inverse of `RepetitionPenalty`, for the encoder's input or the prompt: above 1 favours its tokens. `tokens` and `real` [B,T],
    or [B/n,T] where n rows in turn share one (beams)."""

    penalty: Any
    tokens: Any
    real: Any
    kind: str = kind("EncoderRepetitionPenalty")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _penalize(logits, _spread(self.tokens, logits), _spread(self.real, logits), 1 / self.penalty)


@struct.dataclass
class NoRepeatNGram:
    """No sequence of `size` tokens twice in a row of tokens."""

    size: Any
    kind: str = kind("NoRepeatNGram")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _forbid_ngrams(logits, sequences, sequences.tokens, sequences.real, self.size)


@struct.dataclass
class EncoderNoRepeatNGram:
    """No sequence of `size` tokens that the encoder's input or the prompt holds. `tokens` and `real` as in EncoderRepetitionPenalty."""

    size: Any
    tokens: Any
    real: Any
    kind: str = kind("EncoderNoRepeatNGram")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _forbid_ngrams(logits, sequences, _spread(self.tokens, logits), _spread(self.real, logits), self.size)


@struct.dataclass
class SequenceBias:
    """Add `bias` [Q] to the token that would complete a sequence. `sequences` [Q,L]: filled up with -1 on the left; see `of`."""

    sequences: Any
    bias: Any
    kind: str = kind("SequenceBias")

    @classmethod
    def of(cls, biases: Mapping[tuple[int, ...], float]) -> SequenceBias:
        """From {tokens: bias}; -inf forbids. Rows and columns are rounded up, so that a few more compile nothing."""
        L = room(max(map(len, biases), default=1), least=2)
        table, bias = np.full((room(len(biases)), L), -1, np.int32), np.zeros(room(len(biases)), np.float32)
        for row, (ids, value) in enumerate(biases.items()):
            table[row, L - len(ids) :], bias[row] = ids, value
        return cls(table, bias)

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        wanted = jnp.asarray(self.sequences)
        before, last = wanted[:, :-1], drop(wanted[:, -1], logits)
        tokens, real = sequences.tail(before.shape[1])
        seen = jnp.where(real, tokens, -2)[:, None]  # [B,1,L-1]
        completes = ((seen == before) | (before < 0)).all(-1)
        return logits + jnp.zeros_like(logits).at[:, last].add(jnp.where(completes, self.bias, 0), mode="drop")


@struct.dataclass
class MinLength:
    """No end-of-sequence token before `min_length` tokens, the prompt included. `eos_token_id` [E], -1 for none."""

    min_length: Any
    eos_token_id: Any
    kind: str = kind("MinLength")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return forbid(logits, self.eos_token_id, sequences.length < self.min_length)


@struct.dataclass
class MinNewTokens:
    """No end-of-sequence token before `min_new_tokens` generated ones. `eos_token_id` [E], -1 for none."""

    min_new_tokens: Any
    eos_token_id: Any
    kind: str = kind("MinNewTokens")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return forbid(logits, self.eos_token_id, sequences.new < self.min_new_tokens)


@struct.dataclass
class ForcedBOS:
    """After a single token nothing but `bos_token_id` [E], -1 for none."""

    bos_token_id: Any
    kind: str = kind("ForcedBOS")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return only(logits, self.bos_token_id, sequences.length == 1)


@struct.dataclass
class ForcedEOS:
    """The last of `max_length` tokens, the prompt included, is one of `eos_token_id` [E], -1 for none."""

    max_length: Any
    eos_token_id: Any
    kind: str = kind("ForcedEOS")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return only(logits, self.eos_token_id, sequences.length == self.max_length - 1)


@struct.dataclass
class SuppressTokens:
    """Never one of `tokens` [E], -1 for none."""

    tokens: Any
    kind: str = kind("SuppressTokens")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return forbid(logits, self.tokens)


@struct.dataclass
class SuppressTokensAtBegin:
    """None of `tokens` [E], -1 for none, as generated token number `at`, from 0."""

    tokens: Any
    at: Any
    kind: str = kind("SuppressTokensAtBegin")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return forbid(logits, self.tokens, sequences.new == self.at)


@struct.dataclass
class ExponentialDecayLength:
    """After `start` generated tokens the ends' logits x [E] become x + |x| (factor^n - 1) at the n-th one more."""

    start: Any
    factor: Any
    eos_token_id: Any
    kind: str = kind("ExponentialDecayLength")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        ids = drop(self.eos_token_id, logits)
        found = logits.at[:, ids].get(mode="fill", fill_value=0)
        over = jnp.reshape(jnp.maximum(sequences.new - self.start, 0), (-1, 1))
        raised = found + jnp.where(jnp.isfinite(found), jnp.abs(found) * (jnp.power(self.factor, over) - 1), 0)
        return logits.at[:, ids].set(raised, mode="drop")


@struct.dataclass
class RemoveInvalid:
    """nan becomes 0; infinities the largest and smallest finite values."""

    kind: str = kind("RemoveInvalid")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return jnp.nan_to_num(logits)


def bad_words(bad_words_ids: Any, eos_token_id: Any) -> SequenceBias:
    """None of the sequences of tokens; an end-of-sequence token alone is not forbidden."""
    ends = {(int(n),) for n in np.atleast_1d(eos_token_id)}
    return SequenceBias.of({tuple(ids): -np.inf for ids in bad_words_ids if tuple(ids) not in ends})


def sequence_biases(biases: Any) -> dict[tuple[int, ...], float]:
    """{tokens: bias} of HF's two forms, that one and [[tokens, bias], …]."""
    pairs = biases.items() if isinstance(biases, Mapping) else biases
    return {tuple(ids): float(value) for ids, value in pairs}


def _penalize(logits: jax.Array, tokens: jax.Array, real: jax.Array, penalty: Any) -> jax.Array:
    """Logits of the real ones among tokens [B,W], divided by the penalty if positive, else multiplied."""
    rows = jnp.arange(logits.shape[0])[:, None]
    ids = jnp.where(real, tokens, logits.shape[1])  # behind the vocabulary nothing is read or written
    found = logits.at[rows, ids].get(mode="fill", fill_value=0)
    return logits.at[rows, ids].set(jnp.where(found < 0, found * penalty, found / penalty), mode="drop")


def _forbid_ngrams(logits: jax.Array, sequences: Sequences, tokens: jax.Array, real: jax.Array, size: Any) -> jax.Array:
    """-inf where the next token would complete an n-gram of `size` among the real ones of tokens [B,W]."""
    B, W = tokens.shape
    ids = jnp.where(real, tokens, -1)

    def narrow(back: Any, found: jax.Array) -> jax.Array:
        """found [B,W]: the column's n-gram so far agrees; now also the token `back` before its last one."""
        at = jnp.maximum(sequences.width - back, 0)
        last = lax.dynamic_slice_in_dim(sequences.tokens, at, 1, 1)
        there = lax.dynamic_slice_in_dim(sequences.real, at, 1, 1) & (sequences.width >= back)
        before = jnp.where(jnp.arange(W) >= back, jnp.roll(ids, back, 1), -1)
        return found & there & (before == last)

    found = lax.fori_loop(1, jnp.asarray(size), narrow, real)
    rows = jnp.arange(B)[:, None]
    return logits.at[rows, jnp.where(found, tokens, logits.shape[1])].set(-jnp.inf, mode="drop")


def _spread(values: Any, logits: jax.Array) -> jax.Array:
    """[B/n,T] to [B,T]: every row n times in turn."""
    return jnp.repeat(jnp.asarray(values), logits.shape[0] // len(values), 0)
