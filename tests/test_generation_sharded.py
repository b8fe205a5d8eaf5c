"""Drafts, caches, chunks and beams over eight devices: the tokens of one."""

import functools

import jax
import numpy as np
import pytest
from generation_fixtures import VOCAB, T, ours, prompts, torch_greedy
from test_generation_assisted import SURE, noisy

from jaxmodels.generation import generate
from jaxmodels.params import init_params
from jaxmodels.sharding.rules import Rules, make_mesh

NEVER = VOCAB + 5
NEW = 14


@functools.cache
def spread(preset):
    shape = {"fsdp": {"fsdp": 8}, "tensor": {"tensor": 8}, "fsdp+tensor": {"fsdp": 4, "tensor": 2}}[preset]
    model = ours()[0].clone(rules=Rules.preset(preset, make_mesh(jax.devices(), **shape)))
    places = jax.tree.map(lambda x: x.sharding, init_params(model, jax.random.key(0)))
    return model, *(jax.device_put(params, places) for params in (ours()[1], noisy(ours()[1])))


WAYS = {
    "plain": lambda model, noise: {},
    "lookup": lambda model, noise: {"prompt_lookup_num_tokens": 5},
    "draft": lambda model, noise: {"assistant_model": (model, noise), "num_assistant_tokens": 6, **SURE},
    "exit": lambda model, noise: {"assistant_early_exit": 1, "num_assistant_tokens": 4, **SURE},
    "chunks": lambda model, noise: {"prefill_chunk_size": 64},
}
KINDS = {
    "full": {},
    "offloaded": {"cache_implementation": "offloaded"},
    "sink": {"cache_implementation": "sink", "cache_config": {"window_length": 400}},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"nbits": 8, "q_group_size": 12, "residual_length": 384}},
}
CHEAP = [("tensor", "draft", "offloaded"), ("fsdp+tensor", "chunks", "quantized")]
SLOW = [("fsdp", "lookup", "sink"), ("tensor", "exit", "sink"), ("fsdp+tensor", "lookup", "offloaded"), ("tensor", "plain", "quantized")]


@pytest.mark.parametrize("case", [*CHEAP, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids="-".join)
def test_tokens_are_those_of_one_device(case):
    preset, way, kind = case
    model, params, noise = spread(preset)
    ids, mask = prompts()
    out = generate(model, params, ids, mask, max_new_tokens=NEW, eos_token_id=NEVER, **WAYS[way](model, noise), **KINDS[kind])
    assert [row[T:].tolist() for row in out.sequences] == [torch_greedy(row)[:NEW] for row in range(4)]


@pytest.mark.slow
def test_a_turn_after_beams():
    model, params, _ = spread("fsdp+tensor")
    ids, mask = (x[1:3] for x in prompts())
    found = []
    for pair, kind in (((model, params), KINDS["sink"]), (ours(), {})):
        first = generate(*pair, ids, mask, num_beams=4, max_new_tokens=6, eos_token_id=NEVER, **kind)
        found.append(generate(*pair, np.array([[9, 8], [7, 6]]), cache=first.cache, max_new_tokens=6, eos_token_id=NEVER).sequences)
    np.testing.assert_array_equal(*found)
