import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


class TestQwen2(FamilyTester):
    hf_config = transformers.Qwen2Config(**SHAPE)
    full_size = (  # Qwen/Qwen2.5-7B
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
    )


class TestQwen2WindowInLaterLayers(VariantTester):
    hf_config = transformers.Qwen2Config(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        use_sliding_window=True,
        sliding_window=37,
        max_window_layers=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
    )
