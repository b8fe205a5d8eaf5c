import transformers
from moe_tester import MoeTester
from tester import VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "eos_token_id": None,
}


class TestOlmoe(MoeTester):
    hf_config = transformers.OlmoeConfig(**SHAPE)
    full_size = ({"intermediate_size": 1024}, 6_919_161_856)  # allenai/OLMoE-1B-7B-0924


class TestOlmoeClipped(VariantTester):
    hf_config = transformers.OlmoeConfig(
        **SHAPE, num_key_value_heads=1, clip_qkv=0.9, attention_bias=True, norm_topk_prob=True, tie_word_embeddings=True
    )
