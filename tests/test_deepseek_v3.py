import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from cases import close, tensors
from moe_tester import MoeTester
from safetensors.numpy import load_file
from safetensors.torch import save_file
from test_deepseek_v2 import SHAPE, RouterLogits
from tester import VariantTester
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from jaxmodels import auto

V3 = SHAPE | {
    "num_key_value_heads": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}


def further_predictions(tensors):
    """As the hub's files have it: a layer more, with embeddings and a head of its own."""
    more = {key.replace(".layers.2.", ".layers.3."): tensor for key, tensor in tensors.items() if ".layers.2." in key}
    more |= {"model.layers.3.enorm.weight": np.ones(48, np.float32), "model.layers.3.shared_head.head.weight": tensors["lm_head.weight"]}
    return {**tensors, **more}


class TestDeepseekV3(RouterLogits, MoeTester):
    hf_config = transformers.DeepseekV3Config(
        **V3,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "mscale": 0.9,
            "mscale_all_dim": 1.1,
            "original_max_position_embeddings": 128,
        },
    )
    full_size = ({}, 671_026_419_200)  # deepseek-ai/DeepSeek-V3, without its layer of further predictions
    other_keys = (further_predictions, lambda tensors: {key.removeprefix("model."): tensor for key, tensor in tensors.items()})

    def test_float8(self, case, tmp_path):
        """A file with block scales: its parameters are those that transformers' dequantisation makes, and it is saved without scales."""
        block, plain = (16, 16), case.path / "model.safetensors"
        stored, expected = {}, {}
        for key, array in load_file(plain).items():
            tensor = stored[key] = expected[key] = torch.tensor(array)
            if not key.endswith("_proj.weight"):
                continue
            rows, columns = tensor.shape
            padded = torch.zeros(-(-rows // 16) * 16, -(-columns // 16) * 16)
            padded[:rows, :columns] = tensor
            tiles = padded.reshape(padded.shape[0] // 16, 16, -1, 16)
            scales = tiles.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            low = (tiles / scales[:, None, :, None]).reshape(padded.shape).to(torch.float8_e4m3fn)
            stored[key], stored[f"{key}_scale_inv"] = low[:rows, :columns].contiguous(), scales
            whole = Fp8Dequantize(None)._dequantize_one(low, scales, torch.float32)  # whole blocks: it takes no others
            expected[key] = whole[:rows, :columns]
        save_file(stored, tmp_path / "model.safetensors")
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
        config = json.loads((case.path / "config.json").read_text()) | {"quantization_config": quantization, "dtype": "bfloat16"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for dtype in ("float32", "auto"):
            model, params = auto.from_pretrained(tmp_path, dtype=dtype, scan_layers=True)
            auto.save_pretrained(tmp_path / dtype, model, params)
            written = tensors(tmp_path / dtype)
            assert written.keys() == expected.keys()
            for key, tensor in expected.items():
                rounded = tensor.to(torch.bfloat16) if dtype == "auto" and f"{key}_scale_inv" in stored else tensor
                assert written[key] == (rounded.dtype, tuple(tensor.shape), rounded.contiguous().view(torch.uint8).numpy().tobytes()), key
            assert "quantization_config" not in json.loads((tmp_path / dtype / "config.json").read_text())
        assert model.dtype == jnp.bfloat16
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32", attn_implementation="eager")
        model, params = auto.from_pretrained(tmp_path, dtype="float32")
        ids = case.inputs.input_ids[:1, :50]
        with torch.no_grad():
            ours = jax.jit(lambda params: model.apply({"params": params}, ids).logits)(params)
            close(ours, theirs(torch.tensor(ids, dtype=torch.long)).logits)


class TestDeepseekV3Variant(VariantTester):
    """Halves instead of pairs in rope, weights that are not normalised, queries without a latent, biases."""

    hf_config = transformers.DeepseekV3Config(
        **V3 | {"q_lora_rank": None}, rope_interleave=False, norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True
    )
