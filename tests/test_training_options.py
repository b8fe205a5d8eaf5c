"""What the train step can do beside the plain update, each against torch, HF or the same thing done in another way."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from jaxmodels.auto import find_family
from jaxmodels.layers import dropout
from jaxmodels.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from jaxmodels.models.mixtral import MixtralConfig, MixtralForCausalLM
from jaxmodels.ops.loss import LossOptions, causal_lm_loss, summed_loss, token_losses
from jaxmodels.params import flatten, init_params
from jaxmodels.training import LossScale, create_train_state, make_eval_step, make_train_step

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(**SHAPE, num_key_value_heads=2)
KEY = jax.random.key(0)
SGD = optax.sgd(0.1)


def batch(rows=8, length=21, seed=0, empty=()):
    """Every row counts a number of labels of its own; the rows in `empty` none."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SHAPE["vocab_size"], (rows, length))
    labels = np.where(np.arange(length) < rng.integers(2, length, (rows, 1)), ids, -100)
    labels[list(empty)] = -100
    return {"input_ids": jnp.asarray(ids, jnp.int32), "labels": jnp.asarray(labels, jnp.int32)}


@cache
def perturbed(model):
    noise = jax.jit(lambda params: jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params))
    return noise(init_params(model, KEY))


make_step = cache(make_train_step)  # and compile it once


def run(model, steps=1, key=None, optimizer=SGD, data=None, **options):
    state = create_train_state(model, optimizer, perturbed(model), frozen=options.get("frozen", ()))
    step = make_step(model, optimizer, **options)
    for _ in range(steps):
        state, metrics = step(state, data or batch(), key)
    return state, metrics


def assert_close(one, other, rtol=1e-5):
    for (name, a), b in zip(flatten(one).items(), flatten(other).values()):
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b), name


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_large_batch(parts):
    """Labels weigh the same in whatever part they are, and a part may have none."""
    model, data = LlamaForCausalLM(CONFIG, scan_layers=True), batch(empty=(1, 5))
    whole, metrics = run(model, data=data)
    cut, again = run(model, data=data, accumulation_steps=parts)
    for name in ("loss", "tokens", "grad_norm"):
        np.testing.assert_allclose(again[name], metrics[name], rtol=2e-6)
    assert_close(cut.params, whole.params, 1e-6)


def test_accumulation_of_a_head_that_computes_its_loss_whole():
    model = LlamaForSequenceClassification(CONFIG.replace(num_labels=3, pad_token_id=0))
    data = {"input_ids": batch()["input_ids"], "labels": jnp.asarray([0, 1, 2, -100, -100, 1, 0, -100])}
    whole, metrics = run(model, data=data)
    cut, again = run(model, data=data, accumulation_steps=4)
    assert int(metrics["tokens"]) == 5
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=2e-6)
    assert_close(cut.params, whole.params, 1e-6)
    with pytest.raises(ValueError, match="are for causal language models"):
        make_train_step(model, optax.sgd(0.1), z_loss=0.1)


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match="8 rows cannot be cut into accumulation_steps = 3"):
        run(LlamaForCausalLM(CONFIG), accumulation_steps=3)


def test_label_smoothing_and_z_loss_are_those_of_hf_and_palm():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 11, 50)).astype(np.float32) * 3, rng.integers(0, 50, (3, 11))
    labels[0, 4:] = -100
    ours = lambda **options: summed_loss(lambda x: x, jnp.asarray(logits[:, :-1]), jnp.asarray(labels[:, 1:]), LossOptions(**options))
    count = (labels[:, 1:] != -100).sum()
    theirs = LabelSmoother(epsilon=0.1)({"logits": torch.tensor(logits)}, torch.tensor(labels), shift_labels=True)
    np.testing.assert_allclose(ours(label_smoothing=0.1) / count, theirs, rtol=1e-6)
    normalizers = torch.logsumexp(torch.tensor(logits[:, :-1]), -1)[torch.tensor(labels[:, 1:]) != -100]
    extra = ours(z_loss=0.01, chunk=4) - ours(chunk=4)
    np.testing.assert_allclose(extra, 0.01 * (normalizers**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(ours(), causal_lm_loss(jnp.asarray(logits), jnp.asarray(labels)) * count, rtol=1e-6)


HEADS = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "phi": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", HEADS)
def test_chunks_have_the_value_and_gradient_of_the_whole(name):
    """Heads that cap, scale, add a bias or share the embeddings."""
    family = find_family(name)
    model = family.classes["AutoModelForCausalLM"](family.config.from_dict({**SHAPE, **HEADS[name]}))
    params, data = perturbed(model), batch(3)

    @jax.jit
    def both(params, options):
        value = lambda params, options: model.apply({"params": params}, **data, loss_options=options).loss * 3
        return jax.value_and_grad(value)(params, None), jax.value_and_grad(value)(params, LossOptions(chunk=6))

    (wanted, theirs), (found, ours) = both(params, None)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert_close(ours, theirs, 2e-6)


def test_chunks_in_bfloat16_sum_in_float32():
    w = jax.random.normal(KEY, (64, 16), jnp.bfloat16)
    x = jax.random.normal(KEY, (2, 400, 16), jnp.bfloat16)
    labels = jax.random.randint(KEY, (2, 400), 0, 64)

    def value(x, w, dtype, chunk):
        head = lambda x: jnp.einsum("btd,vd->btv", x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
        return summed_loss(head, x, labels, LossOptions(chunk=chunk))

    gradients = jax.grad(value, (0, 1))
    exact = gradients(x.astype(jnp.float32), w.astype(jnp.float32), jnp.float32, None)
    for found, wanted in zip(gradients(x, w, jnp.bfloat16, 25), exact):
        assert found.dtype == jnp.bfloat16
        assert np.linalg.norm(found.astype(jnp.float32) - wanted) <= 6e-3 * np.linalg.norm(wanted)


def test_logits_of_a_large_vocabulary_never_exist_together():
    """What the compiler sets aside for a step: with chunks no [B,T,V], and the gradients as the largest part."""
    B, T, V = 4, 256, 16384
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": V, "num_hidden_layers": 1}, tie_word_embeddings=True))
    state = jax.eval_shape(lambda: create_train_state(model, optax.sgd(0.1), init_params(model, KEY)))
    data = {name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in ("input_ids", "labels")}

    def temporary(**options):
        return make_train_step(model, optax.sgd(0.1), **options).lower(state, data).compile().memory_analysis().temp_size_in_bytes

    logits = B * T * V * 4
    whole, chunked = temporary(loss_chunk=None), temporary(loss_chunk=8)
    assert whole > 2 * logits
    assert chunked < 0.4 * logits  # most of it attention's [B,N,T,T]
    frozen = temporary(loss_chunk=8, frozen=("model.embed_tokens.weight",))
    assert frozen < chunked - V * SHAPE["hidden_size"] * 4  # the head's gradient is not made for nothing


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_keeps_no_numbers_between(dtype):
    """What the forward pass of scanned layers keeps for the gradient: of the MLP as much as torch does, of norms their inputs alone, and
    nothing in float32 that a bfloat16 array tells."""
    model, data = LlamaForCausalLM(CONFIG, scan_layers=True, dtype=dtype), batch()
    gradient = jax.grad(lambda params: model.apply({"params": params}, **data).loss)
    equations = jax.make_jaxpr(gradient)(perturbed(model)).jaxpr.eqns
    forward = next(equation for equation in equations if equation.primitive.name == "scan")
    kept = [v.aval for v in forward.outvars if v.aval.shape[:3] == (2, *data["labels"].shape)]  # [layers, B, T, …]
    assert [v.dtype for v in kept if v.shape[3:] == (48,)] == [dtype] * 4  # gate, its activation, up, the product of both
    assert [v.dtype for v in kept if v.shape[3:] == (32,)] == [dtype] * 5  # x before and after attention, both normed, attention's output
    assert not [v for v in kept if v.shape[3:] == (1,)]


@pytest.mark.parametrize("interval", [2, 3])
def test_loss_scale_moves_as_torch_scaler(interval, monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", interval)
    scale, growth = torch.tensor([65536.0]), torch.tensor([0], dtype=torch.int32)
    ours = LossScale.initial()
    for finite in [1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]:
        torch._amp_update_scale_(scale, growth, torch.tensor([float(not finite)]), 2.0, 0.5, interval)
        ours = ours.update(jnp.bool_(finite))
        assert (float(ours.scale), int(ours.good)) == (scale.item(), growth.item())


def test_float16_skips_what_overflows_and_trains():
    model, optimizer = LlamaForCausalLM(CONFIG, dtype=jnp.float16), optax.adam(1e-2)
    state = create_train_state(model, optimizer, perturbed(model))
    step, data = make_train_step(model, optimizer), batch()
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**40)))
    before = jax.tree.map(np.asarray, state)
    state, metrics = step(state, data)
    assert not np.isfinite(metrics["grad_norm"]) and float(state.loss_scale.scale) == 2.0**39
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), (state.params, state.opt_state), (before.params, before.opt_state))
    assert all(jax.tree.leaves(same))
    state = state.replace(loss_scale=LossScale.initial())
    losses = []
    for _ in range(12):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    wide = LlamaForCausalLM(CONFIG)
    wanted = float(make_eval_step(wide)(perturbed(wide), data)["loss"])
    assert abs(losses[0] - wanted) <= 2e-3 * wanted
    assert losses[-1] < losses[0] - 0.5


def test_clipping_is_torch():
    model = LlamaForCausalLM(CONFIG)
    before = perturbed(model)
    state, metrics = run(model, max_grad_norm=0.5, optimizer=optax.sgd(1.0))
    grads = jax.tree.map(lambda b, a: torch.tensor(np.asarray(b - a)), before, state.params)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([float(metrics["grad_norm"])])
    torch.nn.utils.clip_grad_norm_([weight], 0.5)
    np.testing.assert_allclose(float(optax.tree.norm(jax.tree.map(np.asarray, grads))), weight.grad.item(), rtol=1e-3)
    _, free = run(model, optimizer=optax.sgd(1.0))
    np.testing.assert_allclose(free["grad_norm"], metrics["grad_norm"], rtol=1e-6)


def test_neftune_is_uniform_noise_on_the_word_embeddings():
    alpha, model, data = 5.0, LlamaForCausalLM(CONFIG, scan_layers=True), batch()
    _, metrics = run(model, key=KEY, neftune_noise_alpha=alpha)
    _, again = run(model, key=KEY, neftune_noise_alpha=alpha)
    _, other = run(model, key=jax.random.key(3), neftune_noise_alpha=alpha)
    assert metrics["loss"] == again["loss"] != other["loss"]
    params = perturbed(model)
    x = params["model"]["embed_tokens"]["weight"][data["input_ids"]]
    noise = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 0), 0), 1), x.shape, x.dtype, -1, 1)
    x = x + noise * alpha / np.sqrt(x.shape[1] * x.shape[2])
    wanted = model.apply({"params": params}, inputs_embeds=x, labels=data["labels"]).loss
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="needs a key"):
        run(model, neftune_noise_alpha=alpha)


@pytest.mark.parametrize("scanned", [False, True])
def test_frozen_parameters_have_no_gradient_and_no_state(scanned):
    model = LlamaForCausalLM(CONFIG, scan_layers=scanned)
    frozen = (r"model\.embed_tokens\..*", r".*\.self_attn\..*")
    start = flatten(jax.tree.map(np.asarray, perturbed(model)))
    state, _ = run(model, 3, optimizer=optax.adam(1e-2), frozen=frozen)
    fixed = {name for name in start if "embed_tokens" in name or "self_attn" in name}
    for name, leaf in flatten(state.params).items():
        assert np.array_equal(leaf, start[name]) == (name in fixed), name
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert any("mlp" in path for path in paths) and not any("embed_tokens" in path or "self_attn" in path for path in paths)
    labels = {name: "fixed" if name in fixed else "trained" for name in start}
    full = optax.partition({"fixed": optax.set_to_zero(), "trained": optax.adam(1e-2)}, lambda params: _named(params, labels))
    wanted, _ = run(model, 3, optimizer=full)
    assert_close(state.params, wanted.params, 1e-6)


def _named(params, labels):
    return jax.tree_util.tree_map_with_path(lambda path, _: labels[".".join(entry.key for entry in path)], params)


def test_frozen_parameters_keep_their_dtype_and_bad_patterns_are_refused():
    model = LlamaForCausalLM(CONFIG, dtype=jnp.bfloat16)
    params = init_params(model, KEY, jnp.bfloat16)
    state = create_train_state(model, optax.sgd(0.1), params, frozen=lambda name: "mlp" in name)
    dtypes = {name: leaf.dtype for name, leaf in flatten(state.params).items()}
    assert all(dtype == (jnp.bfloat16 if "mlp" in name else jnp.float32) for name, dtype in dtypes.items())
    with pytest.raises(ValueError, match="'embed' matches no parameter; names are like"):
        create_train_state(model, optax.sgd(0.1), params, frozen=("embed",))
    with pytest.raises(ValueError, match="are frozen: nothing is left"):
        create_train_state(model, optax.sgd(0.1), params, frozen=(".*",))


def test_a_loss_of_your_own_and_its_metrics_add_up_over_parts():
    model = LlamaForCausalLM(CONFIG)

    def last_token(apply, params, batch, num_items):
        losses = token_losses(apply(params, input_ids=batch["input_ids"]).logits[:, -1], batch["next"])
        return jnp.sum(losses) / num_items, {"worst": jnp.sum(losses**2) / num_items}

    data = {"input_ids": batch()["input_ids"], "next": jnp.arange(8)}
    count = lambda batch: jnp.int32(len(batch["next"]))
    whole, metrics = run(model, data=data, loss=last_token, count=count)
    cut, again = run(model, data=data, loss=last_token, count=count, accumulation_steps=2)
    assert_close(cut.params, whole.params, 1e-6)
    np.testing.assert_allclose([again["loss"], again["worst"]], [metrics["loss"], metrics["worst"]], rtol=2e-6)
    evaluated = make_eval_step(model, last_token, count=count)(perturbed(model), data)
    np.testing.assert_allclose(evaluated["worst"], metrics["worst"], rtol=1e-5)


@pytest.mark.parametrize("scanned", [False, True])
def test_dropout_has_explicit_keys(scanned):
    """No key, no dropout; a key's noise is the same under remat, another in every part and step, and right on average."""
    shape = {name: size for name, size in SHAPE.items() if name != "intermediate_size"}
    config = GPT2Config(**shape, embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3)
    model, data = GPT2LMHeadModel(config, scan_layers=scanned), batch()
    plain = float(make_eval_step(model)(perturbed(model), data)["loss"])
    _, quiet = run(model, data=data)
    np.testing.assert_allclose(quiet["loss"], plain, rtol=1e-6)
    state, noisy = run(model, data=data, key=KEY)
    again, same = run(model.clone(remat="full"), data=data, key=KEY)
    np.testing.assert_allclose(same["loss"], noisy["loss"], rtol=1e-6)
    assert_close(again.params, state.params, 1e-5)
    losses = {float(run(model, data=data, key=jax.random.key(seed))[1]["loss"]) for seed in range(2)}
    assert len(losses | {plain}) == 3
    half = {name: jnp.concatenate([x[:4], x[:4]]) for name, x in data.items()}
    params, rngs = perturbed(model), {"dropout": KEY}
    by_row = jax.jit(lambda params: model.apply({"params": params}, **half, rngs=rngs, loss_options=LossOptions(by_row=True)).loss)
    rows = by_row(params)
    assert np.all(np.abs(rows[:4] - rows[4:]) > 1e-4)


def test_what_is_dropped_is_made_up_for():
    x = jnp.ones((200, 300))
    module = nn.Dense(1)  # any module: the function needs its keys
    y = module.apply({}, x, method=lambda self, x: dropout(self, x, 0.25), rngs={"dropout": KEY})
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert abs(float(jnp.mean(y)) - 1) < 0.01
    assert module.apply({}, x, method=lambda self, x: dropout(self, x, 0.25)) is x


def test_the_routers_loss_counts_with_the_labels():
    """Each part of a batch has its own router loss; chunks and packing keep it."""
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.3)
    model, data = MixtralForCausalLM(config, scan_layers=True), batch()
    params, wanted, tokens = perturbed(model), 0.0, 0
    forward = jax.jit(lambda part: model.apply({"params": params}, **part))
    for rows in (slice(0, 8, 2), slice(1, 8, 2)):  # how the step cuts
        part = {name: x[rows] for name, x in data.items()}
        out, count = forward(part), int(jnp.sum(part["labels"][:, 1:] != -100))
        assert out.aux_loss > 1
        wanted, tokens = wanted + float(out.loss) * count, tokens + count
    _, metrics = run(model, data=data, accumulation_steps=2, loss_chunk=6)
    np.testing.assert_allclose(metrics["loss"], wanted / tokens, rtol=1e-5)
