import transformers
from tester import FamilyTester, VariantTester

SHAPE = {"vocab_size": 263, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 512, "bos_token_id": None, "eos_token_id": None}


class TestGPTBigCode(FamilyTester):
    hf_config = transformers.GPTBigCodeConfig(**SHAPE, n_inner=80)
    full_size = (  # bigcode/starcoder
        {"vocab_size": 49152, "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_positions": 8192, "n_inner": 24576},
        15_517_456_384,
    )
    other_keys = (lambda file: file | {"lm_head.weight": file["transformer.wte.weight"]},)


class TestGPTBigCodeMultiHead(VariantTester):
    hf_config = transformers.GPTBigCodeConfig(**SHAPE, multi_query=False, scale_attn_weights=False, tie_word_embeddings=False)
