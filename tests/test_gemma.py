import pytest
import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestGemma(FamilyTester):
    hf_config = transformers.GemmaConfig(**SHAPE)
    way = {"do_sample": True, "top_k": 20}  # noqa: RUF012
    full_size = (  # google/gemma-2b
        {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        },
        2_506_172_416,
    )


class TestGemmaUntiedWithBiases(VariantTester):
    hf_config = transformers.GemmaConfig(
        **SHAPE | {"num_key_value_heads": 6}, hidden_act="gelu", attention_bias=True, tie_word_embeddings=False
    )


def test_bidirectional_attention_is_refused():
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        AutoConfig.for_model("gemma", use_bidirectional_attention=True)
