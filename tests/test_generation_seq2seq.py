"""An encoder-decoder under every processor and strategy: T5 against torch's, row by row, and against what transformers 4.45.2 wrote."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from fixtures.make_generation_fixtures import HERE, T5, T5_CASES, weights
from fixtures.make_generation_fixtures import prompts as fixture_prompts
from generation_fixtures import compilations
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_generation_assisted import SURE, noisy

import jaxmodels as jm
from jaxmodels.generation import WatermarkingConfig, generate

VOCAB, NEW = T5["vocab_size"], 12
NEVER = VOCAB + 5
LENGTHS = (17, 6)
T = max(LENGTHS)


@functools.cache
def torch_model():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    found = weights({name: tuple(x.shape) for name, x in model.named_parameters()})
    model.load_state_dict({name: torch.tensor(x) for name, x in found.items()}, strict=False)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    torch_model().save_pretrained(folder)
    return jm.AutoModelForSeq2SeqLM.from_pretrained(folder)


@functools.cache
def prompts():
    mask = np.stack([np.arange(T) >= T - n for n in LENGTHS]).astype(int)
    return np.random.default_rng(0).integers(3, VOCAB, mask.shape) * mask, mask


def theirs(**options):
    rows = []
    for row, n in enumerate(LENGTHS):
        ids = torch.tensor(prompts()[0][row : row + 1, -n:])
        options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None} | options
        with torch.no_grad():
            rows.append(torch_model().generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 1:].tolist())
    return rows


def mine(pair, **options):
    out = generate(*pair, *prompts(), **{"max_new_tokens": NEW, "eos_token_id": NEVER, "pad_token_id": 0} | options)
    return [row[1 : 1 + n].tolist() for row, n in zip(out.sequences, out.lengths)]


@functools.cache
def greedy():
    return theirs()


def ends(rows):
    """Without what pads a row after its end; pad_token_id is 0."""
    return [row[: len(row) - next((i for i, token in enumerate(row[::-1]) if token), 0)] for row in rows]


@functools.cache
def pool():
    """Options and values that may go together in greedy decoding and in beams."""
    said = st.sampled_from(sorted({*greedy()[0], *greedy()[1]}))
    words = st.lists(said, min_size=1, max_size=2)
    return st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.floats(1.05, 2.0), "no_repeat_ngram_size": st.integers(1, 3), "min_new_tokens": st.integers(1, 9),
            "encoder_no_repeat_ngram_size": st.integers(1, 3), "encoder_repetition_penalty": st.floats(1.1, 2.0),
            "bad_words_ids": st.lists(words, min_size=1, max_size=3, unique_by=tuple), "forced_bos_token_id": st.integers(3, VOCAB - 1),
            "sequence_bias": st.dictionaries(words.map(tuple), st.floats(-5, 5), min_size=1, max_size=3),
            "suppress_tokens": st.lists(said, min_size=1, max_size=3), "begin_suppress_tokens": st.lists(said, min_size=1, max_size=3),
            "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(1.0, 1.5)),
            "remove_invalid_values": st.just(True), "renormalize_logits": st.just(True), "forced_eos_token_id": st.just(7),
        },
    )  # fmt: skip


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_random_options_equal_torch(pair, beams):
    @given(options=pool(), eos=st.lists(st.sampled_from(greedy()[0][2:] + greedy()[1][2:]), min_size=2, max_size=2, unique=True))
    @settings(deadline=None, max_examples=4, derandomize=True, phases=[Phase.generate])
    def check(options, eos):
        for name in () if beams == 1 else ("exponential_decay_length_penalty", "remove_invalid_values"):
            options.pop(name, None)  # beams would add up infinities
        options = options | {"eos_token_id": eos, "num_beams": beams, "pad_token_id": 0}
        assert ends(mine(pair, **options)) == ends(theirs(**options))

    check()


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_functions_and_marks(pair, beams):
    """A custom processor, criterion and prefix function see the decoder's tokens; a watermark counts them."""
    functions = {
        "logits_processor": [lambda ids, scores: scores * (2 if ids.shape[1] % 2 else 0.4)],
        "stopping_criteria": [lambda ids, scores: ids[:, -1] % 5 == 0],
        "prefix_allowed_tokens_fn": lambda batch, ids: list(range(-int(ids[-1]) % 7 + 1, VOCAB, 7)),
    }
    assert ends(mine(pair, num_beams=beams, **functions)) == ends(theirs(num_beams=beams, pad_token_id=0, **functions))
    marked = theirs(num_beams=beams, watermarking_config=transformers.WatermarkingConfig(bias=3.0))
    assert mine(pair, num_beams=beams, watermarking_config=WatermarkingConfig(bias=3.0)) == marked != greedy()


@pytest.mark.parametrize("name", T5_CASES)
def test_strategies_that_transformers_dropped(pair, name):
    about = json.loads((HERE / "generation.json").read_text())
    assert about["t5"] == T5 and about["t5_cases"] == json.loads(json.dumps(T5_CASES))
    assert about["t5_weights"] == sorted(name for name, _ in torch_model().named_parameters())
    with np.load(HERE / "generation.npz") as file:
        want = file[f"{name}/tokens"]
    out = generate(*pair, *fixture_prompts(), pad_token_id=0, **T5_CASES[name])
    np.testing.assert_array_equal(out.sequences, want)


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "constraints": {"num_beams": 4, "force_words_ids": [[11, 12]]},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "draft": {"num_assistant_tokens": 4, **SURE},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}
FEW = {"nbits": 8, "q_group_size": 8, "residual_length": 64}
CACHES = [{"cache_implementation": "offloaded"}, {"cache_implementation": "quantized", "cache_config": FEW}, {"use_cache": False}]
CHEAP = ("beams", "draft")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in STRATEGIES])
def test_every_strategy_over_every_cache(pair, name):
    """The same tokens, or a reason; greedy drafts and beams are held against torch, too."""
    options = {"decoder_input_ids": np.array([[0, 5, 6, 7, 8], [0, 9, 8, 7, 6]]), "max_new_tokens": NEW, "eos_token_id": NEVER}
    options |= STRATEGIES[name] | ({"key": jax.random.key(0)} if "sampl" in name else {})
    options |= {"assistant_model": (pair[0], noisy(pair[1]))} if name == "draft" else {}
    want = generate(*pair, *prompts(), **options).sequences
    if name in CHEAP:
        beams = {"num_beams": options.get("num_beams", 1)}
        begun = [theirs(decoder_input_ids=torch.tensor(row)[None], **beams)[i] for i, row in enumerate(options["decoder_input_ids"])]
        assert want[:, 1:].tolist() == begun
    for cache in CACHES:
        few = "quantized" in cache.values()
        refused = {"contrastive": not cache.get("use_cache", True), "lookup": not cache.get("use_cache", True) or few}
        if refused.get({"draft": "lookup"}.get(name, name), False):
            with compilations() as found, pytest.raises(ValueError, match="cache"):
                generate(*pair, *prompts(), **options, **cache)
            assert found == []
        else:
            np.testing.assert_array_equal(generate(*pair, *prompts(), **options, **cache).sequences, want, err_msg=str(cache))


def test_other_values_compile_nothing(pair):
    """Of what only encoder-decoders and assistants have."""
    options = {"max_new_tokens": NEW, "eos_token_id": NEVER, "assistant_model": (pair[0], noisy(pair[1])), "num_assistant_tokens": 4}
    call = functools.partial(generate, *pair, *prompts(), **options)
    call(decoder_start_token_id=3, assistant_ensemble_weight=0.3)
    with compilations() as found:
        call(decoder_start_token_id=[4, 5], assistant_ensemble_weight=0.7, num_assistant_tokens=6, decoder_input_ids=np.full((2, 3), 8))
    assert found == []
