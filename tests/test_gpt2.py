import numpy as np
import transformers
from tester import FamilyTester, VariantTester

SHAPE = {"vocab_size": 263, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 512, "bos_token_id": None, "eos_token_id": None}


class TestGPT2(FamilyTester):
    hf_config = transformers.GPT2Config(**SHAPE, n_inner=80)
    full_size = ({}, 124_439_808)  # openai-community/gpt2
    other_keys = (
        # as published: no prefix, a buffer with the causal mask
        lambda file: {k.removeprefix("transformer."): v for k, v in file.items()} | {"h.1.attn.bias": np.ones((1, 1, 9, 9), bool)},
        lambda file: file | {"lm_head.weight": file["transformer.wte.weight"], "transformer.h.0.attn.masked_bias": np.float32([-1e4])},
    )


class TestGPT2ScaledByLayer(VariantTester):
    hf_config = transformers.GPT2Config(
        **SHAPE, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, activation_function="relu", tie_word_embeddings=False
    )
