import transformers
from moe_tester import MoeTester
from tester import VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
}


class TestQwen3Moe(MoeTester):
    hf_config = transformers.Qwen3MoeConfig(**SHAPE, norm_topk_prob=True)
    full_size = (  # Qwen/Qwen3-30B-A3B
        {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        30_532_122_624,
    )


class TestQwen3MoeSomeLayers(VariantTester):
    hf_config = transformers.Qwen3MoeConfig(
        **SHAPE | {"num_key_value_heads": 1},
        mlp_only_layers=[1],
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=37,
    )
