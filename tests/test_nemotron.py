import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestNemotron(FamilyTester):
    hf_config = transformers.NemotronConfig(**SHAPE)
    full_size = (  # nvidia/Minitron-4B-Base
        {
            "hidden_size": 3072,
            "intermediate_size": 9216,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        4_190_509_056,
    )


class TestNemotronTiedWithBiases(VariantTester):
    hf_config = transformers.NemotronConfig(
        **SHAPE | {"num_key_value_heads": 1},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5},
    )
