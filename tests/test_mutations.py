"""The power of the tester: every mistake that this file makes in an op, a layer or a checkpoint turns a check of the tester red.

Run op by op, without jit: the programs are then the primitives', compiled once for all mutations."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from cases import Case
from tester import FamilyTester

from jaxmodels import layers, model, step
from jaxmodels.cache import KV, Cache
from jaxmodels.convert import parity
from jaxmodels.models import bert
from jaxmodels.ops import activation, attention
from jaxmodels.params import flatten, unflatten

TESTER = FamilyTester()


def torch_config(**changes):
    values = {
        "vocab_size": 151,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "max_position_embeddings": 512,
    }
    return transformers.LlamaConfig(**values | changes)


def make(directory, **changes):
    case = Case.make(torch_config(**changes), directory, greedy=False)
    case.torch, case.torch64, case.loaded  # noqa: B018  truth, before anything is broken
    return case


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    factors = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.5, 3.0, 5.0, 8.0]}
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 129, **factors}
    return make(tmp_path_factory.mktemp("longrope"), rope_parameters=parameters)


def again(case, **loaded):
    """The case with nothing computed by ours yet; `params`: other parameters, `model`: another model."""
    new = copy.copy(case)
    for name in ("report", "forward", "scanned"):
        new.__dict__.pop(name, None)
    old_model, old_params = case.loaded
    new.loaded = (loaded.get("model", old_model), loaded.get("params", old_params))
    return new


def run(check, case):
    with jax.disable_jit():
        getattr(TESTER, f"test_{check}")(case)


def caught(check, case):
    """The check fails, and by a number that is off rather than by a crash."""
    with pytest.raises(AssertionError):
        run(check, case)


CHECKS = ("hidden_states", "logits", "gradients", "second_turn_of_ragged_rows")


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_caught_where_nothing_is_wrong(plain, longrope, check):
    run(check, again(plain))
    run(check, again(longrope))


# ---- ops -------------------------------------------------------------------------------------------------------------------------


def wrap(patch, module, name, change):
    """Put `change(original, *args, **kwargs)` in the place of a function."""
    original = getattr(module, name)
    patch.setattr(module, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def wrong_theta(patch):
    def change(original, parameters, *rest):
        return original(dataclasses.replace(parameters, rope_theta=1.5 * parameters.rope_theta), *rest)

    wrap(patch, step, "inverse_frequencies", change)


def swapped_halves(patch):
    wrap(patch, step, "rotate", lambda original, x, table, *rest: original(x, (table[0], -table[1]), *rest))


def interleaved_pairs(patch):
    wrap(patch, step, "rotate", lambda original, x, table, interleaved=False: original(x, table, not interleaved))


def unturned_keys(patch):
    turns = iter(range(10**6))
    wrap(patch, step, "rotate", lambda original, x, *rest: x if next(turns) % 2 else original(x, *rest))


def table_in_bfloat16(patch):
    def change(original, frequencies, scale, positions, dtype):
        return tuple(x.astype(dtype) for x in original(frequencies, scale, positions, jnp.bfloat16))

    wrap(patch, step, "rope_table", change)


def sees_the_next_token(patch):
    wrap(patch, attention, "visible", lambda original, q, k, *rest: original(q + 1, k, *rest))


def misses_its_own_token(patch):
    """Each token but the first."""
    wrap(patch, attention, "visible", lambda original, q, k, *rest: original(jnp.where(q > 0, q - 1, q), k, *rest))


def sees_padding(patch):
    wrap(patch, attention, "visible", lambda original, q, k, *rest: k[:, None, None] <= q[:, None, :, None])


def forgets_far_tokens(patch):
    wrap(patch, attention, "visible", lambda original, q, k, *rest: original(q, k, 150))


def no_scale(patch):
    wrap(patch, step, "attention", lambda original, *args, **kwargs: original(*args, **kwargs | {"scale": 1.0}))


def heads_in_the_wrong_groups(patch):
    """Query head n reads key head n % K rather than n // (N / K)."""

    def change(original, q, k, v, *rest, **kwargs):
        order = np.arange(q.shape[2]).reshape(k.shape[2], -1).T.reshape(-1)
        out, weights = original(q[:, :, order], k, v, *rest, **kwargs)
        return out[:, :, np.argsort(order)], weights

    wrap(patch, step, "attention", change)


def wrong_eps(patch):
    wrap(patch, layers, "rms_norm", lambda original, x, weight, eps: original(x, weight, 10 * eps))


def norm_in_bfloat16(patch):
    wrap(patch, layers, "rms_norm", lambda original, x, *rest: original(x.astype(jnp.bfloat16), *rest).astype(x.dtype))


def norm_takes_the_mean_away(patch):
    wrap(patch, layers, "rms_norm", lambda original, x, *rest: original(x - x.mean(-1, keepdims=True), *rest))


def wrong_activation(patch):
    patch.setitem(activation.ACTIVATIONS, "silu", activation.ACTIVATIONS["gelu"])


def no_bias(patch):
    wrap(patch, layers, "linear", lambda original, x, weight, bias=None: original(x, weight))


def products_in_bfloat16(patch):
    """What accelerators do by default."""
    low = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)
    wrap(patch, layers, "linear", lambda original, x, weight, bias=None: original(low(x), low(weight), bias))


def no_final_norm(patch):
    call = layers.RMSNorm.__call__
    patch.setattr(layers.RMSNorm, "__call__", lambda self, x: x if self.name == "norm" else call(self, x))


def always_tied(patch):
    patch.setattr(model.CausalLM, "head", lambda self, x: self.model.embeddings().attend(x))


OPS = [
    wrong_theta,
    swapped_halves,
    interleaved_pairs,
    unturned_keys,
    table_in_bfloat16,
    sees_the_next_token,
    misses_its_own_token,
    sees_padding,
    forgets_far_tokens,
    no_scale,
    heads_in_the_wrong_groups,
    wrong_eps,
    norm_in_bfloat16,
    norm_takes_the_mean_away,
    wrong_activation,
    no_bias,
    products_in_bfloat16,
    no_final_norm,
    always_tied,
]


@pytest.mark.parametrize("mutation", OPS, ids=lambda f: f.__name__)
def test_a_wrong_op_is_caught(plain, monkeypatch, mutation):
    mutation(monkeypatch)
    case = again(plain)
    caught("logits", case)
    if mutation is not always_tied:
        caught("hidden_states", case)
        assert case.report.first_divergent == ("layer 1 + norm" if mutation is no_final_norm else "layer 0")


# ---- an encoder ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    values = {k: v for k, v in torch_config().to_dict().items() if k in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.BertConfig(**values, num_hidden_layers=2, num_attention_heads=6, pad_token_id=None)
    case = Case.make(config, tmp_path_factory.mktemp("encoder"), False, "AutoModelForMaskedLM", {"token_type_ids": 2})
    case.torch, case.torch64, case.loaded  # noqa: B018
    return case


def sees_what_precedes(patch):
    wrap(patch, attention, "visible", lambda original, q, k, *rest: original(q, k))


def sees_everything(patch):
    wrap(patch, attention, "visible", lambda original, q, k, *rest: original(q, jnp.maximum(k, 0), *rest))


def one_position_further(patch):
    wrap(patch, layers.Step, "lookup", lambda original, *args: original(*args) + 1)


def one_kind_of_token(patch):
    wrap(
        patch, bert.BertEmbeddings, "__call__", lambda original, self, words, types, positions: original(self, words, 0 * types, positions)
    )


@pytest.mark.parametrize("mutation", [sees_what_precedes, sees_everything, one_position_further, one_kind_of_token, no_bias, no_scale])
def test_a_wrong_encoder_is_caught(encoder, monkeypatch, mutation):
    run("logits", again(encoder))
    mutation(monkeypatch)
    caught("logits", again(encoder))


# ---- the cache: one forward pass is right ------------------------------------------------------------------------------------------


def stale_index(patch):
    """Every turn is written over the last."""
    wrap(patch, Cache, "advance", lambda original, self, positions: original(self, positions).replace(index=self.index))


def positions_by_column(patch):
    """Padding counts in what follows it, as it does where a cache has one length for all rows."""

    def change(original, shape, mask, cache, **static):
        step, after = original(shape, mask, cache, **static)
        columns = (0 if cache is None else cache.index) + jnp.broadcast_to(jnp.arange(shape[1]), shape)
        positions = jnp.where(step.positions >= 0, columns, -1)
        after = None if cache is None else cache.advance(positions)
        keys = positions if cache is None or cache.fresh else after.positions
        return step.replace(positions=positions, key_positions=keys), after

    wrap(patch, model, "begin", change)


def padding_is_remembered(patch):
    def change(original, shape, mask, cache, **static):
        return original(shape, None if cache is not None and not cache.fresh else mask, cache, **static)

    wrap(patch, model, "begin", change)


def only_this_turn_is_seen(patch):
    def change(original, self, k, v, step):
        state, *_ = original(self, k, v, step)
        return state, k, v, step.positions

    wrap(patch, KV, "update", change)


@pytest.mark.parametrize(
    "mutation", [stale_index, positions_by_column, padding_is_remembered, only_this_turn_is_seen], ids=lambda f: f.__name__
)
def test_a_wrong_cache_is_caught(plain, monkeypatch, mutation):
    mutation(monkeypatch)
    case = again(plain)
    run("logits", case)
    caught("second_turn_of_ragged_rows", case)


# ---- ropes that depend on the length -----------------------------------------------------------------------------------------------


def length_of_the_batch(patch):
    """As HF: the longest row decides for all."""
    wrap(patch, step, "inverse_frequencies", lambda original, p, d, lengths: original(p, d, jnp.full_like(lengths, lengths.max())))


def one_token_early(patch):
    wrap(patch, step, "inverse_frequencies", lambda original, p, d, lengths: original(p, d, lengths + 1))


def attention_factor_lost(patch):
    wrap(patch, step, "inverse_frequencies", lambda original, *args: (original(*args)[0], 1.0))


def test_a_wrong_length_is_caught(longrope, monkeypatch):
    for mutation, check in (
        (length_of_the_batch, "logits"),
        (one_token_early, "second_turn_of_ragged_rows"),  # a row ends there with the 129 tokens of the limit
        (attention_factor_lost, "logits"),
    ):
        with monkeypatch.context() as patch:
            mutation(patch)
            caught(check, again(longrope))


# ---- gradients: the numbers of the forward pass are right -----------------------------------------------------------------------------


def loss_of_the_same_token(patch):
    wrap(patch, model, "causal_lm_loss", lambda original, logits, labels, count: model.cross_entropy(logits, labels, count))


def loss_counts_padding(patch):
    wrap(patch, model, "causal_lm_loss", lambda original, logits, labels, count: original(logits, jnp.maximum(labels, 0), count))


def no_gradient_through_keys(patch):
    def change(original, q, k, *rest, **kwargs):
        return original(q, jax.lax.stop_gradient(k), *rest, **kwargs)

    wrap(patch, step, "attention", change)


@pytest.mark.parametrize("mutation", [loss_of_the_same_token, loss_counts_padding, no_gradient_through_keys], ids=lambda f: f.__name__)
def test_a_wrong_gradient_is_caught(plain, monkeypatch, mutation):
    mutation(monkeypatch)
    case = again(plain)
    run("logits", case)
    caught("gradients", case)


# ---- the checkpoint --------------------------------------------------------------------------------------------------------------


def swap(flat, a, b):
    return flat | {key: flat[key.replace(a, b) if a in key else key.replace(b, a)] for key in flat if a in key or b in key}


PARAMETERS = {
    "gate and up swapped": lambda flat: swap(flat, "gate_proj", "up_proj"),
    "keys and values swapped": lambda flat: swap(flat, "k_proj", "v_proj"),
    "norms swapped": lambda flat: swap(flat, "input_layernorm", "post_attention_layernorm"),
    "layers swapped": lambda flat: swap(flat, "layers.0.", "layers.1."),
    "output transposed": lambda flat: {k: v.T if k.endswith("o_proj.weight") else v for k, v in flat.items()},
    "one norm left at one": lambda flat: flat | {"model.layers.1.input_layernorm.weight": jnp.ones(48)},
    "one bias left at zero": lambda flat: flat | {"model.layers.1.self_attn.k_proj.bias": jnp.zeros(16)},
    "one weight through float16": lambda flat: (
        flat | {"model.layers.1.mlp.up_proj.weight": flat["model.layers.1.mlp.up_proj.weight"].astype(jnp.float16).astype(jnp.float32)}
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_wrong_parameters_are_caught(plain, name, tmp_path):
    params = plain.loaded[1]
    case = again(plain, params=unflatten(PARAMETERS[name](flatten(params))))
    case.scanned = plain.scanned
    with pytest.raises(AssertionError):
        TESTER.test_round_trip(case, tmp_path)
    if name != "one weight through float16":  # for bytes alone
        caught("logits", case)


def test_a_wrong_order_of_scanned_layers_is_caught(plain):
    scanned, params = plain.scanned
    case = again(plain)
    case.scanned = (scanned, jax.tree.map(lambda x: x, params))
    TESTER.test_scanned_equals_unrolled(case)
    case.scanned = (scanned, unflatten({k: v[::-1] if ":" in k else v for k, v in flatten(params).items()}))
    with pytest.raises(AssertionError):
        TESTER.test_scanned_equals_unrolled(case)


def test_a_wrong_token_is_caught(plain):
    theirs = np.arange(8).reshape(2, 4)
    ours = theirs.copy()
    compare = lambda: parity.compare(dataclasses.replace(plain.torch, greedy=ours), dataclasses.replace(plain.torch, greedy=theirs))
    assert compare().passed
    ours[1, 3] = 9
    assert compare().greedy == (4, 3) and not compare().greedy_equal and not compare().passed


def test_nan_is_caught(plain):
    answers = dataclasses.replace(plain.torch, logits=plain.torch.logits.copy())
    answers.logits[3, 4] = np.nan
    report = parity.compare(answers, plain.torch)
    assert report.first_divergent == "logits" and not report.passed
