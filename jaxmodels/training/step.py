"""The jitted train step: float32 master parameters, the model's compute dtype inside, one optax update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.ops.loss import IGNORE
from jaxmodels.params import abstract_params

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything that a step changes: a pytree to donate, shard and checkpoint. step [] int32, params in float32."""

    step: jax.Array
    params: Any
    opt_state: Any


def _shardings(model: Any, optimizer: optax.GradientTransformation) -> TrainState | None:
    """Where the state lives when the model has rules: moments as their parameters, all else replicated. (A plain jit of
    optimizer.init would replicate the moments.)"""
    if model.rules is None:
        return None
    shapes = abstract_params(model)
    everywhere = NamedSharding(model.rules.mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer, lambda _, leaf: leaf.sharding, jax.eval_shape(optimizer.init, shapes), shapes, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, jax.tree.map(lambda leaf: leaf.sharding, shapes), opt_state)  # type: ignore[arg-type]


def create_train_state(model: Any, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The state before the first step, with `params` raised to float32. It owns its arrays, since the step donates them."""
    placed = _shardings(model, optimizer)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    if placed is None:
        return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    params = jax.device_put(params, placed.params)
    return TrainState(jnp.zeros((), jnp.int32, device=placed.step), params, jax.jit(optimizer.init, out_shardings=placed.opt_state)(params))


def _loss(model: Any, params: Any, batch: Batch) -> jax.Array:
    return model.apply({"params": params}, **batch).loss


def _count(batch: Batch) -> jax.Array:
    return jnp.sum(batch["labels"][:, 1:] != IGNORE)


def make_train_step(model: Any, optimizer: optax.GradientTransformation) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted `(state, batch) -> (state, metrics)` for a causal model; the old state is donated.

    batch: the model's arguments by name, `input_ids` and `labels` [B,T] int (-100 left out, shifted inside as in HF) and,
    if wanted, `attention_mask`. metrics, each []: `loss` (mean over the labels that count), `tokens` (how many),
    `grad_norm` (before any clipping in the optimizer)."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = jax.value_and_grad(lambda params: _loss(model, params, batch))(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": loss, "tokens": _count(batch), "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    placed = _shardings(model, optimizer)
    return jax.jit(step, donate_argnums=0, out_shardings=None if placed is None else (placed, placed.step))


def make_eval_step(model: Any) -> Callable[[Any, Batch], Metrics]:
    """A jitted `(params, batch) -> {loss, tokens}`; weigh the losses of several batches by their tokens."""
    return jax.jit(lambda params, batch: {"loss": _loss(model, params, batch), "tokens": _count(batch)})
