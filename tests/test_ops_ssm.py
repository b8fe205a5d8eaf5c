"""The recurrences of ops/ssm.py: in chunks, padded anywhere and from any state as one step after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.ops import ssm

EACH = settings(deadline=None, max_examples=25)
LENGTHS = st.sampled_from([1, 5, 40])  # few shapes, few programs
CHUNKS = st.sampled_from([3, 64])


def same(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance, rtol=tolerance)


def rows_of(real, rng, *shapes):
    """Random arrays [B,T,...], with large numbers where `real` is not."""
    for shape in shapes:
        x = rng.standard_normal((*real.shape, *shape)).astype(np.float32)
        yield np.where(real.reshape(*real.shape, *(1,) * len(shape)), x, 1e6)


def masks(rng, B, T):
    """Rows that are whole, empty, padded on the left, on the right, and full of gaps."""
    column = np.arange(T)
    kinds = [column >= 0, column < 0, column >= rng.integers(T + 1), column < rng.integers(T + 1), rng.random(T) < 0.5]
    return np.stack([kinds[i] for i in rng.integers(5, size=B)])


@EACH
@given(LENGTHS, st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))
def test_convolution_is_torch_on_each_rows_tokens(T, K, seed):
    rng = np.random.default_rng(seed)
    B, C = 3, 4
    real = masks(rng, B, T)
    (x,) = rows_of(real, rng, (C,))
    weight, b = rng.standard_normal((C, K)).astype(np.float32), rng.standard_normal(C).astype(np.float32) if K % 2 == 0 else None
    window = rng.standard_normal((B, K - 1, C)).astype(np.float32) if seed % 2 else None
    y, after = jax.jit(ssm.causal_conv)(x, weight, b, window, real)
    for i in range(B):
        before = np.zeros((K - 1, C), np.float32) if window is None else window[i]
        seen = np.concatenate([before, x[i][real[i]]])
        same(after[i], seen[len(seen) - K + 1 :], 0)
        if real[i].any():
            theirs = torch.nn.functional.conv1d(
                torch.tensor(seen.T[None]), torch.tensor(weight[:, None]), None if b is None else torch.tensor(b), groups=C
            )
            same(np.asarray(y)[i][real[i]], theirs[0].T)
        assert not np.asarray(y)[i][~real[i]].any()


def scan_case(rng, real):
    E, N = 6, 4
    x, dt, B, C = rows_of(real, rng, (E,), (E,), (N,), (N,))
    arguments = (x, np.abs(dt), -np.exp(rng.standard_normal((E, N))).astype(np.float32), B, C)

    def step(h, t, x, dt, A, B, C):  # h [E,N]
        h = np.exp(dt[t][:, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        return h, h @ C[t]

    return ssm.selective_scan, arguments, (N, E), step, (0, 1, 3, 4), lambda h: h.T


def ssd_case(rng, real):
    H, G, P, N = 6, 2, 3, 5
    x, dt, B, C = rows_of(real, rng, (H, P), (H,), (G, N), (G, N))

    def step(h, t, x, dt, A, B, C):  # h [H,P,N]
        group = np.arange(H) // (H // G)
        h = np.exp(dt[t] * A)[:, None, None] * h + np.einsum("h,hp,hn->hpn", dt[t], x[t], B[t][group])
        return h, np.einsum("hpn,hn->hp", h, C[t][group])

    return ssm.ssd, (x, np.abs(dt), -np.arange(1, 7, dtype=np.float32), B, C), (H, P, N), step, (0, 1, 3, 4), lambda h: h


def lru_case(rng, real):
    C = 5
    x, gate, decay_gate = rows_of(real, rng, (C,), (C,), (C,))
    sigmoid = lambda x: (1 / (1 + np.exp(-np.clip(x, -50, 50)))).astype(np.float32)
    first = rng.random(real.shape) < 0.2

    def step(h, t, x, gate, decay_gate, decay, first):
        log_a = -8 * decay_gate[t] * np.log1p(np.exp(decay))
        if first[t]:
            h = x[t] * gate[t]
        else:
            h = np.exp(log_a) * h + np.sqrt(1 - np.exp(2 * log_a)) * x[t] * gate[t]
        return h, h

    def run(x, gate, decay_gate, decay, first, state, real, chunk=7):
        return ssm.rg_lru(x, gate, decay_gate, decay, state, first, real, chunk=chunk)

    decay = rng.standard_normal(C).astype(np.float32)
    return run, (x, sigmoid(gate), sigmoid(decay_gate), decay, first), (C,), step, (0, 1, 2, 4), lambda h: h


CASES = {"selective_scan": scan_case, "ssd": ssd_case, "rg_lru": lru_case}


@pytest.mark.parametrize("name", CASES)
@EACH
@given(LENGTHS, CHUNKS, st.integers(0, 2**32 - 1))
def test_chunks_are_steps(name, T, chunk, seed):
    """From any state; an empty row keeps its state to the last bit."""
    rng = np.random.default_rng(seed)
    real = masks(rng, 3, T)
    function, arguments, shape, step, per_token, layout = CASES[name](rng, real)
    state = rng.standard_normal((3, *shape)).astype(np.float32) if seed % 2 else None
    y, after = function(*arguments, state, real, chunk=chunk)
    for i in range(3):
        h = layout(np.zeros(shape, np.float32) if state is None else state[i]).astype(np.float64)
        mine = [x[i].astype(np.float64) if j in per_token else x for j, x in enumerate(arguments)]
        for t in np.flatnonzero(real[i]):
            h, out = step(h, t, *mine)
            same(np.asarray(y)[i, t], out, 1e-4)
        same(after[i], layout(h), 1e-4 if real[i].any() else 0)


@pytest.mark.parametrize("name", CASES)
def test_the_tree_of_accelerators_is_the_loop_of_a_cpu(name, monkeypatch):
    """Values and gradients, through several chunks."""
    rng = np.random.default_rng(0)
    real = masks(rng, 5, 40)
    function, arguments, shape, *_ = CASES[name](rng, real)
    state = rng.standard_normal((5, *shape)).astype(np.float32)
    floats = [i for i, x in enumerate(arguments) if x.dtype != bool]
    arguments = [np.where(np.abs(x) > 1e5, 1, x) if i in floats else x for i, x in enumerate(arguments)]

    def loss(moved, state):
        given = [moved[floats.index(i)] if i in floats else x for i, x in enumerate(arguments)]
        y, after = function(*given, state, real, chunk=11)
        return jnp.sum(jnp.where(real.reshape(5, 40, *(1,) * (y.ndim - 2)), y, 0) ** 2) + jnp.sum(after**3)

    both = lambda: jax.value_and_grad(loss, (0, 1))([arguments[i] for i in floats], state)
    loop = both()
    jax.clear_caches()
    monkeypatch.setattr(ssm.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    jax.tree.map(lambda a, b: same(a, b, 2e-4 * max(1, float(jnp.abs(b).max()))), both(), loop)
    jax.clear_caches()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_whole_sequence_at_once(name):
    """Chunks that are computed again in the backward pass against one chunk, which is not."""
    rng = np.random.default_rng(1)
    real = masks(rng, 3, 40)
    function, arguments, *_ = CASES[name](rng, real)
    x = jnp.asarray(np.where(np.abs(arguments[0]) > 1e5, 1, arguments[0]))
    loss = lambda x, chunk: jnp.sum(function(x, *arguments[1:], None, real, chunk=chunk)[0][real] ** 2)
    same(jax.grad(loss)(x, 7), jax.grad(loss)(x, 40), 1e-4)
    assert np.isfinite(np.asarray(jax.grad(loss)(x, 7))).all()


def test_a_long_scan_keeps_no_states_per_token():
    """The backward pass over 2048 tokens needs far less memory than the states of all tokens."""
    B, T, E, N = 1, 2048, 64, 16
    shapes = [(B, T, E), (B, T, E), (E, N), (B, T, N), (B, T, N)]
    values = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    loss = lambda *x: jnp.sum(ssm.selective_scan(*x, None, jnp.ones((B, T), bool))[0])
    used = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(*values).compile().memory_analysis().temp_size_in_bytes
    assert used < B * T * E * N * 4 / 2
