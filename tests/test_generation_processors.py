"""Processors against transformers' on random logits; the draw against the probabilities it draws from."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers.generation as hf
from hypothesis import given, settings

from jaxmodels.generation import MinLength, MinNewTokens, MinP, RepetitionPenalty, Sequences, Temperature, TopK, TopP
from jaxmodels.generation.sampling import argmax, draw

SHAPES = [(3, 50), (2, 129), (4, 9001)]  # all in the prefix; just not; groups with a ragged end
SCALES = [0.01, 3.0]  # 0.01: thresholds lie far behind the prefix
apply = jax.jit(lambda processor, sequences, logits: processor(sequences, logits))
example = functools.partial(settings, deadline=None, max_examples=25)


def case(shape, scale, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape).astype(np.float32) * np.float32(scale)
    ids = rng.integers(0, shape[1], (shape[0], 12))
    mask = np.arange(12) >= rng.integers(0, 12, (shape[0], 1))
    return logits, ids, mask


def run(processor, logits, ids=None, mask=None, new=0):
    ids = np.zeros((len(logits), 1), int) if ids is None else ids
    return np.asarray(apply(processor, Sequences.of(ids, mask, new), logits))


def reference(processor, logits, ids=None):
    ids = np.zeros((len(logits), 1), int) if ids is None else ids
    return processor(torch.tensor(ids), torch.tensor(logits)).numpy()


cases = given(shape=st.sampled_from(SHAPES), scale=st.sampled_from(SCALES), seed=st.integers(0, 2**32 - 1), data=st.data())


@cases
@example()
def test_temperature(shape, scale, seed, data):
    t = data.draw(st.floats(0.05, 10.0))
    logits, *_ = case(shape, scale, seed)
    np.testing.assert_allclose(run(Temperature(np.float32(t)), logits), reference(hf.TemperatureLogitsWarper(t), logits), rtol=1e-6)


@cases
@example()
def test_top_k(shape, scale, seed, data):
    k = data.draw(st.integers(1, shape[1] + 5))
    logits, *_ = case(shape, scale, seed)
    np.testing.assert_array_equal(run(TopK(np.int32(k)), logits), reference(hf.TopKLogitsWarper(k), logits))


@cases
@example()
def test_top_p(shape, scale, seed, data):
    """Equal but for tokens whose running sum is within rounding of p."""
    p = data.draw(st.floats(0.0, 0.999))
    logits, *_ = case(shape, scale, seed)
    got, want = run(TopP(np.float32(p)), logits), reference(hf.TopPLogitsWarper(p), logits)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(-1, keepdims=True)
    above = np.stack([running(row) for row in exact])
    clear = np.abs(above - p) > 3e-6
    np.testing.assert_array_equal(got[clear], want[clear])
    kept = (above < p) | (exact == exact.max(-1, keepdims=True))
    np.testing.assert_array_equal(got[clear], np.where(kept, logits, -np.inf)[clear])


def running(row):
    """The probability above each token, float64."""
    order = np.argsort(-row)
    above = np.empty_like(row)
    above[order] = np.cumsum(row[order]) - row[order]
    return above


@cases
@example()
def test_min_p(shape, scale, seed, data):
    p = data.draw(st.floats(0.0, 1.0))
    logits, *_ = case(shape, scale, seed)
    got, want = run(MinP(np.float32(p)), logits), reference(hf.MinPLogitsWarper(p), logits)
    ratio = np.exp((logits - logits.max(-1, keepdims=True)).astype(np.float64))
    clear = np.abs(ratio - p) > 1e-6
    np.testing.assert_array_equal(got[clear], want[clear])


@cases
@example()
def test_repetition_penalty(shape, scale, seed, data):
    penalty = data.draw(st.floats(0.3, 3.0))
    logits, ids, mask = case(shape, scale, seed)
    processor = hf.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=torch.tensor((~mask).sum(1)))
    np.testing.assert_allclose(run(RepetitionPenalty(np.float32(penalty)), logits, ids, mask), reference(processor, logits, ids), rtol=1e-6)


@cases
@example()
def test_minimum_lengths(shape, scale, seed, data):
    logits, ids, _ = case(shape, scale, seed)
    eos = data.draw(st.lists(st.integers(0, shape[1] - 1), min_size=1, max_size=4))
    least, new = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 12))
    ends = np.array(eos + [-1] * (8 - len(eos)), np.int32)
    want = reference(hf.MinLengthLogitsProcessor(least, eos), logits, ids)
    np.testing.assert_array_equal(run(MinLength(np.int32(least), ends), logits, ids), want)
    want = reference(hf.MinNewTokensLengthLogitsProcessor(12 - new, least, eos), logits, ids)
    np.testing.assert_array_equal(run(MinNewTokens(np.int32(least), ends), logits, ids, new=new), want)


@cases
@example(max_examples=15)
def test_chain_gives_the_same_probabilities(shape, scale, seed, data):
    """As `generate` strings them together: what one filter removed, the next does not count."""
    k, p, least = data.draw(st.integers(1, 60)), data.draw(st.floats(0.1, 0.99)), data.draw(st.floats(0.0, 0.5))
    logits, ids, mask = case(shape, scale, seed)
    got, want = logits, torch.tensor(logits)
    for ours, theirs in [
        (Temperature(np.float32(0.7)), hf.TemperatureLogitsWarper(0.7)),
        (TopK(np.int32(k)), hf.TopKLogitsWarper(k)),
        (TopP(np.float32(p)), hf.TopPLogitsWarper(p)),
        (MinP(np.float32(least)), hf.MinPLogitsWarper(least)),
    ]:
        got, want = run(ours, got, ids, mask), theirs(torch.tensor(ids), want)
    got, want = torch.softmax(torch.tensor(got), -1).numpy(), torch.softmax(want, -1).numpy()
    kept = (got > 0).sum(-1), (want > 0).sum(-1)
    if (kept[0] == kept[1]).all():  # else a token stood within rounding of a limit
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)
    else:
        assert np.abs(kept[0] - kept[1]).max() <= 1


def test_structures_tell_processors_apart():
    """What jit compares: see processors.kind."""
    one = np.float32(0.5)
    chains = [Temperature(one), TopP(one), MinP(one), RepetitionPenalty(one), TopK(one), MinLength(one, one), MinNewTokens(one, one)]
    structures = [jax.tree.structure(chain) for chain in chains]
    assert [structures.index(structure) for structure in structures] == list(range(len(chains)))


def test_equal_logits_stay_together():
    logits = np.zeros((2, 9001), np.float32)
    np.testing.assert_array_equal(run(TopK(np.int32(3)), logits), logits)
    np.testing.assert_array_equal(run(TopP(np.float32(0.5)), logits), logits)


def test_values_compile_nothing():
    logits, ids, _ = case((2, 9001), 3.0, 0)
    run(TopK(np.int32(1)), logits, ids)
    run(TopP(np.float32(0.1)), logits, ids)
    count = apply._cache_size()
    for k in (50, 128, 129, 8000):
        run(TopK(np.int32(k)), logits, ids)
        run(TopP(np.float32(k / 9000)), logits, ids)
    assert apply._cache_size() == count


def test_argmax():
    x = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    x[1, 200] = x[1, 100] = 9  # a tie: the first
    x[2, 150] = np.nan
    x[3] = -np.inf
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), np.argmax(x, -1))


@pytest.mark.parametrize("V", [7, 128, 1000])
def test_draws_follow_the_probabilities(V):
    rng = np.random.default_rng(V)
    logits = (rng.normal(size=V) * 2).astype(np.float32)
    logits[rng.random(V) < 0.4] = -np.inf
    rows = 40_000
    tokens = np.asarray(jax.jit(draw)(jax.random.key(0), jnp.broadcast_to(jnp.asarray(logits), (rows, V))))
    p = np.exp(logits - logits.max()).astype(np.float64)
    p /= p.sum()
    counts = np.bincount(tokens, minlength=V)
    assert counts[p == 0].sum() == 0
    common = p * rows > 5
    chi2 = ((counts - p * rows)[common] ** 2 / (p * rows)[common]).sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_a_draw_never_leaves_what_is_allowed():
    """One allowed token at every place, and weights that differ by 30 orders of magnitude."""
    V = 1000
    only = np.where(np.eye(V, dtype=bool), 0, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(draw)(jax.random.key(1), only), np.arange(V))
    steep = np.tile(np.linspace(-70, 0, V, dtype=np.float32), (4000, 1))
    assert np.asarray(jax.jit(draw)(jax.random.key(2), steep)).min() > 500


@pytest.mark.parametrize("processor", [TopK(np.int32(50)), TopP(np.float32(0.9))], ids=lambda p: type(p).__name__)
def test_no_sort_of_the_vocabulary(processor):
    """XLA:CPU has a fast partial sort, and falls back to a full one, forty times slower, when its pattern is not matched."""
    compiled = apply.lower(processor, Sequences.of(np.zeros((8, 1), int)), np.zeros((8, 49152), np.float32)).compile().as_text()
    assert compiled.count('custom_call_target="TopK"') == 2 and " sort(" not in compiled
