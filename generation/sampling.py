"""Greedy decoding and sampling: one token per row and step.

A strategy is a pytree whose values are traced. It turns logits into the next state and says nothing about prompts, buckets,
chunks or streams, which are the loop's; another strategy is another class with the Protocol's methods.

Axis letters: B rows, R rows of the result, T tokens read, S cache slots, W columns of tokens, N steps, V vocabulary,
E end-of-sequence ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.cache import Cache
from jaxmodels.generation.guidance import GuidedCache
from jaxmodels.generation.processors import LogitsProcessor, Sequences, kind

Forward = Callable[[jax.Array, jax.Array, Cache], tuple[Any, Cache]]
BLOCK = 128


@struct.dataclass
class State:
    """What a step of decoding hands to the next. `finished` [B]; `scores` and `logits` [N,B,V] float32 where asked for; `extra`: what
    else the strategy remembers; `prompt`: of beams, the states after the prompt of the layers that cannot take tokens back."""

    sequences: Sequences
    cache: Cache
    finished: jax.Array
    scores: jax.Array | None
    logits: jax.Array | None
    extra: Any = None
    prompt: Any = None

    @property
    def steps(self) -> jax.Array:
        """The columns of new tokens that are complete, [] int32: rows that are finished wait for nothing."""
        new, waits = self.sequences.new, ~self.finished
        if jnp.ndim(new) == 0:
            return new
        return jnp.where(waits.any(), jnp.where(waits, new, jnp.iinfo(jnp.int32).max).min(), new.max())

    def process(self, processors: tuple[LogitsProcessor, ...], logits: jax.Array) -> jax.Array:
        """The logits [B,V] after all processors."""
        sequences = self.sequences
        if isinstance(self.cache, GuidedCache):
            sequences = dataclasses.replace(sequences, unconditional=self.cache.unconditional)
        for processor in processors:
            logits = processor(sequences, logits)
        return logits


@struct.dataclass
class Result:
    """What a strategy would return now: the `new` columns of tokens and real [R,W] from column `first` on.

    `last`: the newest token of each row of the cache and whether it is real, [B] each, for a next turn; all new tokens [R,N] where the
    cache's rows are not those of the result. `sequences_scores` [R] and `beam_indices` [R,N] as HF defines them, of beams. `assistance`:
    see Assistance."""

    tokens: jax.Array
    real: jax.Array
    first: jax.Array
    new: jax.Array
    last: tuple[jax.Array, jax.Array]
    sequences_scores: jax.Array | None = None
    beam_indices: jax.Array | None = None
    assistance: Any = None


def reader(model: Any, params: Any, source: tuple[jax.Array, jax.Array] | None = None) -> Callable[..., Any]:
    """`read(tokens [B,T], real [B,T], cache, **options) -> output` of the model, whatever stands in padding. `source` [B,S]: what an
    encoder reads, and which of it is real; later steps find it in the cache."""
    names = ("input_ids", "attention_mask")
    clean = lambda ids, real: (jnp.where(real, ids, 0), real)  # whatever stands in padding, it must not make nan
    encoder = {} if source is None else dict(zip(names, clean(*source)))
    prefix = "decoder_" if model.config.is_encoder_decoder else ""

    def read(tokens: jax.Array, real: jax.Array, cache: Cache, **options: Any) -> Any:
        inputs = {prefix + name: x for name, x in zip(names, clean(tokens, real))}
        return model.apply({"params": params}, **encoder, **inputs, cache=cache, **options)

    return read


class Strategy(Protocol):
    """How next tokens are chosen: a pytree of static and traced options, whose methods the jitted loop calls."""

    hidden_states: ClassVar[bool]  # whether `look` needs the model's

    @property
    def copies(self) -> int:
        """Rows of the state for each row of the prompt."""
        ...

    def look(self, model: Any, params: Any, out: Any) -> Any:
        """What `start` and `step` want to know of the model's output: the last logits [B,V] float32, or a pytree with rows first of which
        they are the first leaf."""
        ...

    def start(self, state: State, seen: Any) -> State:
        """The state with its first new tokens, from what `look` saw of the prompt."""
        ...

    def step(self, forward: Forward, state: State) -> State:
        """One step on: `forward(tokens [B,T], real [B,T], cache) -> (what `look` sees, cache)` and a choice."""
        ...

    def done(self, state: State) -> jax.Array:
        """Whether nothing is left to do, bool []."""
        ...

    def result(self, state: State) -> Result: ...


@struct.dataclass
class Sampling:
    """The most probable token where `key` is None, else one drawn in proportion to the processed probabilities.

    `eos_token_id` [E], -1 for none. A row draws from (key, step, row) alone, whatever its batch mates are."""

    processors: tuple[LogitsProcessor, ...]
    eos_token_id: Any
    pad_token_id: Any
    key: jax.Array | None
    copies: int = struct.field(pytree_node=False, default=1)
    kind: str = kind("Sampling")
    hidden_states: ClassVar[bool] = False

    def look(self, model: Any, params: Any, out: Any) -> Any:
        return last_logits(out)

    def start(self, state: State, seen: Any) -> State:
        return self.choose(state, seen, seen)

    def choose(self, state: State, logits: jax.Array, raw: jax.Array) -> State:
        """The state with one more token a row by the logits [B,V]; `raw` are those that are recorded as the model's."""
        sequences = state.sequences
        scores = state.process(self.processors, logits)
        chosen = argmax(scores) if self.key is None else draw(jax.random.fold_in(self.key, sequences.new), scores)
        real = ~state.finished
        tokens = jnp.where(real, chosen, self.pad_token_id)
        longer = sequences.append(tokens, real)
        return dataclasses.replace(
            state,
            sequences=longer,
            finished=state.finished | (tokens[:, None] == self.eos_token_id).any(-1) | longer.stopped(),
            scores=record(state.scores, scores, sequences.new),
            logits=record(state.logits, raw, sequences.new),
        )

    def step(self, forward: Forward, state: State) -> State:
        seen, cache = forward(*state.sequences.last(), state.cache)
        return self.start(dataclasses.replace(state, cache=cache), seen)

    def done(self, state: State) -> jax.Array:
        return state.finished.all()

    def result(self, state: State) -> Result:
        s = state.sequences
        token, real = s.last()
        return Result(s.tokens, s.real, s.width - s.new, s.new, (token[:, 0], real[:, 0]))


def last_logits(out: Any) -> jax.Array:
    """[B,V] float32."""
    return out.logits[:, -1].astype(jnp.float32)


def record(records: jax.Array | None, new: jax.Array, step: jax.Array) -> jax.Array | None:
    """records [N,B,V] with `new` [B,V] at `step`; None where nothing is recorded."""
    return None if records is None else lax.dynamic_update_index_in_dim(records, new, step, 0)


def argmax(x: jax.Array) -> jax.Array:
    """int32 [B], the first of the largest of each row [B,V], a nan counting as largest. Two plain reductions are several times
    faster than jnp.argmax on CPU."""
    V = x.shape[-1]
    best = (x == x.max(-1, keepdims=True)) | jnp.isnan(x)
    return jnp.where(best, jnp.arange(V, dtype=jnp.int32), V).min(-1)


def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
    """int32 [B]: a token of each row of logits [B,V] in proportion to exp(logits). Row b's draw depends on (key, b) and its logits."""
    return draw_at(uniforms(_each(key, logits)), logits)


def draw_at(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    """int32 [B]: the token of each row of logits [B,V] that a number [B] from 0 to 1 chooses, a longer part of them the likelier it is.

    Two short cumulative sums, over blocks and within one: noise for every logit takes ten times as long."""
    blocks = _blocks(logits)
    return _draw(uniform, blocks, blocks.sum(-1))


def uniforms(keys: jax.Array) -> jax.Array:
    """A number from 0 to 1 of every row's key and place, [B]."""
    return jax.vmap(lambda key, row: jax.random.uniform(jax.random.fold_in(key, row)))(keys, jnp.arange(len(keys)))


def draw_some(key: jax.Array, logits: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """n tokens of each row of logits [B,V] drawn as by `draw`, one after the other, none twice: their logits [B,n] and places [B,n]
    int32. Where fewer than n have a probability above 0, the logits of the rest are -2e9."""
    rows, blocks = jnp.arange(len(logits)), _blocks(logits)

    def one(left: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        blocks, sums = left
        place = _draw(uniforms(_each(key, logits)), blocks, sums)
        block = place // BLOCK
        there = blocks[rows, block, place % BLOCK] > 0
        blocks = blocks.at[rows, block, place % BLOCK].set(0)
        return (blocks, sums.at[rows, block].set(blocks[rows, block].sum(-1))), (jnp.where(there, logits[rows, place], -2e9), place)

    _, (values, places) = lax.scan(one, (blocks, blocks.sum(-1)), jax.random.split(key, n))
    return values.T, places.T


def _each(key: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.broadcast_to(key, (len(logits), *key.shape))


def _blocks(logits: jax.Array) -> jax.Array:
    """exp(logits), the largest 1, in blocks [B,n,BLOCK]."""
    B, V = logits.shape
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)


def _draw(uniform: jax.Array, blocks: jax.Array, sums: jax.Array) -> jax.Array:
    target = uniform * sums.sum(-1)
    block, before = _passes(sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    return block * BLOCK + _passes(inside, target - before)[0]


def _passes(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per row of [B,n]: the positive weight where the running sum first exceeds target [B], else the last one; and the sum before it."""
    total = jnp.cumsum(weights, -1)
    n, index = weights.shape[1], jnp.arange(weights.shape[1], dtype=jnp.int32)
    first = jnp.where((total > target[:, None]) & (weights > 0), index, n).min(-1)
    last = jnp.where(weights > 0, index, 0).max(-1)
    at = jnp.where(first < n, first, last)
    return at, jnp.where(at > 0, jnp.take_along_axis(total, jnp.maximum(at - 1, 0)[:, None], 1)[:, 0], 0)
