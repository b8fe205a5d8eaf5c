import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig

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
    "original_max_position_embeddings": 512,
}


def longrope(original, pairs):
    factors = {"short_factor": [1 + 0.1 * i for i in range(pairs)], "long_factor": [1.5 + i for i in range(pairs)]}
    return {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original, **factors}


class TestPhi3(FamilyTester):
    hf_config = transformers.Phi3Config(**SHAPE)
    full_size = ({}, 3_821_079_552)  # microsoft/Phi-3-mini-4k-instruct


class TestPhi3LongRope(VariantTester):
    """Rows on both sides of the original length; rope on three quarters of every head, as in Phi-4-mini."""

    hf_config = transformers.Phi3Config(
        **SHAPE | {"original_max_position_embeddings": 129},
        partial_rotary_factor=0.75,
        rope_parameters=longrope(129, 3),
        tie_word_embeddings=True,
    )


class TestPhi3Window(VariantTester):
    hf_config = transformers.Phi3Config(**SHAPE | {"num_key_value_heads": 1}, sliding_window=37)


def test_longrope_by_its_older_names():
    rope = longrope(4096, 48)
    for name in ("su", "yarn", "longrope"):
        older = {**{k: v for k, v in rope.items() if k not in ("rope_type", "original_max_position_embeddings")}, "type": name}
        config = AutoConfig.for_model("phi3", max_position_embeddings=131072, original_max_position_embeddings=4096, rope_scaling=older)
        assert config.rope_parameters.rope_type == "longrope"
        assert transformers.Phi3Config(**config.to_dict()).rope_parameters["short_factor"] == rope["short_factor"]
