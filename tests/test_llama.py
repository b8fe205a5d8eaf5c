"""Llama through the family tester, and its structural variants."""

import jax
import numpy as np
import pytest
import torch
import transformers
from cases import Case, close
from tester import FamilyTester, VariantTester

from jaxmodels.auto import from_pretrained
from jaxmodels.cache import init_cache
from jaxmodels.layers import attend
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import init_params


def tiny(**changes):
    """2 layers, odd sizes, head_dim apart from hidden_size / num_attention_heads, grouped queries."""
    values = {
        "vocab_size": 263,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return transformers.LlamaConfig(**values | changes)


def rope(rope_type, **values):
    return {"rope_type": rope_type, "rope_theta": 10000.0, **values}


def longrope(original):
    factors = {"short_factor": [1 + 0.1 * i for i in range(5)], "long_factor": [1.5 + i for i in range(5)]}
    return rope("longrope", original_max_position_embeddings=original, **factors)


class TestLlama(FamilyTester):
    hf_config = tiny()
    way = {"num_beams": 3}  # noqa: RUF012
    own_heads = True
    full_size = (
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        8_030_261_248,
    )


# The inputs have rows of 300, 211, 93 and 7 tokens; turns end at 204, 129, 42 and 35 tokens, row 0 after a first turn of 130. So with
# the limits below rows of one batch lie on either side, and in turns every row keeps to one side, where the cache is exact.
VARIANTS = {
    "mha, biases, tied": tiny(num_key_value_heads=6, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mqa, linear": tiny(num_key_value_heads=1, rope_parameters=rope("linear", factor=3.0)),
    "no head_dim, gelu, eps": tiny(head_dim=None, hidden_act="gelu", rms_norm_eps=1e-3),
    "dynamic": tiny(max_position_embeddings=204, rope_parameters=rope("dynamic", factor=4.0)),
    "yarn": tiny(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "longrope": tiny(rope_parameters=longrope(129)),
    "llama3": tiny(
        rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    ),
}


class TestVariants(VariantTester):
    @pytest.fixture(scope="class", params=list(VARIANTS))
    @classmethod
    def case(cls, request, tmp_path_factory):
        return Case.make(VARIANTS[request.param], tmp_path_factory.mktemp("case"), greedy=False)


# The frequencies of these ropes follow the length of the row. Keys are cached unturned, so the attention over a cache is exact whatever
# the frequencies were before; but what a second layer cached was computed from a first layer that had turned by the old ones.
GROWING = {
    "dynamic": {"max_position_embeddings": 20, "rope_parameters": rope("dynamic", factor=4.0)},
    "longrope": {"rope_parameters": longrope(20)},
}


@pytest.mark.parametrize("kind", GROWING)
def test_growing_rope_over_a_cache_is_exact_in_one_layer(kind, tmp_path):
    """Rows cross the limit of 20 tokens in the second or third turn, or never."""
    case = Case.make(tiny(num_hidden_layers=1, **GROWING[kind]), tmp_path, greedy=False)
    model, params = case.loaded
    cache = init_cache(model, 4, 31)
    ids = case.inputs.input_ids
    real = np.array([[7] * 4, [7, 5, 7, 0], [7, 7, 7, 3], [7, 7, 0, 7]])
    done = np.zeros(4, int)
    for new in real:
        mask = (np.arange(7) >= 7 - new[:, None]).astype(np.int32)
        chunk = np.stack([np.pad(row[n : n + k], (7 - k, 0)) for row, n, k in zip(ids, done, new)])
        out = case.forward(params, {"input_ids": chunk, "attention_mask": mask, "cache": cache})
        cache, done = out.cache, done + new
        for row, n, k, ours in zip(ids, done, new, np.asarray(out.logits)):
            if k:
                close(ours[7 - k :], case.torch_logits(row[:n])[n - k :])
    assert sorted(done) == [17, 21, 26, 28]


@pytest.mark.parametrize("kind", GROWING)
def test_growing_rope_within_one_call_is_a_fresh_forward(kind, tmp_path):
    """Rows of one batch on both sides of the limit, two layers, as one prefill into a cache."""
    case = Case.make(tiny(**GROWING[kind]), tmp_path, greedy=False)
    case.check_turns([[28, 21, 20, 3]], [28])


def test_a_full_cache_is_an_error():
    """Writing on would silently overwrite the newest tokens."""
    cache = init_cache(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)), 1, 5)
    with pytest.raises(ValueError, match="no room for 6 new tokens: 0 of 5 slots"):
        cache.advance(np.zeros((1, 6), np.int32))
    cache = cache.advance(np.arange(4, dtype=np.int32)[None])
    with pytest.raises(ValueError, match="no room for 2 new tokens: 4 of 5 slots are written"):
        cache.advance(np.zeros((1, 2), np.int32))
    assert int(cache.resize(6).advance(np.array([[4, 5]], np.int32)).index) == 6


@pytest.mark.parametrize("remat", [None, "full"])
def test_equal_layers_are_traced_once_a_program(monkeypatch, remat):
    """Unrolled; what another trace finds around it, here another function, is never taken from an earlier one."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes), remat=remat)
    params, ids = init_params(model, jax.random.key(0)), np.arange(6)[None]
    traced = []
    for name in "ab":
        noted = lambda *args, name=name, **options: traced.append(name) or attend(*args, **options)
        monkeypatch.setattr("jaxmodels.models.llama.attend", noted)
        once = jax.jit(lambda params: model.apply({"params": params}, ids).logits)(params)
    assert traced == ["a", "b"]
    np.testing.assert_allclose(once, model.apply({"params": params}, ids).logits, atol=1e-5)
    assert len(traced) == 2 + (1 if remat else 5)  # outside of a program each layer runs by itself


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.MixtralConfig])
def test_loss_over_a_number_of_items_of_the_callers(kind, tmp_path):
    config = kind(vocab_size=263, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 263, (2, 7))
    labels = np.where(ids % 3, ids, -100)
    wanted = theirs(torch.tensor(ids), labels=torch.tensor(labels), num_items_in_batch=5).loss.item()
    assert float(model.apply({"params": params}, ids, labels=labels, num_items_in_batch=5).loss) == pytest.approx(wanted, rel=1e-5)
