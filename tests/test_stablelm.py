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


class TestStableLm(FamilyTester):
    hf_config = transformers.StableLmConfig(**SHAPE, partial_rotary_factor=0.5)
    full_size = ({}, 2_795_443_200)  # stabilityai/stablelm-3b-4e1t


class TestStableLmParallelWithHeadNorms(VariantTester):
    """As in StableLM 2 12B; tied, with biases."""

    hf_config = transformers.StableLmConfig(
        **SHAPE, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True, tie_word_embeddings=True
    )
