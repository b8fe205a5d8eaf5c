import jax
import numpy as np
import pytest
import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig
from jaxmodels.cache import Recurrent, init_cache
from jaxmodels.models.recurrent_gemma import RecurrentGemmaForCausalLM

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "attention_window_size": 37,
    "logits_soft_cap": 3.5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestRecurrentGemma(FamilyTester):
    hf_config = transformers.RecurrentGemmaConfig(**SHAPE)
    full_size = ({"num_key_value_heads": 1, "intermediate_size": 15360}, 2_682_862_080)  # google/recurrentgemma-2b
    other_keys = (lambda file: file | {"lm_head.weight": file["model.embed_tokens.weight"]},)


class TestRecurrentGemmaVariant(VariantTester):
    greedy = True  # HF's modules keep the last state with its graph, and cannot be copied; generate leaves one without
    hf_config = transformers.RecurrentGemmaConfig(
        **SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 4},
        block_types=["attention", "recurrent"],
        conv1d_width=2,
        attention_bias=True,
        attention_dropout=0.0,
        tie_word_embeddings=False,
    )


def test_unknown_blocks():
    with pytest.raises(ValueError, match="block_types are conv; expected recurrent and attention"):
        AutoConfig.for_model("recurrent_gemma", block_types=["recurrent", "conv"])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_rows_and_room_of_a_mixed_cache(scan_layers):
    model = RecurrentGemmaForCausalLM(AutoConfig.for_model("recurrent_gemma", **SHAPE), scan_layers=scan_layers)
    numbered = lambda x: np.arange(x.size).reshape(x.shape).astype(x.dtype)
    cache = init_cache(model, 3, 20)
    cache = cache.replace(layers=jax.tree.map(numbered, cache.layers))
    assert {type(state).__name__ for state in cache.layers} == {"Recurrent", "SlidingKV"}
    rows = np.array([2, 0, 0, 1])

    def check(old, new, axes):
        axis = old.ndim - len(axes) + axes.index("batch") if axes else None
        np.testing.assert_array_equal(new, old if axis is None else np.take(old, rows, axis))

    for old, new in zip(cache.layers, cache.take(rows).layers):
        jax.tree.map(check, old, new, old.axes)
    for old, new in zip(cache.layers, cache.resize(50).layers):
        if isinstance(old, Recurrent):
            jax.tree.map(np.testing.assert_array_equal, old, new)
        else:
            assert new.positions.shape[-1] == SHAPE["attention_window_size"]
    with pytest.raises(ValueError, match="a recurrent state cannot forget tokens"):
        cache.rewind(cache.lengths, cache.index)
