"""ZeRO-1 and ZeRO-2 on 8 virtual devices: one device's losses, whole parameters, split moments, scattered gradients."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import init_params
from jaxmodels.sharding import Rules, make_mesh
from jaxmodels.training import create_train_state, make_train_step

CONFIG = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("preset", ["zero1", "zero2"])
def test_zero(preset):
    optimizer = optax.adamw(1e-2)
    ids = np.random.default_rng(0).integers(0, 96, (8, 24)).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids}
    one = LlamaForCausalLM(CONFIG, scan_layers=True)
    params = init_params(one, jax.random.key(0))
    losses, states = [], []
    for model in (one, dataclasses.replace(one, rules=Rules.preset(preset, make_mesh(fsdp=8)))):
        step, state = make_train_step(model, optimizer), create_train_state(model, optimizer, params)
        if model.rules is not None:
            text = step.lower(state, batch).compile().as_text()
        losses.append([])
        for _ in range(3):
            state, metrics = step(state, batch)
            losses[-1].append(float(metrics["loss"]))
        states.append(state)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(states[1].params))
    moments = [leaf for leaf in jax.tree.leaves(states[1].opt_state) if leaf.ndim > 1]
    assert moments and all(not leaf.sharding.is_fully_replicated for leaf in moments)
    # each device updates its part, and the new parameters are gathered
    assert re.search(r" all-gather", text)
