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


class TestOlmo2(FamilyTester):
    hf_config = transformers.Olmo2Config(**SHAPE)
    full_size = ({"vocab_size": 100352}, 7_298_617_344)  # allenai/OLMo-2-1124-7B


class TestOlmo2TiedWithBiases(VariantTester):
    hf_config = transformers.Olmo2Config(**SHAPE | {"num_key_value_heads": 1}, attention_bias=True, tie_word_embeddings=True)
