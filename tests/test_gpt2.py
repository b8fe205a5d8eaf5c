import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import close, sensitive, tensors
from tester import FamilyTester, VariantTester

from jaxmodels.auto import from_pretrained, save_pretrained
from jaxmodels.generation import generate
from jaxmodels.models.gpt2 import GPT2Config, GPT2DoubleHeadsModel
from jaxmodels.params import abstract_params

SHAPE = {"vocab_size": 263, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 512, "bos_token_id": None, "eos_token_id": None}


class TestGPT2(FamilyTester):
    hf_config = transformers.GPT2Config(**SHAPE, n_inner=80)
    full_size = ({}, 124_439_808)  # openai-community/gpt2
    other_keys = (
        # as published: no prefix, a buffer with the causal mask
        lambda file: {k.removeprefix("transformer."): v for k, v in file.items()} | {"h.1.attn.bias": np.ones((1, 1, 9, 9), bool)},
        lambda file: file | {"lm_head.weight": file["transformer.wte.weight"], "transformer.h.0.attn.masked_bias": np.float32([-1e4])},
    )


class TestGPT2ScaledByLayer(VariantTester):
    hf_config = transformers.GPT2Config(
        **SHAPE, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, activation_function="relu", tie_word_embeddings=False
    )


@pytest.mark.parametrize("summary", [{}, {"summary_activation": "tanh", "tie_word_embeddings": False}])
def test_double_heads(tmp_path, summary):
    """Choices padded on the right, each judged by the token it names, by its last one without names, and without padding."""
    hf = sensitive(transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**SHAPE, **summary)))
    hf.save_pretrained(tmp_path / "theirs")
    model, params = from_pretrained(tmp_path / "theirs", GPT2DoubleHeadsModel, dtype=jnp.float32, scan_layers=True)
    save_pretrained(tmp_path / "ours", model, params)
    assert tensors(tmp_path / "ours") == tensors(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 263, (2, 3, 17), dtype=np.int32), np.ones((2, 3, 17), np.int32)
    mask[0, 1, 9:], mask[1, 2, 4:] = 0, 0
    labels = np.where(mask == 1, ids, -100)
    given = {"attention_mask": mask, "mc_token_ids": mask.sum(-1) - 1, "labels": labels, "mc_labels": np.array([2, 0])}
    with torch.no_grad():
        theirs = hf(**{name: torch.tensor(x).long() for name, x in {"input_ids": ids, **given}.items()})
        whole = hf(torch.tensor(ids).long()).mc_logits
    out = model.apply({"params": params}, ids, **given)
    close(out.loss, theirs.loss)
    close(out.mc_loss, theirs.mc_loss)
    close(out.logits[mask == 1], theirs.logits[torch.tensor(mask) == 1])
    close(out.mc_logits, theirs.mc_logits)
    close(model.apply({"params": params}, ids, mask).mc_logits, theirs.mc_logits)
    close(model.apply({"params": params}, ids).mc_logits, whole)


def test_double_heads_need_one_number():
    config = GPT2Config.from_dict({"summary_type": "mean"})
    with pytest.raises(ValueError, match="summary_type is 'mean' in the config; a choice needs"):
        abstract_params(GPT2DoubleHeadsModel(config))


def test_beyond_the_learned_positions(tmp_path):
    """transformers ends with an IndexError there. The last token is not read: 16 positions after 12 tokens are room for 5."""
    hf = sensitive(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE | {"n_positions": 16, "pad_token_id": 0})))
    hf.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path, dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(1, 263, (2, 20), dtype=np.int32)
    mask = np.ones((2, 12), np.int32)
    mask[1, :9] = 0
    with pytest.warns(UserWarning, match="9 tokens after 12 exceed the 16 learned positions: generating 5 at most"):
        result = generate(model, params, ids[:, :12], mask, max_new_tokens=9)
    theirs = hf.generate(torch.tensor(ids[:1, :12]).long(), max_new_tokens=5, do_sample=False)
    np.testing.assert_array_equal(result.sequences[:1], theirs)
    for call in (
        lambda: model.apply({"params": params}, ids),
        lambda: generate(model, params, ids, max_new_tokens=1),
        lambda: generate(model, params, ids[:, :1], max_new_tokens=1, cache=result.cache),
    ):
        with pytest.raises(ValueError, match="has learned 16 positions"):
            call()
