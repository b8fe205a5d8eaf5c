import pytest
import transformers
from cases import Case
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestFalcon(FamilyTester):
    hf_config = transformers.FalconConfig(**SHAPE)
    full_size = ({}, 6_921_720_704)  # tiiuae/falcon-7b
    other_keys = (lambda file: file | {"lm_head.weight": file["transformer.word_embeddings.weight"]},)


class TestFalcon40B(VariantTester):
    hf_config = transformers.FalconConfig(**SHAPE, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=80)


class TestFalcon11B(VariantTester):
    hf_config = transformers.FalconConfig(
        **SHAPE, new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1, tie_word_embeddings=False
    )


class TestFalconRW(VariantTester):
    hf_config = transformers.FalconConfig(**SHAPE, alibi=True, multi_query=False, parallel_attn=False, bias=True)

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory):
        """HF's eager attention adds ALiBi twice, sdpa, its default, once."""
        case = Case.make(cls.hf_config, tmp_path_factory.mktemp("case"), cls.greedy)
        case.hf.config._attn_implementation = "sdpa"
        return case
