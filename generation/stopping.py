"""What ends a row besides its end-of-sequence tokens: stop strings, on the device, and criteria of the caller's.

Axis letters: B rows, A states of an automaton, V vocabulary."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.generation.processors_base import Sequences, kind, room
from jaxmodels.generation.vocabulary import token_bytes, walk

KEPT = 8  # tables of a tokenizer
_tables: weakref.WeakKeyDictionary[Any, dict[tuple[tuple[bytes, ...], int], jax.Array]] = weakref.WeakKeyDictionary()


@struct.dataclass
class StopStrings:
    """A row ends with the token that completes one of the strings, whatever follows it within that token; a string may begin in the
    prompt. Strings are compared in bytes, so that a character split over tokens counts.

    `table` [A,V] int: the state after each token, or -1 minus it where a string ends within the token; see `of`."""

    table: Any
    state: Any = None
    hit: Any = None
    kind: str = kind("StopStrings")

    @classmethod
    def of(cls, tokenizer: Any, stop_strings: str | Sequence[str], vocab_size: int) -> StopStrings:
        """For a model of `vocab_size` tokens; ids that the tokenizer does not have are no text. The last tables are kept."""
        if tokenizer is None:
            raise ValueError("stop_strings are matched against the tokens' text: pass tokenizer=, the model's tokenizer")
        words = tuple(word.encode() for word in ((stop_strings,) if isinstance(stop_strings, str) else stop_strings))
        kept = _tables.setdefault(tokenizer, {})
        if (words, vocab_size) not in kept:
            while len(kept) >= KEPT:
                kept.pop(next(iter(kept)))
            with jax.ensure_compile_time_eval():  # what is kept must not belong to a trace
                kept[words, vocab_size] = jnp.asarray(cls._table(tokenizer, words, vocab_size))
        return cls(kept[words, vocab_size])

    @staticmethod
    def _table(tokenizer: Any, words: tuple[bytes, ...], vocab_size: int) -> np.ndarray:
        goto, accept = automaton(words)
        tokens = (*token_bytes(tokenizer), *[b""] * vocab_size)[:vocab_size]
        states, passed = walk(goto, np.arange(len(goto)), tokens, accept)
        table = np.zeros((room(len(goto), least=16), vocab_size), np.int16 if len(goto) < 1 << 15 else np.int32)
        table[: len(goto)] = np.where(passed, -1 - states, states)
        return table

    def start(self, sequences: Sequences) -> StopStrings:
        tokens, real = sequences.tail(min(len(self.table), sequences.tokens.shape[1]))
        rows = jnp.zeros(len(tokens), self.table.dtype)
        begun = StopStrings(jnp.asarray(self.table), rows, rows < 0)
        return lax.scan(lambda row, new: (row.append(*new), None), begun, (tokens.T, real.T))[0]

    def append(self, tokens: jax.Array, real: jax.Array) -> StopStrings:
        found = self.table[self.state, tokens]
        hit = real & (found < 0)
        state = jnp.where(real, jnp.where(found < 0, -1 - found, found), self.state)
        return StopStrings(self.table, state, hit)

    def take(self, rows: jax.Array) -> StopStrings:
        return StopStrings(self.table, self.state[rows], self.hit[rows])

    def stopped(self, sequences: Sequences) -> jax.Array:
        return self.hit


def automaton(words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Aho and Corasick's for the words: goto [A,256] int32 from state 0, and the states [A] in which a word ends."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for word in words:
        at = 0
        for byte in word:
            if byte not in children[at]:
                children[at][byte] = len(children)
                children.append({})
                ends.append(False)
            at = children[at][byte]
        ends[at] = True
    goto = np.zeros((len(children), 256), np.int32)
    queue = deque([(0, 0)])  # a state, and the longest proper suffix of it that is one
    while queue:
        state, back = queue.popleft()
        if state:
            goto[state] = goto[back]
            ends[state] = ends[state] or ends[back]
        for byte, child in children[state].items():
            queue.append((child, int(goto[back, byte]) if state else 0))
            goto[state, byte] = child
    return goto, np.array(ends)
