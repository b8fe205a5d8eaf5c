import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestMistral(FamilyTester):
    hf_config = transformers.MistralConfig(**SHAPE, sliding_window=37)
    full_size = ({"vocab_size": 32000}, 7_241_732_096)  # mistralai/Mistral-7B-v0.1


class TestMistralWithoutWindow(VariantTester):
    hf_config = transformers.MistralConfig(**SHAPE | {"num_key_value_heads": 1}, sliding_window=None)
