"""Products, norms, activations and embeddings against torch, in both dtypes, over layouts and odd shapes."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from jaxmodels.layers import Embedding
from jaxmodels.ops.activation import ACTIVATIONS, activation
from jaxmodels.ops.linear import einsum, linear
from jaxmodels.ops.norm import rms_norm, rms_norm_once

DTYPES = {"float32": (jnp.float32, torch.float32), "bfloat16": (jnp.bfloat16, torch.bfloat16)}
LEADING = [(1,), (2,), (7,), (1, 1), (3, 1), (1, 5), (2, 3, 4)]


def draw(shape, dtype, seed=0, scale=1.0):
    """The same numbers for jax and torch."""
    mine, theirs = DTYPES[dtype]
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, mine)
    return x, torch.tensor(np.asarray(x, np.float32)).to(theirs)


def close(mine, theirs, dtype):
    """float32: to 2e-5 of the largest number. bfloat16: the same number or its neighbour."""
    theirs = theirs.detach().float().numpy()
    rtol, atol = (1e-5, 2e-5 * np.abs(theirs).max()) if dtype == "float32" else (2**-7, 2**-8 * np.abs(theirs).max())
    assert mine.dtype == dtype and mine.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(mine, np.float32), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("use_bias", [False, True])
def test_linear(leading, dtype, use_bias):
    for fan_in, fan_out in ((1, 1), (5, 3), (64, 33)):
        x, tx = draw((*leading, fan_in), dtype)
        w, tw = draw((fan_out, fan_in), dtype, 1)
        b, tb = draw((fan_out,), dtype, 2) if use_bias else (None, None)
        close(jax.jit(linear)(x, w, b), torch.nn.functional.linear(tx, tw, tb), dtype)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_bfloat16_accumulates_in_float32(rows):
    """256 and then 4095 ones: a bfloat16 sum stays at 256; rounded once it is 4352."""
    x = jnp.ones((rows, 4096), jnp.bfloat16)
    w = jnp.ones((3, 4096), jnp.bfloat16).at[:, 0].set(256)
    np.testing.assert_array_equal(np.asarray(linear(x, w), np.float32), np.full((rows, 3), 4352.0))
    b = jnp.full((3,), 10, jnp.bfloat16)  # 4351 + 10 rounds to 4352, 4352 + 10 to 4368
    np.testing.assert_array_equal(np.asarray(linear(x, w, b), np.float32), np.full((rows, 3), 4352.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_linear_under_transformations(dtype, rows):
    x, tx = draw((rows, 6), dtype)
    w, tw = draw((4, 6), dtype, 1)
    b, tb = draw((4,), dtype, 2)
    leaves = [t.requires_grad_() for t in (tx, tw, tb)]
    torch.nn.functional.linear(*leaves).sum().backward()
    gradients = jax.jit(jax.grad(lambda *a: linear(*a).astype(jnp.float32).sum(), (0, 1, 2)))(x, w, b)
    for mine, leaf in zip(gradients, leaves):
        close(mine, leaf.grad, dtype)
    expected = torch.nn.functional.linear(tx, tw, tb)
    stacked = [jnp.stack([a, a]) for a in (x, w, b)]
    close(jax.jit(jax.vmap(linear))(*stacked)[1], expected, dtype)
    close(jax.jit(lambda *a: jax.lax.scan(lambda _, a: (None, linear(*a)), None, a)[1])(*stacked)[1], expected, dtype)


def test_linear_with_parameters_of_another_dtype():
    """The compute dtype is the input's: float32 parameters round to it."""
    x, _ = draw((2, 8), "bfloat16")
    w, _ = draw((3, 8), "float32", 1)
    got = linear(x, w, jnp.ones(3))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, linear(x, w.astype(jnp.bfloat16), jnp.ones(3, jnp.bfloat16)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swapped", [False, True])
def test_batched_products_of_every_layout(dtype, swapped):
    """The two products of attention, with keys and values stored either way: some are not implemented in XLA:CPU for bfloat16."""
    turn = lambda x: jnp.swapaxes(x, 1, 2) if swapped else x
    for B, T, S, K, G, H in ((1, 1, 1, 1, 1, 1), (1, 1, 9, 3, 1, 5), (2, 1, 17, 2, 4, 16), (3, 5, 8, 1, 6, 7)):
        q, tq = draw((B, T, K, G, H), dtype)
        k, tk = draw((B, K, S, H) if swapped else (B, S, K, H), dtype, 1)
        wide = lambda t: t.to(torch.float32)
        tk = wide(tk).swapaxes(1, 2) if swapped else wide(tk)
        scores = jax.jit(lambda q, k: einsum("btkgh,bskh->bkgts", q, turn(k)))(q, k)
        assert scores.dtype == jnp.float32
        np.testing.assert_allclose(scores, torch.einsum("btkgh,bskh->bkgts", wide(tq), tk), rtol=0, atol=3e-5)
        w, tw = draw((B, K, G, T, S), dtype, 2)
        out = jax.jit(lambda w, v: einsum("bkgts,bskh->btkgh", w, turn(v)))(w, k)
        np.testing.assert_allclose(out, torch.einsum("bkgts,bskh->btkgh", wide(tw), tk), rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rms_norm(dtype, scale):
    """At scale 1e-4 eps is as large as the mean square."""
    for shape in ((1,), (1, 7), (3, 48), (2, 3, 130)):
        x, tx = draw(shape, dtype, scale=scale)
        w, tw = draw(shape[-1:], dtype, 1)
        for eps in (1e-5, 1e-6):
            norm = LlamaRMSNorm(shape[-1], eps).to(tw.dtype)
            norm.weight.data = tw
            close(jax.jit(rms_norm)(x, w, eps), norm(tx), dtype)
    assert not rms_norm(jnp.zeros((2, 4)), jnp.ones(4), 1e-6).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounded_once(dtype):
    for shape in ((1, 7), (3, 48), (2, 3, 130)):
        x, tx = draw(shape, dtype)
        w, tw = draw(shape[-1:], dtype, 1)
        norm = Olmo2RMSNorm(shape[-1], 1e-5).to(tw.dtype)
        norm.weight.data = tw
        close(jax.jit(rms_norm_once)(x, w, 1e-5), norm(tx), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_gradient(dtype):
    x, tx = draw((3, 16), dtype)
    w, tw = draw((16,), dtype, 1)
    norm = LlamaRMSNorm(16, 1e-5).to(tw.dtype)
    norm.weight.data = tw
    tx.requires_grad_()
    (norm(tx).float() ** 2).sum().backward()
    gx, gw = jax.jit(jax.grad(lambda x, w: jnp.sum(rms_norm(x, w, 1e-5).astype(jnp.float32) ** 2), (0, 1)))(x, w)
    if dtype == "float32":
        close(gx, tx.grad, dtype)
        close(gw, norm.weight.grad, dtype)
    else:  # torch rounds in between, so to a few steps
        np.testing.assert_allclose(np.asarray(gx, np.float32), tx.grad.float(), rtol=0, atol=2**-6 * float(tx.grad.abs().max()))
        np.testing.assert_allclose(np.asarray(gw, np.float32), norm.weight.grad.float(), rtol=2**-5, atol=2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation(name, dtype):
    x, tx = draw((3, 301), dtype, scale=4)
    as_users = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # tanh is less exact without
    mine, theirs = jax.jit(activation(name), compiler_options=as_users)(x), ACT2FN[name](tx)
    close(mine, theirs, dtype)
    truth = ACT2FN[name](tx.double()).numpy()
    error = lambda y: np.sqrt(np.mean((np.asarray(y, np.float64) - truth) ** 2))
    assert error(mine) <= 1.05 * error(theirs.float().numpy()) + 1e-7


def test_activations_are_hfs():
    assert set(ACT2CLS) - set(ACTIVATIONS) == {"prelu", "xielu"}  # these have parameters


def test_unknown_activation():
    with pytest.raises(ValueError, match="hidden_act 'silo' is not known; known are silu"):
        activation("silo")


def test_an_id_out_of_range_reads_no_neighbour():
    layer = Embedding(5, 3)
    params = {"params": {"weight": jnp.arange(15.0).reshape(5, 3)}}
    look = jax.jit(lambda ids: layer.apply(params, ids, jnp.float32))
    np.testing.assert_array_equal(look(jnp.asarray([[4, 0]])), [[[12, 13, 14], [0, 1, 2]]])
    assert jnp.isnan(look(jnp.asarray([[5, -1]]))).all()


def test_linear_of_a_symbolic_number_of_rows():
    (rows,) = jax.export.symbolic_shape("rows")
    x, weight = np.ones((3, 4), np.float32), np.arange(8, dtype=np.float32).reshape(2, 4)
    exported = jax.export.export(jax.jit(linear))(jax.ShapeDtypeStruct((rows, 4), x.dtype), weight)
    np.testing.assert_array_equal(exported.call(x, weight), x @ weight.T)
