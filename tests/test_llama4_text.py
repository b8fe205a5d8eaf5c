import numpy as np
import pytest
import transformers
from moe_tester import MoeTester
from test_deepseek_v2 import RouterLogits
from tester import VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 24,
    "intermediate_size_mlp": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 37,
    "floor_scale": 20,
    "attn_scale": 0.7,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def of_the_whole_model(tensors):
    """As in the hub's files, beside a vision model."""
    found = {f"language_model.{key}": tensor for key, tensor in tensors.items()}
    vision = ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight")
    return found | {key: np.ones(4, np.float32) for key in vision}


class TestLlama4(RouterLogits, MoeTester):
    """Experts in every other layer, chunks and rope in the others."""

    hf_config = transformers.Llama4TextConfig(**SHAPE, no_rope_layers=[1, 0, 1, 0], rope_parameters=LLAMA3)
    full_size = ({}, 107_769_861_120)  # the text part of meta-llama/Llama-4-Scout-17B-16E
    other_keys = (of_the_whole_model, lambda tensors: {key.removeprefix("model."): tensor for key, tensor in tensors.items()})


class TestLlama4Variant(VariantTester):
    """Maverick's: no norm of heads; also two experts a token, one kv head, biases, layers listed one by one, no temperature, tied."""

    hf_config = transformers.Llama4TextConfig(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        num_experts_per_tok=2,
        moe_layers=[0, 2],
        no_rope_layers=[1, 0, 1],
        layer_types=["full_attention", "chunked_attention", "chunked_attention"],
        use_qk_norm=False,
        attention_bias=True,
        attn_temperature_tuning=False,
        tie_word_embeddings=True,
    )


def test_lists_of_layers():
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=5, interleave_moe_layer_step=2)
    chunks = [("chunked_attention", True, i % 2 == 1) for i in range(3)]
    assert [tuple(kind) for kind in config.layer_kinds[:4]] == [*chunks, ("full_attention", False, True)]
    assert config == AutoConfig.for_model("llama4_text", num_hidden_layers=5, interleave_moe_layer_step=2, moe_layers=None)
    assert not any(kind.experts for kind in AutoConfig.for_model("llama4_text", moe_layers=[]).layer_kinds)
    for wrong in ({"no_rope_layers": [1]}, {"layer_types": ["full_attention"]}, {"attention_chunk_size": None}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            _ = AutoConfig.for_model("llama4_text", num_hidden_layers=5, **wrong).layer_kinds
