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
    "sliding_window": 37,
}


class TestStarcoder2(FamilyTester):
    hf_config = transformers.Starcoder2Config(**SHAPE)
    full_size = (  # bigcode/starcoder2-7b
        {"hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32, "num_attention_heads": 36, "num_key_value_heads": 4},
        7_173_923_840,
    )


class TestStarcoder2WithoutBiases(VariantTester):
    hf_config = transformers.Starcoder2Config(
        **SHAPE | {"num_key_value_heads": 1, "sliding_window": None}, use_bias=False, tie_word_embeddings=False
    )
