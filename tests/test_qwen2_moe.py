import transformers
from moe_tester import MoeTester
from tester import VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
}


class TestQwen2Moe(MoeTester):
    hf_config = transformers.Qwen2MoeConfig(**SHAPE)
    full_size = ({}, 14_315_784_192)  # Qwen/Qwen1.5-MoE-A2.7B


class TestQwen2MoeEverySecondLayer(VariantTester):
    """The last of four layers has experts: every second might, but the second is listed as plain."""

    hf_config = transformers.Qwen2MoeConfig(
        **SHAPE | {"num_hidden_layers": 4, "num_key_value_heads": 1},
        mlp_only_layers=[1],
        decoder_sparse_step=2,
        norm_topk_prob=True,
        qkv_bias=False,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=37,
        max_window_layers=3,
    )
