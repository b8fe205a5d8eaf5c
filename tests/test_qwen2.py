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
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


class TestQwen2(FamilyTester):
    hf_config = transformers.Qwen2Config(**SHAPE)
    full_size = (  # Qwen/Qwen2.5-7B
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
    )


class TestQwen2WindowInLaterLayers(VariantTester):
    hf_config = transformers.Qwen2Config(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 1},
        use_sliding_window=True,
        sliding_window=37,
        max_window_layers=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; expected .* num_hidden_layers = 2"),
        ({"layer_types": ["full_attention", "linear"]}, "among them .'linear'."),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None}, "need a sliding_window"),
    ],
)
def test_kinds_of_layers_that_do_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model("qwen2", num_hidden_layers=2, **values).layer_kinds  # noqa: B018
