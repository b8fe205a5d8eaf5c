import numpy as np
import pytest
import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "num_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 512,
    "window_size": 37,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestGPTNeo(FamilyTester):
    hf_config = transformers.GPTNeoConfig(**SHAPE, num_layers=3, attention_types=[[["global", "local"], 1], [["local"], 1]])
    full_size = ({}, 1_315_575_808)  # EleutherAI/gpt-neo-1.3B
    other_keys = (lambda file: file | {f"transformer.h.1.attn.attention.{k}": np.ones(3, np.float32) for k in ("bias", "masked_bias")},)

    def test_unfitting_attention_types(self):
        with pytest.raises(ValueError, match="global or local for each of 3 layers"):
            AutoConfig.for_model("gpt_neo", num_layers=3)


class TestGPTNeoUntied(VariantTester):
    hf_config = transformers.GPTNeoConfig(
        **SHAPE, num_layers=2, attention_types=[[["local"], 2]], activation_function="relu", tie_word_embeddings=False
    )
