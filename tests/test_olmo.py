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


class TestOlmo(FamilyTester):
    hf_config = transformers.OlmoConfig(**SHAPE, clip_qkv=0.7)
    full_size = ({}, 6_888_095_744)  # allenai/OLMo-7B-hf


class TestOlmoTiedWithBiases(VariantTester):
    hf_config = transformers.OlmoConfig(**SHAPE | {"num_key_value_heads": 1}, attention_bias=True, tie_word_embeddings=True)
