import pytest
import transformers
from moe_tester import MoeTester
from tester import VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_offset": 0,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mamba_d_state": 5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestJamba(MoeTester):
    hf_config = transformers.JambaConfig(**SHAPE)
    full_size = ({}, 51_570_323_328)  # ai21labs/Jamba-v0.1


class TestJambaVariant(VariantTester):
    hf_config = transformers.JambaConfig(
        **SHAPE | {"num_hidden_layers": 2, "expert_layer_offset": 1, "num_key_value_heads": 1},
        mamba_expand=3,
        mamba_d_conv=2,
        mamba_dt_rank=7,
        mamba_conv_bias=False,
        mamba_proj_bias=True,
        tie_word_embeddings=True,
    )


def test_an_offset_beyond_its_period():
    with pytest.raises(ValueError, match="attn_layer_offset is 8; expected less than attn_layer_period, which is 8"):
        AutoConfig.for_model("jamba", attn_layer_offset=8)
