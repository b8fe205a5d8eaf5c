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
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestExaone4(FamilyTester):
    hf_config = transformers.Exaone4Config(**SHAPE, sliding_window=37, sliding_window_pattern=2)
    full_size = (  # LGAI-EXAONE/EXAONE-4.0-32B
        {
            "hidden_size": 5120,
            "intermediate_size": 27392,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window_pattern": 4,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
        32_003_216_384,
    )


class TestExaone4WithoutWindow(VariantTester):
    """As the 1.2B: rope in every layer; tied."""

    hf_config = transformers.Exaone4Config(
        **SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 1},
        sliding_window=None,
        layer_types=["full_attention"] * 2,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        },
    )


def test_patterns_of_letters():
    config = AutoConfig.for_model("exaone4", num_hidden_layers=8, sliding_window_pattern="LLLG")
    assert config.layer_kinds == AutoConfig.for_model("exaone4", num_hidden_layers=8).layer_kinds
    config = AutoConfig.for_model("exaone4", num_hidden_layers=3, sliding_window_pattern="L")  # the last attends to everything
    assert config.layer_kinds == ("sliding_attention", "sliding_attention", "full_attention")
    config = AutoConfig.for_model("exaone4", num_hidden_layers=2, sliding_window=None)
    assert config.layer_kinds == ("full_attention",) * 2
