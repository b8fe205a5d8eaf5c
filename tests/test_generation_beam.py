"""Beam search and beam sampling against torch's on ragged prompts: tokens, ends, scores, ancestors, records; moving a cache's rows."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from generation_fixtures import VOCAB, compilations, ours, torch_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmodels.cache import init_cache
from jaxmodels.generation import generate
from jaxmodels.models.mistral import MistralConfig, MistralForCausalLM
from jaxmodels.params import unflatten

NEVER = VOCAB + 5
LENGTHS = (40, 7, 23, 33)
T = 40
NEW = 16


@functools.cache
def prompts():
    mask = np.stack([np.arange(T) >= T - n for n in LENGTHS]).astype(np.int64)
    return np.random.default_rng(5).integers(3, VOCAB, mask.shape) * mask, mask


def torch_beams(ids=None, mask=None, model=None, **options):
    ids, mask = prompts() if ids is None else (ids, mask)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, **options}
    with torch.no_grad():
        return (model or torch_model()).generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)


def assert_equal(got, want):
    """Tokens up to each row's end (torch pads with the first end where pad_token_id is 0), scores, ancestors."""
    tokens, ancestors = want.sequences.numpy(), want.beam_indices.numpy()
    real = ancestors >= 0
    np.testing.assert_array_equal(got.beam_indices, ancestors)
    np.testing.assert_array_equal(got.lengths, real.sum(1))
    T = tokens.shape[1] - real.shape[1]
    np.testing.assert_array_equal(got.sequences[:, :T], tokens[:, :T])
    np.testing.assert_array_equal(got.sequences[:, T:], np.where(real, tokens[:, T:], 0))
    np.testing.assert_allclose(got.sequences_scores, want.sequences_scores.numpy(), rtol=1e-5, atol=1e-5)


@functools.cache
def ends():
    """Tokens that torch's beams hold early on, so that hypotheses end at different steps."""
    out = torch_beams(num_beams=4, num_return_sequences=4, max_new_tokens=NEW, eos_token_id=None)
    common = collections.Counter(out.sequences[:, T + 2 :].flatten().tolist()).most_common(9)
    return [token for token, _ in common[2::3]][:2]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, -1.5, 3.0])
def test_beams_equal_torch(early_stopping, length_penalty):
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": NEW, "eos_token_id": ends()}
    options |= {"early_stopping": early_stopping, "length_penalty": length_penalty}
    got, want = generate(*ours(), *prompts(), **options), torch_beams(**options)
    assert_equal(got, want)
    if length_penalty == 1.0:
        assert len(set(got.lengths.tolist())) > 3  # hypotheses did end


def test_records_equal_torch():
    options = {"num_beams": 4, "max_new_tokens": NEW, "eos_token_id": ends(), "repetition_penalty": 1.4, "min_new_tokens": 3}
    options |= {"output_scores": True, "output_logits": True}
    got, want = generate(*ours(True), *prompts(), **options), torch_beams(**options)
    assert_equal(got, want)
    for mine, theirs in ((got.scores, want.scores), (got.logits, want.logits)):
        theirs = torch.stack(theirs).numpy()
        assert mine.shape == theirs.shape
        same = np.isfinite(theirs)
        np.testing.assert_array_equal(np.isfinite(mine), same)
        assert np.abs(mine[same] - theirs[same]).max() <= 1e-4 * max(1, theirs[same].std())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=14), min_size=2, max_size=2),
    early_stopping=st.sampled_from([False, True, "never"]),
    length_penalty=st.floats(-3, 3),
    repetition_penalty=st.floats(1.05, 2),
    min_new_tokens=st.integers(1, 6),
    no_repeat_ngram_size=st.integers(1, 4),
    new=st.integers(6, NEW),
    eos=st.lists(st.integers(3, VOCAB - 1), min_size=2, max_size=2, unique=True),
)
def test_random_options_equal_torch(rows, eos, new, **options):
    width = max(map(len, rows))
    mask = np.stack([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64)
    ids = np.stack([[0] * (width - len(row)) + row for row in rows])
    options |= {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": new, "eos_token_id": [*eos, *ends()]}
    assert_equal(generate(*ours(), ids, mask, **options), torch_beams(ids, mask, **options))


def test_sampled_beams_have_torchs_distribution():
    """600 draws of 3 tokens on each side with few continuations: two-sample chi-square over the best sequences."""
    ids, mask = (np.repeat(x[3:4], 600, 0) for x in prompts())
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": True, "top_k": 3, "temperature": 1.7, "eos_token_id": ends()[:1]}
    torch.manual_seed(0)
    got = generate(*ours(), ids, mask, key=jax.random.key(0), **options)
    theirs = torch_beams(ids, mask, **options).sequences[:, T:].numpy()
    counts = [collections.Counter(map(tuple, rows.tolist())) for rows in (got.sequences[:, T:], theirs)]
    common = [key for key in {**counts[0], **counts[1]} if counts[0][key] + counts[1][key] >= 16]
    a, b = (np.array([*[count[key] for key in common], 600 - sum(count[key] for key in common)]) for count in counts)
    keep = a + b > 0
    chi2, freedom = ((a - b)[keep] ** 2 / (a + b)[keep]).sum(), keep.sum() - 1
    assert freedom >= 6 and chi2 < freedom + 4 * np.sqrt(2 * freedom)
    again = generate(*ours(), ids, mask, key=jax.random.key(0), **options)
    np.testing.assert_array_equal(got.sequences, again.sequences)


def test_sliding_windows():
    """Beams over a ring cache, the window shorter than the prompt."""
    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + (weight.ndim == 1))
    model = MistralForCausalLM(MistralConfig.from_dict(config.to_dict()))
    params = unflatten({name: jnp.asarray(weight.detach().numpy()) for name, weight in theirs.named_parameters()})
    options = {"num_beams": 3, "max_new_tokens": NEW, "eos_token_id": NEVER}
    for row, length in enumerate(LENGTHS[:2]):  # alone: torch's masks of padded windows differ
        ids = prompts()[0][row : row + 1, T - length :]
        want = torch_beams(ids, np.ones_like(ids), theirs, **options)
        padded = generate(model, params, *(x[row : row + 1] for x in prompts()), **options)
        np.testing.assert_array_equal(padded.sequences[:, T:], want.sequences[:, length:].numpy())


def test_one_program_for_all_values():
    call = functools.partial(generate, *ours(), *prompts(), num_beams=4, num_return_sequences=3)
    call(max_new_tokens=NEW, eos_token_id=[3, 4])
    with compilations() as found:
        call(max_new_tokens=9, eos_token_id=[7, 9], length_penalty=0.3, early_stopping=True, pad_token_id=5)
        call(max_new_tokens=12, eos_token_id=[1, 9], length_penalty=-2, early_stopping="never")
    assert found == []


def test_under_jit():
    model, params = ours()
    options = {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": tuple(ends())}
    run = jax.jit(lambda params, ids, p: generate(model, params, ids, prompts()[1], max_new_tokens=NEW, length_penalty=p, **options))
    got, want = (f(params, jnp.asarray(prompts()[0]), -1.5) for f in (run, run.__wrapped__))
    width = want.sequences.shape[1]
    np.testing.assert_array_equal(got.sequences[:, :width], want.sequences)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    assert got.sequences.shape == (12, T + NEW) and got.beam_indices.shape == (12, NEW)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("slots", [48, 50])
def test_reordered_rows(scan_layers, slots):
    """As `take`, where rows differ in the named slots only; as they are elsewhere."""
    model, params = ours(scan_layers)
    rows = jnp.array([1, 0, 1, 2])
    ids = np.random.default_rng(0).integers(3, VOCAB, (4, 40))
    ids[:, :29] = ids[0, :29]
    cache = jax.jit(model.apply)({"params": params}, ids, cache=init_cache(model, 4, slots)).cache
    moved, want = cache.reorder(rows, jnp.int32(29), jnp.int32(40)), cache.take(rows)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    stays = cache.reorder(jnp.arange(4), jnp.int32(29), jnp.int32(40))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(stays), jax.tree.leaves(cache)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 0}, "num_beams is 0; expected an integer above 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 exceeds num_beams=2"),
        ({"num_beams": 2, "length_penalty": "long"}, "length_penalty is 'long'"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"num_beams": 2, "do_sample": True}, r"key=jax\.random\.key"),
        ({"num_beams": 2, "streamer": "any"}, "streamer.*num_beams=2"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with compilations() as found, pytest.raises(ValueError, match=words):
        generate(*ours(), np.full((1, 9), 5), max_new_tokens=4, **options)
    assert found == []
