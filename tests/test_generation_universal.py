"""Sampled drafts by a model with another tokenizer: of the tokens that both have, and distributed as the model's own."""

import jax
import numpy as np
import pytest
from processing_fixtures import save
from test_generation_assisted import check_distribution, noisy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jaxmodels as jm
from jaxmodels.generation import generate
from jaxmodels.generation.universal import shared_words
from jaxmodels.models import llama
from jaxmodels.params import init_params

OWN = ["a", "b", "c", "ab", "d", "e"]
OTHER = ["e", "f", "bc", "c", "b", "a", "g", "h"]  # a, b, c and e are common; it reads ab as two and d as nothing
WORDS = [5, 4, 3, -1, -1, 0]


def letters(path, words):
    merges = [tuple(word) for word in words if len(word) == 2]
    backend = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return jm.AutoTokenizer.from_pretrained(save(path, backend, {"tokenizer_class": "PreTrainedTokenizerFast"}, "llama"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("letters")
    return letters(path / "own", OWN), letters(path / "other", OTHER)


def tiny(vocab_size, seed):
    config = llama.LlamaConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        eos_token_id=99,
    )  # fmt: skip
    model = llama.LlamaForCausalLM(config)
    return model, noisy(init_params(model, jax.random.key(seed)), 0.4)


def test_words_that_two_vocabularies_share(tokenizers):
    assert shared_words(*tokenizers, (6, 8)).tolist() == WORDS
    assert shared_words(*tokenizers, (7, 5)).tolist() == [-1, 4, 3, -1, -1, 0, -1]  # of models with more tokens and with fewer


def test_samples_follow_the_models_distribution(tokenizers):
    model, params = tiny(6, 1)
    B, prompt = 6_000, [1, 4, 2, 3]
    options = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.1, "temperature": 0.8, "top_k": 5, "max_new_tokens": 4}
    options |= {"do_sample": True, "key": jax.random.key(11), "tokenizer": tokenizers[0], "assistant_tokenizer": tokenizers[1]}
    out = generate(model, params, np.tile(prompt, (B, 1)), assistant_model=tiny(8, 2), **options)
    accepted = out.assistance.accepted.sum() / out.assistance.drafted.sum()
    assert 0.2 < accepted < 0.97 and out.assistance.drafted.sum() > B
    check_distribution(model, params, prompt, out.sequences[:, 4:])


@pytest.mark.slow
def test_rows_differ_and_end(tokenizers):
    """Ragged prompts, processors that leave a round no common word, ends; every draw what is allowed."""
    model, params = tiny(6, 1)
    ids = np.array([[0, 0, 0, 1], [3, 3, 5, 0], [0, 4, 4, 4]])
    mask = np.array([[0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    options = {"do_sample": True, "tokenizer": tokenizers[0], "assistant_tokenizer": tokenizers[1], "assistant_model": tiny(8, 2)}
    out = generate(model, params, ids, mask, key=jax.random.key(1), eos_token_id=5, max_new_tokens=30, **options)
    for row, n in zip(out.sequences[:, 4:], out.lengths):
        assert (row[: n - 1] != 5).all() and (n == 30 or row[n - 1] == 5) and not (row[n:] - 5).any()
    only = generate(
        model, params, ids, mask, key=jax.random.key(1), mask_fn=lambda ids: np.isin(np.arange(6), (3, 4)), max_new_tokens=9, **options
    )
    assert np.isin(only.sequences[:, 4:], (3, 4)).all() and only.assistance.drafted.sum() == 0
