import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
}


class TestQwen3(FamilyTester):
    hf_config = transformers.Qwen3Config(**SHAPE)
    full_size = (  # Qwen/Qwen3-8B
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        8_190_735_360,
    )


class TestQwen3WindowInLaterLayers(VariantTester):
    hf_config = transformers.Qwen3Config(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        use_sliding_window=True,
        sliding_window=37,
        max_window_layers=1,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
    )
