"""Processors that reshape or cut off a distribution: temperature and the truncations of sampling.

Sorting a vocabulary takes as long as a small model's step on CPU: thresholds are found among the largest `PREFIX` values, and by
bisection where these are not enough. `min_tokens_to_keep`: so many of the most probable tokens stay in any case, None for one.

Axis letters: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.generation.processors_base import Sequences, keep, kind

PREFIX = 128
GROUP = 32
TOP_H_TOKENS = 100  # transformers' TopHLogitsWarper looks at no more


@struct.dataclass
class Temperature:
    """Divide by `temperature` > 0."""

    temperature: Any
    kind: str = kind("Temperature")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return logits / self.temperature


@struct.dataclass
class TopH:
    """Keep the most probable tokens while their share of the entropy stays within `top_h` (0 to 1], of the 100 most probable ones
    (arXiv:2509.02510)."""

    top_h: Any
    kind: str = kind("TopH")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        top, ids = largest(logits, min(TOP_H_TOKENS, logits.shape[1]))
        log_p = jax.nn.log_softmax(top)
        p = jnp.exp(log_p)
        terms = -jnp.where(p == 0, 0, p * log_p)
        kept = (jnp.cumsum(terms, -1) <= self.top_h * terms.sum(-1, keepdims=True)) & (p > 0)
        kept = kept | (jnp.arange(top.shape[1]) == 0)
        rows = jnp.arange(logits.shape[0])[:, None]
        return keep(logits, jnp.zeros(logits.shape, bool).at[rows, ids].set(kept))


@struct.dataclass
class TopK:
    """Keep the `top_k` largest, and what equals the smallest of them."""

    top_k: Any
    min_tokens_to_keep: Any = None
    kind: str = kind("TopK")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        k = self.top_k if self.min_tokens_to_keep is None else jnp.maximum(self.top_k, self.min_tokens_to_keep)
        return keep(logits, logits >= _cutoff(logits, lambda x, _: jnp.ones_like(x), k))


@struct.dataclass
class TopP:
    """Keep the most probable tokens whose probabilities add up to `top_p`, at least one (arXiv:1904.09751); equal ones stay together."""

    top_p: Any
    min_tokens_to_keep: Any = None
    kind: str = kind("TopP")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        top = logits.max(-1, keepdims=True)
        total = jnp.exp(logits - top).sum(-1, keepdims=True)
        kept = (logits >= _cutoff(logits, lambda x, _: jnp.exp(x - top) / total, self.top_p)) | (logits == top)
        return keep(logits, _at_least(logits, kept, self.min_tokens_to_keep))


@struct.dataclass
class MinP:
    """Keep the tokens at least `min_p` times as probable as the most probable one (arXiv:2407.01082)."""

    min_p: Any
    min_tokens_to_keep: Any = None
    kind: str = kind("MinP")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        kept = jnp.exp(logits - logits.max(-1, keepdims=True)) >= self.min_p
        return keep(logits, _at_least(logits, kept, self.min_tokens_to_keep))


@struct.dataclass
class Typical:
    """Keep the tokens whose surprise is closest to the entropy, until their probabilities add up to `mass` (arXiv:2202.00666)."""

    mass: Any
    min_tokens_to_keep: Any = None
    kind: str = kind("Typical")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        p = jnp.exp(log_p)
        closeness = -jnp.abs(-log_p - _entropy(log_p))

        def weigh(_: jax.Array, ids: jax.Array | None) -> jax.Array:
            return p if ids is None else jnp.take_along_axis(p, ids, 1)

        kept = closeness >= _cutoff(closeness, weigh, self.mass)
        return keep(logits, _at_least(closeness, kept, self.min_tokens_to_keep))


@struct.dataclass
class EpsilonCutoff:
    """Keep the tokens at least as probable as `epsilon`, and the most probable one (arXiv:2210.15191)."""

    epsilon: Any
    min_tokens_to_keep: Any = None
    kind: str = kind("EpsilonCutoff")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return _cut_below(logits, self.epsilon, self.min_tokens_to_keep)


@struct.dataclass
class EtaCutoff:
    """Keep the tokens at least as probable as min(epsilon, sqrt(epsilon) exp(-entropy)), and the most probable one (arXiv:2210.15191)."""

    epsilon: Any
    min_tokens_to_keep: Any = None
    kind: str = kind("EtaCutoff")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        entropy = _entropy(jax.nn.log_softmax(logits))
        eta = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-entropy))
        return _cut_below(logits, eta, self.min_tokens_to_keep)


@struct.dataclass
class Normalize:
    """Logits to log-probabilities."""

    kind: str = kind("Normalize")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(logits)


def _entropy(log_p: jax.Array) -> jax.Array:
    """[B,1], in nats."""
    return -jnp.where(log_p == -jnp.inf, 0, log_p * jnp.exp(log_p)).sum(-1, keepdims=True)


def _cut_below(logits: jax.Array, least: Any, min_tokens_to_keep: Any) -> jax.Array:
    kept = (jax.nn.softmax(logits) >= least) | (logits == logits.max(-1, keepdims=True))
    return keep(logits, _at_least(logits, kept, min_tokens_to_keep))


def _at_least(values: jax.Array, kept: jax.Array, n: Any) -> jax.Array:
    """`kept` and the n largest values of each row; as it is where n is None."""
    return kept if n is None else kept | (values >= _cutoff(values, lambda x, _: jnp.ones_like(x), n))


def largest(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row [B,V] in descending order, and where they stand: they lie in the k groups with the largest maxima."""
    B, V = values.shape
    if 2 * k * GROUP >= V:
        return lax.top_k(values, min(k, V))
    groups = jnp.pad(values, ((0, 0), (0, -V % GROUP)), constant_values=-jnp.inf).reshape(B, -1, GROUP)
    best = lax.top_k(groups.max(-1), k)[1]
    top, ids = lax.top_k(jnp.take_along_axis(groups, best[:, :, None], 1).reshape(B, -1), k)
    return top, jnp.take_along_axis(best, ids // GROUP, 1) * GROUP + ids % GROUP


def _cutoff(values: jax.Array, weigh: Callable[[jax.Array, jax.Array | None], jax.Array], limit: Any) -> jax.Array:
    """[B,1]: the smallest x such that the values above x weigh less than `limit` together. `weigh` of some values and their places
    [B,k], or of all [B,V] and None, gives their weights."""
    top, ids = largest(values, PREFIX)
    weights = weigh(top, ids)
    inside = jnp.cumsum(weights, -1) - weights < limit
    quick = jnp.min(jnp.where(inside, top, jnp.inf), -1, keepdims=True)
    if top.shape[1] == values.shape[1]:
        return quick
    enough = ~inside[:, -1] | (top.min(-1) == -jnp.inf)  # a slice of `top` would make XLA:CPU sort instead
    return lax.cond(enough.all(), lambda: quick, lambda: _bisect(values, weigh(values, None), limit))


def _bisect(values: jax.Array, weights: jax.Array, limit: Any) -> jax.Array:
    """`_cutoff` over all values: halving the range of their bits, which as signed integers order as the floats do."""
    flip = lambda bits: jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = flip(lax.bitcast_convert_type(values, jnp.int32))

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # rounded down, without overflow
        light = jnp.where(bits > middle, weights, 0).sum(-1, keepdims=True) < limit
        return jnp.where(light, low, middle + 1), jnp.where(light, middle, high)

    ends = bits.min(-1, keepdims=True), bits.max(-1, keepdims=True)
    return lax.bitcast_convert_type(flip(lax.fori_loop(0, 32, halve, ends)[1]), jnp.float32)
