import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestCohere(FamilyTester):
    hf_config = transformers.CohereConfig(**SHAPE, logit_scale=0.7)
    full_size = ({}, 34_980_831_232)  # CohereForAI/c4ai-command-r-v01


class TestCohereHeadNorms(VariantTester):
    hf_config = transformers.CohereConfig(
        **SHAPE | {"num_key_value_heads": 1}, logit_scale=0.7, use_qk_norm=True, attention_bias=True, tie_word_embeddings=False
    )
