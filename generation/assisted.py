"""Assisted decoding: something cheap drafts the next tokens and the model checks them all in one step (arXiv:2211.17192).

Every row of a batch takes as many drafts as are right for it. Rows are held by their newest token (`Ragged`), the cache's slots by their
positions: what a row rejects is emptied, and where rows leave too many slots empty, their tokens move together.

Axis letters: B rows, K drafts, T = K + 1 columns that are checked, S cache slots, W columns of tokens, N steps, V vocabulary,
P columns of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.cache import Cache
from jaxmodels.generation.processors_base import LogitsProcessor, Sequences, kind
from jaxmodels.generation.sampling import Forward, Result, State, argmax, draw_at, uniforms

ACCEPTS, DRAFTS = 0xFFFFFFFE, 0xFFFFFFFF  # what a key is folded with to accept drafts and to draw them; tokens take their number


@struct.dataclass
class Ragged(Sequences):
    """Sequences whose rows grow by themselves: the newest token of each is in the last column, `length` and `new` are [B]."""

    @classmethod
    def begin(cls, sequences: Sequences) -> Ragged:
        B, W = sequences.tokens.shape
        last = lambda x: jnp.roll(x, W - sequences.width, 1)
        each = lambda x: jnp.full(B, x, jnp.int32)
        return cls(
            last(sequences.tokens), last(sequences.real), jnp.int32(W), each(sequences.length), each(sequences.new), sequences.followers
        )

    def append(self, tokens: jax.Array, real: jax.Array) -> Ragged:
        """One more token in the rows where `real`, [B] each."""
        grown = lambda whole, new: jnp.where(real[:, None], jnp.concatenate([whole[:, 1:], new[:, None]], 1), whole)
        followers = tuple(follower.append(tokens, real) for follower in self.followers)
        return Ragged(grown(self.tokens, tokens), grown(self.real, real), self.width, self.length + real, self.new + real, followers)


@struct.dataclass
class Drafts:
    """`tokens` [B,K], of which a row's first `counts` [B] are meant, int32. `logits` [B,K,V] float32: what they were drawn by, after the
    processors; None where nobody asks. `cache`: of a draft model that has read the row's newest token and its drafts."""

    tokens: Any
    counts: Any
    logits: jax.Array | None = None
    cache: Cache | None = None


class Memory(struct.PyTreeNode):
    """What a draft model has read of a conversation: nothing to another model."""

    cache: Cache
    model: Any = struct.field(pytree_node=False)

    def take(self, rows: jax.Array) -> Memory:
        return self.replace(cache=self.cache.take(rows))


@struct.dataclass
class Progress:
    """What goes on beside the state. `memory`: the draft model's; `num` [B]: drafts a row asks for next; `given`: drafts from the host.
    `rounds` []; `drafted` and `accepted` [B]: tokens so far."""

    memory: Memory | None
    num: jax.Array
    given: Drafts | None
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array

    def roomy(self, columns: int) -> Progress:
        if self.memory is None:
            return self
        return dataclasses.replace(self, memory=self.memory.replace(cache=roomy(self.memory.cache, columns)))


@struct.dataclass
class Assistance:
    """How assisted decoding went: `rounds` [] steps of the model, `drafted` and `accepted` [B] tokens, and `num_assistant_tokens` [B], what
    a schedule has made of it; int32."""

    rounds: Any
    drafted: Any
    accepted: Any
    num_assistant_tokens: Any


class Drafter(Protocol):
    """What makes drafts, and what it carries from round to round: a Progress."""

    @property
    def columns(self) -> int:
        """T: one more than the most drafts of a round."""
        ...

    def begin(self, ids: jax.Array, real: jax.Array, source: Any, memory: Any, slots: int, chunk: int | None) -> Progress:
        """After the prompt [B,P] and, of an encoder-decoder, what its encoder reads; `memory`: of an earlier turn; `chunk`: see
        in_chunks."""
        ...

    def propose(self, assisted: Assisted, state: State, live: jax.Array) -> tuple[Drafts, State]:
        """Drafts for the rows that are `live` [B]."""
        ...

    def settle(self, extra: Progress, tokens: jax.Array, kept: jax.Array, drafts: Drafts) -> Progress:
        """`extra` of before a round that kept the first `kept` [B] of tokens [B,T]."""
        ...


@struct.dataclass
class Assisted:
    """Greedy decoding where `key` is None, else sampling, of at most `limit` new tokens, with drafts by `drafter`. `positions`: how many
    the model has learned, None for any number.

    Greedy tokens are those of Sampling, and so are sampled ones where drafts come without logits: they are right where they are what is
    drawn anyway. Drafts with logits q are accepted with probability min(1, p / q), else a token is drawn from max(p - q, 0): tokens are
    distributed as p. `weight`: None, or below 1 that of p in what drafts are held against, q having the rest (arXiv:2604.07622)."""

    processors: tuple[LogitsProcessor, ...]
    eos_token_id: Any
    pad_token_id: Any
    key: jax.Array | None
    limit: Any
    weight: Any
    drafter: Any
    positions: Any = None
    kind: str = kind("Assisted")
    hidden_states: ClassVar[bool] = False
    copies: ClassVar[int] = 1

    def look(self, model: Any, params: Any, out: Any) -> jax.Array:
        """[B,V] of the prompt, [B,T,V] of what is checked."""
        logits = out.logits.astype(jnp.float32)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def start(self, state: State, seen: jax.Array) -> State:
        state = dataclasses.replace(state, sequences=Ragged.begin(state.sequences), cache=state.cache.spare(self.drafter.columns))
        B = len(state.finished)
        return self._check(state, seen[:, None], Drafts(jnp.zeros((B, 0), jnp.int32), jnp.zeros(B, jnp.int32)), ~state.finished)

    def step(self, forward: Forward, state: State) -> State:
        T = self.drafter.columns
        live = ~state.finished & (state.sequences.new < self.limit)
        state = dataclasses.replace(state, cache=roomy(state.cache, T), extra=state.extra.roomy(T))
        drafts, state = self.drafter.propose(self, state, live)
        tokens = jnp.concatenate([state.sequences.last()[0], drafts.tokens], 1)
        real = live[:, None] & (jnp.arange(T) <= drafts.counts[:, None])
        logits, cache = _forward(forward, tokens, real, state.cache)
        checked = self._check(state, logits, drafts, live)
        kept = checked.sequences.new - state.sequences.new
        extra = self.drafter.settle(state.extra, tokens, kept, drafts)
        return dataclasses.replace(checked, cache=settle(forward, state.cache, cache, tokens, kept), extra=extra)

    def _check(self, state: State, logits: jax.Array, drafts: Drafts, live: jax.Array) -> State:
        """Append to every live row the drafts that the logits [B,T,V] confirm and one token more."""
        padded, rows = jnp.pad(drafts.tokens, ((0, 0), (0, 1))), jnp.arange(len(live))

        def body(carry: Any) -> Any:
            i, state, live = carry
            at = lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
            raw, draft, proposed = at(logits), at(padded), i < drafts.counts
            scores = state.process(self.processors, raw)
            q = None if drafts.logits is None or not drafts.logits.shape[1] else at(drafts.logits)
            token, confirmed = self._choose(scores, draft, proposed, q, state.sequences.new)
            longer = state.sequences.append(token, live)
            ends = live & ((token[:, None] == self.eos_token_id).any(-1) | longer.stopped())
            place = jnp.where(live, state.sequences.new, jnp.iinfo(jnp.int32).max)
            note = lambda records, new: None if records is None else records.at[place, rows].set(new, mode="drop")
            state = dataclasses.replace(
                state,
                sequences=longer,
                finished=state.finished | ends,
                scores=note(state.scores, scores),
                logits=note(state.logits, raw),
            )
            return i + 1, state, live & proposed & confirmed & ~ends & (longer.new < self.limit)

        return lax.while_loop(lambda carry: carry[2].any(), body, (jnp.int32(0), state, live))[1]

    def _choose(self, scores: jax.Array, draft: jax.Array, proposed: jax.Array, q: jax.Array | None, new: jax.Array) -> tuple:
        """The next token [B] after processed scores [B,V], and whether it is the draft [B]."""
        if q is not None:
            q = jax.nn.softmax(q)
            return self._greedy(scores, draft, proposed, q) if self.key is None else self._speculate(scores, draft, proposed, q, new)
        token = argmax(scores) if self.key is None else self.draw(scores, new)
        return token, token == draft

    def _greedy(self, scores: jax.Array, draft: jax.Array, proposed: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = self.weight * jax.nn.softmax(scores) + (1 - self.weight) * q
        token = jnp.where(proposed, argmax(mixed), argmax(scores))
        return token, token == draft

    def _speculate(self, scores: jax.Array, draft: jax.Array, proposed: jax.Array, q: jax.Array, new: jax.Array) -> tuple:
        p = jax.nn.softmax(scores)
        of = lambda x: jnp.take_along_axis(x, draft[:, None], 1)[:, 0]
        ratio = of(p) / of(q)
        if self.weight is not None:
            ratio = 1 - self.weight + self.weight * ratio
        accepted = proposed & (uniforms(self.keys(new, ACCEPTS)) < ratio)
        left = jnp.maximum(p - jnp.where(proposed[:, None], q, 0), 0)
        left = jnp.where((left > 0).any(1, keepdims=True), left, p)  # p is q: nothing is ever left over, rounding aside
        return jnp.where(accepted, draft, self.draw(jnp.log(left), new)), accepted

    def room(self, state: State) -> jax.Array:
        """For how many drafts rows have room [B]: one token more is chosen, and nothing is read behind the last learned position, since
        what is read there is nan and stays so in its slot when it is taken back."""
        left = self.limit - state.sequences.new - 1
        return left if self.positions is None or state.cache is None else jnp.minimum(left, self.positions - state.cache.lengths - 1)

    def draw(self, logits: jax.Array, new: jax.Array, salt: int | None = None) -> jax.Array:
        """A token of each row [B,V], token number new [B]."""
        return draw_at(uniforms(self.keys(new, salt)), logits)

    def keys(self, new: jax.Array, salt: int | None = None) -> jax.Array:
        key: Any = self.key
        return jax.vmap(jax.random.fold_in, (None, 0))(key if salt is None else jax.random.fold_in(key, salt), new)

    def done(self, state: State) -> jax.Array:
        return (state.finished | (state.sequences.new >= self.limit)).all()

    def result(self, state: State) -> Result:
        """New tokens from the first column on, with pad_token_id after a row's end; the model has read all but the newest."""
        s, extra = state.sequences, state.extra
        W = s.tokens.shape[1]
        real = jnp.arange(W) < s.new[:, None]
        begun = jnp.take_along_axis(s.tokens, (jnp.arange(W) - s.new[:, None]) % W, 1)
        assistance = Assistance(extra.rounds, extra.drafted, extra.accepted, extra.num)
        unread = jnp.ones(len(real), bool)
        tokens = jnp.where(real, begun, self.pad_token_id)
        return Result(tokens, real, jnp.int32(0), s.new.max(), (s.last()[0][:, 0], unread), assistance=assistance)


def _forward(forward: Forward, tokens: jax.Array, real: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits [B,T,V] after the real ones of tokens [B,T]. Where no row has a draft, one column is read, to a CPU a third of the work."""

    def first(cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = forward(tokens[:, :1], real[:, :1], cache)
        return jnp.pad(logits[:, None], ((0, 0), (0, tokens.shape[1] - 1), (0, 0))), cache

    return lax.cond(real[:, 1:].any(), lambda cache: forward(tokens, real, cache), first, cache)


def roomy(cache: Cache, columns: int) -> Cache:
    """The cache with room for so many more columns. A row alone leaves no slots empty and always has it."""
    if len(cache.positions) == 1:
        return cache
    full = cache.index + columns > cache.slots
    return lax.fori_loop(0, full.astype(jnp.int32), lambda _, cache: cache.compact(), cache)  # a cond would copy the cache


def settle(read: Callable[..., Any], before: Cache, after: Cache, tokens: jax.Array, kept: jax.Array) -> Cache:
    """The cache that has read the first kept [B] of tokens [B,T] since `before`; `after` has read more of them."""
    index = before.index + kept.max()
    if before.recurrent:  # what such a layer has read stays read
        return read(tokens, jnp.arange(tokens.shape[1]) < kept[:, None], before)[1].replace(index=index)
    return after.rewind(before.lengths + kept, index)
