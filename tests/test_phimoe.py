import numpy as np
import pytest
import transformers
from moe_tester import MoeTester
from tester import VariantTester

from jaxmodels.auto import AutoConfig
from jaxmodels.ops.moe import sparse_mixer

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "router_jitter_noise": 0.4,  # so wide that several experts share a weight
    "bos_token_id": None,
    "eos_token_id": None,
}


def longrope(original, short, long):
    factors = {"short_factor": short, "long_factor": long, "short_mscale": 1.1, "long_mscale": 1.3}
    return {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original, **factors}


class TestPhimoe(MoeTester):
    hf_config = transformers.PhimoeConfig(**SHAPE, attention_bias=True, lm_head_bias=True)
    full_size = ({"attention_bias": True, "lm_head_bias": True}, 41_873_153_344)  # microsoft/Phi-3.5-MoE-instruct


class TestPhimoeLongRope(VariantTester):
    """Rows on both sides of the original length, with the same factors there: transformers never uses the long ones."""

    hf_config = transformers.PhimoeConfig(
        **SHAPE | {"num_key_value_heads": 1, "sliding_window": 147},
        tie_word_embeddings=True,
        rope_parameters=longrope(129, [1, 1.1, 1.2, 1.3], [1, 1.1, 1.2, 1.3]),
    )


class TestPhimoeShortRope(VariantTester):
    """Every row within the original length: the long factors do not count."""

    hf_config = transformers.PhimoeConfig(**SHAPE, rope_parameters=longrope(400, [1, 1.1, 1.2, 1.3], [2, 3, 4, 5]))


def test_published_rope_is_kept():
    rope = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "short_mscale": 1.243, "long_mscale": 1.243}
    rope |= {"original_max_position_embeddings": 4096}
    config = AutoConfig.for_model("phimoe", rope_scaling=rope)
    assert (config.rope_parameters.rope_type, config.rope_parameters.long_mscale) == ("longrope", 1.243)
    written = transformers.PhimoeConfig(**config.to_dict()).rope_parameters
    assert {**written, **{k: v for k, v in rope.items() if k != "type"}} == written


def test_sparse_mixer_is_transformers():
    import torch
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    for jitter in (0.01, 0.3):
        weights, chosen = sparse_mixer(logits, 2, jitter)
        theirs, experts = sparsemixer(torch.tensor(logits), jitter, False)
        np.testing.assert_array_equal(chosen, experts)
        np.testing.assert_allclose(weights, theirs, rtol=1e-6)


def test_every_token_goes_to_two_experts():
    """HF's router chooses two, whatever the config says."""
    with pytest.raises(ValueError, match="num_experts_per_tok is 1; SparseMixer sends every token to 2 experts"):
        AutoConfig.for_model("phimoe", num_experts_per_tok=1)
