"""Constrained beams, as transformers 4.45 has them: hypotheses that must contain phrases, in any order.

Every constraint is a trie of its phrases, of which one must be said; all tries lie in one table of nodes, whose values are traced. What a
beam has said is a place in it. In each step the beams' candidates are joined by those that go on with a constraint, and the next beams are
taken in turn from banks of hypotheses that are equally far (after arXiv:1804.06609).

Axis letters: B rows of the prompt, M beams, A tokens that go on with a constraint, Q constraints, Z nodes, K children, N new tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.generation.beam import Beams, Hypotheses, pick
from jaxmodels.generation.diverse import OlderBeamSearch
from jaxmodels.generation.processors import kind
from jaxmodels.generation.processors_base import room
from jaxmodels.generation.sampling import State

FAR = 1 << 20  # a rank behind all others


@dataclasses.dataclass(frozen=True)
class PhrasalConstraint:
    """The tokens must be said, one right after the other."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _ids(self.token_ids))

    @property
    def phrases(self) -> tuple[tuple[int, ...], ...]:
        return (self.token_ids,)


@dataclasses.dataclass(frozen=True)
class DisjunctiveConstraint:
    """One of the phrases must be said; none may be the beginning of another."""

    nested_token_ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        phrases = self.nested_token_ids
        if not isinstance(phrases, list | tuple) or not phrases:
            raise ValueError(f"a constraint of several phrases is a list of lists of token ids; found {phrases!r}")
        object.__setattr__(self, "nested_token_ids", tuple(_ids(phrase) for phrase in phrases))
        for one in self.nested_token_ids:
            if sum(other[: len(one)] == one for other in self.nested_token_ids) > 1:
                raise ValueError(f"the phrase {list(one)} begins another of the same constraint, or is there twice: leave one of them out")

    @property
    def phrases(self) -> tuple[tuple[int, ...], ...]:
        return self.nested_token_ids


def _ids(phrase: Any) -> tuple[int, ...]:
    whole = lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool) and x >= 0
    if not isinstance(phrase, list | tuple) or not phrase or not all(map(whole, phrase)):
        raise ValueError(f"a phrase is a list of token ids, 0 or more each; found {phrase!r}")
    return tuple(int(x) for x in phrase)


def all_constraints(constraints: Any, force_words_ids: Any) -> tuple[PhrasalConstraint | DisjunctiveConstraint, ...]:
    """What the options `constraints`, a list, and `force_words_ids` ask for: of the second a list of ids is a phrase, a list of lists a
    choice. ValueError for what is neither."""
    found = list(constraints or ())
    for constraint in found:
        if not isinstance(constraint, PhrasalConstraint | DisjunctiveConstraint):
            raise ValueError(f"constraints holds {constraint!r}; expected PhrasalConstraint and DisjunctiveConstraint")
    if force_words_ids is not None:
        if not isinstance(force_words_ids, list | tuple) or not force_words_ids:
            raise ValueError(f"force_words_ids is a list of phrases, or of lists of phrases; found {force_words_ids!r}")
        for words in force_words_ids:
            nested = isinstance(words, list | tuple) and bool(words) and isinstance(words[0], list | tuple)
            found.append(DisjunctiveConstraint(words) if nested else PhrasalConstraint(words))
    return tuple(found)


@struct.dataclass
class Progress:
    """How far hypotheses [...] are: `pending` [...,Q], their order `rank` [...,Q], the constraint that is being said (-1: none) and its
    node, [...] each."""

    pending: jax.Array
    rank: jax.Array
    current: jax.Array
    node: jax.Array

    @property
    def completed(self) -> jax.Array:
        return ~self.pending.any(-1) & (self.current < 0)


@struct.dataclass
class Tries:
    """`tokens` and `children` [Z,K] of every node, -1 where there is none; `depth` and `last` [Z]; the first Q nodes are the roots, of
    which `there` [Q] are used, with the longest phrase's length `height` [Q]."""

    tokens: Any
    children: Any
    depth: Any
    last: Any
    there: Any
    height: Any
    kind: str = kind("Tries")

    @classmethod
    def of(cls, constraints: Sequence[PhrasalConstraint | DisjunctiveConstraint]) -> Tries:
        """Sizes are powers of two, so that other phrases are the same program."""
        Q = room(len(constraints), least=4)
        nodes: list[dict[int, int]] = [{} for _ in range(Q)]
        depth = [0] * Q
        for root, constraint in enumerate(constraints):
            for phrase in constraint.phrases:
                at = root
                for token in phrase:
                    if token not in nodes[at]:
                        nodes[at][token] = len(nodes)
                        nodes.append({})
                        depth.append(depth[at] + 1)
                    at = nodes[at][token]
        Z, K = room(len(nodes), least=16), room(max(map(len, nodes)), least=2)
        tokens, children = np.full((2, Z, K), -1, np.int32)
        for at, branches in enumerate(nodes):
            tokens[at, : len(branches)], children[at, : len(branches)] = list(branches), list(branches.values())
        deep = np.zeros(Z, np.int32)
        deep[: len(depth)] = depth
        last = np.array([not branches for branches in nodes] + [True] * (Z - len(nodes)))
        height = [max(map(len, constraint.phrases)) for constraint in constraints]
        return cls(tokens, children, deep, last, np.arange(Q) < len(constraints), np.array(height + [0] * (Q - len(height)), np.int32))

    def begin(self, shape: tuple[int, ...]) -> Progress:
        Q, none = len(self.there), jnp.full(shape, -1, jnp.int32)
        wide = lambda x: jnp.broadcast_to(jnp.asarray(x), (*shape, Q))
        return Progress(wide(self.there), wide(jnp.arange(Q)), none, none)

    def add(self, progress: Progress, tokens: jax.Array) -> Progress:
        """After one more token [...]. One that breaks a phrase off begins no other, as in transformers."""
        Q, table, children = len(self.there), jnp.asarray(self.tokens), jnp.asarray(self.children)

        def child(node: jax.Array) -> jax.Array:
            token = tokens.reshape(*tokens.shape, *(1,) * (node.ndim + 1 - tokens.ndim))
            return jnp.where(table[node] == token, children[node], -1).max(-1)

        busy, last = progress.current >= 0, jnp.asarray(self.last)
        on = child(jnp.maximum(progress.node, 0))  # [...]
        roots = child(jnp.broadcast_to(jnp.arange(Q), progress.pending.shape))  # [..., Q]
        ranks = jnp.where(progress.pending & (roots >= 0), progress.rank, FAR)
        begun = ranks.argmin(-1).astype(jnp.int32)
        begins = ~busy & (ranks.min(-1) < FAR)
        node = jnp.where(busy, on, jnp.where(begins, jnp.take_along_axis(roots, begun[..., None], -1)[..., 0], -1))
        says = jnp.where(busy, progress.current, jnp.where(begins, begun, -1))
        ends, breaks = (node >= 0) & last[node], busy & (on < 0)
        is_current = jnp.arange(Q) == progress.current[..., None]
        is_begun = (jnp.arange(Q) == begun[..., None]) & begins[..., None]
        returns = is_current & breaks[..., None]
        return Progress(
            (progress.pending & ~is_begun) | returns,
            jnp.where(returns, progress.rank.max(-1, keepdims=True) + 1, progress.rank),
            jnp.where(ends | breaks, -1, says),
            jnp.where(ends | breaks, -1, node),
        )

    def options(self, progress: Progress) -> jax.Array:
        """The tokens [...,A] that go on with a constraint, -1 for none."""
        tokens = jnp.asarray(self.tokens)
        Q, K = len(self.there), tokens.shape[1]
        starts = jnp.where(progress.pending[..., None], tokens[:Q], -1).reshape(*progress.node.shape, Q * K)
        on = jnp.pad(tokens[jnp.maximum(progress.node, 0)], [(0, 0)] * progress.node.ndim + [(0, (Q - 1) * K)], constant_values=-1)
        return jnp.where((progress.current >= 0)[..., None], on, starts)

    def bank(self, progress: Progress) -> jax.Array:
        """[...]: how far, in steps of the longest phrase's tokens."""
        longest, busy = jnp.max(self.height), progress.current >= 0
        done = jnp.sum(self.there) - progress.pending.sum(-1) - busy
        left = jnp.asarray(self.height)[jnp.maximum(progress.current, 0)] - jnp.asarray(self.depth)[jnp.maximum(progress.node, 0)]
        return done * longest + jnp.where(busy, longest - left, 0)


@struct.dataclass
class ConstrainedBeamSearch(OlderBeamSearch):
    """Beam search whose finished hypotheses have said every constraint of `tries`, the prompt counting as said; where that did not come
    to pass for `returned` of them, the best ones otherwise."""

    tries: Tries | None = None
    kind: str = kind("ConstrainedBeamSearch")

    def _begin(self, B: int, M: int, state: State) -> Beams:
        tries, s = self._tries(), state.sequences

        def read(progress: Progress, column: tuple[jax.Array, jax.Array]) -> tuple[Progress, None]:
            token, real = column
            moved = lambda a, b: jnp.where(real.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
            return jax.tree.map(moved, tries.add(progress, token), progress), None

        progress, _ = lax.scan(read, tries.begin((B * M,)), (s.tokens.T, s.real.T))
        progress = jax.tree.map(lambda x: x.reshape(B, M, *x.shape[1:]), progress)
        return dataclasses.replace(super()._begin(B, M, state), progress=progress)

    def _tries(self) -> Tries:
        assert self.tries is not None
        return self.tries

    def _candidates(self, state: State, beams: Beams, scores: jax.Array, first: Any = None) -> tuple[Hypotheses, jax.Array]:
        """Behind the usual candidates each beam's continuations with a constraint [B,M*A], `there` where there is one."""
        found, ends = super()._candidates(state, beams, scores, first)
        tokens = self._tries().options(beams.progress)
        B, M, A = tokens.shape
        totals = scores.reshape(B, M, -1) + beams.running.scores[:, :, None]
        sums = jnp.take_along_axis(totals, jnp.maximum(tokens, 0), 2).reshape(B, M * A)
        parents = jnp.broadcast_to(jnp.repeat(jnp.arange(M), A), (B, M * A))
        forced = beams.running.take(parents).append(tokens.reshape(B, -1), jnp.arange(B)[:, None] * M + parents, sums, state.sequences.new)
        forced = dataclasses.replace(forced, there=tokens.reshape(B, -1) >= 0)
        return found.join(forced), jnp.concatenate([ends, jnp.zeros((B, M * A), bool)], 1)

    def _settle(self, beams: Beams, found: Hypotheses, ends: jax.Array, new: jax.Array) -> Beams:
        """The constraints' candidates come behind the others and must not count as the best one."""
        C = self.candidates * self.copies
        usual, forced = (jax.tree.map(lambda x, part=part: x[:, part], found) for part in (slice(C), slice(C, None)))
        return super()._settle(dataclasses.replace(beams, forced=forced), usual, ends[:, :C], new)

    def _go_on(self, beams: Beams, found: Hypotheses, ends: jax.Array, new: jax.Array) -> tuple[Hypotheses, Progress]:
        """In turn from each bank of the best candidates and of those that go on with a constraint, the most advanced bank first."""
        usual, _ = super()._go_on(beams, found, ends, new)
        M, forced = self.copies, beams.forced
        both = usual.join(forced)
        tokens, parents = both.tokens[:, :, new], both.beams[:, :, new] % M
        same = (beams.running.tokens[:, :, None] == beams.running.tokens[:, None]).all(-1)  # [B, M, M] hypotheses
        alike = jax.vmap(lambda same, at: same[at][:, at])(same, parents) & (tokens[:, :, None] == tokens[:, None])
        order = jnp.arange(tokens.shape[1])
        valid = (order < M) | both.there
        repeats = (alike & valid[:, :, None] & (order[:, None] < order)).any(1)  # [B, candidates]
        valid &= (order < M) | ~repeats
        progress = self._tries().add(pick(beams.progress, parents), tokens)
        banks = self._tries().bank(progress)
        sort = jnp.argsort(jnp.where(valid, -(banks * 100 + both.scores), jnp.inf), axis=1, stable=True)
        banks, valid = jnp.take_along_axis(banks, sort, 1), jnp.take_along_axis(valid, sort, 1)
        begins = jnp.pad(banks[:, 1:] != banks[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        turn = jnp.where(valid, order - lax.cummax(jnp.where(begins, order, 0), axis=1), len(order))
        chosen = jnp.take_along_axis(sort, jnp.argsort(turn, axis=1, stable=True)[:, :M], 1)
        chosen = jnp.where(valid[:, M:].any(1, keepdims=True), chosen, order[:M])
        return dataclasses.replace(both, there=both.there & (order < M)).take(chosen), pick(progress, chosen)

    def _may_end(self, beams: Beams, found: Hypotheses, new: jax.Array) -> jax.Array:
        return jnp.take_along_axis(beams.progress.completed, found.beams[:, :, new] % self.copies, 1)

    def _ready(self, running: Hypotheses, progress: Progress) -> jax.Array:
        completed = progress.completed
        return completed | (completed.sum(1, keepdims=True) < self.returned)
