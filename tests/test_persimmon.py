import numpy as np
import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestPersimmon(FamilyTester):
    hf_config = transformers.PersimmonConfig(**SHAPE)
    full_size = ({}, 9_397_175_296)  # adept/persimmon-8b-base
    other_keys = (lambda file: file | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)},)


class TestPersimmonTiedWithoutHeadNorms(VariantTester):
    hf_config = transformers.PersimmonConfig(
        **SHAPE,
        qk_layernorm=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 1.0},
    )
