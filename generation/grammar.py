"""Structured output: a regular expression or a JSON schema as token masks that live on the device.

Axis letters: B rows, A states of the automaton, V vocabulary, L bytes of a token, E end-of-sequence ids."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.generation.processors_base import Sequences, drop, kind, room
from jaxmodels.generation.regex import compile_regex
from jaxmodels.generation.vocabulary import token_bytes, walk

LONGEST = 32  # bytes: longer tokens are never chosen
FORBIDDEN = -1e8  # the logit of what the grammar allows and others forbid; below that of every beam which is not
CHUNK = 64  # states whose tokens are looked at together


@struct.dataclass
class Grammar:
    """The generated text of every row matches an expression as a whole: `generate(…, grammar=Grammar.regex(…))`. A follower; what it
    allows is `GrammarMask`'s to say.

    `goto` [A,256] int: the state after a byte; `masks` [A,V/32] uint32: the tokens that may come, a bit each; `accept` [A] bool: the text
    may end; `text` [V,L] uint8 and `lengths` [V] of the tokens. `state` [B]."""

    goto: Any
    masks: Any
    accept: Any
    text: Any
    lengths: Any
    state: Any = None
    kind: str = kind("Grammar")

    @classmethod
    def regex(cls, tokenizer: Any, pattern: str, vocab_size: int) -> Grammar:
        """For a model of `vocab_size` tokens. ValueError for a pattern that is not understood (see regex), that matches nothing, or
        whose texts the vocabulary cannot spell."""
        goto, accept = compile_regex(pattern)
        special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        tokens = (*token_bytes(tokenizer), *[b""] * vocab_size)[:vocab_size]
        tokens = tuple(b"" if n in special or len(token) > LONGEST else token for n, token in enumerate(tokens))
        masks = _masks(goto, accept, tokens, pattern)
        A = room(len(goto), least=16)
        text = np.zeros((vocab_size, LONGEST), np.uint8)
        for n, token in enumerate(tokens):
            text[n, : len(token)] = list(token)
        grow = lambda x: np.pad(x, ((0, A - len(x)), *((0, 0),) * (x.ndim - 1)))
        lengths = np.array([len(token) for token in tokens], np.int32)
        tables = (grow(np.maximum(goto, 0)), grow(masks), grow(accept), text, lengths)
        return cls(*map(jnp.asarray, tables))  # type: ignore[arg-type]

    @classmethod
    def json_schema(cls, tokenizer: Any, schema: Any, vocab_size: int, whitespace: str | None = None) -> Grammar:
        """For the JSON texts of a schema (a dictionary, or its text), keys in the schema's order. whitespace: an expression for what may
        stand between, "" for nothing; by default one space or none. Needs outlines-core, the extra `grammar`, which turns a schema
        into an expression and says what it cannot."""
        try:
            from outlines_core.json_schema import build_regex_from_schema
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("JSON schemas need outlines-core: pip install 'jaxmodels[grammar]'") from error
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return cls.regex(tokenizer, build_regex_from_schema(text, whitespace), vocab_size)

    def start(self, sequences: Sequences) -> Grammar:
        return self.replace(state=jnp.zeros(len(sequences.tokens), jnp.int32))  # type: ignore[attr-defined]

    def append(self, tokens: jax.Array, real: jax.Array) -> Grammar:
        text, lengths = self.text[tokens], jnp.where(real, self.lengths[tokens], 0)

        def read(i: jax.Array, state: jax.Array) -> jax.Array:
            byte = lax.dynamic_index_in_dim(text, i, 1, keepdims=False)
            return jnp.where(i < lengths, self.goto[state, byte], state)

        return self.replace(state=lax.fori_loop(0, lengths.max(), read, self.state))  # type: ignore[attr-defined]

    def take(self, rows: jax.Array) -> Grammar:
        return self.replace(state=self.state[rows])  # type: ignore[attr-defined]

    def stopped(self, sequences: Sequences) -> None:
        return None


@struct.dataclass
class GrammarMask:
    """Only what the grammar among the followers lets come next, and the ends `eos_token_id` [E], -1 for none, where the text may end.
    Where all of it has -inf already (DoLa does so to what is unlikely), it is better than what breaks the grammar."""

    eos_token_id: Any
    kind: str = kind("GrammarMask")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        grammar = next(follower for follower in sequences.followers if isinstance(follower, Grammar))
        words = grammar.masks[grammar.state]  # [B,V/32]
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed = bits.reshape(len(words), -1)[:, : logits.shape[1]].astype(bool)
        ends = jnp.broadcast_to(grammar.accept[grammar.state][:, None], (len(words), len(self.eos_token_id)))
        allowed = allowed.at[:, drop(self.eos_token_id, logits)].set(ends, mode="drop")
        kept = jnp.where(allowed, logits, -jnp.inf)
        dead = kept.max(-1, keepdims=True) == -jnp.inf
        return jnp.where(dead & allowed, FORBIDDEN, kept)


def _masks(goto: np.ndarray, accept: np.ndarray, tokens: tuple[bytes, ...], pattern: str) -> np.ndarray:
    """[A,V/32] uint32: the tokens that lead from each state to one from which tokens lead to an end."""
    A, V = len(goto), len(tokens)
    empty = np.array([len(token) == 0 for token in tokens])
    leads = np.zeros((A, A), bool)

    def after(start: int) -> tuple[np.ndarray, np.ndarray]:
        states = np.arange(start, min(start + CHUNK, A))
        found = walk(goto, states, tokens)[0]
        found[:, empty] = -1
        return states, found

    for start in range(0, A, CHUNK):
        states, found = after(start)
        for state, row in zip(states, found):
            leads[state, np.unique(row[row >= 0])] = True
    good = accept.copy()
    while (more := good | (leads & good).any(1)).sum() > good.sum():
        good = more
    if not good[0]:
        raise ValueError(f"the vocabulary has no tokens that spell a text of {pattern[:200]!r}")
    masks = np.zeros((A, -(-V // 32) * 32), np.uint8)
    for start in range(0, A, CHUNK):
        states, found = after(start)
        masks[states[0] : states[-1] + 1, :V] = (found >= 0) & good[np.maximum(found, 0)]
    return np.packbits(masks, 1, bitorder="little").view("<u4")
