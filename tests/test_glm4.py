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
    "eos_token_id": 263,
    "head_dim": 12,
}


class TestGlm4(FamilyTester):
    hf_config = transformers.Glm4Config(**SHAPE)
    full_size = ({}, 9_400_279_040)  # THUDM/GLM-4-9B-0414


class TestGlm4TiedWithoutBiases(VariantTester):
    hf_config = transformers.Glm4Config(**SHAPE | {"num_key_value_heads": 1}, attention_bias=False, tie_word_embeddings=True)
