import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 17,
    "sliding_window": 37,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def ropes(full):
    return {"full_attention": {"rope_theta": 1e5, **full}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}


class TestGemma3(FamilyTester):
    hf_config = transformers.Gemma3TextConfig(**SHAPE, rope_parameters=ropes({"rope_type": "default"}))
    full_size = (  # google/gemma-3-1b-pt
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "sliding_window": 512,
        },
        999_885_952,
    )


class TestGemma3LinearRope(VariantTester):
    hf_config = transformers.Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 3, "sliding_window_pattern": 3, "num_key_value_heads": 1},
        rope_parameters=ropes({"rope_type": "linear", "factor": 8.0}),
        final_logit_softcapping=3.5,
        tie_word_embeddings=False,
    )


def test_ropes_in_both_spellings():
    older = {"rope_theta": 1e5, "rope_local_base_freq": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = AutoConfig.for_model("gemma3_text", **older)
    assert config == AutoConfig.for_model("gemma3_text", rope_parameters=ropes({"rope_type": "linear", "factor": 8.0}))
    written = config.to_dict()
    assert {key: written[key] for key in older} == older
    assert type(config).from_dict(written) == config
    assert transformers.Gemma3TextConfig(**written).rope_parameters["full_attention"]["factor"] == 8.0
