"""Universal assisted decoding: the assistant has a tokenizer of its own, and reads what was said as text, on the host between two rounds.

Greedy drafts go back through text, too. Sampled ones are tokens that both vocabularies have, for these have probabilities in both
(arXiv:2502.05202).

Axis letters: B rows, K drafts, P a bucket of the assistant's tokens, V the model's vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.cache import Cache, SlidingKV
from jaxmodels.generation.assisted import Assisted, Drafts, Memory, Progress, Ragged
from jaxmodels.generation.drafts import DraftModel, count, progress, scheduled
from jaxmodels.generation.inputs import bucket
from jaxmodels.generation.processors_base import Sequences, kind
from jaxmodels.generation.sampling import Result, State
from jaxmodels.generation.vocabulary import token_bytes


@struct.dataclass
class Given:
    """Drafts that the host puts into the state's `extra.given`; `num` of the assistant's tokens at first. `logits`: V, where the drafts
    come with theirs."""

    num: Any
    columns: int = struct.field(pytree_node=False)
    heuristic: bool = struct.field(pytree_node=False)
    logits: int | None = struct.field(pytree_node=False)
    kind: str = kind("Given")

    def begin(self, ids: jax.Array, real: jax.Array, source: Any, memory: Any, slots: int, chunk: int | None) -> Progress:
        B, K = len(ids), self.columns - 1
        logits = None if self.logits is None else jnp.zeros((B, K, self.logits), jnp.float32)
        return progress(self.num, B, given=Drafts(jnp.zeros((B, K), jnp.int32), jnp.zeros(B, jnp.int32), logits))

    def propose(self, assisted: Assisted, state: State, live: jax.Array) -> tuple[Drafts, State]:
        given, room = state.extra.given, jnp.maximum(assisted.room(state), 0)
        return dataclasses.replace(given, counts=jnp.where(live, jnp.clip(given.counts, 0, room), 0)), state

    def settle(self, extra: Progress, tokens: jax.Array, kept: jax.Array, drafts: Drafts) -> Progress:
        num = scheduled(extra.num, kept, drafts, self.columns - 1) if self.heuristic else extra.num
        return count(extra, kept, drafts, num=num)


@struct.dataclass
class SharedWords(DraftModel):
    """A DraftModel that drafts tokens of the vocabulary [V] of the model that checks, those that `words` [V] has a token of its own for;
    -1 where there is none. `newest` [B]: the last of its own tokens for what was said."""

    words: Any = None
    newest: Any = None
    kind: str = kind("SharedWords")

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def follow(self, i: jax.Array, sequences: Any, going: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        token = jnp.where(i == 0, self.newest, self.words[sequences.last()[0][:, 0]])
        seen, cache = self._read(token[:, None], going[:, None], cache)
        return jnp.where(self.words >= 0, seen[:, self.words], -jnp.inf), cache


def shared_words(target: Any, assistant: Any, sizes: tuple[int, int]) -> np.ndarray:
    """For every token [V] of one tokenizer that of the other with the same bytes, -1 for none; `sizes` of the models' vocabularies."""
    theirs = {text: token for token, text in reversed([*enumerate(token_bytes(assistant)[: sizes[1]])]) if text}
    own = token_bytes(target)[: sizes[0]]
    return np.array([*(theirs.get(text, -1) for text in own), *[-1] * (sizes[0] - len(own))], np.int32)


class Reencoder:
    """Drafts [B,K] for what a batch says so far, by an assistant that reads other tokens."""

    def __init__(
        self, drafter: DraftModel, assisted: Assisted, tokenizers: tuple[Any, Any], lookbehind: tuple[int, int],
        rows: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        """`assisted`: how drafts are chosen; `tokenizers` and `lookbehind`: of the model and of the assistant; `rows`: the prompts."""
        self.drafter, self.assisted = drafter, assisted
        self.shares = isinstance(drafter, SharedWords)
        self.target, self.assistant = tokenizers
        self.back, self.assistant_back = lookbehind
        self.prompts = [list(map(int, row)) for row in rows]
        self.rows: list[list[int]] = [[] for _ in rows]  # the assistant's tokens at the last round
        self.known = [0] * len(rows)  # and how many of the model's tokens they stood for
        self.memory: Memory | None = None
        self.read: list[list[int]] = []

    def __call__(self, state: State, result: Result, limit: int) -> State:
        """The state with drafts for every row that goes on, `result` being on the host."""
        new, real = result.tokens, result.real
        said = [prompt + new[b, real[b]].tolist() for b, prompt in enumerate(self.prompts)]
        live = np.array([real[b].sum() < limit for b in range(len(said))]) & ~np.asarray(state.finished)
        ids = [self._assistant_ids(b, row) if live[b] else self.rows[b] or [0] for b, row in enumerate(said)]
        none: dict[str, Any] = dict.fromkeys(("cache", "scores", "logits", "extra"))
        bare = dataclasses.replace(state, **none) if self.shares else None
        given, drafted = self._draft(bare, ids, live, result.assistance.num_assistant_tokens, limit)
        K = self.drafter.columns - 1
        tokens, counts = np.zeros((len(said), K), np.int32), np.zeros(len(said), np.int32)
        for b in np.flatnonzero(live):
            self.rows[b], self.known[b] = ids[b], len(said[b])
            found = () if self.shares else self._target_drafts(ids[b], drafted[b])[:K]
            tokens[b, : len(found)], counts[b] = found, len(found)
        given = dataclasses.replace(given, cache=None) if self.shares else Drafts(tokens, counts)
        return dataclasses.replace(state, extra=dataclasses.replace(state.extra, given=given))

    def _assistant_ids(self, b: int, said: list[int]) -> list[int]:
        """The row's tokens as the assistant's; where it was read before, what is new follows."""
        known = self.known[b]
        more = continuation(said[max(known - self.back, 0) : known], said[known:], self.target, self.assistant) if known else None
        if more is not None:
            return self.rows[b] + more
        return list(map(int, self.assistant.encode(self.target.decode(said, skip_special_tokens=True))))

    def _target_drafts(self, ids: list[int], drafted: list[int]) -> list[int]:
        """What the assistant drafted as tokens of the model's."""
        found = continuation(ids[-self.assistant_back :], drafted, self.assistant, self.target)
        return reencode(drafted, self.assistant, self.target) if found is None else found

    def _draft(
        self, state: State | None, ids: list[list[int]], live: np.ndarray, num: np.ndarray, limit: int
    ) -> tuple[Drafts, list[list[int]]]:
        """Up to num [B] tokens after each row, and as the assistant's. What it has read before, it need not read again; room is for `limit`
        more."""
        same = [common(old, new[:-1]) for old, new in zip(self.read, ids)] if self.memory is not None else [0] * len(ids)
        P = bucket(max(len(row) - n for row, n in zip(ids, same)))
        wide, real = np.zeros((len(ids), P), np.int32), np.zeros((len(ids), P), bool)
        for b, row in enumerate(ids):
            part = row[same[b] :]
            wide[b, P - len(part) :], real[b, P - len(part) :] = part, True
        slots, needed = 0 if self.memory is None else self.memory.cache.slots, max(map(len, ids)) + P + self.drafter.columns
        slots = slots if slots >= needed else bucket(needed + limit)
        drafts = _draft(self.drafter, self.assisted, state, self.memory, np.array(same, np.int32), wide, real, live, num, slots=slots)
        tokens, counts = jax.device_get((drafts.tokens, drafts.counts))
        tokens = np.asarray(self.drafter.words)[tokens] if isinstance(self.drafter, SharedWords) else tokens
        found = [row[:n].tolist() for row, n in zip(tokens, counts)]
        if not drafts.cache.recurrent and not any(isinstance(s, SlidingKV) for s in drafts.cache.layers):
            self.memory, self.read = Memory(drafts.cache, self.drafter.model), [row + more for row, more in zip(ids, found)]
        return drafts, found


@partial(jax.jit, static_argnames="slots")
def _draft(
    drafter: DraftModel, assisted: Assisted, state: Any, memory: Memory | None, same: jax.Array, ids: jax.Array, real: jax.Array,
    live: jax.Array, num: jax.Array, *, slots: int,
) -> Drafts:  # fmt: skip
    """Drafts after `ids` [B,P] that follow the first same [B] tokens of what `memory` holds. `state`: what SharedWords follow."""
    if memory is not None:
        memory = memory.replace(cache=memory.cache.rewind(same, memory.cache.index))
    extra: Any = dataclasses.replace(drafter.begin(ids[:, :-1], real[:, :-1], None, memory, slots), num=num)
    if isinstance(drafter, SharedWords):
        drafter = dataclasses.replace(drafter, newest=ids[:, -1])
    else:
        state = State(Ragged.begin(Sequences.of(ids, real)), extra.memory.cache, ~live, None, None)
    return drafter.propose(assisted, dataclasses.replace(state, extra=extra), live)[0]


def continuation(before: list[int], after: list[int], source: Any, target: Any) -> list[int] | None:
    """Tokens of `target` for what `after` adds to the text of `before`; None where the text before it would be other tokens then."""
    one, both = (reencode(ids, source, target) for ids in (before, before + after))
    return both[len(one) :] if both[: len(one)] == one else None


def reencode(ids: list[int], source: Any, target: Any) -> list[int]:
    """Tokens of one tokenizer as another's, special ones left out."""
    return list(map(int, target.encode(source.decode(ids, skip_special_tokens=True), add_special_tokens=False)))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
