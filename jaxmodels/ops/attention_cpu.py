"""Dense attention for XLA:CPU: whole, a row at a time, or in blocks where a row's logits would not stay in its caches.

All take mask [B,1,T,S], bias broadcast to [B,N,T,S] or None, scale, q [B,T,N,H], k [B,S,K,H] and v [B,S,K,V]; [B,T,N,V] comes out, in
float32 but for `attend`. Softmax and sums are in float32.

Axis letters: B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim, V value dim, Q queries and C keys of a block."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256  # queries or keys at most
LARGE = 1 << 21  # logits of a row
LOWEST = jnp.finfo(jnp.float32).min


def attend(mask: jax.Array, bias: jax.Array | None, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Whole where there is less than a block of queries or of keys, else a row at a time or, where its logits are many, in blocks. Output
    in q.dtype."""
    (_, T, N, _), S = q.shape, k.shape[1]
    run = by_head if min(T, S) < BLOCK else in_blocks if N * T * S >= LARGE else by_row
    # bfloat16 products take half as long as float32 ones, those of blocks do not
    dtype = jnp.bfloat16 if q.dtype == jnp.bfloat16 and run is not in_blocks else jnp.float32
    return run(mask, bias, scale, *(x.astype(dtype) for x in (q, k, v))).astype(q.dtype)


def by_row(mask: jax.Array, bias: jax.Array | None, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One row after another, computed again for the gradient: no more than a row's logits are in memory."""
    bias = None if bias is None else jnp.broadcast_to(bias, (len(q), *bias.shape[1:]))
    row = jax.checkpoint(lambda x: by_head(x[0], x[1], scale, *x[2:])[0])
    return lax.map(row, jax.tree.map(lambda x: x[:, None], (mask, bias, q, k, v)))


def by_head(mask: jax.Array, bias: jax.Array | None, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """With the queries of a kv head in one product, which XLA:CPU computes faster than products over groups."""
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    # rows and heads as one axis: behind two that were turned, XLA:CPU makes a bfloat16 product a float32 one
    keys, values = (jnp.swapaxes(x, 1, 2).reshape(B * K, S, -1) for x in (k, v))
    q = jnp.where(mask.any(-1)[:, 0, :, None, None], q, 0)  # a row that sees nothing has the same weights everywhere, and no gradient
    queries = q.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K * T, -1)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    # a sum becomes part of the product, a choice would be a pass of its own
    added = jnp.where(mask[:, :, None], 0 if bias is None else _grouped(bias, B, K, N), LOWEST)
    logits = (product("bxh,bsh->bxs", queries, keys) * scale).reshape(B, K, N // K, T, S)
    logits = (logits + added).reshape(B * K, -1, S)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = product("bxs,bsv->bxv", weights.astype(v.dtype), values) / weights.sum(-1, keepdims=True)
    return out.reshape(B, K, N // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def in_blocks(mask: jax.Array, bias: jax.Array | None, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """A block of queries and a block of keys of one kv head at a time, with a running maximum and sum (arXiv:2205.14135); computed again
    for the gradient. Keys of which no query of a block sees any are passed over."""
    (B, T, N, H), K = q.shape, k.shape[2]
    queries = _cut(q, 1)
    queries = queries.reshape(*queries.shape[:3], K, N // K, H).transpose(0, 3, 1, 4, 2, 5)  # [B,K,blocks,G,Q,H]
    keys, values = (_cut(x, 1).transpose(0, 3, 1, 2, 4) for x in (k, v))  # [B,K,blocks,C,H]
    seen = _cut(_cut(mask[:, 0], 2), 1).transpose(0, 1, 3, 2, 4)  # [B,blocks,blocks of keys,Q,C]
    if bias is not None:
        grouped = _cut(_grouped(bias, B, K, N), 4)
        grouped = (_cut(grouped, 3) if bias.shape[2] > 1 else grouped[:, :, :, None]).transpose(0, 1, 3, 5, 2, 4, 6)
        bias = jnp.broadcast_to(grouped, (*queries.shape[:3], *grouped.shape[3:]))  # [B,K,blocks,blocks of keys,G,Q or 1,C]

    def head(seen: jax.Array, x: tuple) -> jax.Array:
        keys, values, queries, bias = x
        return lax.map(lambda x: _over_keys(scale, keys, values, *x), (queries, seen, bias))

    row = lambda x: lax.map(partial(head, x[0]), x[1])
    out = lax.map(row, (seen, (keys, values, queries, bias)))  # [B,K,blocks,G,Q,V]
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, N, v.shape[-1])[:, :T]


def _over_keys(scale: float, keys: jax.Array, values: jax.Array, q: jax.Array, seen: jax.Array, bias: jax.Array | None) -> jax.Array:
    """keys [blocks,C,H] and values, q [G,Q,H], seen [blocks,Q,C], bias [blocks,G,Q,C]: [G,Q,V]."""
    G, Q, H = q.shape
    q = q.reshape(-1, H)

    @jax.checkpoint
    def add(carry: tuple, k: jax.Array, v: jax.Array, seen: jax.Array, bias: jax.Array | None) -> tuple:
        top, total, out = carry
        logits = (q @ k.T * scale).reshape(G, Q, -1)
        logits = jnp.where(seen, logits if bias is None else logits + bias, LOWEST).reshape(G * Q, -1)
        new = lax.stop_gradient(jnp.maximum(top, logits.max(-1, keepdims=True)))
        weights, old = jnp.exp(logits - new), jnp.exp(top - new)
        return new, total * old + weights.sum(-1, keepdims=True), out * old + weights @ v

    def block(carry: tuple, x: Any) -> tuple:
        return lax.cond(x[2].any(), lambda carry: add(carry, *x), lambda carry: carry, carry), None

    column = jnp.zeros((G * Q, 1))
    start = (column + LOWEST, column, jnp.zeros((G * Q, values.shape[-1])))
    (_, total, out), _ = lax.scan(block, start, (keys, values, seen, bias))
    return (out / jnp.where(total == 0, 1, total)).reshape(G, Q, -1)


def _grouped(bias: jax.Array, B: int, K: int, N: int) -> jax.Array:
    """[B,K,G,T or 1,S]"""
    return jnp.broadcast_to(bias, (B, N, *bias.shape[2:])).reshape(B, K, -1, *bias.shape[2:])


def _cut(x: jax.Array, axis: int) -> jax.Array:
    """An axis as two, of blocks and of up to BLOCK in each, filled up with zeros."""
    blocks = -(-x.shape[axis] // BLOCK)
    x = jnp.pad(x, [(0, -size % blocks if i == axis else 0) for i, size in enumerate(x.shape)])
    return x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
