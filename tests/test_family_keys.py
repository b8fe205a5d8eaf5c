"""Checkpoints of the families under the keys that files on the hub have: all mean the same parameters."""

import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from cases import close, sensitive
from safetensors.numpy import load_file, save_file

from jaxmodels import auto
from jaxmodels.params import abstract_params, flatten, unflatten

TINY = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FAMILIES = [
    *("cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "llama", "mistral", "nemotron"),
    *("olmo", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
    *("granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
    *("bloom", "codegen", "dbrx", "deepseek_v2", "deepseek_v3", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj"),
    *("llama4_text", "mpt", "opt", "xglm"),
]
SMALL = {  # where TINY does not make it so
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 20}},
    "deepseek_v2": {"kv_lora_rank": 8, "q_lora_rank": None, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"kv_lora_rank": 8, "moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "llama4_text": {"intermediate_size_mlp": 20, "num_local_experts": 4},
    "opt": {"word_embed_proj_dim": 24},
}
INV_FREQ = ("llama", "nemotron", "persimmon", "phi", "stablelm")  # families whose files of the time hold rope's frequencies


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys(model_type, tmp_path):
    for tied in (True, False):
        config = auto.AutoConfig.for_model(model_type, **TINY | SMALL.get(model_type, {}), tie_word_embeddings=tied)
        model = auto.AutoModelForCausalLM.class_for(config)(config)
        rng = np.random.default_rng(0)
        params = {key: rng.standard_normal(leaf.shape, np.float32) for key, leaf in flatten(abstract_params(model)).items()}
        auto.save_pretrained(tmp_path, model, unflatten(params))
        file = tmp_path / "model.safetensors"
        written, prefix = load_file(file), f"{model.base_name}."
        head = "embed_out.weight" if model_type == "gpt_neox" else "lm_head.weight"
        variants = [written]
        assert tied == (head not in written)
        if tied:
            table = next(key for key, tensor in written.items() if tensor.shape == (37, 24))
            variants.append({**written, head: written[table]})
            variants.append({k: v for k, v in variants[1].items() if k != table})
        variants += [{key.removeprefix(prefix): tensor for key, tensor in tensors.items()} for tensors in variants[:2]]
        if model_type in INV_FREQ:
            variants.append({**written, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
        for tensors in variants:
            save_file(tensors, file)
            loaded = flatten(auto.from_pretrained(tmp_path, dtype="float32")[1])
            assert loaded.keys() == params.keys()
            assert all(np.array_equal(loaded[key], params[key]) for key in params)


TEXT = {"vocab_size": 131, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 8}
TEXT |= {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PIXELS = {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16, "pixel_shuffle_ratio": 0.5}
WHOLE = {
    "Gemma3": {"text_config": TEXT | {"sliding_window": 7}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "Llama4": {
        "text_config": TEXT | {"num_local_experts": 3, "intermediate_size_mlp": 20, "attention_chunk_size": 7},
        "vision_config": VISION | PIXELS,
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_text_part_of_a_whole_model(name, tmp_path):
    """The checkpoint of a model that also sees, as published: its language model gives the same logits, and is saved as one alone."""
    config = getattr(transformers, f"{name}Config")(**WHOLE[name], eos_token_id=[3, 5])
    whole = sensitive(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    whole.save_pretrained(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the rest was left out
        model, params = auto.from_pretrained(tmp_path / "whole", dtype="float32")
    assert model.config.model_type.endswith("_text") and model.config.eos_token_id == (3, 5)
    auto.save_pretrained(tmp_path / "text", model, params)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(alone).__name__ == type(model).__name__
    ids = np.random.default_rng(0).integers(1, 131, (2, 19), dtype=np.int32)
    with torch.no_grad():
        theirs, again = (hf(torch.tensor(ids).long()).logits for hf in (whole, alone))
    close(jax.jit(lambda params: model.apply({"params": params}, ids).logits)(params), theirs)
    close(again, theirs)
