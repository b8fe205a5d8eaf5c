"""Pipelines on 8 virtual devices: one device's losses and gradients, what moves between the stages, and what cannot be cut."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmodels as jm
from jaxmodels.cache import init_cache
from jaxmodels.models.bert import BertConfig, BertForMaskedLM
from jaxmodels.models.gemma3_text import Gemma3ForCausalLM, Gemma3TextConfig
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM, LlamaModel
from jaxmodels.models.mixtral import MixtralConfig, MixtralForCausalLM
from jaxmodels.models.t5 import T5Config, T5ForConditionalGeneration
from jaxmodels.ops.pipeline import pipeline
from jaxmodels.params import flatten, init_params, unflatten
from jaxmodels.sharding import Rules, make_mesh
from jaxmodels.sharding.hlo import analyse
from jaxmodels.training import create_train_state, make_train_step
from jaxmodels.training.trainable import placement

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
DECODER = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
LLAMA = LlamaForCausalLM(LlamaConfig(**DECODER, num_hidden_layers=4), scan_layers=True, remat="full")
# four stages of two layers, and a ninth on all devices
GEMMA = Gemma3TextConfig(**DECODER, num_hidden_layers=9, sliding_window_pattern=2, sliding_window=5)
MIXTRAL = MixtralConfig(**DECODER, num_hidden_layers=4, num_local_experts=4, sliding_window=None, output_router_logits=True)
T5 = T5Config(
    vocab_size=97,
    hidden_size=32,
    head_dim=8,
    d_ff=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
BERT = BertConfig(**SHAPE, num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CASES = {
    "llama": (LLAMA, "fsdp+tensor", {"stage": 2, "fsdp": 2, "tensor": 2}, 4),
    "gemma3": (Gemma3ForCausalLM(GEMMA, scan_layers=True), "fsdp", {"stage": 4, "data": 2}, 4),
    "bert": (BertForMaskedLM(BERT, scan_layers=True), "zero2", {"stage": 2, "fsdp": 4}, 2),
    "mixtral": (MixtralForCausalLM(MIXTRAL, scan_layers=True), "expert", {"stage": 2, "data": 2, "expert": 2}, 2),  # the router's loss too
    "t5": (T5ForConditionalGeneration(T5, scan_layers=True), "sequence", {"stage": 2, "sequence": 2, "tensor": 2}, 2),
}


def sensitive(model):
    """Random parameters large enough that every layer matters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return unflatten({key: jnp.asarray(rng.normal("norm" in key.lower(), 0.15, x.shape), x.dtype) for key, x in flatten(shapes).items()})


def batch(rows=16, columns=13):
    """Ragged rows, padded on the left; some labels do not count."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 97, (rows, columns)).astype(np.int32)
    mask = (np.arange(columns) >= rng.integers(0, 6, (rows, 1))).astype(np.int32)
    labels = np.where(mask & (rng.random(ids.shape) < 0.7), ids, -100).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def staged(model, preset, mesh, microbatches):
    return dataclasses.replace(model, rules=Rules.preset(preset, make_mesh(**mesh), microbatches=microbatches))


@partial(jax.jit, static_argnums=0)
def losses(model, params, inputs):
    return jax.value_and_grad(lambda params: model.apply({"params": params}, **inputs).loss)(params)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "mixtral" else []) for name in CASES])
def test_loss_and_gradients_are_one_devices(name):
    model, *where = CASES[name]
    many, params, inputs = staged(model, *where), sensitive(model), batch()
    expected, wanted = jax.device_get(losses(model, params, inputs))
    loss, gradients = jax.device_get(losses(many, jax.device_put(params, placement(many, params)), inputs))
    assert abs(loss - expected) <= 1e-5 * expected
    wanted, found = flatten(wanted), flatten(gradients)
    total = optax.tree.norm(wanted)
    for key, g in wanted.items():
        assert np.linalg.norm(found[key] - g) <= 1e-4 * max(np.linalg.norm(g), 1e-3 * total), key


@pytest.mark.parametrize(("stages", "replicas", "microbatches"), [(2, 1, 6), (4, 2, 4), (4, 2, 12), (8, 1, 8)])
def test_every_row_passes_every_layer_in_order(stages, replicas, microbatches):
    """The schedule alone: what comes out, what each layer reports, and that each row is told its part of the batch."""
    mesh = make_mesh(jax.devices()[: stages * replicas], stage=stages, data=replicas)
    rules = Rules.preset("replicated", mesh, microbatches=microbatches)
    rows, layers = 2 * replicas * microbatches, 2 * stages
    weights, x = jnp.arange(1.0, layers + 1), jnp.arange(rows * 3.0).reshape(rows, 3)

    def stage(weights, x, number, piece):
        def layer(carry, weight):
            value, number = carry
            return (jnp.sin(value + weight), number), (value, jnp.broadcast_to(piece, value.shape[:1]), jnp.full(len(value), number))

        (value, _), reports = jax.lax.scan(layer, (x, number), weights)
        return value, reports

    out, (seen, pieces, numbers) = jax.jit(lambda w, x: pipeline(stage, w, x, rules))(weights, x)
    expected = x
    for layer, weight in enumerate(weights):
        np.testing.assert_allclose(seen[layer], expected, atol=1e-6)
        assert (numbers[layer] == layer // 2).all()
        expected = jnp.sin(expected + weight)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert (pieces == pieces[0]).all() and sorted(pieces[0].tolist()) == sorted(list(range(microbatches * replicas)) * 2)


def test_what_moves():
    """Activations to the neighbours in every tick; the gradients of a stage over its replicas once; no parameter at all."""
    many = staged(LLAMA, "fsdp", {"stage": 4, "data": 2}, 4)
    params = jax.eval_shape(lambda: init_params(many, jax.random.key(0)))
    inputs = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=many.rules.sharding(("batch", None), x.shape)) for k, x in batch().items()}
    placed = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), params, placement(many, params))
    found = analyse(losses.lower(many, placed, inputs).compile().as_text(), 8).collectives
    layer = sum(leaf.size for key, leaf in flatten(params).items() if ":" in key) // 4
    permutes = [c for c in found if c.kind == "collective-permute"]
    assert {c.group for c in permutes} == {4} and {c.count for c in permutes} == {4 + 4 - 1}
    assert max(c.bytes for c in permutes) == 2 * 13 * 32 * 4  # a microbatch of one replica
    reduced = [c for c in found if c.kind == "all-reduce" and c.bytes >= layer]
    assert reduced and all(c.count == 1 for c in reduced)
    assert not [c for c in found if c.kind not in ("collective-permute", "all-reduce")]


def test_train_steps_with_accumulation():
    """Three steps of two parts, each of two microbatches, are one device's; every stage keeps its layers and their moments."""
    optimizer, losses = optax.adamw(1e-2), []
    params = sensitive(LLAMA)
    for model in (LLAMA, staged(LLAMA, "zero1", {"stage": 2, "data": 2, "fsdp": 2}, 2)):
        step, state = make_train_step(model, optimizer, accumulation_steps=2), create_train_state(model, optimizer, params)
        losses.append([])
        for _ in range(3):
            state, metrics = step(state, batch())
            losses[-1].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for leaf in (*jax.tree.leaves(state.params["model"]["layers"]), *jax.tree.leaves(state.opt_state[0].mu["model"]["layers"])):
        assert leaf.sharding.spec[0] == "stage"


def test_reports():
    """Hidden states and attention weights of every layer, in the order of layers and rows."""
    inputs = {"input_ids": batch()["input_ids"], "output_hidden_states": True, "output_attentions": True}
    model = LlamaModel(LLAMA.config, scan_layers=True, attn_implementation="eager")
    many, params = staged(model, "fsdp", {"stage": 4, "data": 2}, 4), sensitive(model)
    expected, found = (jax.jit(lambda p, m=m: m.apply({"params": p}, **inputs))(params) for m in (model, many))
    assert len(found.hidden_states) == 5 and len(found.attentions) == 4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_dropout_is_drawn_for_every_part():
    """Rows that are equal draw differently, in another microbatch, another replica and another layer."""
    config = BertConfig(**SHAPE | {"num_hidden_layers": 2}, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    many = staged(BertForMaskedLM(config, scan_layers=True), "replicated", {"stage": 2, "data": 4}, 2)
    ids = jnp.ones((8, 3), jnp.int32)
    embeds = jnp.ones((8, 3, 32))
    params = sensitive(many)
    call = jax.jit(lambda key: many.apply({"params": params}, inputs_embeds=embeds, attention_mask=ids, rngs={"dropout": key}).logits)
    rows = np.asarray(call(jax.random.key(0)))[:, 0]
    assert len(np.unique(rows.round(4), axis=0)) == 8
    np.testing.assert_array_equal(call(jax.random.key(0)), call(jax.random.key(0)))


def test_a_checkpoint_loads_onto_stages(tmp_path):
    model, params = dataclasses.replace(LLAMA, scan_layers=False, remat=None), sensitive(dataclasses.replace(LLAMA, scan_layers=False))
    jm.save_pretrained(tmp_path, model, params)
    many, placed = jm.AutoModelForCausalLM.from_pretrained(tmp_path, mesh=make_mesh(stage=4, fsdp=2), scan_layers=True)
    weight = placed["model"]["layers"]["0:4:1"]["mlp"]["up_proj"]["weight"]
    assert weight.sharding.shard_shape(weight.shape) == (1, 48, 16)
    ids = batch(8)["input_ids"]
    got, expected = (jax.jit(lambda p, m=m: m.apply({"params": p}, ids).logits)(p) for m, p in ((many, placed), (model, params)))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_refusals():
    mesh = make_mesh(stage=4, data=2)
    for microbatches in (6, 0, -4):
        with pytest.raises(ValueError, match=rf"microbatches = {microbatches}: .* must be a multiple of its `stage`"):
            Rules.preset("fsdp", mesh, microbatches=microbatches)
    with pytest.raises(ValueError, match="must be a multiple of its `stage`, which it lacks"):
        Rules.preset("fsdp", make_mesh(fsdp=8), microbatches=4)

    def run(model, rows=16, **inputs):
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        jax.eval_shape(lambda params: model.apply({"params": params}, jnp.ones((rows, 4), jnp.int32), **inputs), params)

    llama = staged(LLAMA, "fsdp", {"stage": 4, "data": 2}, 8)
    with pytest.raises(ValueError, match=r"a batch of 12 rows cannot be cut into 8 microbatches \(Rules.microbatches\)"):
        run(llama, 12)
    with pytest.raises(ValueError, match=r"8 microbatches .* are 1 each, .* a batch of a multiple of 16 rows"):
        run(llama, 8)
    with pytest.raises(ValueError, match="a mesh with 4 stages needs scan_layers=True"):
        run(dataclasses.replace(llama, scan_layers=False))
    with pytest.raises(ValueError, match="a pipeline has no cache"):
        run(llama, cache=init_cache(llama, 16, 4))
    gemma = Gemma3ForCausalLM(GEMMA, scan_layers=True)
    with pytest.raises(ValueError, match="into 8 stages: layers 0 to 7 repeat a period of 2 4 times; possible numbers of stages are 2, 4"):
        run(staged(gemma, "fsdp", {"stage": 8}, 8))
