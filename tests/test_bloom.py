import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {"vocab_size": 263, "hidden_size": 48, "n_layer": 2, "n_head": 6, "bos_token_id": None, "eos_token_id": None}


class TestBloom(FamilyTester):
    hf_config = transformers.BloomConfig(**SHAPE)
    full_size = ({"hidden_size": 14336, "n_layer": 70, "n_head": 112}, 176_247_271_424)  # bigscience/bloom
    other_keys = (
        lambda file: {k.removeprefix("transformer."): v for k, v in file.items()},
        lambda file: file | {"lm_head.weight": file["transformer.word_embeddings.weight"]},
    )

    def test_published_config(self):
        config = AutoConfig.for_model("bloom", n_embed=96, n_layer=3, num_attention_heads=12)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 3, 12)


class TestBloomPostNorm(VariantTester):
    hf_config = transformers.BloomConfig(**SHAPE | {"n_head": 4}, apply_residual_connection_post_layernorm=True, tie_word_embeddings=False)
