import transformers
from tester import FamilyTester, VariantTester

SHAPE = {"vocab_size": 263, "d_model": 48, "n_layers": 2, "max_seq_len": 512}


class TestMpt(FamilyTester):
    hf_config = transformers.MptConfig(**SHAPE, n_heads=6)
    full_size = ({"vocab_size": 50432, "d_model": 4096, "n_heads": 32, "n_layers": 32}, 6_649_286_656)  # mosaicml/mpt-7b
    other_keys = (lambda file: file | {"lm_head.weight": file["transformer.wte.weight"]},)


class TestMptClipped(VariantTester):
    hf_config = transformers.MptConfig(**SHAPE, n_heads=4, attn_config={"clip_qkv": 1.5, "softmax_scale": 0.4}, tie_word_embeddings=False)
