"""A pipeline: the stages of a stack work at one time, each on another part of the batch (GPipe, arXiv:1811.06965).

The schedule is one loop over M + S - 1 ticks. In each, every stage computes the microbatch that it holds and hands it to the next one. The
batch itself lies spread over the stages: the parts that wait move towards the first stage, and what leaves the last one takes their place,
so that no device ever holds more than its share and nothing is gathered. A stage is idle for (S-1)/(M+S-1) of the ticks.

Where the mesh has replicas of a stage (axes that split rows alone), each has a copy of the parameters to itself, so that gradients are
added up over the replicas once, after the loop, and not in every tick.

Axis letters: B rows, S stages, M microbatches, C = M/S that a stage keeps, b = B/M rows of one, R replicas, L layers of a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Stage = Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, Any]]


def pipeline(stage: Stage, params: Any, rows: Any, rules: Any) -> tuple[Any, Any]:
    """`stage(params [L, …], rows [b/R, …], number [], piece []) -> (rows, reports [L, b/R, …])` applied by S stages one after the other.

    params: a tree of leaves [S*L, …]; rows: a tree of [B, …], whose leaves the stages change or pass on; piece: which part of the batch
    these rows are; rules: the model's, which say over which mesh axes stages are spread and into how many microbatches the batch is cut.
    Returns the rows after the last stage [B, …] and the reports of all stages [S*L, B, …]. ValueError when the batch cannot be cut so."""
    axes, M, S = rules.stages, rules.microbatch_count, rules.stage_count
    B = len(jax.tree.leaves(rows)[0])
    inside = rules.inside_stage()
    R = rules.pieces(rules.replicas)
    _check(B, M, rules)
    C, b = M // S, B // M
    numbers = jnp.arange(S)
    rows_over = (*rules.replicas, *spec_axes(inside.spec(("batch",), (b // R,))[0]))

    def place(leaf: jax.Array, *kept: None) -> jax.Array:
        """Of a leaf [S, *kept, b, …], every stage its own."""
        spec = [axes, *kept, rows_over]
        spec += [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - len(spec))
        return lax.with_sharding_constraint(leaf, NamedSharding(rules.mesh, PartitionSpec(*spec)))

    def cut(leaf: jax.Array) -> jax.Array:  # [B, …] -> [S, C, b, …]; a microbatch has rows from all over its stage's, so that none moves
        return place(leaf.reshape(S, b, C, *leaf.shape[1:]).swapaxes(1, 2), None)

    def shift(leaves: Any, by: int) -> Any:
        """To the next stage (by = 1) or the one before it (-1), around the ring."""
        ring = [(i, (i + by) % S) for i in range(S)]
        move = lambda tree: jax.tree.map(lambda leaf: lax.ppermute(leaf, axes, ring), tree)
        spec = PartitionSpec(axes)
        return jax.shard_map(move, mesh=rules.mesh, in_specs=spec, out_specs=spec, axis_names=set(axes), check_vma=False)(leaves)

    def only(number: int, chosen: Any, others: Any) -> Any:
        pick = lambda a, b: jnp.where((numbers == number).reshape(S, *[1] * (a.ndim - 1)), a, b)
        return jax.tree.map(pick, chosen, others)

    def copies(leaf: jax.Array) -> jax.Array:  # [S*L, …] -> [S*R, L, …]
        leaf = jnp.broadcast_to(leaf.reshape(S, 1, -1, *leaf.shape[1:]), (S, R, len(leaf) // S, *leaf.shape[1:]))
        spec = PartitionSpec(inside.around, *[PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 2))
        return lax.with_sharding_constraint(leaf.reshape(S * R, *leaf.shape[2:]), NamedSharding(rules.mesh, spec))

    def run(rows: Any, t: jax.Array) -> tuple:
        """Every replica of every stage on its part of rows [S, b, …]."""
        parts = jax.tree.map(lambda leaf: leaf.reshape(S * R, b // R, *leaf.shape[2:]), rows)
        place, replica = jnp.divmod(jnp.arange(S * R), R)
        parts, reports = jax.vmap(stage, spmd_axis_name=inside.around)(mine, parts, place, (t - place) * R + replica)
        return jax.tree.map(lambda leaf: leaf.reshape(S, b, *leaf.shape[2:]), parts), reports

    mine = jax.tree.map(copies, params)

    def tick(carry: tuple, t: jax.Array) -> tuple:
        held, waiting = carry
        slot = t % C
        next_in = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, slot, 1, keepdims=False), waiting)
        done, reports = run(only(0, next_in, held), t)
        done = jax.tree.map(place, done)
        back = only(S - 1, done, shift(next_in, -1))
        waiting = jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, slot, 1), waiting, back)
        return (shift(done, 1), waiting), reports

    waiting = jax.tree.map(cut, rows)
    # A stage without a microbatch computes on rows of the batch: what comes of it is dropped, and it is as finite as the rest.
    held = jax.tree.map(lambda leaf: leaf[:, 0], waiting)
    ticked: Any = lax.scan(tick, (held, waiting), jnp.arange(M + S - 1))
    (_, waiting), reports = ticked

    def whole(leaf: jax.Array) -> jax.Array:  # the slot of a microbatch has gone around S - 1 times
        return jnp.roll(leaf, 1 - S, 1).swapaxes(1, 2).reshape(B, *leaf.shape[3:])

    def collect(leaf: jax.Array) -> jax.Array:  # [ticks, S*R, L, b/R, …] -> [S*L, B, …]; stage s sees microbatch m in tick m + s
        _, _, L, _, *rest = leaf.shape
        leaf = leaf.reshape(-1, S, R, L, b // R, *rest)
        seen = jnp.stack([leaf[s : s + M, s] for s in range(S)])  # [S, M, R, L, b/R, …]
        parts = seen.reshape(S, S, C, R, L, b // R, *rest).transpose(0, 4, 1, 3, 5, 2, *range(6, 6 + len(rest)))
        return parts.reshape(S * L, B, *rest)

    return jax.tree.map(whole, waiting), jax.tree.map(collect, reports)


def spec_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check(rows: int, microbatches: int, rules: Any) -> None:
    if rows % microbatches:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {microbatches} microbatches (Rules.microbatches) for the pipeline")
    over = {axis: rules.mesh.shape[axis] for axis in rules.mesh_axes("batch")}
    pieces = rules.pieces(axis for axis in over if axis not in rules.stages)
    if rows // microbatches % pieces:
        raise ValueError(
            f"{rows} rows in {microbatches} microbatches (Rules.microbatches) are {rows // microbatches} each, which the mesh {over} does "
            f"not divide: fewer microbatches, or a batch of a multiple of {microbatches * pieces} rows"
        )
