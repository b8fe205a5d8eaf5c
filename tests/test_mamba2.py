import pytest
import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 40,
    "state_size": 6,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 10,
    "n_groups": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestMamba2(FamilyTester):
    hf_config = transformers.Mamba2Config(**SHAPE)
    attentions = False
    full_size = ({}, 7_285_403_648)  # mistralai/Mamba-Codestral-7B-v0.1
    other_keys = (lambda file: {k.replace("embeddings", "embedding"): v for k, v in file.items()},)


class TestMamba2Variant(VariantTester):
    hf_config = transformers.Mamba2Config(
        **SHAPE | {"n_groups": 1},
        conv_kernel=3,
        chunk_size=29,
        use_bias=True,
        use_conv_bias=False,
        residual_in_fp32=False,
        time_step_limit=(0.01, 0.05),
        tie_word_embeddings=True,
    )


def test_heads_that_do_not_fill_the_channels():
    with pytest.raises(ValueError, match="num_heads 100 times head_dim 64 is 6400; expand 2 times hidden_size 4096 is 8192"):
        AutoConfig.for_model("mamba2", num_heads=100)
