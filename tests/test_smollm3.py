import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestSmolLM3(FamilyTester):
    hf_config = transformers.SmolLM3Config(**SHAPE, no_rope_layer_interval=2)
    full_size = ({"pad_token_id": None}, 3_075_098_624)  # HuggingFaceTB/SmolLM3-3B


class TestSmolLM3WindowAndBiases(VariantTester):
    hf_config = transformers.SmolLM3Config(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=37,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
