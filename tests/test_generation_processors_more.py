"""Processors of the later options against transformers' on random logits and sequences."""

import functools

import hypothesis.strategies as st
import jax
import numpy as np
import torch
import transformers.generation as hf
from hypothesis import assume, given, settings
from test_generation_processors import SCALES, SHAPES, case, reference, run
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    TopHLogitsWarper,
)

import jaxmodels.generation.processors as ours

example = functools.partial(settings, deadline=None, max_examples=20)
cases = given(shape=st.sampled_from(SHAPES), scale=st.sampled_from(SCALES), seed=st.integers(0, 2**32 - 1), data=st.data())
small = given(V=st.sampled_from([5, 50]), seed=st.integers(0, 2**32 - 1), data=st.data())


def repetitive(V, seed, rows=3, width=14):
    """Logits [rows,V] and ids [rows,width] of few distinct tokens, so that n-grams do repeat."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, V)).astype(np.float32), rng.integers(0, 4, (rows, width)), rng


def unpadded(processor, logits, ids, mask, make=None):
    """The reference row by row, on each row's real tokens alone; `make(row)` where it depends on the row."""
    rows = [reference(make(i) if make else processor, logits[i : i + 1], ids[i : i + 1, mask[i]])[0] for i in range(len(ids))]
    return np.stack(rows)


@small
@example()
def test_no_repeat_ngram(V, seed, data):
    size = data.draw(st.integers(1, 5))
    logits, ids, rng = repetitive(V, seed)
    mask = np.arange(ids.shape[1]) >= rng.integers(0, ids.shape[1], (len(ids), 1))
    got = run(ours.NoRepeatNGram(np.int32(size)), logits, ids, mask)
    np.testing.assert_array_equal(got, unpadded(hf.NoRepeatNGramLogitsProcessor(size), logits, ids, mask))


@small
@example()
def test_encoder_no_repeat_ngram(V, seed, data):
    """Six rows over three encoder rows, as beams are."""
    size = data.draw(st.integers(1, 4))
    logits, ids, rng = repetitive(V, seed, rows=6, width=data.draw(st.sampled_from([1, 9])))
    source = rng.integers(0, 4, (3, 11))
    mask = np.arange(11) >= rng.integers(0, 11, (3, 1))
    got = run(ours.EncoderNoRepeatNGram(np.int32(size), source, mask), logits, ids)
    make = lambda i: EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor(source[i // 2][None, mask[i // 2]]))
    np.testing.assert_array_equal(got, unpadded(None, logits, ids, np.ones(ids.shape, bool), make))


@small
@example()
def test_encoder_repetition_penalty(V, seed, data):
    penalty = data.draw(st.floats(0.3, 3.0))
    logits, ids, rng = repetitive(V, seed, rows=6)
    source = rng.integers(0, 4, (3, 11))
    mask = np.arange(11) >= rng.integers(0, 11, (3, 1))
    got = run(ours.EncoderRepetitionPenalty(np.float32(penalty), source, mask), logits, ids)
    make = lambda i: EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor(source[i // 2][None, mask[i // 2]]))
    np.testing.assert_allclose(got, unpadded(None, logits, ids, np.ones(ids.shape, bool), make), rtol=1e-6)


@small
@example()
def test_sequence_bias_and_bad_words(V, seed, data):
    logits, ids, rng = repetitive(V, seed)
    mask = np.arange(ids.shape[1]) >= rng.integers(0, ids.shape[1], (len(ids), 1))
    words = data.draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=20, unique_by=tuple))
    biases = {tuple(word): float(rng.normal()) for word in words}
    got = run(ours.SequenceBias.of(biases), logits, ids, mask)
    np.testing.assert_allclose(got, unpadded(hf.SequenceBiasLogitsProcessor(biases), logits, ids, mask), rtol=1e-5, atol=1e-6)
    eos = [1, 3]
    assume(any(word not in ([1], [3]) for word in words))
    got = run(ours.bad_words(words, np.array([*eos, -1])), logits, ids, mask)
    np.testing.assert_array_equal(got, unpadded(hf.NoBadWordsLogitsProcessor(words, eos), logits, ids, mask))


@cases
@example(max_examples=10)
def test_forced_and_suppressed(shape, scale, seed, data):
    logits, ids, _ = case(shape, scale, seed)
    tokens = data.draw(st.lists(st.integers(0, shape[1] - 1), min_size=1, max_size=12))
    table = ours.id_array(tokens)
    ids = ids[:, : data.draw(st.integers(1, 3))]
    n = ids.shape[1]
    check = lambda got, want: np.testing.assert_array_equal(run(got, logits, ids, new=n - 1), reference(want, logits, ids))
    check(ours.ForcedBOS(ours.id_array(tokens[0])), hf.ForcedBOSTokenLogitsProcessor(tokens[0]))
    check(ours.ForcedEOS(np.int32(3), table), hf.ForcedEOSTokenLogitsProcessor(3, tokens))
    check(ours.SuppressTokens(table), hf.SuppressTokensLogitsProcessor(tokens))
    check(ours.SuppressTokensAtBegin(table, np.int32(1)), hf.SuppressTokensAtBeginLogitsProcessor(tokens, 2))


@cases
@example()
def test_exponential_decay(shape, scale, seed, data):
    """The reference's power is a float64's: ours may be a few float32 roundings away."""
    start, factor = data.draw(st.integers(0, 12)), data.draw(st.floats(0.9, 1.3))
    new = data.draw(st.integers(0, 12))
    logits, ids, _ = case(shape, scale, seed)
    eos = data.draw(st.lists(st.integers(0, shape[1] - 1), min_size=1, max_size=4, unique=True))
    logits[0, eos[0]] = -np.inf
    want = reference(hf.ExponentialDecayLengthPenalty((start, factor), eos, 12 - new), logits, ids)
    got = run(ours.ExponentialDecayLength(np.int32(start), np.float32(factor), ours.id_array(eos)), logits, ids, new=new)
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6 * scale)


def test_remove_invalid_and_normalize():
    logits, *_ = case((3, 50), 3.0, 0)
    logits[0, :4] = [np.nan, np.inf, -np.inf, 3e38]
    np.testing.assert_array_equal(run(ours.RemoveInvalid(), logits), reference(hf.InfNanRemoveLogitsProcessor(), logits))
    logits[0, :4] = -np.inf
    np.testing.assert_allclose(run(ours.Normalize(), logits), reference(hf.LogitNormalization(), logits), rtol=2e-6)


def clear_of(logits, limits):
    """Where a token's probability is not within rounding of any limit [B,1]."""
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p, np.abs(p - limits) > 2e-6 * limits


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1, keepdims=True)


@cases
@example()
def test_epsilon_and_eta(shape, scale, seed, data):
    epsilon, least = data.draw(st.floats(1e-5, 0.3)), data.draw(st.sampled_from([None, 1, 3]))
    logits, *_ = case(shape, scale, seed)
    if data.draw(st.booleans()):
        logits[:, ::2] = -np.inf  # as another filter left it
    keeps = None if least is None else np.int32(least)
    _, clear = clear_of(logits, np.float64(epsilon))
    want = reference(hf.EpsilonLogitsWarper(epsilon, min_tokens_to_keep=least or 1), logits)
    np.testing.assert_array_equal(run(ours.EpsilonCutoff(np.float32(epsilon), keeps), logits)[clear], want[clear])
    _, clear = clear_of(logits, np.minimum(epsilon, np.sqrt(epsilon) * np.exp(-entropy(clear_of(logits, 1.0)[0]))))
    want = reference(hf.EtaLogitsWarper(epsilon, min_tokens_to_keep=least or 1), logits)
    got = run(ours.EtaCutoff(np.float32(epsilon), keeps), logits)
    np.testing.assert_array_equal(got[clear], want[clear])


@cases
@example()
def test_typical(shape, scale, seed, data):
    """Equal but for tokens whose running sum is within rounding of the mass."""
    mass, least = data.draw(st.floats(0.02, 0.98)), data.draw(st.sampled_from([None, 3]))
    logits, *_ = case(shape, scale, seed)
    if data.draw(st.booleans()):
        logits[:, ::2] = -np.inf
    got = run(ours.Typical(np.float32(mass), None if least is None else np.int32(least)), logits)
    want = reference(hf.TypicalLogitsWarper(mass, min_tokens_to_keep=least or 1), logits)
    p, _ = clear_of(logits, 1.0)
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(p) - entropy(p))
    for row in range(len(p)):
        order = np.argsort(distance[row], kind="stable")
        before = np.empty_like(p[row])
        before[order] = np.cumsum(p[row][order]) - p[row][order]
        edge = distance[row][order[np.searchsorted(np.cumsum(p[row][order]), mass).clip(max=len(order) - 1)]]
        clear = (np.abs(before - mass) > 1e-5) & (np.abs(distance[row] - edge) > 1e-5)
        np.testing.assert_array_equal(got[row][clear], want[row][clear])
        assert (got[row] > -np.inf).sum() >= 1


@cases
@example()
def test_top_h(shape, scale, seed, data):
    share = data.draw(st.floats(0.01, 0.99))
    logits, *_ = case(shape, scale, seed)
    got, want = run(ours.TopH(np.float32(share)), logits), reference(TopHLogitsWarper(share), logits)
    close = np.abs((got > -np.inf).sum(-1) - (want > -np.inf).sum(-1))
    top = np.sort(logits.astype(np.float64), -1)[:, ::-1][:, :100]
    p = np.exp(top - top.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    terms = -p * np.log(p)
    edge = np.abs(np.cumsum(terms, -1) - share * terms.sum(-1, keepdims=True)).min(-1) < 2e-5
    assert (close <= edge).all()
    np.testing.assert_array_equal(got[~edge], want[~edge])


@cases
@example(max_examples=10)
def test_filters_keep_what_beams_need(shape, scale, seed, data):
    least = data.draw(st.integers(1, 5))
    logits, *_ = case(shape, scale, seed)
    n = np.int32(least)
    for got, want in [
        (ours.TopK(np.int32(1), n), hf.TopKLogitsWarper(1, min_tokens_to_keep=least)),
        (ours.TopP(np.float32(1e-4), n), hf.TopPLogitsWarper(1e-4, min_tokens_to_keep=least)),
        (ours.MinP(np.float32(1.0), n), hf.MinPLogitsWarper(1.0, min_tokens_to_keep=least)),
    ]:
        np.testing.assert_array_equal(run(got, logits), reference(want, logits))


def test_structures_tell_them_apart():
    one = np.float32(0.5)
    ids = np.zeros((1, 3), int)
    chains = [
        ours.TopH(one), ours.Typical(one), ours.EpsilonCutoff(one), ours.EtaCutoff(one), ours.NoRepeatNGram(one), ours.SuppressTokens(one),
        ours.ForcedBOS(one), ours.ForcedEOS(one, one), ours.SuppressTokensAtBegin(one, one), ours.SequenceBias(one, one),
        ours.EncoderRepetitionPenalty(one, ids, ids), ours.EncoderNoRepeatNGram(one, ids, ids), ours.ExponentialDecayLength(one, one, one),
        ours.RemoveInvalid(), ours.Normalize(), ours.TopK(one), ours.TopP(one), ours.MinP(one),
    ]  # fmt: skip
    structures = [jax.tree.structure(chain) for chain in chains]
    assert [structures.index(structure) for structure in structures] == list(range(len(chains)))
