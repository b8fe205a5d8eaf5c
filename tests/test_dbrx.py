import pytest
import torch
import transformers
from moe_tester import MoeTester
from tester import VariantTester
from transformers.models.dbrx.modeling_dbrx import DbrxExperts

from jaxmodels.auto import AutoConfig

SHAPE = {"vocab_size": 263, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 512}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
FFN = {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3}


@pytest.fixture(autouse=True, scope="module")
def gradients_of_experts():
    """transformers 5.23 cuts the experts' weights out of the graph (their slices are taken under no_grad), so that torch would have no
    gradients to compare with: here the same products with them."""
    patch = pytest.MonkeyPatch()

    def forward(self, x, top_k_index, top_k_weights):
        shape, tokens = x.shape, x.reshape(-1, self.hidden_size)
        w1, v1, w2 = (w.view(self.num_experts, self.ffn_hidden_size, self.hidden_size) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        out = torch.zeros_like(tokens)
        for e in range(self.num_experts):
            token, place = torch.where(top_k_index == e)
            y = self.mlp(tokens[token], w1[e], v1[e], w2[e]) * top_k_weights[token, place, None]
            out.index_add_(0, token, y)
        return out.view(shape)

    patch.setattr(DbrxExperts, "forward", forward)
    yield
    patch.undo()


class TestDbrx(MoeTester):
    hf_config = transformers.DbrxConfig(
        **SHAPE, attn_config={"kv_n_heads": 2, "clip_qkv": 1.1, "rope_theta": 50000.0}, ffn_config=FFN, rope_parameters=ROPE
    )
    full_size = (  # databricks/dbrx-base
        {
            "vocab_size": 100352,
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "max_seq_len": 32768,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
        131_596_523_520,
    )


class TestDbrxOneKvHead(VariantTester):
    hf_config = transformers.DbrxConfig(
        **SHAPE,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0},
        ffn_config=FFN | {"moe_normalize_expert_weights": None, "ffn_act_fn": {"name": "gelu"}},
    )


def test_published_theta():
    """transformers 4 kept it in attn_config, and wrote neither rope_theta nor rope_parameters beside it."""
    config = AutoConfig.for_model("dbrx", attn_config={"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000})
    assert config.rope_parameters.rope_theta == 500000
    assert transformers.DbrxConfig(**config.to_dict()).rope_parameters["rope_theta"] == 500000
