"""Mixtures of experts without a capacity: every token reaches every expert that it chose.

Routing turns logits into (weights [..., k], chosen [..., k] int32); `mix_experts` applies the chosen experts. `dense` runs every expert on
every token, `ragged_dot` sorts tokens by expert and reads only experts that were chosen; they agree to rounding.

Axis letters: S tokens, D hidden, E experts, k experts per token, P = S*k pairs of token and expert, I in, O out; x [B,T,D] over a mesh
is S = B*T tokens; M rows of a tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.sharding import PartitionSpec

from jaxmodels.ops.linear import einsum, linear
from jaxmodels.ops.pipeline import spec_axes

IMPLEMENTATIONS = ("ragged_dot", "dense")
Dot = Callable[..., jax.Array]
# ---- routing ---------------------------------------------------------------------------------------------------------


def pick(scores: jax.Array, k: int, by: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The scores [..., k] of the k experts that `by` (default: the scores) [..., E] puts first, and which they are."""
    if by is None:
        return lax.top_k(scores, k)
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


def sparse_mixer(logits: jax.Array, k: int, jitter: float) -> tuple[jax.Array, jax.Array]:
    """SparseMixer (arXiv:2409.12136) as it runs after training: k times the best of the experts that are left, weighted, in float32, by its
    probability among those whose logits are within 2 * `jitter` of it, relative to the larger magnitude."""
    logits = logits.astype(jnp.float32)
    left, weights, chosen = logits, [], []
    for _ in range(k):
        best = jnp.max(left, -1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        first = jnp.argmax(left, -1, keepdims=True)
        weights.append(jnp.take_along_axis(jax.nn.softmax(jnp.where(far, -jnp.inf, left), -1), first, -1))
        chosen.append(first)
        left = jnp.where(jnp.arange(logits.shape[-1]) == first, -jnp.inf, left)
    return jnp.concatenate(weights, -1), jnp.concatenate(chosen, -1)


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
    implementation: `ragged_dot` (default) or `dense`. rules: x is [B,T,D], and every device of the mesh
    computes its own tokens and experts. scale_input: the weights multiply x instead of the result."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"experts_implementation {implementation!r} is not known; known are {', '.join(IMPLEMENTATIONS)}")
    run = partial(_dense if implementation == "dense" else _ragged, mlp, scale_input)
    if rules is None or implementation == "dense":
        rows = lambda a: a.reshape(-1, a.shape[-1])
        return run(params, rows(x), rows(weights), rows(chosen)).astype(x.dtype).reshape(x.shape)
    # cast before they are gathered; biases are added in float32
    cast = jax.tree.map(lambda w: w.astype(x.dtype) if w.ndim == 3 else w, params)
    return _on_mesh(run, rules, cast, x, weights, chosen).astype(x.dtype)


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
    sizes = jnp.sum(flat[:, None] == jnp.arange(E), 0, dtype=jnp.int32)
    share = weights.reshape(-1)[order][:, None]  # [P, 1]
    rows = x[order // k]
    rows = rows * share.astype(x.dtype) if scale_input else rows
    # XLA:CPU expands ragged_dot to every expert times every row
    y = lax.platform_dependent(params, rows, sizes, cpu=partial(_tiled, mlp), default=partial(_grouped, mlp)).astype(jnp.float32)
    y = y if scale_input else y * share.astype(jnp.float32)
    y = jnp.where(flat[order][:, None] < E, y, 0)
    return jnp.sum(y[jnp.argsort(order)].reshape(S, k, -1), 1)


def _on_mesh(run: Any, rules: Any, params: Any, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
    """Every device sorts its own tokens of x [B,T,D]. Along mesh axes that split the experts, tokens are gathered, each device computes
    those of its own experts, and the results are added up and go back to where the tokens live."""
    split = rules.spec(("experts",), jax.tree.leaves(params)[0].shape[:1])[0]
    spec = rules.spec(("batch", "seq", None), x.shape)
    experts, tokens = spec_axes(split), spec_axes(spec[0]) + spec_axes(spec[1])
    both, alone = tuple(a for a in experts if a in tokens), tuple(a for a in experts if a not in tokens)

    def local(params: Any, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        def gather(a: jax.Array) -> jax.Array:
            rows = a.reshape(-1, a.shape[-1])
            return lax.all_gather(rows, both, axis=0, tiled=True) if both else rows

        first = lax.axis_index(experts) * jax.tree.leaves(params)[0].shape[0] if experts else 0
        y = run(params, gather(x), gather(weights), gather(chosen) - first)
        y = lax.psum(y, alone) if alone else y
        return (lax.psum_scatter(y, both, scatter_dimension=0, tiled=True) if both else y).reshape(x.shape)

    names = {*experts, *tokens}
    if not names:
        return local(params, x, weights, chosen)
    names |= {*rules.around}  # over which jax.vmap has spread what stands here
    specs = (PartitionSpec(split), spec, spec, spec)
    return jax.shard_map(local, mesh=rules.mesh, in_specs=specs, out_specs=spec, axis_names=names, check_vma=False)(
        params, x, weights, chosen
    )


# ---- rows that are sorted by expert -----------------------------------------------------------------------------------
# Both: mlp of x [P,D], whose first rows are sizes[0] of expert 0, the next sizes[1] of expert 1, …; [P,D] in x.dtype.


def _plain_ragged_dot(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, weight, sizes, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _ragged_dot(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """float32 [P,O] of x [P,I] and weight [E,I,O]. XLA:TPU has no such product with a batch axis, which the stages of a pipeline add: it
    and its gradients take what is batched one by one."""
    return sequential_vmap(_plain_ragged_dot)(x, weight, sizes)


def _ragged_dot_backward(saved: tuple, dy: jax.Array) -> tuple:
    def pull(x: jax.Array, weight: jax.Array, sizes: jax.Array, dy: jax.Array) -> tuple:
        (dx,) = jax.linear_transpose(lambda x: _plain_ragged_dot(x, weight, sizes), x)(dy)
        (dweight,) = jax.linear_transpose(lambda weight: _plain_ragged_dot(x, weight, sizes), weight)(dy)
        return dx, dweight

    return *sequential_vmap(pull)(*saved, dy), np.zeros(saved[2].shape, jax.dtypes.float0)


_ragged_dot.defvjp(lambda *arguments: (_ragged_dot(*arguments), arguments), _ragged_dot_backward)


def _grouped(mlp: Any, params: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    expert = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))

    def dot(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        y = _ragged_dot(x, jnp.swapaxes(weight, 1, 2).astype(x.dtype), sizes)
        return (y if bias is None else y + bias[expert].astype(jnp.float32)).astype(x.dtype)

    return mlp(x, params, dot)


class _Tiles:
    """The rows of one expert after the other in tiles of M; an expert's last reaches into the next one's rows, or past the end."""

    def __init__(self, sizes: jax.Array, rows: int) -> None:
        per_expert = rows / sizes.shape[0]
        self.M = 1 if per_expert <= 4 else min(64, 1 << max(3, math.ceil(math.log2(per_expert))))  # fewer rows than 8 gain nothing
        self.sizes, self.starts = sizes, jnp.cumsum(sizes) - sizes
        self.used = jnp.argsort(sizes == 0, stable=True)

    def pad(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, self.M - 1), (0, 0)))

    def cut(self, x: jax.Array, row: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, row, self.M, 0)

    def of(self, e: jax.Array, body: Callable[[jax.Array, jax.Array, Any], Any], carry: Any) -> Any:
        """`body(first row, which [M,1] of the rows are the expert's, carry)` for every tile of expert e."""
        real = lambda t: jnp.arange(self.M)[:, None] < self.sizes[e] - t * self.M
        count = (self.sizes[e] + self.M - 1) // self.M
        return lax.fori_loop(0, count, lambda t, carry: body(self.starts[e] + t * self.M, real(t), carry), carry)

    def experts(self, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """`body(e, carry)` for every expert that has rows."""
        return lax.fori_loop(0, jnp.sum(self.sizes > 0), lambda i, carry: body(self.used[i], carry), carry)


def _one(params: Any, e: jax.Array) -> Any:
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, e, 0, keepdims=False), params)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(mlp: Any, params: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Reads every expert that has rows once; the gradient runs the tiles again."""
    tiles = _Tiles(sizes, len(x))
    padded = tiles.pad(x)

    def expert(e: jax.Array, y: jax.Array) -> jax.Array:
        w = _one(params, e)

        def tile(row: jax.Array, real: jax.Array, y: jax.Array) -> jax.Array:
            new = jnp.where(real, mlp(tiles.cut(padded, row), w, linear), 0)
            return lax.dynamic_update_slice_in_dim(y, new, row, 0)  # the next tile writes over the excess

        return tiles.of(e, tile, y)

    return tiles.experts(expert, jnp.zeros_like(padded))[: len(x)]


def _forward(mlp: Any, params: Any, x: jax.Array, sizes: jax.Array) -> tuple:
    return _tiled(mlp, params, x, sizes), (params, x, sizes)


def _backward(mlp: Any, saved: tuple, dy: jax.Array) -> tuple:
    params, x, sizes = saved
    tiles = _Tiles(sizes, len(x))
    padded, grads = tiles.pad(x), tiles.pad(dy)

    def expert(e: jax.Array, carry: tuple) -> tuple:
        w = _one(params, e)

        def tile(row: jax.Array, real: jax.Array, carry: tuple) -> tuple:
            total, dx = carry
            pull = jax.vjp(lambda w, x: mlp(x, w, linear), w, tiles.cut(padded, row))[1]
            dw, new = pull(jnp.where(real, tiles.cut(grads, row), 0))
            return jax.tree.map(jnp.add, total, dw), lax.dynamic_update_slice_in_dim(dx, new, row, 0)

        dparams, dx = carry
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), w)
        total, dx = tiles.of(e, tile, (zeros, dx))
        put = lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, e, 0)
        return jax.tree.map(put, dparams, total), dx

    start = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    dparams, dx = tiles.experts(expert, (start, jnp.zeros_like(padded)))
    return jax.tree.map(lambda d, w: d.astype(w.dtype), dparams, params), dx[: len(x)], np.zeros(sizes.shape, jax.dtypes.float0)


_tiled.defvjp(_forward, _backward)
