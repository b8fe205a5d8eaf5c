"""Recurrences over tokens and the short convolutions before them, with the state as an argument and a result.

`real` [B,T] says which columns hold tokens. The others, wherever they stand, change neither a state nor the output of a token: for a
recurrence they are steps of length 0, and a convolution looks at the tokens before, not at the columns before.

Everything is float32 inside. Prefill goes through the tokens in chunks whose insides are computed again in the backward pass, so that
only the states between chunks are kept. One token goes straight through.

Axis letters: B batch, T tokens, C channels, K kernel width, E channels of Mamba, N state size, H heads, G groups of heads, P head dim."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 32  # tokens


def causal_conv(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, window: jax.Array | None, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Depthwise: token t of channel c is the sum of weight[c, j] times the token K-1-j before it, plus bias [C].

    x [B,T,C], weight [C,K]; window [B,K-1,C]: the inputs of each row's last tokens, oldest first, None where there were none. Returns the
    output in x.dtype, 0 where `real` is not, and the window after the last token."""
    (B, T, C), K = x.shape, weight.shape[1]
    x = jnp.where(real[..., None], x, 0)
    if T == 1 or K == 1:
        before = jnp.zeros((B, K - 1, C), x.dtype) if window is None else window.astype(x.dtype)
        seen = jnp.concatenate([before, x], 1)
        y, after = _taps(seen, weight, bias), jnp.where(real[:, :1, None], seen[:, T:], before)
    else:
        begin, count = jnp.argmax(real, 1), jnp.sum(real, 1)
        gaps = jnp.any(real & (jnp.arange(T) >= (begin + count)[:, None]))  # a row's tokens do not stand side by side

        order, place = jnp.argsort(~real, axis=1, stable=True), jnp.maximum(jnp.cumsum(real, 1) - 1, 0)  # the same in all layers
        move = lambda x, to: lax.cond(gaps, lambda x: jnp.take_along_axis(x, to[..., None], 1), lambda x: x, x)
        seen = jnp.pad(move(x, order), ((0, 0), (K - 1, 0), (0, 0)))
        begin = jnp.where(gaps, 0, begin)
        if window is not None:  # in the place of the padding before a row's first token
            seen = jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=0))(seen, window.astype(x.dtype), begin)
        after = jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, K - 1))(seen, begin + count)
        y = move(_taps(seen, weight, bias), place)
    return jnp.where(real[..., None], y, 0), after


def _taps(seen: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[B,T,C] in seen.dtype, rounded once, of seen [B,T+K-1,C]."""
    T, K = seen.shape[1] - weight.shape[1] + 1, weight.shape[1]
    w = weight.astype(jnp.float32)
    y = sum(seen[:, j : j + T].astype(jnp.float32) * w[:, j] for j in range(K))
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(seen.dtype)  # type: ignore[union-attr]


def recurrence(
    terms: Callable[..., tuple[jax.Array, jax.Array]], read: Callable[..., jax.Array], state: jax.Array, inputs: Any, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """state = a * state + b; y = read(state, inputs) for each step of inputs, whose leaves are [T,...], with (a, b) = terms(inputs).

    `terms` and `read` take any number of leading axes of steps. Steps of zeros must have a = 1 and b = 0. Returns y [T,...] and the
    last state. The steps of a chunk are a tree (jax.lax.associative_scan); on CPU one after another, which there is 3 to 8 times faster:
    the state stays in the processor's cache and terms are never written to memory."""
    T = jax.tree.leaves(inputs)[0].shape[0]

    def one(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        a, b = terms(inputs)
        state = a * state + b
        return state, read(state, inputs)

    def tree(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        a, b = terms(inputs)
        decays, sums = lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b))
        states = decays * state + sums
        return states[-1], read(states, inputs)

    if T == 1:
        state, y = one(state, jax.tree.map(lambda x: x[0], inputs))
        return y[None], state
    together = lambda state, inputs: lax.platform_dependent(state, inputs, cpu=partial(lax.scan, one), default=tree)
    return _in_chunks(together, state, inputs, min(chunk, T))


def _in_chunks(body: Callable[..., tuple[jax.Array, Any]], state: jax.Array, inputs: Any, chunk: int) -> tuple[jax.Array, jax.Array]:
    """`body(state, inputs of a chunk) -> (state, y)` over inputs [T,...], filled up with zeros; y [T,...] and the last state."""
    T = jax.tree.leaves(inputs)[0].shape[0]
    n = -(-T // chunk)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, n * chunk - T), *((0, 0),) * (x.ndim - 1))).reshape(n, chunk, *x.shape[1:])

    inputs = jax.tree.map(cut, inputs)
    if n == 1:
        state, y = body(state, jax.tree.map(lambda x: x[0], inputs))
        return y[:T], state
    state, y = lax.scan(jax.checkpoint(body, prevent_cse=False), state, inputs)
    return y.reshape(n * chunk, *y.shape[2:])[:T], state


def _time_first(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.float32).swapaxes(0, 1) for x in arrays)


@partial(jax.jit, static_argnames="chunk")
def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array | None,
    real: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Mamba's recurrence (arXiv:2312.00752): h = exp(dt A) h + dt B x, y = C h, in every channel with N numbers of state.

    x and dt [B,T,E], A [E,N], B and C [B,T,N], state [B,N,E] or None for zeros. Returns y [B,T,E] and the state, float32."""
    A = A.astype(jnp.float32).T
    if state is None:
        state = jnp.zeros((x.shape[0], *A.shape), jnp.float32)

    def terms(inputs: Any) -> tuple[jax.Array, jax.Array]:
        x, dt, B, _ = inputs
        return jnp.exp(dt[..., None, :] * A), (dt * x)[..., None, :] * B[..., None]

    def read(state: jax.Array, inputs: Any) -> jax.Array:
        return jnp.sum(state * inputs[3][..., None], -2)

    dt = jnp.where(real[..., None], dt, 0)
    y, state = recurrence(terms, read, state, _time_first(x, dt, B, C), chunk)
    return y.swapaxes(0, 1), state


@partial(jax.jit, static_argnames="chunk")
def ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array | None,
    real: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Mamba-2's recurrence (arXiv:2405.21060): h = exp(dt A) h + dt x B', y = h C, with one decay a head: a chunk is matrix
    products.

    x [B,T,H,P], dt [B,T,H], A [H], B and C [B,T,G,N] of G groups of heads, state [B,H,P,N] or None for zeros. Returns y [B,T,H,P] and the
    state, float32."""
    (batch, T, H, P), (G, N) = x.shape, B.shape[2:]
    A = A.astype(jnp.float32)
    heads = lambda x, axis: x.reshape(*x.shape[:axis], G, H // G, *x.shape[axis + 1 :])  # letters below: g group, h head in it
    state = jnp.zeros((batch, H, P, N), jnp.float32) if state is None else state
    state = heads(state, 1)
    dt = jnp.where(real[..., None], dt, 0)
    inputs = _time_first(heads(x, 2), heads(dt, 2), B, C)

    def one(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        x, dt, B, C = inputs
        update = (dt[..., None] * x)[..., None] * B[:, :, None, None]
        state = jnp.exp(dt * heads(A, 0))[..., None, None] * state + update
        return state, jnp.sum(state * C[:, :, None, None], -1)

    def body(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        x, dt, B, C = inputs  # letters: t and s steps of the chunk
        steps = dt * heads(A, 0)
        sums = jnp.cumsum(steps, 0)  # log of the decay since the chunk began
        # log of the decay from s to t, [t,s,B,G,H/G]: summed by itself, as differences of sums lose digits
        later = jnp.arange(len(dt))[:, None] > jnp.arange(len(dt))
        between = jnp.cumsum(jnp.where(later[..., None, None, None], steps[:, None], 0), 0)
        seen = jnp.where(later.T[..., None, None, None], -jnp.inf, between).transpose(2, 3, 4, 0, 1)
        scores = jnp.einsum("tbgn,sbgn->bgts", C, B)[:, :, None] * jnp.exp(seen)
        x = x * dt[..., None]
        y = jnp.einsum("bghts,sbghp->tbghp", scores, x)
        y = y + jnp.einsum("tbgn,bghpn->tbghp", C, state) * jnp.exp(sums)[..., None]
        left = jnp.exp(between[-1])[..., None]  # what is left of each step at the end
        new = jnp.einsum("sbghp,sbgn->bghpn", x * left, B)
        return jnp.exp(sums[-1])[..., None, None] * state + new, y

    if T == 1:
        state, y = one(state, jax.tree.map(lambda x: x[0], inputs))
        y = y[None]
    else:
        y, state = _in_chunks(body, state, inputs, min(chunk, T))
    return y.swapaxes(0, 1).reshape(batch, T, H, P), state.reshape(batch, H, P, N)


@jax.custom_jvp
def _bounded_sqrt(x: jax.Array) -> jax.Array:
    """The root, with a slope of at most 1000."""
    return jnp.sqrt(x)


@_bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx * lax.rsqrt(jnp.maximum(4 * x, 1e-6))


@partial(jax.jit, static_argnames="chunk")
def rg_lru(
    x: jax.Array,
    input_gate: jax.Array,
    recurrence_gate: jax.Array,
    decay: jax.Array,
    state: jax.Array | None,
    first: jax.Array,
    real: jax.Array,
    chunk: int = 8 * CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The real-gated linear recurrent unit (arXiv:2402.19427): h = a h + sqrt(1 - a²) (input_gate x), where
    log a = -8 recurrence_gate softplus(decay).

    x and the gates [B,T,C], decay [C], state [B,C] or None for zeros; first [B,T]: the tokens that begin anew, from x alone. Returns h
    [B,T,C] and the state, float32."""
    x, input_gate, recurrence_gate = (v.astype(jnp.float32) for v in (x, input_gate, recurrence_gate))
    log_a = -8.0 * recurrence_gate * jax.nn.softplus(decay.astype(jnp.float32))
    first, real = first[..., None], real[..., None]
    b = x * input_gate * jnp.where(first, 1, _bounded_sqrt(1 - jnp.exp(2 * log_a)))
    inputs = _time_first(jnp.where(real, log_a, 0), jnp.where(real, b, 0), first & real)
    terms = lambda inputs: (jnp.where(inputs[2] > 0, 0, jnp.exp(inputs[0])), inputs[1])
    state = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32) if state is None else state
    y, state = recurrence(terms, lambda state, _: state, state, inputs, chunk)
    return y.swapaxes(0, 1), state
