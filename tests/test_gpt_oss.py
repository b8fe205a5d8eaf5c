import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import close, tensors
from moe_tester import MoeTester
from safetensors.torch import load_file, save_file
from tester import VariantTester
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxmodels import auto

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 37,
    "max_position_embeddings": 512,
    "swiglu_limit": 2.5,  # so that it is met, and seldom so nearly that rounding decides whether there is a gradient
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 8.0, "truncate": False, "original_max_position_embeddings": 128}


class TestGptOss(MoeTester):
    hf_config = transformers.GptOssConfig(**SHAPE, rope_parameters=YARN, router_aux_loss_coef=0.9)
    full_size = ({"num_hidden_layers": 24, "num_local_experts": 32}, 20_914_757_184)  # openai/gpt-oss-20b

    def test_mxfp4(self, case, tmp_path):
        """Experts' weights as in the released files: those that transformers makes of them, saved without blocks and scales."""
        rng = np.random.default_rng(0)
        stored = load_file(case.path / "model.safetensors")
        expected = {torch.float32: dict(stored), torch.bfloat16: {key: tensor.bfloat16() for key, tensor in stored.items()}}
        for key in [key for key in stored if key.endswith("experts.gate_up_proj") or key.endswith("experts.down_proj")]:
            experts, columns, rows = stored.pop(key).shape
            blocks = torch.tensor(rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8))
            scales = torch.tensor(rng.integers(121, 126, (experts, rows, columns // 32), np.uint8))
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
            for dtype, made in expected.items():
                made[key] = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        config = json.loads((case.path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
        for dtype, made in expected.items():
            path = tmp_path / str(dtype)
            path.mkdir()
            save_file(
                {key: tensor if tensor.dtype == torch.uint8 else tensor.to(dtype) for key, tensor in stored.items()},
                path / "model.safetensors",
            )
            (path / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
            for scan in (False, True):
                model, params = auto.from_pretrained(path, scan_layers=scan)
                assert model.dtype == jnp.dtype(str(dtype).removeprefix("torch."))
                auto.save_pretrained(path / "saved", model, params)
                written = tensors(path / "saved")
                raw = lambda tensor: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
                assert written == {key: raw(tensor) for key, tensor in made.items()}
                assert "quantization_config" not in json.loads((path / "saved" / "config.json").read_text())
        model, params = auto.from_pretrained(tmp_path / "torch.float32")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "torch.float32" / "saved", attn_implementation="eager")
        ids = case.inputs.input_ids[:1, :50]
        with torch.no_grad():
            close(jax.jit(lambda p: model.apply({"params": p}, ids).logits)(params), theirs(torch.tensor(ids, dtype=torch.long)).logits)


class TestGptOssVariant(VariantTester):
    """No biases in attention, one kv head, another order of layers, all experts, the released rope."""

    hf_config = transformers.GptOssConfig(
        **SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 1, "num_experts_per_tok": 5},
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=False,
        swiglu_alpha=1.1,
        tie_word_embeddings=True,
    )


def test_the_released_config():
    """openai/gpt-oss-20b's keys."""
    scaling = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    config = auto.AutoConfig.for_model("gpt_oss", rope_theta=150000, rope_scaling=scaling, swiglu_limit=7.0, initial_context_length=4096)
    assert config == auto.AutoConfig.for_model("gpt_oss")
    assert config.layer_kinds[:2] == ("sliding_attention", "full_attention")
    with pytest.raises(ValueError, match="layer_types has 3 entries"):
        _ = auto.AutoConfig.for_model("gpt_oss", layer_types=["full_attention"] * 3).layer_kinds
