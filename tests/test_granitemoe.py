import transformers
from moe_tester import MoeTester
from tester import VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.7,
}


class TestGraniteMoe(MoeTester):
    hf_config = transformers.GraniteMoeConfig(**SHAPE)
    full_size = (  # ibm-granite/granite-3.0-1b-a400m-base
        {
            "vocab_size": 49155,
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": True,
        },
        1_334_628_352,
    )


class TestGraniteMoeTiedWithBiases(VariantTester):
    hf_config = transformers.GraniteMoeConfig(**SHAPE | {"num_key_value_heads": 1}, attention_bias=True, tie_word_embeddings=True)
