"""Mixtures of experts without a capacity: every token reaches every expert that it chose.

Routing turns logits into (weights [..., k], chosen [..., k] int32); `mix_experts` applies the chosen experts. `dense` runs every expert on
every token, `ragged_dot` sorts tokens by expert and reads only experts that were chosen; they agree to rounding.

Axis letters: S tokens, D hidden, E experts, k experts per token, P = S*k pairs of token and expert, I in, O out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxmodels.ops.linear import einsum, linear

IMPLEMENTATIONS = ("ragged_dot", "dense")
Dot = Callable[..., jax.Array]
# ---- routing ---------------------------------------------------------------------------------------------------------


def pick(scores: jax.Array, k: int, by: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The scores [..., k] of the k experts that `by` (default: the scores) [..., E] puts first, and which they are."""
    if by is None:
        return lax.top_k(scores, k)  # type: ignore[return-value]
    chosen = lax.top_k(lax.stop_gradient(by), k)[1]
    return jnp.take_along_axis(scores, chosen, -1), chosen


def normalized(weights: jax.Array, eps: float = 0.0) -> jax.Array:
    """Weights [..., k] that sum to one; `eps` is added to the sum."""
    return weights / (jnp.sum(weights, -1, keepdims=True) + eps)


def softmax_top_k(logits: jax.Array, k: int, normalize: bool = False) -> tuple[jax.Array, jax.Array]:
    """Probabilities over all experts, in float32, of the k largest; `normalize`: made to sum to one (Mixtral, Qwen, OLMoE)."""
    weights, chosen = pick(jax.nn.softmax(logits.astype(jnp.float32), -1), k)
    return normalized(weights) if normalize else weights, chosen


def top_k_softmax(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Probabilities over the k largest logits alone, computed in float32, in the logits' dtype (gpt_oss, Granite)."""
    top, chosen = pick(logits, k)
    return jax.nn.softmax(top.astype(jnp.float32), -1).astype(logits.dtype), chosen


def keep_groups(scores: jax.Array, groups: int, kept: int, best: int = 1, fill: float = -jnp.inf) -> jax.Array:
    """Scores [..., E] with `fill` for experts outside the `kept` of `groups` equal groups whose `best` highest scores sum highest
    (DeepSeek's limit on the machines that a token visits, arXiv:2405.04434 and 2412.19437)."""
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    ranks = lax.top_k(jnp.sum(lax.top_k(grouped, best)[0], -1), kept)[1]  # [..., kept]
    allowed = jnp.any(ranks[..., None] == jnp.arange(groups), -2)  # [..., groups]
    return jnp.where(allowed[..., None], grouped, fill).reshape(scores.shape)


def load_balancing_loss(router_logits: Sequence[jax.Array], k: int, real: jax.Array | None = None) -> jax.Array:
    """Switch's auxiliary loss (arXiv:2101.03961, equations 4 to 6) over all layers' logits [..., E] taken together: E times the sum over
    experts of the share of choices and the mean probability; 1·k when balanced. `real` [...]: 0 for tokens that do not count."""
    logits = jnp.stack([x.astype(jnp.float32) for x in router_logits])  # [layers, ..., E]
    E = logits.shape[-1]
    probabilities = jax.nn.softmax(logits, -1)
    counts = jnp.sum(jax.nn.one_hot(pick(probabilities, k)[1], E), -2)
    each = jnp.ones(logits.shape[1:-1]) if real is None else real.astype(jnp.float32)
    axes = tuple(range(logits.ndim - 1))
    mean = lambda x: jnp.sum(x * each[..., None], axes) / (len(router_logits) * jnp.sum(each))
    return E * jnp.sum(mean(counts) * mean(probabilities))


# ---- experts ---------------------------------------------------------------------------------------------------------


def gated_mlp(act: Callable[[jax.Array], jax.Array], x: jax.Array, w: Any, dot: Dot) -> jax.Array:
    """down_proj(act(gate_proj(x)) * up_proj(x)): what most experts are. partial(gated_mlp, act) is an `mlp` of `mix_experts`."""
    return dot(act(dot(x, w["gate_proj"])) * dot(x, w["up_proj"]), w["down_proj"])


def mix_experts(
    mlp: Callable[[jax.Array, Any, Dot], jax.Array],
    params: Any,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    implementation: str | None = None,
    rules: Any = None,
    scale_input: bool = False,
) -> jax.Array:
    """The sum over each token's chosen experts of weight * mlp(x): x [..., D], weights and chosen [..., k] -> [..., D] in x.dtype.

    mlp(x, params, dot): one expert as seen by itself, with every product written `dot(x, weight, bias=None)` for a weight [E,O,I] and a
    bias [E,O] of `params`, a tree whose leaves begin with the E axis. It must be the same function of every row and close over no array.
    implementation: `ragged_dot` (default) or `dense`. rules: where the mesh axis of `experts` has several devices, each computes its
    own experts. scale_input: the weights multiply x instead of the result."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"experts_implementation {implementation!r} is not known; known are {', '.join(IMPLEMENTATIONS)}")
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = weights.reshape(-1, weights.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
    E = jax.tree.leaves(params)[0].shape[0]
    run = partial(_dense if implementation == "dense" else _ragged, mlp, scale_input)
    axis = None if rules is None or implementation == "dense" else rules.spec(("experts",), (E,))[0]
    if axis is not None and math.prod(rules.mesh.shape[a] for a in np.atleast_1d(axis)) > 1:
        run = partial(_own_experts, run, rules.mesh, axis)
    return run(params, tokens, weights, chosen).astype(x.dtype).reshape(x.shape)


def _dense(mlp: Any, scale_input: bool, params: Any, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
    E = jax.tree.leaves(params)[0].shape[0]
    hit = jax.nn.one_hot(chosen, E, dtype=jnp.float32)  # [S, k, E]
    share = jnp.einsum("ske,sk->es", hit, weights.astype(jnp.float32))

    def dot(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        y = einsum("si,eoi->eso" if x.ndim == 2 else "esi,eoi->eso", x, weight.astype(x.dtype))
        return (y if bias is None else y + bias[:, None].astype(jnp.float32)).astype(x.dtype)

    if scale_input:
        x, share = x * share[..., None].astype(x.dtype), jnp.sum(hit, 1).T
    return jnp.einsum("esd,es->sd", mlp(x, params, dot).astype(jnp.float32), share)


def _ragged(mlp: Any, scale_input: bool, params: Any, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
    """Choices outside 0..E-1 count nothing."""
    (S, k), E = chosen.shape, jax.tree.leaves(params)[0].shape[0]
    flat = jnp.where((chosen >= 0) & (chosen < E), chosen, E).reshape(-1)
    order = jnp.argsort(flat)
    expert = flat[order]  # [P], rising
    sizes = jnp.sum(flat[:, None] == jnp.arange(E), 0, dtype=jnp.int32)
    share = jnp.where(expert < E, weights.reshape(-1)[order], 0)[:, None]  # [P, 1]
    rows = x[order // k]

    def dot(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        y = grouped_linear(x, weight.astype(x.dtype), sizes)
        return y if bias is None else (y + bias[jnp.minimum(expert, E - 1)].astype(jnp.float32)).astype(x.dtype)

    if scale_input:
        y = mlp(rows * share.astype(x.dtype), params, dot).astype(jnp.float32)
        y = jnp.where(expert[:, None] < E, y, 0)
    else:
        y = mlp(rows, params, dot).astype(jnp.float32) * share.astype(jnp.float32)
    return jnp.sum(y[jnp.argsort(order)].reshape(S, k, -1), 1)


def _own_experts(run: Any, mesh: Any, axis: Any, params: Any, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
    """Every device of `axis` sees all tokens, computes those of its own experts, and the results are added up."""

    def local(params: Any, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        mine = jax.tree.leaves(params)[0].shape[0]
        return lax.psum(run(params, x, weights, chosen - lax.axis_index(axis) * mine), axis)

    split, whole = PartitionSpec(axis), PartitionSpec()
    names = {axis} if isinstance(axis, str) else set(axis)
    local = jax.shard_map(local, mesh=mesh, in_specs=(split, whole, whole, whole), out_specs=whole, axis_names=names, check_vma=False)
    return local(params, x, weights, chosen)


# ---- products of sorted rows -----------------------------------------------------------------------------------------


@jax.custom_vjp
def grouped_linear(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [P,I], rows sorted by expert, times their experts' weight [E,O,I] transposed; sizes [E] int32 rows each. [P,O] in x.dtype, zero
    after the last expert's rows. On CPU, where XLA expands `ragged_dot` to every expert times every row, a loop over tiles of rows."""
    return lax.platform_dependent(x, weight, sizes, cpu=_tiled, default=_ragged_dot).astype(x.dtype)


def _ragged_dot(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, jnp.swapaxes(weight, 1, 2), sizes, preferred_element_type=jnp.float32)


_ROWS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())  # contracts the rows of each expert


def _weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """[E,O,I]: the sum over each expert's rows of dy [P,O] times x [P,I]."""
    return lax.ragged_dot_general(dy, x, sizes, _ROWS, preferred_element_type=jnp.float32)


class _Tiles:
    """Tiles of M consecutive rows of one expert each; the last of an expert reaches into the next one's rows, or past the end."""

    def __init__(self, sizes: jax.Array, rows: int) -> None:
        per_expert = rows / sizes.shape[0]
        self.M = 1 if per_expert <= 2 else min(128, 1 << max(3, math.ceil(math.log2(per_expert))))  # fewer rows than 8 gain nothing
        self.count = (sizes + self.M - 1) // self.M
        self.ends, self.sizes, self.starts = jnp.cumsum(self.count), sizes, jnp.cumsum(sizes) - sizes

    def __getitem__(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tile i's expert, its first row, and how many of its M rows are the expert's."""
        e = jnp.searchsorted(self.ends, i, side="right").astype(jnp.int32)
        done = (i - (self.ends[e] - self.count[e])) * self.M
        return e, self.starts[e] + done, jnp.minimum(self.sizes[e] - done, self.M)

    def cut(self, x: jax.Array, row: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, row, self.M, 0)

    def pad(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, self.M - 1), (0, 0)))


def _tiled(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    tiles = _Tiles(sizes, len(x))
    padded = tiles.pad(x)

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        e, row, real = tiles[i]
        new = linear(tiles.cut(padded, row), lax.dynamic_index_in_dim(weight, e, 0, keepdims=False))
        new = jnp.where(jnp.arange(tiles.M)[:, None] < real, new, 0)
        return lax.dynamic_update_slice_in_dim(y, new, row, 0)  # the next expert's tile writes over the excess

    y = jnp.zeros((len(padded), weight.shape[1]), x.dtype)
    return lax.fori_loop(0, tiles.ends[-1], body, y)[: len(x)].astype(jnp.float32)


def _tiled_weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    tiles = _Tiles(sizes, len(x))
    rows, grads = tiles.pad(x), tiles.pad(dy)

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        e, row, real = tiles[i]
        dy = jnp.where(jnp.arange(tiles.M)[:, None] < real, tiles.cut(grads, row), 0)
        new = jnp.einsum("po,pi->oi", dy.astype(jnp.float32), tiles.cut(rows, row).astype(jnp.float32))
        return lax.dynamic_update_index_in_dim(dw, lax.dynamic_index_in_dim(dw, e, 0, keepdims=False) + new, e, 0)

    return lax.fori_loop(0, tiles.ends[-1], body, jnp.zeros((len(sizes), dy.shape[1], x.shape[1]), jnp.float32))


def _forward(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> tuple:
    return grouped_linear(x, weight, sizes), (x, weight, sizes)


def _backward(saved: tuple, dy: jax.Array) -> tuple:
    x, weight, sizes = saved
    dx = grouped_linear(dy, jnp.swapaxes(weight, 1, 2), sizes)
    dw = lax.platform_dependent(x, dy, sizes, cpu=_tiled_weight_gradient, default=_weight_gradient)
    return dx, dw.astype(weight.dtype), np.zeros(sizes.shape, jax.dtypes.float0)


grouped_linear.defvjp(_forward, _backward)
