"""Gradient transformations that optax lacks, or has with other numbers than the torch optimizers that HF's names mean.

Axis letters: O out, I in, r rank."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from jaxmodels.params import flatten, unflatten

BLOCK = 256  # numbers that share a scale in an 8-bit state
SMALL = 4096  # smaller parameters keep 32-bit states
STACK = re.compile(r"(?:^|\.)\d+:\d+:\d+\.")  # the part of a name that says: these are stacked layers


def per_layer(inner: optax.GradientTransformation, *, in_turn: bool = False) -> optax.GradientTransformation:
    """`inner` on every layer of a scanned model's stacks by itself, for rules that look at a whole tensor (its norm, say).
    in_turn: one layer after the other, where `inner` has a branch that is seldom taken; side by side it would be taken every time."""

    def groups(tree: Any) -> dict[str, Any]:
        """{"0": what is not stacked, "24": the stacks of 24 layers, …}, each in the tree's own nesting."""
        found: dict[str, dict[str, Any]] = {}
        for name, leaf in flatten(tree).items():
            found.setdefault(str(len(leaf)) if STACK.search(name) and hasattr(leaf, "shape") else "0", {})[name] = leaf
        return {key: unflatten(flat) for key, flat in found.items()}

    def init(params: Any) -> dict[str, Any]:
        return {key: inner.init(tree) if key == "0" else jax.vmap(inner.init)(tree) for key, tree in groups(params).items()}

    def one_by_one(*stacks: Any) -> tuple[Any, Any]:
        return lax.map(lambda layer: inner.update(*layer), stacks)

    def update(updates: Any, state: dict[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
        done: dict[str, Any] = {}
        after: dict[str, Any] = {}
        parts = groups(params)
        for key, tree in groups(updates).items():
            function = inner.update if key == "0" else one_by_one if in_turn else jax.vmap(inner.update)
            new, after[key] = function(tree, state[key], parts[key])
            done |= flatten(new)
        return unflatten({name: done[name] for name in flatten(updates)}), after

    return optax.GradientTransformation(init, update)


@functools.cache
def codebook(signed: bool) -> np.ndarray:
    """The 256 numbers of dynamic tree quantization (arXiv:1511.04561, as 8-bit optimizers use it: 2110.02861), float32, rising, from -1 or
    0 to 1: seven decades, each cut into twice as many even steps as the one below, and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=np.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (decade - 6))
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.asarray(values, np.float32))


class Quantized(struct.PyTreeNode):
    """An array in 8 bits: codes uint8 in its shape, and the largest magnitude of every 256 numbers of it, row by row, float32."""

    codes: jax.Array
    scales: jax.Array
    signed: bool = struct.field(pytree_node=False)

    @staticmethod
    def encode(x: jax.Array, signed: bool) -> Quantized:
        table = codebook(signed)
        blocks = jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
        scales = jnp.max(jnp.abs(blocks), 1)
        ratios = blocks / jnp.where(scales > 0, scales, 1)[:, None]
        codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), ratios).astype(jnp.uint8)
        return Quantized(codes.reshape(-1)[: x.size].reshape(x.shape), scales, signed)

    def decode(self) -> jax.Array:
        values = jnp.asarray(codebook(self.signed))[self.codes.reshape(-1)]
        values = jnp.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK) * self.scales[:, None]
        return values.reshape(-1)[: self.codes.size].reshape(self.codes.shape)


def in_8_bits(inner: optax.GradientTransformation, keep: Callable[[str], bool] = lambda name: False) -> optax.GradientTransformation:
    """`inner` with its state in blocks of 8 bits between the steps, except parameters below 4096 numbers and those that `keep` names."""

    def encode(path: tuple, leaf: Any) -> Any:
        name = ".".join(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
        if leaf.size < SMALL or not jnp.issubdtype(leaf.dtype, jnp.floating) or keep(name):
            return leaf
        squares = any(isinstance(entry, jax.tree_util.GetAttrKey) and entry.name == "nu" for entry in path)
        return Quantized.encode(leaf, signed=not squares)

    def decode(state: Any) -> Any:
        small = lambda x: isinstance(x, Quantized)
        return jax.tree.map(lambda x: x.decode() if small(x) else x, state, is_leaf=small)

    def init(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(encode, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, decode(state), params)
        return updates, jax.tree_util.tree_map_with_path(encode, state)

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    momentum: Any


def scale_by_muon(beta: float = 0.95, nesterov: bool = True, steps: int = 5) -> optax.GradientTransformation:
    """Momentum made orthogonal by Newton-Schulz (github.com/KellerJordan/Muon), as torch.optim.Muon does it: matrices [O,I] alone."""

    def orthogonal(x: jax.Array) -> jax.Array:
        wide = x.T if x.shape[0] > x.shape[1] else x
        wide = wide / jnp.maximum(jnp.linalg.norm(wide), 1e-7)
        for _ in range(steps):
            gram = wide @ wide.T
            wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
        ratio = math.sqrt(max(1, x.shape[0] / x.shape[1]))
        return ratio * (wide.T if x.shape[0] > x.shape[1] else wide)

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, updates) if nesterov else momentum
        return jax.tree.map(orthogonal, ahead), MuonState(momentum)

    return optax.GradientTransformation(init, update)


class GaLoreState(NamedTuple):
    steps: jax.Array
    projector: Any
    inner: Any


def galore(
    inner: optax.GradientTransformation, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25, proj_type: str = "std"
) -> optax.GradientTransformation:
    """GaLore (arXiv:2403.03507) with galore_torch's options: `inner` sees the gradient of a matrix [O,I] in the space of its first `rank`
    singular vectors, found anew every `update_proj_gap` steps; its answer is projected back and multiplied by `scale`.

    proj_type: `std` keeps the longer side whole, `reverse_std` the shorter, `right` the rows O, `left` the columns I."""
    if proj_type not in ("std", "reverse_std", "right", "left"):
        raise ValueError(f"proj_type {proj_type!r} is not known; known are std, reverse_std, right, left")

    def keeps_rows(shape: tuple[int, ...]) -> bool:
        tall = shape[0] >= shape[1]
        return {"std": tall, "reverse_std": not tall, "right": True, "left": False}[proj_type]

    def vectors(g: jax.Array) -> jax.Array:
        u, _, v = jnp.linalg.svd(g, full_matrices=False)
        p = v[:rank].T if keeps_rows(g.shape) else u[:, :rank]  # [I,r] or [O,r]
        # The signs are the library's whim, and the moments live on under new vectors: a rule makes them the same everywhere.
        return p * jnp.sign(jnp.take_along_axis(p, jnp.argmax(jnp.abs(p), 0)[None], 0))

    def down(g: jax.Array, p: jax.Array) -> jax.Array:
        return g @ p if keeps_rows(g.shape) else p.T @ g

    def up(low: jax.Array, p: jax.Array, g: jax.Array) -> jax.Array:
        return scale * (low @ p.T if keeps_rows(g.shape) else p @ low)

    def init(params: Any) -> GaLoreState:
        projector = jax.tree.map(lambda x: jnp.zeros((x.shape[keeps_rows(x.shape)], min(rank, *x.shape)), x.dtype), params)
        return GaLoreState(jnp.zeros((), jnp.int32), projector, inner.init(jax.tree.map(down, params, projector)))

    def update(updates: Any, state: GaLoreState, params: Any = None) -> tuple[Any, GaLoreState]:
        renew = state.steps % update_proj_gap == 0
        projector = lax.cond(renew, lambda: jax.tree.map(vectors, updates), lambda: state.projector)
        low, inside = inner.update(jax.tree.map(down, updates, projector), state.inner, jax.tree.map(down, params, projector))
        return jax.tree.map(up, low, projector, updates), GaLoreState(state.steps + 1, projector, inside)

    return optax.GradientTransformation(init, update)
