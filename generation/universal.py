"""Universal assisted decoding: the assistant has a tokenizer of its own, and drafts go through text, on the host between two rounds.

Axis letters: B rows, K drafts, P a bucket of the assistant's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.cache import SlidingKV
from jaxmodels.generation.assisted import Assisted, Drafts, Memory, Progress, Ragged
from jaxmodels.generation.drafts import DraftModel, count, progress, scheduled
from jaxmodels.generation.processors_base import Sequences, id_array, kind
from jaxmodels.generation.sampling import Result, State


@struct.dataclass
class Given:
    """Drafts that the host puts into the state's `extra.given`; `num` of the assistant's tokens at first."""

    num: Any
    columns: int = struct.field(pytree_node=False)
    heuristic: bool = struct.field(pytree_node=False)
    kind: str = kind("Given")

    def begin(self, ids: jax.Array, real: jax.Array, source: Any, memory: Any, slots: int, chunk: int | None) -> Progress:
        B = len(ids)
        return progress(self.num, B, given=Drafts(jnp.zeros((B, self.columns - 1), jnp.int32), jnp.zeros(B, jnp.int32)))

    def propose(self, assisted: Assisted, state: State, live: jax.Array) -> tuple[Drafts, State]:
        given, left = state.extra.given, assisted.limit - state.sequences.new - 1
        return dataclasses.replace(given, counts=jnp.where(live, jnp.clip(given.counts, 0, left), 0)), state

    def settle(self, extra: Progress, tokens: jax.Array, kept: jax.Array, drafts: Drafts) -> Progress:
        num = scheduled(extra.num, kept, drafts, self.columns - 1) if self.heuristic else extra.num
        return count(extra, kept, drafts, num=num)


class Reencoder:
    """Drafts [B,K] for what a batch says so far, by an assistant that reads other tokens."""

    def __init__(
        self, drafter: DraftModel, eos: Any, tokenizers: tuple[Any, Any], lookbehind: tuple[int, int], rows: Sequence[Sequence[int]]
    ) -> None:
        """`tokenizers` and `lookbehind`: of the model and of the assistant; `rows`: the prompts."""
        self.drafter, self.eos = drafter, id_array(eos)
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
        drafted = self._draft(ids, live, result.assistance.num_assistant_tokens, limit)
        K = self.drafter.columns - 1
        tokens, counts = np.zeros((len(said), K), np.int32), np.zeros(len(said), np.int32)
        for b in np.flatnonzero(live):
            self.rows[b], self.known[b] = ids[b], len(said[b])
            found = self._target_drafts(ids[b], drafted[b])[:K]
            tokens[b, : len(found)], counts[b] = found, len(found)
        return dataclasses.replace(state, extra=dataclasses.replace(state.extra, given=Drafts(tokens, counts)))

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

    def _draft(self, ids: list[list[int]], live: np.ndarray, num: np.ndarray, limit: int) -> list[list[int]]:
        """Up to num [B] tokens after each row. What the assistant has read before, it need not read again; room is for `limit` more."""
        from jaxmodels.generation.loop import bucket

        same = [common(old, new[:-1]) for old, new in zip(self.read, ids)] if self.memory is not None else [0] * len(ids)
        P = bucket(max(len(row) - n for row, n in zip(ids, same)))
        wide, real = np.zeros((len(ids), P), np.int32), np.zeros((len(ids), P), bool)
        for b, row in enumerate(ids):
            part = row[same[b] :]
            wide[b, P - len(part) :], real[b, P - len(part) :] = part, True
        slots, needed = 0 if self.memory is None else self.memory.cache.slots, max(map(len, ids)) + P + self.drafter.columns
        slots = slots if slots >= needed else bucket(needed + limit)
        drafts = _draft(self.drafter, self.memory, np.array(same, np.int32), wide, real, self.eos, live, num, slots=slots)
        tokens, counts = jax.device_get((drafts.tokens, drafts.counts))
        found = [row[:n].tolist() for row, n in zip(tokens, counts)]
        if not drafts.cache.recurrent and not any(isinstance(s, SlidingKV) for s in drafts.cache.layers):
            self.memory, self.read = Memory(drafts.cache, self.drafter.model), [row + more for row, more in zip(ids, found)]
        return found


@partial(jax.jit, static_argnames="slots")
def _draft(
    drafter: DraftModel, memory: Memory | None, same: jax.Array, ids: jax.Array, real: jax.Array, eos: jax.Array, live: jax.Array,
    num: jax.Array, *, slots: int,
) -> Drafts:  # fmt: skip
    """Drafts after `ids` [B,P] that follow the first same [B] tokens of what `memory` holds."""
    if memory is not None:
        memory = memory.replace(cache=memory.cache.rewind(same, memory.cache.index))
    extra: Any = dataclasses.replace(drafter.begin(ids[:, :-1], real[:, :-1], None, memory, slots), num=num)
    state = State(Ragged.begin(Sequences.of(ids, real)), extra.memory.cache, ~live, None, None, extra)
    assisted = Assisted((), eos, np.int32(0), None, np.int32(np.iinfo(np.int32).max), None, drafter)
    return drafter.propose(assisted, state, live)[0]


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
