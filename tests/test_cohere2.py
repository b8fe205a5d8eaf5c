import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "sliding_window": 37,
    "logit_scale": 0.7,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestCohere2(FamilyTester):
    hf_config = transformers.Cohere2Config(**SHAPE, sliding_window_pattern=2)
    full_size = (  # CohereForAI/c4ai-command-r7b-12-2024
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        8_028_033_024,
    )


class TestCohere2BiasesAndPatternOfThree(VariantTester):
    hf_config = transformers.Cohere2Config(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        sliding_window_pattern=3,
        attention_bias=True,
        tie_word_embeddings=False,
    )
