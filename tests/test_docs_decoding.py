"""The loop of docs/decoding.md runs as printed and, told to be greedy, gives generate's tokens."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels as jm
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM

CODE, TURNS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "decoding.md").read_text(), re.DOTALL)
MODEL = LlamaForCausalLM(
    LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
)


def test_the_loop():
    scope: dict = {}
    exec(CODE, scope)  # the page's own code
    params = jm.init_params(MODEL, jax.random.key(0))
    ids = np.random.default_rng(0).integers(1, 97, (3, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :5], mask[2, :9] = 0, 0
    run = lambda switch: np.asarray(scope["decode"](MODEL, params, ids, mask, jax.random.key(1), new_tokens=9, switch=switch))
    expected = jm.generate(MODEL, params, ids, mask, max_new_tokens=9, min_new_tokens=9, eos_token_id=None, pad_token_id=0).sequences[
        :, 12:
    ]
    np.testing.assert_array_equal(run(0), expected)
    mixed = run(4)
    assert (mixed[:, :4] != expected[:, :4]).any()
    assert scope["decode"]._cache_size() == 1


def test_turns():
    params = jm.init_params(MODEL, jax.random.key(0))
    rng, never = np.random.default_rng(0), {"eos_token_id": None, "pad_token_id": 0}
    draw = lambda *shape: rng.integers(1, 97, shape).astype(np.int32)
    scope = {
        "jax": jax,
        "jm": jm,
        "jnp": jnp,
        "model": MODEL,
        "params": params,
        "prompt": draw(1, 30),
        "questions": draw(3, 6),
        "more": draw(3, 2),
    }
    scope |= {"mask": np.arange(6) >= np.array([[0], [4], [2]]), "more_mask": np.ones((3, 2), int)}
    exec(TURNS, scope)  # the page's own code
    whole = np.concatenate([np.repeat(scope["prompt"], 3, 0), scope["questions"]], 1)
    real = np.concatenate([np.ones((3, 30), bool), scope["mask"]], 1)
    for name, options in (("first", {}), ("other", {"num_beams": 2})):
        want = jm.generate(MODEL, params, whole, real, max_new_tokens=8, **never, **options).sequences[:, -8:]
        np.testing.assert_array_equal(scope[name].sequences[:, -8:], want)
    assert scope["again"].sequences.shape == (3, 10)
