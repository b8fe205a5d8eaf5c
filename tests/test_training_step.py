"""The train step against torch's AdamW, step by step; sharded against one device; the state's ownership and placement."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.models.mixtral import MixtralConfig, MixtralForCausalLM
from jaxmodels.ops.loss import LossOptions, row_losses
from jaxmodels.params import flatten, init_params, unflatten
from jaxmodels.sharding.hlo import analyse
from jaxmodels.sharding.rules import Rules, make_mesh
from jaxmodels.training import create_train_state, make_eval_step, make_optimizer, make_train_step
from jaxmodels.training.lora import LoraConfig, add_lora, frozen_by

SHAPE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2}
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS, LR = 8, 1e-2


def torch_model(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def tree_of(model, *, scanned):
    """torch's parameters under our names; scanned, those of all layers stacked."""
    flat = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    if scanned:
        layers = SHAPE["num_hidden_layers"]
        for name in [name for name in flat if ".layers.0." in name]:
            rows = [flat.pop(name.replace(".layers.0.", f".layers.{i}.")) for i in range(layers)]
            flat[name.replace(".layers.0.", f".layers.0:{layers}:1.")] = np.stack(rows)
    return unflatten({name: jnp.asarray(leaf) for name, leaf in flat.items()})


def batches():
    """Ragged rows: some labels do not count, some rows end in padding, and the number of labels changes from step to step."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = rng.integers(0, SHAPE["vocab_size"], (4, 37))
        mask = np.arange(37) < rng.integers(9, 38, (4, 1))
        labels = np.where(mask & (rng.random(ids.shape) < 0.8), ids, -100)
        yield {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}


@pytest.mark.parametrize(("scanned", "remat", "tied"), [(False, None, True), (True, "full", False), (True, None, True)])
def test_equals_torch_adamw(scanned, remat, tied):
    theirs = torch_model(tied)
    start = {name: leaf.copy() for name, leaf in flatten(tree_of(theirs, scanned=scanned)).items()}
    adam = torch.optim.AdamW(theirs.parameters(), lr=LR, betas=(ADAM["b1"], ADAM["b2"]), eps=ADAM["eps"], weight_decay=ADAM["weight_decay"])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR, **ADAM))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied), scan_layers=scanned, remat=remat)
    step, eval_step = make_train_step(model, optimizer), make_eval_step(model)
    state = create_train_state(model, optimizer, unflatten(start))
    for number, batch in enumerate(batches()):
        adam.zero_grad()
        out = theirs(**{name: torch.from_numpy(value) for name, value in batch.items()})
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
        ours = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
        before = eval_step(state.params, ours)
        state, metrics = step(state, ours)
        assert abs(float(metrics["loss"]) - out.loss.item()) <= 1e-4
        assert abs(float(before["loss"]) - out.loss.item()) <= 1e-4
        assert abs(float(metrics["grad_norm"]) - norm.item()) <= 1e-4 * norm.item()
        assert int(metrics["tokens"]) == int(before["tokens"]) == (batch["labels"][:, 1:] != -100).sum()
        assert int(state.step) == number + 1
    wanted, found = flatten(tree_of(theirs, scanned=scanned)), flatten(state.params)
    assert wanted.keys() == found.keys()
    for name, leaf in wanted.items():
        moved, off = np.linalg.norm(leaf - start[name]), np.linalg.norm(leaf - found[name])
        assert moved > 1e-2 * np.linalg.norm(leaf), name
        assert off <= 1e-4 * np.linalg.norm(leaf), (name, off / moved)


def test_bfloat16_computes_on_float32_masters():
    """A step too small for bfloat16 parameters still arrives, because the masters are float32."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE), dtype=jnp.bfloat16)
    given = init_params(model, jax.random.key(0), jnp.bfloat16)
    optimizer = optax.sgd(1e-4)
    state = create_train_state(model, optimizer, given)
    before = jax.tree.map(np.asarray, state.params)
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in next(batches()).items()}
    state, _ = make_train_step(model, optimizer)(state, batch)
    moved = jax.tree.map(lambda a, b: (a.dtype == jnp.float32) and bool(np.any(np.asarray(a) != b)), state.params, before)
    assert all(jax.tree.leaves(moved))
    assert all(leaf.dtype == jnp.bfloat16 and not leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize(("scanned", "preset"), [(False, "fsdp+tensor"), (True, "fsdp"), (True, "fsdp+tensor")])
def test_sharded_equals_one_device(scanned, preset):
    """Moments live with their parameters, the step keeps every placement and compiles once, the losses agree."""
    mesh = make_mesh(fsdp=4, tensor=2) if "tensor" in preset else make_mesh(fsdp=8)
    rules = Rules.preset(preset, mesh)
    config = LlamaConfig(**{**SHAPE, "vocab_size": 96})
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR, **ADAM))
    losses = []
    for r in (None, rules):
        model = LlamaForCausalLM(config, scan_layers=scanned, remat="full", rules=r)
        state = create_train_state(model, optimizer, init_params(model, jax.random.key(1)))
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        if r is not None:
            moments = state.opt_state[1][0]
            cut = [leaf for leaf in jax.tree.leaves(placed.params) if not leaf.is_fully_replicated]
            assert len(cut) > len(jax.tree.leaves(placed.params)) // 2
            same = jax.tree.map(lambda p, m, v: p.sharding == m.sharding == v.sharding, state.params, moments.mu, moments.nu)
            assert all(jax.tree.leaves(same))
        step, seen = make_train_step(model, optimizer), []
        for batch in itertools.islice(batches(), 3):
            batch = {name: jnp.asarray(np.tile(np.where(value < 0, value, value % 96), (2, 1)), jnp.int32) for name, value in batch.items()}
            before = state
            state, metrics = step(state, batch)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        kept = jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, placed)
        assert all(jax.tree.leaves(kept))
        assert step._cache_size() == 1
        losses.append(seen)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


LAID = {
    "replicated": {"data": 8},
    "tensor": {"data": 4, "tensor": 2},
    "sequence": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "expert": {"expert": 4, "tensor": 2},
}


@cache
def losses_of(preset, moe):
    """Two steps of two parts, under a preset or on one device."""
    make, config = (MixtralForCausalLM, MixtralConfig) if moe else (LlamaForCausalLM, LlamaConfig)
    rules = None if preset is None else Rules.preset(preset, make_mesh(**LAID[preset]))
    model, optimizer = make(config(**{**SHAPE, "vocab_size": 96, "num_hidden_layers": 2}), scan_layers=True, rules=rules), optax.adam(LR)
    state = create_train_state(model, optimizer, init_params(model, jax.random.key(1)))
    if rules is not None:
        assert preset == "replicated" or any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    step, seen = make_train_step(model, optimizer, accumulation_steps=2), []
    for batch in itertools.islice(batches(), 2):
        batch = {k: jnp.asarray(np.tile(np.where(v < 0, v, v % 96)[:, :36], (4, 1)), jnp.int32) for k, v in batch.items()}
        state, metrics = step(state, batch)
        seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("preset", LAID)
def test_the_other_presets_too(preset):
    np.testing.assert_allclose(losses_of(preset, preset == "expert"), losses_of(None, preset == "expert"), rtol=1e-4)


@pytest.mark.parametrize(
    ("preset", "mesh"),
    [("fsdp+tensor", {"fsdp": 4, "tensor": 2}), ("sequence", {"data": 2, "fsdp": 2, "sequence": 2}), ("zero2", {"data": 8})],
)
def test_the_heads_gradient_is_reduced_once(preset, mesh):
    """Of eight chunks every device adds up its own; nothing so large is sent in their loop. Loss and gradients are one device's."""
    config = LlamaConfig(**{**SHAPE, "vocab_size": 1024, "num_hidden_layers": 2, "hidden_size": 64}, tie_word_embeddings=False)
    optimizer, ids = optax.sgd(LR), np.random.default_rng(0).integers(0, 1024, (8, 128)).astype(np.int32)
    ids[3, 40:] = -100
    batch, found = {"input_ids": np.maximum(ids, 0), "labels": ids}, []
    for rules in (None, Rules.preset(preset, make_mesh(**mesh))):
        model = LlamaForCausalLM(config, scan_layers=True, rules=rules)
        step, state = (
            make_train_step(model, optimizer, loss_chunk=16),
            create_train_state(model, optimizer, init_params(model, jax.random.key(1))),
        )
        if rules is not None:
            collectives = analyse(step.lower(state, batch).compile().as_text(), 8).collectives
        state, metrics = step(state, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"]), np.asarray(flatten(state.params)["lm_head.weight"])))
    for one, many in zip(*found):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-6)
    whole = 1024 * 64 * 4 // mesh.get("tensor", 1)  # two layers, eight chunks, of which `tensor` sums the activations' gradients
    assert collectives and all(c.count <= 2 or c.bytes <= whole / 8 for c in collectives), collectives


def test_rows_of_a_loss_in_chunks_over_a_mesh():
    """A sum for every row and its gradient, where rows and tokens are split."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 24, 8)).astype(np.float32), rng.standard_normal((32, 8)).astype(np.float32)
    labels, weights = rng.integers(-1, 32, (4, 24)), rng.standard_normal(4).astype(np.float32)
    labels[labels < 0] = -100

    def value(x, w, chunk, rules):
        sums = row_losses(lambda x: x @ w.T, x, labels, LossOptions(chunk=chunk), rules)
        return jnp.sum(sums * weights), sums

    call = lambda *options: jax.jit(lambda x, w: jax.value_and_grad(value, (0, 1), has_aux=True)(x, w, *options))(x, w)
    rules = Rules.preset("sequence", make_mesh(fsdp=2, sequence=2, tensor=2))
    for options in ((5, None), (7, rules), (None, rules)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), call(*options), call(None, None))


@pytest.mark.parametrize(
    "name", ["adamw_8bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "muon")), "adamw lora"]
)
def test_what_the_step_can_do_works_sharded(name):
    """Parts, chunks, clipping, other optimizers' states, adapters: the losses of one device, and no second program."""
    config = LlamaConfig(**{**SHAPE, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128})
    seen = []
    for rules in (None, Rules.preset("fsdp+tensor", make_mesh(fsdp=4, tensor=2))):
        model = LlamaForCausalLM(config, scan_layers=True, rules=rules)
        optimizer = make_optimizer(name.split()[0], LR, model, weight_decay=0.1)
        params, options = init_params(model, jax.random.key(1)), {}
        if "lora" in name:
            adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
            params, options = add_lora(model, params, adapter, jax.random.key(2)), {"frozen": frozen_by(adapter)}
        state = create_train_state(model, optimizer, params, **options)
        step = make_train_step(model, optimizer, accumulation_steps=2, loss_chunk=8, max_grad_norm=1.0, **options)
        for batch in itertools.islice(batches(), 3):
            batch = {k: jnp.asarray(np.tile(np.where(v < 0, v, v % 96), (4, 1)), jnp.int32) for k, v in batch.items()}
            state, metrics = step(state, batch)
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        assert step._cache_size() == 1
    np.testing.assert_allclose(seen[:3], seen[3:], rtol=1e-3 if "8bit" in name else 1e-4)
