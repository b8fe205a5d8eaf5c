import jax
import numpy as np
import torch
import transformers
from cases import close
from moe_tester import MoeTester
from tester import VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "kv_lora_rank": 18,
    "q_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}


class RouterLogits:
    def test_router_loss(self, case):
        """HF's loss has nothing of the router's, which is reported."""
        ids = case.inputs.input_ids[:2, :50]
        as_long = torch.tensor(ids, dtype=torch.long)
        with torch.no_grad():
            theirs = case.hf(as_long, labels=as_long, output_router_logits=True)
        model, params = case.scanned
        out = jax.jit(lambda p: model.apply({"params": p}, ids, labels=ids, output_router_logits=True))(params)
        close(out.loss, theirs.loss)
        assert len(out.router_logits) == len(theirs.router_logits) == 2
        for mine, reference in zip(out.router_logits, theirs.router_logits):
            close(np.asarray(mine).reshape(100, -1), reference)


class TestDeepseekV2(RouterLogits, MoeTester):
    """Groups, and yarn with a magnitude in the scale of attention."""

    hf_config = transformers.DeepseekV2Config(
        **SHAPE,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.1,
            "original_max_position_embeddings": 128,
        },
    )
    full_size = (  # deepseek-ai/DeepSeek-V2-Lite
        {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
        },
        15_706_484_224,
    )


class TestDeepseekV2Lite(VariantTester):
    """Queries without a latent, experts in every layer, biases, tied."""

    hf_config = transformers.DeepseekV2Config(
        **SHAPE | {"q_lora_rank": None, "first_k_dense_replace": 0, "num_experts_per_tok": 3},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
