"""Every option of `generate` against torch's on ragged prompts, row by row; functions of the caller's; and that other values of any
of them compile nothing."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from generation_fixtures import LENGTHS, VOCAB, T, compilations, ours, prompts, torch_greedy, torch_model, torch_row
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.generation import generate
from jaxmodels.generation.config import FIELDS
from jaxmodels.generation.processors import SuppressTokens, id_array
from jaxmodels.generation.watermark import WatermarkingConfig

NEVER = VOCAB + 5
NEW = 20
seen = lambda row, n: int(torch_greedy(row)[n])  # a token that greedy decoding gives


def rows_of(new=NEW, **options):
    """What torch adds to rows 1 and 2, alone and unpadded."""
    ids, mask = prompts()
    return [torch_row(ids[row][mask[row] == 1], new=new, **options) for row in (1, 2)]


def mine(new=NEW, rows=slice(1, 3), **options):
    ids, mask = prompts()
    out = generate(*ours(), ids[rows], mask[rows], max_new_tokens=new, **({"eos_token_id": NEVER} | options))
    return [row[T : T + n].tolist() for row, n in zip(out.sequences, out.lengths)]


OPTIONS = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 2.5},
    {"bad_words_ids": [[seen(1, 0)], [seen(2, 0)], [seen(1, 2), seen(1, 3)]]},
    {"sequence_bias": {(seen(1, 0),): -4.0, (seen(2, 1), seen(2, 2)): -6.0, (11,): 3.5}},
    {"forced_eos_token_id": [7, 9]},
    {"suppress_tokens": [seen(1, 0), seen(1, 4), seen(2, 3)]},
    {"begin_suppress_tokens": [seen(1, 0), seen(2, 0), seen(1, 1)]},
    {"remove_invalid_values": True, "suppress_tokens": [3]},
    {"renormalize_logits": True},
    {"guidance_scale": 2.5},
    {"guidance_scale": 1.7, "no_repeat_ngram_size": 3, "renormalize_logits": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options_equal_torch(options):
    assert mine(**options) == rows_of(eos_token_id=None, **options)


def test_ends_are_favoured_as_in_torch():
    eos = seen(1, 12)
    options = {"eos_token_id": [eos, 17], "exponential_decay_length_penalty": (3, 1.4)}
    got = mine(**options)
    assert got == rows_of(**options) and any(len(row) < NEW for row in got)


def test_forced_bos_follows_a_single_token():
    ids = np.array([[9], [30]])
    options = {"forced_bos_token_id": 21, "begin_suppress_tokens": [21, 30]}
    out = generate(*ours(), ids, max_new_tokens=6, eos_token_id=NEVER, **options)
    assert out.sequences[:, 1:].tolist() == [torch_row(row, new=6, eos_token_id=None, **options) for row in ids]


@pytest.mark.parametrize("beams", [1, 3])
def test_guidance_with_a_negative_prompt(beams):
    """Of another length than the prompt. Beams: against transformers' search with a processor that reads the negative prompt and all that
    the beam has said afresh; its own keeps a cache whose rows do not follow the beams."""
    ids, mask = prompts()
    negative = np.random.default_rng(5).integers(3, VOCAB, (1, 37))
    own = {"negative_prompt_ids": torch.tensor(negative), "guidance_scale": 1.8}

    def afresh(said, log_p):
        text = torch.cat([torch.tensor(negative).repeat(len(said), 1), said[:, length:]], 1)
        u = torch_model()(text).logits[:, -1].log_softmax(-1)
        return u + 1.8 * (log_p.log_softmax(-1) - u)

    want = []
    for row in (1, 2):
        length = LENGTHS[row]
        options = own if beams == 1 else {"num_beams": beams, "logits_processor": [afresh]}
        want.append(torch_row(ids[row][mask[row] == 1], new=NEW, eos_token_id=None, **options))
    left = np.concatenate([np.zeros((1, 5), int), negative], 1)
    masks = {
        "negative_prompt_ids": np.repeat(left, 2, 0),
        "negative_prompt_attention_mask": np.repeat(np.arange(42) >= 5, 2).reshape(42, 2).T,
    }
    assert mine(guidance_scale=1.8, num_beams=beams, **masks) == want


def test_raw_logits_are_those_of_the_prompt():
    ids, mask = prompts()
    row, plain = ids[2:3, -LENGTHS[2] :], {"max_new_tokens": 5, "eos_token_id": None}
    options = {"guidance_scale": 2.0, "output_logits": True, "output_scores": True}
    want = torch_model().generate(
        torch.tensor(row), attention_mask=torch.ones(1, LENGTHS[2]), do_sample=False, return_dict_in_generate=True, **plain, **options
    )
    out = generate(*ours(), ids[2:3], mask[2:3], **plain | {"eos_token_id": NEVER}, **options)
    for got, wanted in ((out.logits, want.logits), (out.scores, want.scores)):
        wanted = torch.stack(wanted).numpy()
        assert np.abs(got - wanted).max() <= 1e-4 * max(1, wanted.std())


@pytest.mark.parametrize("options", [{"no_repeat_ngram_size": 2}, {"bad_words_ids": [[seen(1, 0)], [7, 8]]}], ids=str)
def test_processors_in_beams(options):
    assert mine(12, num_beams=3, **options) == rows_of(12, num_beams=3, eos_token_id=None, **options)


FILTERS = {"top_h": 0.7, "typical_p": 0.6, "epsilon_cutoff": 0.005, "eta_cutoff": 0.8}


@pytest.mark.parametrize("name", FILTERS)
def test_samples_stay_within_torchs_filter(name):
    """The scores that are drawn from are torch's; 500 draws lie where these are finite."""
    ids, mask = prompts()
    options = {"do_sample": True, "max_new_tokens": 1, "temperature": 5.0, "top_k": 0, name: FILTERS[name], "output_scores": True}
    row = torch.tensor(ids[2:3, -LENGTHS[2] :])
    want = torch_model().generate(row, attention_mask=torch.ones_like(row), return_dict_in_generate=True, **options).scores[0][0].numpy()
    out = generate(*ours(), ids[2:3], mask[2:3], key=jax.random.key(0), num_return_sequences=500, **options)
    kept = np.isfinite(want)
    assert 1 < kept.sum() < VOCAB and kept[out.sequences[:, -1]].all()
    np.testing.assert_array_equal(np.isfinite(out.scores[0][0]), kept)
    assert np.abs(out.scores[0][0][kept] - want[kept]).max() <= 1e-4 * max(1, want[kept].std())


@functools.cache
def pool():
    """Options and values that may go together in greedy decoding."""
    words = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.floats(0.7, 2.0), "no_repeat_ngram_size": st.integers(1, 4), "min_new_tokens": st.integers(0, 9),
            "encoder_no_repeat_ngram_size": st.integers(2, 4), "encoder_repetition_penalty": st.floats(0.7, 2.0),
            "bad_words_ids": st.lists(words, min_size=1, max_size=5, unique_by=tuple),
            "sequence_bias": st.dictionaries(words.map(tuple), st.floats(-5, 5), min_size=1, max_size=4),
            "suppress_tokens": st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9),
            "begin_suppress_tokens": st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=9),
            "exponential_decay_length_penalty": st.tuples(st.integers(0, 5), st.floats(1.0, 1.5)),
            "remove_invalid_values": st.just(True), "renormalize_logits": st.just(True), "guidance_scale": st.floats(0.5, 2.0),
        },
    )  # fmt: skip


@given(data=st.data())
@settings(deadline=None, max_examples=3, derandomize=True)
def test_random_options_equal_torch(data):
    options = data.draw(pool()) | {"eos_token_id": [seen(1, 7), seen(2, 9)]}
    assert mine(**options) == rows_of(**options)


def test_custom_processors_and_criteria():
    """Functions on numpy arrays see what transformers' see; a processor of the package runs in the program; the caller's takes the
    place of its like."""
    theirs, here = [], []

    def process(ids, scores):
        (here if isinstance(ids, np.ndarray) else theirs).append(ids.tolist())
        scores[:, [seen(1, 1), seen(2, 1)]] = -np.inf
        return scores

    stop = lambda ids, scores: (ids[:, -1] % 5 == 0) & (ids.shape[1] > 0)
    want = rows_of(eos_token_id=None, logits_processor=[process], stopping_criteria=[stop])
    got = mine(logits_processor=[process], stopping_criteria=[stop])
    assert got == want and any(len(row) < NEW for row in got)
    step = len(want[1]) - 1
    assert here[0] == prompts()[0][1:3].tolist() and here[step][1][T - LENGTHS[2] :] == theirs[len(want[0]) + step][0]
    own = SuppressTokens(id_array([seen(1, 0), seen(2, 0)]))
    assert mine(logits_processor=[own], suppress_tokens=[4]) == rows_of(eos_token_id=None, suppress_tokens=[seen(1, 0), seen(2, 0)])


@pytest.mark.parametrize("beams", [1, 2])
def test_prefix_allowed_tokens(beams):
    allowed = lambda batch, ids: list(range(-int(ids[-1]) % 7, VOCAB, 7))
    want = rows_of(10, eos_token_id=None, prefix_allowed_tokens_fn=allowed, num_beams=beams)
    assert mine(10, prefix_allowed_tokens_fn=allowed, num_beams=beams) == want
    mask = lambda ids: (np.arange(VOCAB) + ids[:, -1:]) % 7 == 0
    assert beams > 1 or mine(10, mask_fn=mask) == want
    batches = set()
    mine(10, num_beams=beams, prefix_allowed_tokens_fn=lambda batch, ids: batches.add(batch) or range(9))
    assert batches == {0, 1}


def test_functions_that_fail_say_so():
    def fail(ids, scores):
        raise KeyError("disk full")

    with pytest.raises(KeyError, match="disk full"):
        mine(logits_processor=[fail])
    with pytest.raises(ValueError, match=r"a logits processor returned shape \(3,\); expected \(2, 211\)"):
        mine(logits_processor=[lambda ids, scores: np.zeros(3)])
    with pytest.raises(ValueError, match="allows no token"):
        mine(prefix_allowed_tokens_fn=lambda batch, ids: [])
    with pytest.raises(TypeError, match="neither a function"):
        mine(logits_processor=[3])
    with pytest.raises(TypeError, match="stopping_criteria is a list"):
        mine(stopping_criteria=lambda ids, scores: False)


def test_functions_under_jit():
    ids, mask = prompts()
    model, params = ours()
    allowed = lambda batch, ids: range(-int(ids[-1]) % 7, VOCAB, 7)
    run = jax.jit(
        lambda params, ids: (
            generate(model, params, ids, mask[1:3], max_new_tokens=6, eos_token_id=NEVER, prefix_allowed_tokens_fn=allowed).sequences
        )
    )
    assert np.asarray(run(params, jnp.asarray(ids[1:3])))[:, T:].tolist() == mine(6, prefix_allowed_tokens_fn=allowed)


def test_max_time():
    began = time.perf_counter()
    mine(1500, max_time=1e-4)  # whatever must be compiled
    assert [len(row) for row in mine(1500, max_time=1e-4)] == [1, 1]
    began = time.perf_counter()
    got = mine(1500, max_time=0.3)
    assert time.perf_counter() - began < 3 and 1 < len(got[0]) < 1500
    assert mine(30, max_time=60.0) == mine(30)
    assert len(mine(40, num_beams=2, max_time=1e-4)[0]) == 1


VALUES = {  # an option, and other values of the same structure
    "repetition_penalty": (1.2, 1.9), "encoder_repetition_penalty": (1.3, 0.8), "no_repeat_ngram_size": (3, 2),
    "encoder_no_repeat_ngram_size": (3, 2), "min_length": (305, 310), "min_new_tokens": (3, 8),
    "bad_words_ids": ([[5, 6]], [[7], [8, 9]]), "sequence_bias": ({(5,): 1.0}, {(6, 7): -2.0, (8,): 0.5}), "forced_bos_token_id": (5, 6),
    "forced_eos_token_id": (5, [6, 7]), "suppress_tokens": ([5], [6, 7, 8]), "begin_suppress_tokens": ([5], [6, 7, 8]),
    "exponential_decay_length_penalty": ((2, 1.1), (5, 1.2)), "guidance_scale": (1.5, 2.5), "max_time": (30.0, 40.0),
    "eos_token_id": (5, [6, 7]), "pad_token_id": (3, 4), "max_new_tokens": (20, 25), "max_length": (320, 325),
    "watermarking_config": (WatermarkingConfig(), WatermarkingConfig(bias=3.0, hashing_key=77)),
    "logits_processor": ([lambda ids, scores: scores], [lambda ids, scores: scores * 2]),
    "stopping_criteria": ([lambda ids, scores: False], [lambda ids, scores: ids[:, -1] == 5]),
    "prefix_allowed_tokens_fn": (lambda batch, ids: [5, 6], lambda batch, ids: range(9)),
    "mask_fn": (lambda ids: np.arange(VOCAB) > 3, lambda ids: np.arange(VOCAB) > 9),
    "temperature": (0.7, 1.3), "top_k": (5, 90), "top_p": (0.5, 0.9), "min_p": (0.1, 0.2), "top_h": (0.3, 0.6), "typical_p": (0.5, 0.7),
    "epsilon_cutoff": (0.01, 0.02), "eta_cutoff": (0.01, 0.02), "length_penalty": (0.5, 2.0), "early_stopping": (True, "never"),
    "key": (jax.random.key(1), jax.random.key(2)), "negative_prompt_ids": (np.full((2, 5), 7), np.full((2, 9), 11)),
}  # fmt: skip
ARGUMENTS = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "mask_fn", "key", "negative_prompt_ids"}
ELSEWHERE = {  # options whose values vary while compilations are counted, in the tests of the strategies that have them
    "diversity_penalty", "penalty_alpha", "force_words_ids", "constraints", "stop_strings", "decoder_start_token_id",
    "num_assistant_tokens", "assistant_confidence_threshold", "assistant_ensemble_weight", "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
}  # fmt: skip
STRUCTURE = {  # what runs, and with which shapes
    "do_sample", "num_beams", "num_beam_groups", "num_return_sequences", "dola_layers", "assistant_early_exit", "prefill_chunk_size",
    "num_assistant_tokens_schedule", "token_healing", "remove_invalid_values", "renormalize_logits", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "output_scores", "output_logits", "output_hidden_states", "output_attentions",
}  # fmt: skip
ON_THE_HOST = {  # what no program knows
    "bos_token_id", "assistant_lookbehind", "target_lookbehind", "return_dict_in_generate", "is_assistant", "compile_config",
    "disable_compile", "use_mtp", "speculation_type",
}  # fmt: skip
SAMPLED = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "key"}
TOGETHER = [
    sorted(SAMPLED),
    ["repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"],
    ["encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id", "watermarking_config"],
    ["min_length", "exponential_decay_length_penalty", "guidance_scale", "negative_prompt_ids", "eos_token_id", "pad_token_id"],
    ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "mask_fn", "min_new_tokens"],
    ["max_time"], ["max_new_tokens"], ["max_length"],
    ["length_penalty", "early_stopping"],
]  # fmt: skip


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_other_values_compile_nothing(names):
    """Option by option; and with all of them together changed once, so that each is held against the same programs."""
    ids, mask = prompts()
    first, other = ({name: VALUES[name][i] for name in names} for i in (0, 1))
    fixed = {"max_new_tokens": None if "max_length" in names else 20}
    if names[0] in SAMPLED:
        fixed |= {"do_sample": True}
    if "length_penalty" in names:
        fixed |= {"num_beams": 2}
    call = lambda options: generate(*ours(), ids[1:3], mask[1:3], **fixed | options)
    call(first)
    with compilations() as found:
        for name in names:
            call(first | {name: other[name]})
            assert found == [], name
        call(other)
    assert found == []


def test_every_option_is_walked():
    assert {name for names in TOGETHER for name in names} == set(VALUES)
    kinds = [set(VALUES) - ARGUMENTS, ELSEWHERE, STRUCTURE, ON_THE_HOST]
    assert set().union(*kinds) == set(FIELDS) and sum(map(len, kinds)) == len(FIELDS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5; expected an integer"), ({"bad_words_ids": [5]}, "bad_words_ids is"),
        ({"bad_words_ids": [[VOCAB]]}, "bad_words_ids names token 211; the model's vocabulary has 211"),
        ({"sequence_bias": {(): 1.0}}, "sequence_bias is"), ({"sequence_bias": {(VOCAB + 1,): 1.0}}, "sequence_bias names token 212"),
        ({"forced_eos_token_id": -1}, "forced_eos_token_id is -1"), ({"typical_p": 0.0}, "typical_p is 0.0"),
        ({"eta_cutoff": 1.0}, "eta_cutoff is 1.0"), ({"top_h": 2.0}, "top_h is 2.0"), ({"epsilon_cutoff": -1.0}, "epsilon_cutoff is -1.0"),
        ({"exponential_decay_length_penalty": 3}, "exponential_decay_length_penalty is 3"), ({"max_time": 0}, "max_time is 0"),
        ({"stop_strings": ""}, "stop_strings is ''"), ({"stop_strings": "x"}, "pass tokenizer="), ({"remove_invalid_values": 1}, "True"),
        ({"suppress_tokens": [5, 6], "forced_eos_token_id": 6}, "suppress_tokens forbids every token of forced_eos_token_id"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": np.ones((3, 4), int)}, r"negative_prompt_ids have shape \(3, 4\)"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": np.full((2, 4), VOCAB)}, "vocabulary has 211"),
        ({"watermarking_config": {"bias": 1.0, "scheme": "x"}}, "watermarking_config has scheme"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_say_what_is_wrong_before_compiling(options, words):
    with compilations() as found, pytest.raises(ValueError, match=words):
        generate(*ours(), np.full((2, 9), 5), max_new_tokens=4, **options)
    assert found == []


def test_options_without_effect_are_named():
    with pytest.warns(UserWarning, match=r"top_p, length_penalty: without effect as do_sample=False, num_beams=1"):
        generate(*ours(), np.full((2, 9), 5), max_new_tokens=4, top_p=0.5, length_penalty=2.0)


GROUPS = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}
PHRASES = {"num_beams": 3, "force_words_ids": [[5, 6], [7]]}


@pytest.mark.parametrize("options", [{"num_beams": 3}, GROUPS, PHRASES, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_every_strategy_is_traced_in_x64(options):
    model, params = ours()
    ids, mask = (np.asarray(x[1:3], np.int64) for x in prompts())
    with jax.enable_x64(True):
        out = jax.eval_shape(lambda params, ids: generate(model, params, ids, mask, max_new_tokens=5, **options).sequences, params, ids)
    assert out.shape == (2, T + 5) and out.dtype == np.int32
