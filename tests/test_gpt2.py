from functools import partial

import jax
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
from jaxmodels.params import abstract_params, flatten, unflatten

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


ENDS = {  # shapes with 16 learned positions
    "gpt2": transformers.GPT2Config(**SHAPE | {"n_positions": 16, "pad_token_id": 0}),
    "opt": transformers.OPTConfig(
        vocab_size=263, hidden_size=48, ffn_dim=48, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=16,
        word_embed_proj_dim=48, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", pytest.param("opt", marks=pytest.mark.slow)])
def test_drafts_at_the_end_of_the_learned_positions(name, tmp_path):
    """Seven drafts where three positions are left: what is read behind the last one is nan, and must not reach what is before it; inside
    jit, where nobody can look how long a row is, too. A draft model may have learned fewer positions."""
    torch.manual_seed(0)
    hf = sensitive(transformers.AutoModelForCausalLM.from_config(ENDS[name]))
    hf.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path, dtype=jnp.float32)
    table = "model.decoder.embed_positions.weight" if name == "opt" else "transformer.wpe.weight"
    fewer = model.clone(config=model.config.replace(max_position_embeddings=14))
    short = unflatten({key: leaf[:-2] if key == table else leaf for key, leaf in flatten(params).items()})
    ids = np.random.default_rng(0).integers(1, 263, (2, 12), dtype=np.int32)
    ids[0, 8:] = ids[0, 4:8]
    mask = np.ones((2, 12), np.int32)
    mask[1, :7] = 0
    theirs = [
        hf.generate(torch.tensor(row[keep > 0])[None].long(), max_new_tokens=5, do_sample=False)[0, -5:] for row, keep in zip(ids, mask)
    ]
    seven = {"num_assistant_tokens": 7, "assistant_confidence_threshold": 0.0}
    call = partial(generate, model, params, max_new_tokens=9)
    with pytest.warns(UserWarning, match="generating 5 at most"):
        result = call(ids, mask, assistant_model=(model, params), **seven)
    np.testing.assert_array_equal(result.sequences[:, 12:], theirs)
    assert result.assistance.accepted.tolist() == [3, 3]
    ways = {
        "lookup": {"prompt_lookup_num_tokens": 7, "max_matching_ngram_size": 1},
        "short draft": {"assistant_model": (fewer, short), **seven},
        "exit": {"assistant_early_exit": 1, **seven},
    }
    for way, options in ways.items():
        traced = jax.jit(partial(call, **options))(ids, mask)
        np.testing.assert_array_equal(traced.sequences[:, 12:17], theirs, way)  # what comes behind the longest row's end is undefined
        assert traced.assistance.drafted[0] > 0 and (way != "short draft" or traced.assistance.accepted[0] == 1), way


def test_contrastive_search_at_the_end_of_the_learned_positions(tmp_path):
    """It reads the last token too: 16 positions after 12 tokens are room for 4, as in transformers."""
    hf = sensitive(transformers.AutoModelForCausalLM.from_config(ENDS["gpt2"]))
    hf.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path, dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(1, 263, (1, 12), dtype=np.int32)
    with pytest.warns(UserWarning, match="generating 4 at most"):
        result = generate(model, params, ids, max_new_tokens=5, penalty_alpha=0.6, top_k=3)
    assert result.sequences.shape == (1, 16)
