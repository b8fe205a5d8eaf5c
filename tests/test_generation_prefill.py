"""Prompts read in chunks: the same tokens with everything that reads a prompt, and less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_fixtures import VOCAB, compilations, ours, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation_assisted import SURE, draft, family, noisy

from jaxmodels.generation import generate
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import abstract_params

NEVER = VOCAB + 5
LENGTHS = np.array([40, 7, 33, 1])


def texts(vocab):
    mask = (np.arange(40) >= 40 - LENGTHS[:, None]).astype(int)
    return np.random.default_rng(0).integers(3, vocab, mask.shape) * mask, mask


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "key": jax.random.key(3), "temperature": 0.7, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": np.arange(4 * 50).reshape(4, 50) % 50 + 3},
    "dola": {"dola_layers": [0]},
    "records": {"output_logits": True, "encoder_repetition_penalty": 1.5},
    "draft": {"assistant_model": draft, "num_assistant_tokens": 4, **SURE},
    "offloaded": {"cache_implementation": "offloaded"},
    "sink": {"cache_implementation": "sink", "cache_config": {"window_length": 20}},
}


@functools.cache
def whole(way):
    return call(way)


def call(way, **options):
    found = {name: value() if callable(value) else value for name, value in WAYS[way].items()}
    return generate(*ours(), *texts(VOCAB), max_new_tokens=12, eos_token_id=NEVER, **found, **options)


@settings(deadline=None, max_examples=2, derandomize=True)
@given(way=st.sampled_from(sorted(WAYS)), size=st.integers(3, 47))
def test_every_strategy(way, size):
    want, got = whole(way), call(way, prefill_chunk_size=size)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    if got.logits is not None:
        assert np.abs(got.logits - want.logits).max() <= 1e-4 * want.logits.std()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_strategy(way):
    np.testing.assert_array_equal(call(way, prefill_chunk_size=9).sequences, whole(way).sequences)


MORE = [("mamba", False), ("mistral", False), ("gemma2", True), ("gpt2", False), ("jamba", True), ("recurrent_gemma", True)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("name", "scan_layers"), [("mistral", True), *SLOW])
def test_families(name, scan_layers):
    """Windows shorter than a chunk and recurrent layers; and the turn after it, in chunks, too."""
    model, params = family(name, scan_layers)
    one, other = (functools.partial(generate, model, params, max_new_tokens=9, **more) for more in ({}, {"prefill_chunk_size": 11}))
    ids, mask = texts(60)
    want, got = one(ids, mask), other(ids, mask)
    np.testing.assert_array_equal(got.sequences, want.sequences)
    turns = [call(ids[:, ::-1], mask[:, ::-1], cache=out.cache).sequences for call, out in ((one, want), (other, got))]
    np.testing.assert_array_equal(*turns)


@pytest.mark.slow
def test_an_encoder_decoder():
    """It is the decoder's prompt that is read in chunks; the encoder reads once."""
    model, params = family("t5", False)
    ids, mask = texts(60)
    options = {"decoder_input_ids": ids[:, ::-1], "decoder_attention_mask": mask[:, ::-1], "max_new_tokens": 6}
    want, got = (generate(model, params, ids, mask, **options, **more) for more in ({}, {"prefill_chunk_size": 8}))
    np.testing.assert_array_equal(got.sequences, want.sequences)
    assisted = generate(
        model, params, ids, mask, assistant_model=(model, noisy(params)), num_assistant_tokens=4, prefill_chunk_size=8, **options
    )
    np.testing.assert_array_equal(assisted.sequences, want.sequences)


def test_chunks_need_less_memory():
    """By XLA's account of the whole program, for a prompt of 2,048 tokens; what is left is the cache and the weights."""
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model, ids = LlamaForCausalLM(config, scan_layers=True), jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    params = abstract_params(model)

    def temporary(size):
        call = lambda params, ids: generate(model, params, ids, max_new_tokens=4, eos_token_id=NEVER, prefill_chunk_size=size).sequences
        return jax.jit(call).lower(params, ids).compile().memory_analysis().temp_size_in_bytes

    none, half, few = map(temporary, (None, 1024, 256))
    assert few < half < none and few < none / 2


def test_lengths_of_prompts_compile_nothing():
    ids, mask = prompts()
    options = {"max_new_tokens": 4, "eos_token_id": NEVER, "prefill_chunk_size": 64}
    generate(*ours(), ids, mask, **options)
    with compilations() as found:
        generate(*ours(), ids[:, 20:], mask[:, 20:], **options)
    assert found == []
    assert generate(*ours(), ids, mask, **options | {"prefill_chunk_size": 5000}).cache.slots < 512  # more than there is to read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefill_chunk_size": 0}, "prefill_chunk_size is 0; expected an integer above 0"),
        ({"prefill_chunk_size": 8, "use_cache": False}, "follow one another through a cache"),
        ({"prefill_chunk_size": 8, "penalty_alpha": 0.6, "top_k": 4}, "contrastive search looks at the whole prompt"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    ours()  # made now, if no test before has
    with compilations() as found, pytest.raises(ValueError, match=words):
        generate(*ours(), np.full((1, 9), 5), max_new_tokens=4, **options)
    assert found == []
    with pytest.raises(ValueError, match="make it static"):
        jax.jit(lambda size: generate(*ours(), np.full((1, 9), 5), max_new_tokens=4, prefill_chunk_size=size).sequences)(8)
