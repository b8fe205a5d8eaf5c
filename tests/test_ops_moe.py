from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.layers import activation
from jaxmodels.ops import moe

MLP = partial(moe.gated_mlp, activation("silu"))


def case(S, D, F, E, k, dtype=jnp.float32, used=None, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype)
    params = {"gate_proj": draw(E, F, D), "up_proj": draw(E, F, D), "down_proj": draw(E, D, F)}
    logits = rng.standard_normal((S, E))
    logits[:, used or E :] = -np.inf
    return params, draw(S, D), *moe.softmax_top_k(jnp.asarray(logits), k)


def by_hand(params, x, weights, chosen, scale_input=False):
    p = {name: np.asarray(w, np.float64) for name, w in params.items()}
    x, weights, out = np.asarray(x, np.float64), np.asarray(weights, np.float64), []
    for row, ws, es in zip(x, weights, np.asarray(chosen)):
        y = 0
        for w, e in zip(ws, es):
            r = row * w if scale_input else row
            gate, up = p["gate_proj"][e] @ r, p["up_proj"][e] @ r
            y = y + (1 if scale_input else w) * (p["down_proj"][e] @ (gate / (1 + np.exp(-gate)) * up))
        out.append(y)
    return np.array(out)


@settings(deadline=None, max_examples=12)
@given(
    S=st.sampled_from([1, 3, 37, 200]),
    E=st.sampled_from([2, 5, 16]),
    k=st.integers(1, 2),
    used=st.sampled_from([2, None]),
    scale_input=st.booleans(),
    seed=st.integers(0, 9),
)
def test_paths_agree(S, E, k, used, scale_input, seed):
    """With each other and with float64 by hand; also when most experts get no token."""
    params, x, weights, chosen = case(S, 12, 20, E, k, used=used, seed=seed)
    truth = by_hand(params, x, weights, chosen, scale_input)
    for name in moe.IMPLEMENTATIONS:
        ours = moe.mix_experts(MLP, params, x, weights, chosen, name, scale_input=scale_input)
        np.testing.assert_allclose(ours, truth, atol=2e-6)


@pytest.mark.parametrize("S", [1, 3, 150])
def test_gradients_agree(S):
    params, x, weights, chosen = case(S, 12, 20, 5, 2, used=4)

    def loss(params, x, weights, name):
        return jnp.sum(jnp.sin(moe.mix_experts(MLP, params, x, weights, chosen, name)))

    ours, theirs = (jax.jit(jax.grad(partial(loss, name=name), (0, 1, 2)))(params, x, weights) for name in moe.IMPLEMENTATIONS)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), ours, theirs)
    assert all(not np.any(g[4]) for g in ours[0].values())  # the expert that nobody chose


@pytest.mark.parametrize("S", [1, 3, 150])
def test_bfloat16(S):
    params, x, weights, chosen = case(S, 24, 40, 4, 2, jnp.bfloat16)
    truth = by_hand(params, x, weights, chosen)
    for name in moe.IMPLEMENTATIONS:
        ours = jax.jit(partial(moe.mix_experts, MLP, implementation=name))(params, x, weights, chosen)
        assert ours.dtype == jnp.bfloat16
        assert np.sqrt(np.mean((np.asarray(ours, np.float64) - truth) ** 2)) < 4 * 2**-9 * np.std(truth)  # four roundings in a row
        grads = jax.grad(lambda p, name=name: jnp.sum(moe.mix_experts(MLP, p, x, weights, chosen, name).astype(jnp.float32)))(params)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_experts_with_biases_agree():
    params, x, weights, chosen = case(30, 12, 20, 5, 2)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((5, 12)), jnp.float32)
    mlp = lambda x, w, dot: dot(jnp.tanh(dot(x, w["up_proj"])), w["down_proj"], w["bias"])
    one, other = (moe.mix_experts(mlp, params | {"bias": bias}, x, weights, chosen, name) for name in moe.IMPLEMENTATIONS)
    np.testing.assert_allclose(one, other, atol=2e-6)
    assert np.abs(one - moe.mix_experts(mlp, params | {"bias": 0 * bias}, x, weights, chosen)).max() > 0.1


def test_grouped_rows():
    """What other backends run, by XLA's own expansion of ragged_dot, is what the CPU runs; also the gradients."""
    params, x, *_ = case(40, 12, 20, 3, 1)
    sizes = jnp.array([11, 0, 20], jnp.int32)
    run = lambda f: jax.jit(jax.value_and_grad(lambda p, x: (jnp.sum(jnp.sin(y := f(MLP, p, x, sizes)[:31])), y), (0, 1), has_aux=True))
    for ours, theirs in zip(*(jax.tree.leaves(run(f)(params, x)) for f in (moe._tiled, moe._grouped))):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_routing():
    logits = jnp.array([[1.0, 3.0, 2.0, -1.0]])
    p = np.asarray(jax.nn.softmax(logits))[0]
    weights, chosen = moe.softmax_top_k(logits, 2)
    np.testing.assert_array_equal(chosen, [[1, 2]])
    np.testing.assert_allclose(weights, [[p[1], p[2]]], rtol=1e-6)
    np.testing.assert_allclose(moe.softmax_top_k(logits, 2, True)[0], [[p[1] / (p[1] + p[2]), p[2] / (p[1] + p[2])]], rtol=1e-6)
    np.testing.assert_allclose(moe.top_k_softmax(logits, 2)[0], moe.softmax_top_k(logits, 2, True)[0], rtol=1e-6)
    weights, chosen = moe.pick(logits, 2, by=logits + jnp.array([0, 0, 0, 9]))
    np.testing.assert_array_equal(chosen, [[3, 1]])
    np.testing.assert_array_equal(weights, [[-1, 3]])


def test_groups():
    scores = np.float32([[0.9, 0.0, 0.5, 0.6, 0.3, 0.2]])
    np.testing.assert_array_equal(moe.keep_groups(jnp.asarray(scores), 3, 1, fill=0), np.float32([[0.9, 0, 0, 0, 0, 0]]))
    np.testing.assert_array_equal(moe.keep_groups(jnp.asarray(scores), 3, 1, best=2, fill=0), np.float32([[0, 0, 0.5, 0.6, 0, 0]]))
    assert np.isneginf(moe.keep_groups(jnp.asarray(scores), 3, 2)[0, 4:]).all()


def test_load_balancing_loss_is_transformers():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((3, 7, 5)).astype(np.float32) for _ in range(4)]
    mask = (np.arange(7) >= np.array([[0], [3], [5]])).astype(np.int32)
    theirs = tuple(torch.tensor(x.reshape(-1, 5)) for x in layers)
    np.testing.assert_allclose(moe.load_balancing_loss(layers, 2), load_balancing_loss_func(theirs, 5, 2), rtol=1e-6)
    masked = load_balancing_loss_func(theirs, 5, 2, torch.tensor(mask))
    np.testing.assert_allclose(moe.load_balancing_loss(layers, 2, jnp.asarray(mask)), masked, rtol=1e-6)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="ragged_dot, dense"):
        moe.mix_experts(MLP, *case(3, 4, 4, 2, 1), "megablocks")
