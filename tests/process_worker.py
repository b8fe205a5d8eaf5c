"""One process of a job that test_processes.py launches: `process_worker.py TASK PROCESS COUNT PORT DIRECTORY …`. No test of its own."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

import jaxmodels as jm
from jaxmodels.sharding import global_batch, process_rows, to_host

MESH = {"fsdp": 4, "tensor": 2}
PROMPTS = np.random.default_rng(0).integers(3, 97, (4, 12)).astype(np.int32)
MASK = np.ones((4, 12), np.int32)
MASK[1, :5] = 0
BATCHES = np.random.default_rng(1).integers(3, 97, (4, 8, 16)).astype(np.int32)


def batch(model, step):
    rows = process_rows(model.rules, len(BATCHES[step]))
    return global_batch(model.rules, {"input_ids": BATCHES[step][rows], "labels": BATCHES[step][rows]})


def numbers(path, mesh=MESH):
    """What a checkpoint gives: logits, greedy tokens, the losses of three steps and the parameters after them."""
    model, params = jm.AutoModelForCausalLM.from_pretrained(path, mesh=jm.make_mesh(**mesh))
    found = {"logits": to_host(jax.jit(lambda p: model.apply({"params": p}, PROMPTS, attention_mask=MASK).logits)(params))}
    found["tokens"] = to_host(jm.generate(model, params, PROMPTS, attention_mask=MASK, max_new_tokens=6).sequences)
    optimizer = optax.adamw(1e-2)
    state, step = jm.create_train_state(model, optimizer, params), jm.make_train_step(model, optimizer)
    losses = []
    for i in range(3):
        state, metrics = step(state, batch(model, i))
        losses.append(to_host(metrics["loss"]))
    found["losses"] = np.stack(losses)
    found["norm"] = to_host(jm.flatten(state.params)["model.norm.weight"])
    return found, model, state, step, optimizer
