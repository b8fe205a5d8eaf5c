import numpy as np
import transformers
from tester import FamilyTester, VariantTester

SHAPE = {"vocab_size": 263, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": None, "eos_token_id": None}


class TestGPTJ(FamilyTester):
    hf_config = transformers.GPTJConfig(**SHAPE, rotary_dim=6)
    head_config = {"num_labels": 2, "pad_token_id": 0}  # noqa: RUF012  # HF's span head has num_labels columns and reads two
    full_size = ({}, 6_050_882_784)  # EleutherAI/gpt-j-6b
    other_keys = (lambda file: file | {f"transformer.h.1.attn.{k}": np.ones(3, np.float32) for k in ("bias", "masked_bias")},)


class TestGPTJTied(VariantTester):
    hf_config = transformers.GPTJConfig(**SHAPE, rotary_dim=12, n_inner=80, activation_function="gelu", tie_word_embeddings=True)
