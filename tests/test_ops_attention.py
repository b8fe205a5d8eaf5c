"""Attention: every implementation against float64, in both dtypes, over layouts and odd shapes, and the masks by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.cache import KV, Cache
from jaxmodels.layers import attend, begin
from jaxmodels.ops import attention_cpu
from jaxmodels.ops.attention import IMPLEMENTATIONS, attention, register_attention, resolve_attention, visible

# B, T, S, N, K, H: one row, one token, one head, groups, multiple queries per single kv head, odd sizes
SHAPES = [(1, 1, 1, 1, 1, 1), (1, 1, 9, 3, 1, 7), (2, 5, 5, 4, 4, 10), (3, 1, 33, 6, 2, 16), (2, 13, 29, 9, 3, 5), (1, 17, 17, 8, 1, 64)]
DTYPES = [jnp.float32, jnp.bfloat16]


NAMES = ["eager", "xla", "xla long"]


@pytest.fixture
def name(request, monkeypatch):
    """Of an implementation; `long` as for long texts: from 4 tokens on row by row, from 200 logits on in blocks."""
    if request.param.endswith("long"):
        monkeypatch.setattr(attention_cpu, "BLOCK", 4)
        monkeypatch.setattr(attention_cpu, "LARGE", 200)
    return request.param.removesuffix(" long")


def inputs(B, T, S, N, K, H, dtype, seed=0):
    """q, k, v and ragged positions: row b misses its first b keys and its newest T tokens are the queries."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    k_positions = np.stack([np.maximum(np.arange(S) - min(b, S - 1), -1) for b in range(B)]).astype(np.int32)
    return q, k, v, jnp.asarray(k_positions[:, S - T :]), jnp.asarray(k_positions)


def reference(q, k, v, q_positions, k_positions, scale=None):
    """In numpy float64, one query and one head at a time. Queries that see nothing stay zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q_positions, k_positions = np.asarray(q_positions), np.asarray(k_positions)
    (B, T, N, H), K = q.shape, k.shape[2]
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = (k_positions[b] >= 0) & (k_positions[b] <= q_positions[b, t])
        if seen.any():
            scores = k[b, seen, n // (N // K)] @ q[b, t, n] * (H**-0.5 if scale is None else scale)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, seen, n // (N // K)]
    return out


def check(got, expected, q_positions, dtype):
    real = np.asarray(q_positions) >= 0
    assert got.dtype == dtype and got.shape == expected.shape
    atol = 1e-5 if dtype == jnp.float32 else 2**-6  # bfloat16: weights and output rounded, values up to about 3
    np.testing.assert_allclose(np.asarray(got, np.float64)[real], expected[real], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_against_float64(name, shape, dtype):
    q, k, v, qp, kp = inputs(*shape, dtype)
    got, weights = jax.jit(attention, static_argnames="implementation")(q, k, v, qp, kp, implementation=name)
    check(got, reference(q, k, v, qp, kp), qp, dtype)
    assert (weights is None) == (name != "eager")
    if weights is not None:
        assert weights.shape == (shape[0], shape[3], shape[1], shape[2])
        np.testing.assert_allclose(np.asarray(weights, np.float32).sum(-1), 1, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_from_a_cache_of_either_layout(name, heads_first, dtype):
    """Written in two chunks into a cache with slots to spare, as a layer does it."""
    for B, T, S, N, K, H in (SHAPES[1], SHAPES[3], SHAPES[4]):
        q, k, v, qp, kp = inputs(B, T, S, N, K, H, dtype)
        shape = (B, K, S + 3, H) if heads_first else (B, S + 3, K, H)
        state = KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), heads_first)
        cache = Cache((state,), jnp.full((B, S + 3), -1, jnp.int32), jnp.int32(0), fresh=True)

        @jax.jit
        def run(cache, q, k, v, mask, T=T, S=S):
            for new in (slice(0, S - T), slice(S - T, S)):
                step, cache = begin(mask[:, new].shape, mask[:, new], cache, attention=name)
                queries = q if new.stop == S else jnp.zeros((*mask[:, new].shape, *q.shape[2:]), q.dtype)
                out, state, _ = attend(queries, k[:, new], v[:, new], cache.layers[0], step, None)
                cache = cache.replace(layers=(state,))
            return out, cache

        got, cache = run(cache, q, k, v, kp >= 0)
        check(got.reshape(q.shape), reference(q, k, v, qp, kp), qp, dtype)
        assert cache.layers[0].k.shape == shape and int(cache.index) == S
        np.testing.assert_array_equal(cache.lengths, kp.max(1) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_under_transformations(name, dtype):
    """grad, vmap and scan, compiled; the gradients agree with float32 eager's."""
    q, k, v, qp, kp = inputs(2, 5, 11, 6, 2, 10, dtype)
    run = lambda q, k, v: attention(q, k, v, qp, kp, implementation=name)[0]
    expected = reference(q, k, v, qp, kp)
    twice = lambda x: jnp.stack([x, x])
    for got in jax.jit(jax.vmap(run))(twice(q), twice(k), twice(v)):
        check(got, expected, qp, dtype)
    for got in jax.jit(lambda *x: jax.lax.scan(lambda _, x: (None, run(*x)), None, x)[1])(twice(q), twice(k), twice(v)):
        check(got, expected, qp, dtype)

    real = (qp >= 0)[..., None, None]
    loss = lambda f: lambda q, k, v: jnp.sum(jnp.where(real, f(q, k, v), 0).astype(jnp.float32) ** 2)
    gradients = jax.jit(jax.grad(loss(run), (0, 1, 2)))(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = jax.jit(jax.grad(loss(lambda q, k, v: attention(q, k, v, qp, kp, implementation="eager")[0]), (0, 1, 2)))(*wide)
    for mine, theirs in zip(gradients, expected):
        assert mine.dtype == dtype
        atol = 1e-4 if dtype == jnp.float32 else 0.03 * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(np.asarray(mine, np.float32), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_scale(name):
    q, k, v, qp, kp = inputs(2, 3, 7, 4, 2, 6, jnp.float32)
    got, _ = attention(q, k, v, qp, kp, scale=0.9, implementation=name)
    check(got, reference(q, k, v, qp, kp, scale=0.9), qp, jnp.float32)


@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_a_padding_query_is_finite(name):
    """It sees nothing; what it gives is thrown away, but nan would spread through gradients."""
    q, k, v, *_ = inputs(1, 3, 3, 2, 1, 4, jnp.float32)
    run = lambda q, k, v: attention(q, k, v, jnp.asarray([[-1, 0, 1]]), jnp.asarray([[-1, 0, 1]]), implementation=name)[0]
    assert np.isfinite(jax.jit(run)(q, k, v)).all()
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(run(*x)[:, 1:] ** 2), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(gradients[1])[:, 0].any() and not np.asarray(gradients[2])[:, 0].any()


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_visible_by_positions(data):
    """Against the definition, for any order of the slots, empty slots and padding."""
    B, T, S = (data.draw(st.integers(1, n)) for n in (3, 5, 7))
    rows = lambda n: np.array(data.draw(st.lists(st.lists(st.integers(-1, 6), min_size=n, max_size=n), min_size=B, max_size=B)), np.int32)
    q, k = rows(T), rows(S)
    got, both = np.asarray(visible(q, k)), np.asarray(visible(q, k, causal=False))
    assert got.shape == both.shape == (B, 1, T, S)
    for b, t, s in np.ndindex(B, T, S):
        assert both[b, 0, t, s] == (k[b, s] != -1)
        assert got[b, 0, t, s] == (k[b, s] != -1 and k[b, s] <= q[b, t])


def test_names():
    assert resolve_attention(None) is None and resolve_attention("sdpa") == "xla" and resolve_attention("eager") == "eager"
    with pytest.raises(ValueError, match=r"'flash_attention_9' is not registered; possible are eager, .*xla"):
        resolve_attention("flash_attention_9")


def test_register(monkeypatch):
    monkeypatch.setattr("jaxmodels.ops.attention.IMPLEMENTATIONS", dict(IMPLEMENTATIONS))
    register_attention("mean", lambda q, k, v, q_positions, k_positions, scale: (jnp.broadcast_to(v.mean(1, keepdims=True), q.shape), None))
    q, k, v, qp, kp = inputs(1, 2, 4, 2, 2, 3, jnp.float32)
    got, _ = attention(q, k, v, qp, kp, implementation=resolve_attention("mean"))
    np.testing.assert_allclose(got[0, 0], v[0].mean(0), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        ("window",),
        ("bias",),
        ("window", "bias"),
        ("softcap",),
        ("sinks",),
        ("window", "softcap", "sinks"),
        ("causal", "bias"),
        ("causal", "window"),
    ],
)
def test_options(options, dtype, monkeypatch):
    """Against the definition, written out in float64; the implementation is chosen by what the options need."""
    q, k, v, qp, kp = inputs(2, 5, 11, 6, 2, 10, dtype)
    rng = np.random.default_rng(1)
    values = {"causal": False, "window": 3, "softcap": 2.0, "bias": rng.normal(size=(1, 6, 5, 11)), "sinks": rng.normal(size=6)}
    asked = {name: jnp.asarray(values[name], jnp.float32) if name in ("bias", "sinks") else values[name] for name in options}
    got, _ = attention(q, k, v, qp, kp, **asked)
    found = [got]
    monkeypatch.setattr(attention_cpu, "BLOCK", 4)
    for large in (attention_cpu.LARGE, 0):  # row by row, in blocks
        monkeypatch.setattr(attention_cpu, "LARGE", large)
        found.append(attention(q, k, v, qp, kp, **asked)[0])
    a, b, c = (np.asarray(x, np.float64) for x in (q, np.repeat(k, 3, 2), np.repeat(v, 3, 2)))
    logits = np.einsum("btnh,bsnh->bnts", a, b) / np.sqrt(10)
    if "softcap" in options:
        logits = 2 * np.tanh(logits / 2)
    if "bias" in options:
        logits = logits + values["bias"]
    qp, kp = np.asarray(qp)[:, None, :, None], np.asarray(kp)[:, None, None]
    seen = (kp >= 0) & ((kp <= qp) | ("causal" in options)) & (("window" not in options) | (abs(kp - qp) < 3))
    weights = np.where(seen, np.exp(logits), 0)
    extra = np.exp(values["sinks"])[:, None, None] if "sinks" in options else 0
    weights = weights / np.maximum(weights.sum(-1, keepdims=True) + extra, 1e-30)
    for mine in found:
        check(mine, np.einsum("bnts,bsnh->btnh", weights, c), qp[:, 0, :, 0], dtype)


@pytest.mark.parametrize("name", NAMES, indirect=True)
def test_padding_moves_no_gradient(name):
    """What a query that sees nothing makes of the values depends on no query, key or bias."""
    q, k, v, qp, kp = inputs(3, 7, 7, 6, 2, 10, jnp.float32)
    bias, blind = jnp.ones((3, 6, 7, 7)), (qp < 0)[:, :, None, None]
    assert blind.any() and not blind.all()
    run = lambda q, k, bias: jnp.sum(jnp.where(blind, attention(q, k, v, qp, kp, bias=bias, implementation=name)[0], 0) * v[:, :, :1])
    for gradient in jax.jit(jax.grad(run, (0, 1, 2)))(q, k, bias):
        np.testing.assert_array_equal(gradient, 0)


def test_an_option_that_is_lacking():
    q, k, v, qp, kp = inputs(1, 2, 4, 2, 2, 3, jnp.float32)
    with pytest.raises(ValueError, match="'xla' has no softcap, which the model needs; possible are eager"):
        attention(q, k, v, qp, kp, softcap=1.0, implementation="xla")
    with pytest.raises(ValueError, match="'splash' has no bidirectional form, which the model needs; possible are eager, xla"):
        attention(q, k, v, qp, kp, causal=False, implementation="splash")
