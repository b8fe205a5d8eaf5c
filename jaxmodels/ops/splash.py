"""Splash attention, JAX's flash attention for TPU in Pallas, behind the registry's signature.

It is the kernel for training and prefill: no [T,S] logits, forward or backward. It knows columns, not positions, and that is
enough when the keys are the queries' own tokens (T == S: no cache, or a fresh one). There the positions of real tokens
rise with their column, so `position of key <= position of query` is `column of key <= column of query`, and the keys at -1 are
left out by segment ids, 0 for padding. Padding sees padding, itself at least, and so is finite. A window counts columns where it
should count tokens: rows with padding between their tokens are put in order before it, and where positions jump, as from one packed
document to the next, the following tokens are a segment of their own.

Axis letters: B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim (padded to a multiple of 128, as the length is)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.ops.attention import IMPLEMENTATIONS, Weights, eager, xla
from jaxmodels.ops.pipeline import spec_axes

LANES = 128  # a block of the kernel is a multiple of this in both directions
BLOCK = 512  # the largest block: rows of queries and columns of keys

# A zero that exists on TPU alone. The platform is known when a program is lowered and no sooner: tracing on a CPU machine for a
# TPU topology, eval_shape and initialisation must all pass.
_zero_on_tpu = Primitive("zero_on_tpu")
_zero_on_tpu.def_impl(lambda: jax.jit(_zero_on_tpu.bind)())
_zero_on_tpu.def_abstract_eval(lambda: jax.core.ShapedArray((), jnp.int32))
mlir.register_lowering(_zero_on_tpu, mlir.lower_fun(lambda: jnp.int32(0), multiple_results=False), platform="tpu")


def _elsewhere(ctx: mlir.LoweringRuleContext) -> Any:
    platforms = "/".join(ctx.module_context.platforms)
    others = ", ".join(sorted(set(IMPLEMENTATIONS) - {"splash"}))
    raise ValueError(f"attn_implementation 'splash' is a kernel for TPU; this program is compiled for {platforms}, where {others} run")


mlir.register_lowering(_zero_on_tpu, _elsewhere)


class _Band(kernels.LocalMask):
    """Causal, over the last `window` columns. The library looks at every block of the mask while it traces. Only those that the band's
    edges cross need looking at: the others are answered with one element, which takes 131,072 tokens from two minutes to seconds."""

    def __init__(self, length: int, window: int | None):
        super().__init__((length, length), (None if window is None else window - 1, 0), 0)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        rows, columns = block
        behind = self.window_size[0]
        first, last = rows.start - columns.stop + 1, rows.stop - 1 - columns.start  # how far back the block's keys lie, least and most
        if last < 0 or (behind is not None and first > behind):
            return np.full((1, 1), False)
        if first >= 0 and (behind is None or last <= behind):
            return np.full((1, 1), True)
        return super().__getitem__(block)


def _close_up(positions: jax.Array) -> tuple[Callable, Callable]:
    """Two functions of a tree of [B,T,…]: one puts every row's tokens at positions [B,T] beside each other, the other undoes it. Both move
    something only where padding lies between tokens."""
    real = positions >= 0
    gaps = jnp.any(jnp.sum(real & ~jnp.pad(real, ((0, 0), (1, 0)))[:, :-1], 1) > 1)
    order = jnp.argsort(~real, 1)

    def move(columns: jax.Array, tree: Any) -> Any:
        taken = lambda x: jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), 1)
        return lax.cond(gaps, lambda tree: jax.tree.map(taken, tree), lambda tree: tree, tree)

    return partial(move, order), partial(move, jnp.argsort(order, 1))


def _segments(positions: jax.Array) -> jax.Array:
    """int32 [B,T]: 0 for padding, and another number for the tokens after every jump of their positions [B,T]."""
    jumps = (positions - jnp.pad(positions, ((0, 0), (1, 0)), constant_values=-1)[:, :-1] != 1) & (positions >= 0)
    return jnp.where(positions >= 0, 1 + jnp.cumsum(jumps, 1, dtype=jnp.int32), 0)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    rules: Any = None,
    interpret: bool = False,
) -> tuple[jax.Array, Weights]:
    """The registry's attention of q [B,T,N,H] over k, v [B,S,K,H]; see the module for what it relies on.

    window: tokens seen, the query's own included; positions that jump must jump by as much, as they do where documents are packed. softcap:
    logits are softcap·tanh(logits/softcap).
    With S != T (decoding, a later turn, a cache that held something) it is `xla`, or with a softcap `eager`: one query has no tile to
    fill, and there columns say nothing of positions. The compiler cannot split a kernel, so on several devices it needs the model's
    `rules`: batch and query heads are split as the rules say, key heads with them, and of a split sequence each device does its queries
    over all keys.
    `interpret` runs the kernel's arithmetic on any platform, slowly. ValueError when it is compiled for anything but TPU.
    The kernel has no scale of its own: queries are multiplied by `scale` in float32 and rounded to their dtype before it."""
    if not interpret:
        q_positions = q_positions + _zero_on_tpu.bind()
    if q.shape[1] != k.shape[1]:
        if softcap is not None:
            return eager(q, k, v, q_positions, k_positions, scale, window, softcap)[0], None
        return xla(q, k, v, q_positions, k_positions, scale, window)
    undo = None
    if window is not None:
        close_up, undo = _close_up(q_positions)
        q, k, v, q_positions, k_positions = close_up((q, k, v, q_positions, k_positions))
    (B, T, N, _), K = q.shape, k.shape[2]
    batch, heads, seq = (None, None, None) if rules is None else rules.spec(("batch", "act_heads", "seq"), (B, N, T))
    pieces = lambda entry: 1 if entry is None else rules.pieces(spec_axes(entry))
    mine, G = N // pieces(heads), N // K
    if mine % G and G % mine:  # a device's queries would need parts of two groups
        heads, mine = None, N

    rows = -(-T // pieces(seq))
    blocks = -(-rows // BLOCK)
    block = _up(-(-rows // blocks))
    length = pieces(seq) * blocks * block
    # the TPU multiplies bfloat16 in one precision only; where more is asked for (jm.parity_mode) the operands go up
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    dtype = jnp.float32 if precision in ("highest", "float32") else q.dtype

    def tile(x: jax.Array) -> jax.Array:
        width = _up(x.shape[-1])
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - T), (0, width - x.shape[-1]))).astype(dtype)

    tiles = [tile(q.astype(jnp.float32) * scale), tile(k), tile(v)]  # [B, N or K, length, width]
    marks = (lambda p: (p >= 0).astype(jnp.int32)) if window is None else _segments
    segments = [jnp.pad(marks(p), ((0, 0), (0, length - T))) for p in (q_positions, k_positions)]
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([_Band(length, window)]),
        block_sizes=kernels.BlockSizes(*[block] * 8),  # type: ignore[arg-type]  # queries and keys, forward and backward
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=pieces(seq),
        interpret=interpret,
    )

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, q_ids: jax.Array, k_ids: jax.Array) -> jax.Array:
        if mine < G:  # more devices than key heads: all of these queries belong to one
            first = lax.axis_index(heads) * mine // G
            k, v = (lax.dynamic_slice_in_dim(x, first, 1, 1) for x in (k, v))
        return jax.vmap(kernel)(q, k, v, kernels.SegmentIds(q_ids, k_ids))

    if rules is not None:
        spec = PartitionSpec
        keys = spec(batch, heads if mine >= G else None)
        split = kernel.manual_sharding_spec(NamedSharding(rules.mesh, spec(None, seq)))
        queries = spec(batch, heads, seq)
        specs = (split, queries, keys, keys, spec(batch, seq), spec(batch))
        local = jax.shard_map(local, mesh=rules.mesh, in_specs=specs, out_specs=queries, check_vma=False)
    out = local(kernel, *tiles, *segments)
    out = out[:, :, :T, : v.shape[-1]].swapaxes(1, 2).astype(q.dtype)
    return out if undo is None else undo(out), None


def _up(size: int) -> int:
    return -(-size // LANES) * LANES
