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
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestGranite(FamilyTester):
    hf_config = transformers.GraniteConfig(
        **SHAPE, embedding_multiplier=12.0, attention_multiplier=0.15, residual_multiplier=0.22, logits_scaling=0.3
    )
    full_size = (  # ibm-granite/granite-3.0-8b-base
        {
            "vocab_size": 49155,
            "intermediate_size": 12800,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        8_170_848_256,
    )


class TestGraniteTiedWithBiases(VariantTester):
    hf_config = transformers.GraniteConfig(
        **SHAPE | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    )
