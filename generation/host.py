"""Python functions inside the compiled loop: processors, masks and stopping criteria of the caller's.

A program calls one fixed function with the number of the caller's, a traced value: another lambda is another number and compiles
nothing. What a function raises ends its work and is raised again by `generate`.

Axis letters: B rows, T tokens so far, W columns of tokens, V vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import io_callback

from jaxmodels.generation.processors_base import Sequences, kind

_functions: dict[int, Callable[..., Any]] = {}
_errors: dict[int, BaseException] = {}
_numbers = itertools.count()


@struct.dataclass
class HostProcessor:
    """`function(input_ids [B,T], scores [B,V]) -> scores` on numpy arrays, by its number; see `number`."""

    number: Any
    kind: str = kind("HostProcessor")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return io_callback(_scores, jax.ShapeDtypeStruct(logits.shape, logits.dtype), self.number, *_columns(sequences), logits)


@struct.dataclass
class HostMask:
    """`function(input_ids [B,T]) -> allowed [B,V] or [V] bool` on numpy arrays, by its number."""

    number: Any
    kind: str = kind("HostMask")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        allowed = io_callback(_mask, jax.ShapeDtypeStruct(logits.shape, bool), self.number, *_columns(sequences), logits.shape[1])
        return jnp.where(allowed, logits, -jnp.inf)


@struct.dataclass
class PrefixAllowedTokens:
    """HF's prefix_allowed_tokens_fn: `function(batch_id, input_ids [T]) -> ids`, by its number. Where every allowed token of a
    prompt's beams has -inf already, these count as 0."""

    number: Any
    num_beams: int = struct.field(pytree_node=False, default=1)
    kind: str = kind("PrefixAllowedTokens")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(logits.shape, bool)
        allowed = io_callback(_prefix, shape, self.number, *_columns(sequences), logits.shape[1], self.num_beams)
        mask = jnp.where(allowed, 0, -jnp.inf)
        scores = logits + mask
        dead = (scores.max(-1) == -jnp.inf).reshape(-1, self.num_beams).all(-1)
        return jnp.where(jnp.repeat(dead, self.num_beams)[:, None], mask, scores)


@struct.dataclass
class HostCriterion:
    """`function(input_ids [B,T], scores) -> bool or bool [B]`, whether a row ends with its newest token; by its number. `scores` is
    None: what a criterion needs of them, a processor can keep."""

    number: Any
    kind: str = kind("HostCriterion")

    def start(self, sequences: Sequences) -> HostCriterion:
        return self

    def append(self, tokens: jax.Array, real: jax.Array) -> HostCriterion:
        return self

    def take(self, rows: jax.Array) -> HostCriterion:
        return self

    def stopped(self, sequences: Sequences) -> jax.Array:
        rows = sequences.tokens.shape[0]
        return io_callback(_criterion, jax.ShapeDtypeStruct((rows,), bool), self.number, *_columns(sequences))


@struct.dataclass
class Caller:
    """What the caller of `generate` adds: processors where HF has prefix_allowed_tokens_fn and logits_processor, and followers."""

    allowed: tuple[Any, ...]
    custom: tuple[Any, ...]
    followers: tuple[Any, ...]


@contextmanager
def caller(
    logits_processor: Any, stopping_criteria: Any, prefix_allowed_tokens_fn: Any, mask_fn: Any, num_beams: int, keep: bool
) -> Iterator[Caller]:
    """Processors and criteria that are pytrees as they are, functions by their numbers within the block; see `numbered`. TypeError for
    what is neither."""
    processors, criteria = _listed(logits_processor, "logits_processor"), _listed(stopping_criteria, "stopping_criteria")
    one = [f for f in (prefix_allowed_tokens_fn, mask_fn) if f is not None]
    functions = [f for f in (*one, *processors, *criteria) if _on_host(f)]
    for f in functions:
        if not callable(f):
            raise TypeError(f"{f!r} is neither a function nor a processor or criterion of jaxmodels.generation")
    with numbered(functions, keep) as numbers:
        left = iter(numbers)
        allowed: list[Any] = []
        if prefix_allowed_tokens_fn is not None:
            allowed.append(PrefixAllowedTokens(next(left), num_beams))
        if mask_fn is not None:
            allowed.append(HostMask(next(left)))
        custom = tuple(HostProcessor(next(left)) if _on_host(f) else f for f in processors)
        yield Caller(tuple(allowed), custom, tuple(HostCriterion(next(left)) if _on_host(f) else f for f in criteria))


def _listed(given: Any, name: str) -> tuple[Any, ...]:
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise TypeError(f"{name} is a list; found {type(given).__name__}")
    return tuple(given)


def _on_host(f: Any) -> bool:
    return jax.tree_util.all_leaves([f])


@contextmanager
def numbered(functions: list[Callable[..., Any]], keep: bool = False) -> Iterator[list[np.int32]]:
    """The numbers of Python functions, int32 [] each, within the block; what one of them raised is raised at its end. `keep`: for good,
    since a program that is traced now runs later."""
    numbers = [next(_numbers) for _ in functions]
    _functions.update(zip(numbers, functions))
    try:
        yield [np.int32(number) for number in numbers]
        raised = [_errors[number] for number in numbers if number in _errors]
        if raised:
            raise raised[0]
    finally:
        for number in () if keep else numbers:
            del _functions[number]
            _errors.pop(number, None)


def _columns(sequences: Sequences) -> tuple[Any, ...]:
    return sequences.tokens, sequences.width, sequences.length


def _call(number: Any, tokens: Any, width: Any, length: Any, use: Callable[[Callable[..., Any], np.ndarray], Any], otherwise: Any) -> Any:
    """`use(function, input_ids)`, or `otherwise` once the function has failed."""
    # All in numpy: an operation of jax's in a callback may wait for the program that waits for the callback.
    number, width = int(number), int(width)
    if number in _errors:
        return otherwise
    try:
        return use(_functions[number], np.asarray(tokens)[:, width - int(np.asarray(length).max()) : width])
    except BaseException as error:
        _errors[number] = error
        return otherwise


def _scores(number: Any, tokens: Any, width: Any, length: Any, logits: Any) -> np.ndarray:
    logits = np.asarray(logits)

    def use(function: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
        return _shaped(function(ids, logits.copy()), np.float32, logits.shape, "a logits processor")

    return _call(number, tokens, width, length, use, logits)


def _mask(number: Any, tokens: Any, width: Any, length: Any, vocab: Any) -> np.ndarray:
    shape = (tokens.shape[0], int(vocab))

    def use(function: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
        found = np.asarray(function(ids))
        return _shaped(np.broadcast_to(found, shape) if found.ndim == 1 else found, bool, shape, "a mask function")

    return _call(number, tokens, width, length, use, np.ones(shape, bool))


def _prefix(number: Any, tokens: Any, width: Any, length: Any, vocab: Any, beams: Any) -> np.ndarray:
    shape = (tokens.shape[0], int(vocab))

    def use(function: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
        mask, lengths = np.zeros(shape, bool), np.broadcast_to(np.asarray(length), len(ids))
        for row in range(len(ids)):
            allowed = np.asarray(function(row // int(beams), ids[row, ids.shape[1] - int(lengths[row]) :]), np.int64).reshape(-1)
            if not len(allowed):
                raise ValueError(f"prefix_allowed_tokens_fn allows no token after {ids[row].tolist()} in row {row // int(beams)}")
            mask[row, allowed] = True
        return mask

    return _call(number, tokens, width, length, use, np.ones(shape, bool))


def _criterion(number: Any, tokens: Any, width: Any, length: Any) -> np.ndarray:
    rows = tokens.shape[:1]

    def use(function: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
        found = np.asarray(function(ids, None))
        return _shaped(np.broadcast_to(found, rows) if found.ndim == 0 else found, bool, rows, "a stopping criterion")

    return _call(number, tokens, width, length, use, np.ones(rows, bool))


def _shaped(found: Any, dtype: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    found = np.asarray(found)
    if found.shape != shape:
        raise ValueError(f"{what} returned shape {found.shape}; expected {shape}")
    return found.astype(dtype)
