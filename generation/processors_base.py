"""What logits processors share: the sequences they read, the protocol, and small helpers.

Axis letters: B rows, T columns of a prompt, W columns of tokens, V vocabulary, E token ids."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax


class Follower(Protocol):
    """A pytree that reads every row's tokens as they come: a stop string's automaton, a grammar's state. It says its `kind`."""

    def start(self, sequences: Sequences) -> Any:
        """Itself over the rows of the prompt's sequences."""
        ...

    def append(self, tokens: jax.Array, real: jax.Array) -> Any:
        """Itself after one more token a row, [B] each; a row whose token is not real stays as it is."""
        ...

    def take(self, rows: jax.Array) -> Any:
        """Itself over the rows [B'], in that order."""
        ...

    def stopped(self, sequences: Sequences) -> jax.Array | None:
        """Rows that end with their newest token, bool [B]; None where it never ends one."""
        ...


@struct.dataclass
class Sequences:
    """The tokens of every row so far. `tokens` [B,W] int32 and `real` [B,W] bool (false: padding, or not yet written); `width` [] the
    columns written; `length` the tokens that HF counts, padding of the prompt included, and `new` those that were generated, [] each, or
    [B] in assisted decoding, where every row grows by itself; `followers`: what keeps a state of its own about every row;
    `unconditional` [B,V]: the logits after a negative prompt."""

    tokens: jax.Array
    real: jax.Array
    width: Any
    length: Any
    new: Any
    followers: tuple[Any, ...] = ()
    unconditional: jax.Array | None = None

    @classmethod
    def of(cls, input_ids: Any, attention_mask: Any = None, new: int = 0) -> Sequences:
        """From input_ids [B,T], of which the last `new` columns were generated."""
        tokens = jnp.asarray(input_ids, jnp.int32)
        real = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        return cls(tokens, real, np.int32(tokens.shape[1]), np.int32(tokens.shape[1]), np.int32(new))

    def append(self, tokens: jax.Array, real: jax.Array) -> Sequences:
        """One more column, [B] each, in the room that there is."""
        put = lambda whole, column: lax.dynamic_update_slice_in_dim(whole, column[:, None].astype(whole.dtype), self.width, 1)
        followers = tuple(follower.append(tokens, real) for follower in self.followers)
        return Sequences(put(self.tokens, tokens), put(self.real, real), self.width + 1, self.length + 1, self.new + 1, followers)

    def follow(self, followers: tuple[Any, ...]) -> Sequences:
        """With followers that have read the prompt."""
        return dataclasses.replace(self, followers=tuple(follower.start(self) for follower in followers))

    def stopped(self) -> jax.Array:
        """Rows that a follower ends with the newest token, bool [B]."""
        ends = [follower.stopped(self) for follower in self.followers]
        return functools.reduce(jnp.logical_or, (end for end in ends if end is not None), jnp.zeros(len(self.tokens), bool))

    def take(self, rows: jax.Array) -> Sequences:
        """The rows [B'], in that order."""
        followers = tuple(follower.take(rows) for follower in self.followers)
        return dataclasses.replace(self, tokens=self.tokens[rows], real=self.real[rows], followers=followers)

    def last(self) -> tuple[jax.Array, jax.Array]:
        """The newest column: tokens [B,1] and whether they are real [B,1]."""
        get = lambda whole: lax.dynamic_slice_in_dim(whole, self.width - 1, 1, 1)
        return get(self.tokens), get(self.real)

    def tail(self, n: int) -> tuple[jax.Array, jax.Array]:
        """The newest n columns, [B,n] each: tokens and whether they are real; what lies before the first column is not."""
        get = lambda whole: lax.dynamic_slice_in_dim(jnp.pad(whole, ((0, 0), (n, 0))), self.width, n, 1)
        return get(self.tokens), get(self.real)


class LogitsProcessor(Protocol):
    """A pytree that turns logits [B,V] float32 into others; -inf forbids a token. It says its `kind`, see there."""

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array: ...


def kind(name: str) -> Any:
    """A static field that names a processor's class. To jaxlib (0.10.2) the tree structures of two dataclasses with the same number of
    leaves and the same static fields are equal, whatever the classes: now and then jit would run the one's program for the other."""
    return struct.field(pytree_node=False, default=name)


def to_float(x: Any) -> Any:
    return x.astype(jnp.float32) if isinstance(x, jax.core.Tracer) else np.float32(x)


def to_int(x: Any) -> Any:
    return x.astype(jnp.int32) if isinstance(x, jax.core.Tracer) else np.int32(x)


def room(n: int, least: int = 8) -> int:
    """The padded size for n entries of a table: a power of two, so that a few more compile nothing."""
    return max(least, 1 << (n - 1).bit_length() if n else 0)


def id_array(ids: Any) -> np.ndarray:
    """[E] int32 of an id, several or None, filled up with -1 so that another number of ids is the same program."""
    ids = () if ids is None else (ids,) if isinstance(ids, int | np.integer) else tuple(ids)
    return np.array([*ids, *[-1] * (room(len(ids)) - len(ids))], np.int32)


def keep(logits: jax.Array, kept: jax.Array) -> jax.Array:
    """-inf where not `kept`, both [B,V]."""
    return jnp.where(kept, logits, -jnp.inf)


def forbid(logits: jax.Array, ids: Any, when: Any = True) -> jax.Array:
    """-inf at the ids [E] (those below 0 left out) while `when`, [] or [B]."""
    return logits.at[:, drop(ids, logits)].min(jnp.where(jnp.reshape(when, (-1, 1)), -jnp.inf, jnp.inf), mode="drop")


def only(logits: jax.Array, ids: Any, when: Any) -> jax.Array:
    """0 at the ids [E] and -inf elsewhere while `when`, [] or [B]."""
    forced = jnp.full_like(logits, -jnp.inf).at[:, drop(ids, logits)].set(0, mode="drop")
    return jnp.where(jnp.reshape(when, (-1, 1)), forced, logits)


def drop(ids: Any, logits: jax.Array) -> jax.Array:
    """ids with those below 0 moved behind the vocabulary, where nothing is read or written."""
    return jnp.where(jnp.asarray(ids) < 0, logits.shape[1], jnp.asarray(ids))
