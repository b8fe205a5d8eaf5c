"""Contrastive search (arXiv:2202.06417), as transformers 4.45 has it.

The model reads the `top_k` likeliest next tokens of every row at once, each in a row of its own; the one that is likely and whose hidden
state resembles none before is chosen, and its column of the cache is copied to the others.

Axis letters: B rows, K candidates, T tokens read, W columns of tokens, D hidden, V vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.generation.processors import LogitsProcessor, kind
from jaxmodels.generation.processors_filter import largest
from jaxmodels.generation.sampling import Forward, Result, State, last_logits, record


@struct.dataclass
class Read:
    """What the model makes of what it has read: the last logits [B,V] and hidden states [B,T,D] of length 1, float32."""

    logits: jax.Array
    hidden: jax.Array


@struct.dataclass
class ContrastiveSearch:
    """Of the `copies` likeliest tokens that with the largest (1 - penalty_alpha) p - penalty_alpha s: p its probability, s the largest
    cosine between its hidden state and one before it in this call. A step reads the candidates, so the cache has read the newest token."""

    processors: tuple[LogitsProcessor, ...]
    eos_token_id: Any
    pad_token_id: Any
    penalty_alpha: Any
    copies: int = struct.field(pytree_node=False)
    kind: str = kind("ContrastiveSearch")
    hidden_states: ClassVar[bool] = True

    def look(self, model: Any, params: Any, out: Any) -> Read:
        states = (out.decoder_hidden_states if model.config.is_encoder_decoder else out.hidden_states)[-1].astype(jnp.float32)
        return Read(last_logits(out), states / jnp.linalg.norm(states, axis=-1, keepdims=True))

    def start(self, state: State, seen: Read) -> State:
        """No token yet: the first one needs its candidates read. One row of each prompt stays, its cache in `copies` rows."""
        K, W = self.copies, state.sequences.tokens.shape[1]
        one = jax.tree.map(lambda x: x[::K], seen)
        context = jnp.pad(one.hidden, ((0, 0), (0, W - one.hidden.shape[1]), (0, 0)))
        scores, logits = (None if x is None else x[:, ::K] for x in (state.scores, state.logits))
        sequences = state.sequences.take(jnp.arange(0, len(state.finished), K))
        return State(sequences, state.cache, state.finished[::K], scores, logits, Read(one.logits, context))

    def step(self, forward: Forward, state: State) -> State:
        sequences, B, K = state.sequences, len(state.finished), self.copies
        scores = state.process(self.processors, state.extra.logits)
        top, ids = largest(scores, K)
        real = ~state.finished
        seen: Any
        seen, cache = forward(ids.reshape(-1, 1), jnp.repeat(real, K)[:, None], state.cache)
        hidden = seen.hidden.reshape(B, K, -1)
        cosines = jnp.where(sequences.real[:, None], jnp.einsum("bkd,bwd->bkw", hidden, state.extra.hidden), -jnp.inf)
        p = jnp.exp(top - jax.nn.logsumexp(scores, -1, keepdims=True))
        best = ((1 - self.penalty_alpha) * p - self.penalty_alpha * cosines.max(-1)).argmax(1)
        rows = jnp.arange(B) * K + best
        tokens = jnp.where(real, jnp.take_along_axis(ids, best[:, None], 1)[:, 0], self.pad_token_id)
        longer = sequences.append(tokens, real)
        context = lax.dynamic_update_slice_in_dim(state.extra.hidden, seen.hidden[rows], sequences.width, 1)
        return dataclasses.replace(
            state,
            sequences=longer,
            cache=cache.reorder(jnp.repeat(rows, K), cache.index - 1, cache.index),
            finished=state.finished | (tokens[:, None] == self.eos_token_id).any(-1) | longer.stopped(),
            scores=record(state.scores, scores, sequences.new),
            logits=record(state.logits, state.extra.logits, sequences.new),
            extra=Read(seen.logits[rows], context),
        )

    def done(self, state: State) -> jax.Array:
        return state.finished.all()

    def result(self, state: State) -> Result:
        s = state.sequences
        token, _ = s.last()
        return Result(s.tokens, s.real, s.width - s.new, s.new, (token[:, 0], jnp.zeros(len(token), bool)))
