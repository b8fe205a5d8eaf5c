"""Beam search and beam sampling, as transformers 5 counts them.

Every row of the prompt is decoded in `num_beams` rows of the state. A step takes the best continuations of all beams of a row, moves
those that end to the row's finished hypotheses and goes on with the others. Of the cache only the columns since a row's beams last had
one ancestor are moved: older ones are equal in all of them.

Axis letters: B rows of the prompt, M beams, C candidates, N room for new tokens, V vocabulary, E end-of-sequence ids."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.generation.processors import LogitsProcessor, kind
from jaxmodels.generation.processors_filter import largest
from jaxmodels.generation.sampling import Forward, Result, State, draw_some, last_logits, record

LOW = -1e9  # the score of what is not there; added to a score, it keeps a candidate out of a choice
EARLY_STOPPING = {False: 0, True: 1, "never": 2}


@struct.dataclass
class Hypotheses:
    """Some hypotheses of every row [B,M]: new tokens and, for each, the beam it continued [B,M,N] int32 (-1: no token there), scores,
    and whether it is one at all."""

    tokens: jax.Array
    beams: jax.Array
    scores: jax.Array
    there: jax.Array

    @classmethod
    def none(cls, shape: tuple[int, int, int]) -> Hypotheses:
        empty = jnp.full(shape, -1, jnp.int32)
        return cls(empty, empty, jnp.full(shape[:2], LOW, jnp.float32), jnp.zeros(shape[:2], bool))

    def take(self, places: jax.Array) -> Hypotheses:
        """Those at places [B,M'] of each row."""
        return pick(self, places)

    def append(self, tokens: jax.Array, rows: jax.Array, scores: jax.Array, new: jax.Array) -> Hypotheses:
        """Their continuations by tokens [B,M] in column `new`, as rows [B,M] of the state, with new scores."""
        put = lambda whole, column: lax.dynamic_update_index_in_dim(whole, column.astype(whole.dtype), new, 2)
        return Hypotheses(put(self.tokens, tokens), put(self.beams, rows), scores, self.there)

    def best(self, n: int) -> Hypotheses:
        return self.take(lax.top_k(self.scores, n)[1])

    def join(self, others: Hypotheses) -> Hypotheses:
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), self, others)


def pick(tree: Any, places: jax.Array) -> Any:
    """Of every leaf [B,M,...] the places [B,M'] of each row."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), 1), tree)


@struct.dataclass
class Beams:
    """`running` [B,M] and `finished` [B,M] hypotheses; `improvable` [B,1]: a running one may still beat the finished; `going` [];
    `progress`: what else is known of the running ones; `forced`: further candidates within a step."""

    running: Hypotheses
    finished: Hypotheses
    improvable: jax.Array
    going: jax.Array
    progress: Any = None
    forced: Any = None


@struct.dataclass
class BeamSearch:
    """The likeliest continuations, by the sum of their tokens' log-probabilities over length ** length_penalty; where `key` is given, the
    candidates of a step are drawn, without replacement, in proportion to the probabilities of the continuations.

    `early_stopping`: a value of EARLY_STOPPING. `candidates`: per beam and step, at least one more than there are end-of-sequence ids.
    `columns`: room for new tokens."""

    processors: tuple[LogitsProcessor, ...]
    eos_token_id: Any
    pad_token_id: Any
    key: jax.Array | None
    length_penalty: Any
    early_stopping: Any
    max_new_tokens: Any
    copies: int = struct.field(pytree_node=False)
    returned: int = struct.field(pytree_node=False)
    candidates: int = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)
    kind: str = kind("BeamSearch")
    hidden_states: ClassVar[bool] = False

    def look(self, model: Any, params: Any, out: Any) -> jax.Array:
        return last_logits(out)

    def start(self, state: State, logits: jax.Array) -> State:
        B, M = len(logits) // self.copies, self.copies
        return self._choose(dataclasses.replace(state, extra=self._begin(B, M, state)), logits)[0]

    def _begin(self, B: int, M: int, state: State) -> Beams:
        """The beams of B rows, M each, before the first token."""
        running, finished = (Hypotheses.none((B, M, self.columns)) for _ in range(2))
        running = dataclasses.replace(running, scores=running.scores.at[:, 0].set(0))  # equal beams would stay equal
        return Beams(running, finished, jnp.ones((B, 1), bool), jnp.bool_(True))

    def step(self, forward: Forward, state: State) -> State:
        sequences, running = state.sequences, state.extra.running
        logits, cache = forward(*sequences.last(), state.cache)
        state, rows = self._choose(dataclasses.replace(state, cache=cache), logits)
        apart = (running.tokens != running.tokens[:, :1]).any((0, 1))  # [N]
        stop = cache.index
        start = jnp.where(apart.any(), stop - sequences.new + apart.argmax().astype(jnp.int32), stop)
        return dataclasses.replace(state, cache=cache.reorder(rows, start, stop))

    def _choose(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        """The state with one more token a beam, its cache as it was, and the rows [B*M] that the new beams continue."""
        sequences, new = state.sequences, state.sequences.new
        scores = state.process(self.processors, jax.nn.log_softmax(logits))
        beams = self._settle(state.extra, *self._candidates(state, state.extra, scores), new)
        rows, chosen = (x[:, :, new].reshape(-1) for x in (beams.running.beams, beams.running.tokens))
        state = dataclasses.replace(
            state,
            sequences=sequences.take(rows).append(chosen, jnp.ones(len(rows), bool)),
            scores=record(state.scores, scores, new),
            logits=record(state.logits, logits, new),
            extra=beams,
        )
        return state, rows

    def _candidates(self, state: State, beams: Beams, scores: jax.Array, first: Any = None) -> tuple[Hypotheses, jax.Array]:
        """The best continuations of each row's beams, or those drawn [B,C], and which of them end [B,C], from the log-probabilities
        scores [B*M,V]. `first` [B]: the row of each first beam."""
        sequences, new, V = state.sequences, state.sequences.new, scores.shape[1]
        B, M = beams.running.scores.shape
        totals = (scores.reshape(B, M, V) + beams.running.scores[:, :, None]).reshape(B, M * V)
        if self.key is None:
            sums, places = largest(totals, self.candidates * M)
        else:
            sums, places = draw_some(jax.random.fold_in(self.key, new), totals, self.candidates * M)
        parents, tokens = places // V, places % V
        rows = (jnp.arange(B) * M if first is None else first)[:, None] + parents
        found = beams.running.take(parents).append(tokens, rows, sums, new)
        ends = (tokens[..., None] == self.eos_token_id).any(-1)
        if sequences.followers:
            longer = sequences.take(rows.reshape(-1)).append(tokens.reshape(-1), jnp.ones(tokens.size, bool))
            ends |= longer.stopped().reshape(ends.shape)
        return found, ends

    def _settle(self, beams: Beams, found: Hypotheses, ends: jax.Array, new: jax.Array) -> Beams:
        """The beams after `found` [B,C], best first, of which `ends` end."""
        ends = ends | (new + 1 >= self.max_new_tokens)
        running = dataclasses.replace(found, scores=found.scores + ends * LOW).best(self.copies)
        finished = self._finish(beams, found, ends, new + 1)
        improvable = beams.improvable & self._improvable(running, finished, new + 1)
        full = finished.there.all() & (self.early_stopping == 1)
        return Beams(running, finished, improvable, improvable.any() & ~full & ~ends.all())

    def _finish(self, beams: Beams, found: Hypotheses, ends: jax.Array, length: jax.Array) -> Hypotheses:
        """The best of the finished hypotheses and of those among the M best candidates that end now."""
        M = self.copies
        ends = ends & (jnp.arange(ends.shape[1]) < M)
        full = beams.finished.there.all(1, keepdims=True) & (self.early_stopping == 1)
        scores = found.scores / length.astype(jnp.float32) ** self.length_penalty
        scores += (full * LOW + ~beams.improvable * LOW) + ~ends * LOW
        return beams.finished.join(dataclasses.replace(found, scores=scores, there=ends)).best(M)

    def _improvable(self, running: Hypotheses, finished: Hypotheses, length: jax.Array) -> jax.Array:
        """[B,1]: whether the best running hypothesis at its most favourable length beats the worst finished one."""
        patient = (self.early_stopping == 2) & (self.length_penalty > 0)
        length = jnp.where(patient, self.max_new_tokens, length).astype(jnp.float32)
        worst = jnp.where(finished.there, finished.scores.min(1, keepdims=True), LOW)
        return (running.scores.max(1, keepdims=True) / length**self.length_penalty > worst).any(1, keepdims=True)

    def done(self, state: State) -> jax.Array:
        return ~state.extra.going

    def result(self, state: State) -> Result:
        best = jax.tree.map(lambda x: x.reshape(-1, self.copies, *x.shape[2:]), state.extra.finished).best(self.returned)
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        real = flat(best.beams) >= 0
        tokens = jnp.where(real, flat(best.tokens), self.pad_token_id)
        new, scores, beams = real.sum(1).max(), flat(best.scores), flat(best.beams)
        return Result(tokens, real, jnp.int32(0), new, (tokens, real), sequences_scores=scores, beam_indices=beams)
