import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestPhi(FamilyTester):
    hf_config = transformers.PhiConfig(**SHAPE)
    full_size = (  # microsoft/phi-2
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "partial_rotary_factor": 0.4},
        2_779_683_840,
    )


class TestPhiTiedWithHeadNorms(VariantTester):
    hf_config = transformers.PhiConfig(**SHAPE | {"num_key_value_heads": 1}, qk_layernorm=True, tie_word_embeddings=True)
