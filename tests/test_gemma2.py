import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 17,
    "attn_logit_softcapping": 2.5,
    "final_logit_softcapping": 3.5,
    "sliding_window": 37,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestGemma2(FamilyTester):
    hf_config = transformers.Gemma2Config(**SHAPE)
    way = {"num_beams": 3}  # noqa: RUF012
    full_size = ({}, 2_614_341_888)  # google/gemma-2-2b


class TestGemma2WithoutCaps(VariantTester):
    changes = {"num_key_value_heads": 1, "attn_logit_softcapping": None, "final_logit_softcapping": None}  # noqa: RUF012
    hf_config = transformers.Gemma2Config(**SHAPE | changes, tie_word_embeddings=False)
