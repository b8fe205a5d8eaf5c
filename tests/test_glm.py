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
    "eos_token_id": 263,
}


class TestGlm(FamilyTester):
    hf_config = transformers.GlmConfig(**SHAPE)
    full_size = ({}, 9_399_951_360)  # THUDM/glm-4-9b-chat-hf


class TestGlmTiedWithoutBiases(VariantTester):
    hf_config = transformers.GlmConfig(
        **SHAPE | {"num_key_value_heads": 1},
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    )
