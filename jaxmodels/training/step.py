"""The jitted train step: float32 master parameters, the model's compute dtype inside, one optax update.

Axis letters: A accumulated parts, B batch, T tokens, D hidden, V vocabulary."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import lax

from jaxmodels.layers import Embedding
from jaxmodels.model import CausalLM, pack
from jaxmodels.ops.loss import IGNORE, LossOptions, answer_labels, token_losses
from jaxmodels.params import flatten
from jaxmodels.training.trainable import Frozen, merge, placement, split

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# (apply, params, batch, num_items) -> (loss [], metrics): `apply(params, **inputs)` calls the model; both are sums divided by num_items [].
Loss = Callable[[Callable[..., Any], Any, Batch, jax.Array], tuple[jax.Array, Metrics]]

ROW_COUNTS = "row_counts"  # of a batch [B,1,N] int32, not the model's: metrics have their sums [N], over all processes' rows
CHUNK_LOGITS = 1 << 26  # logits that a device holds at one time, by default: 256 MB in float32


@struct.dataclass
class LossScale:
    """torch's GradScaler: float16 gradients are those of `scale` [] times the loss; `good` [] counts finite steps since it last changed."""

    scale: jax.Array
    good: jax.Array

    GROWTH_INTERVAL = 2000

    @staticmethod
    def initial() -> LossScale:
        return LossScale(jnp.float32(65536), jnp.int32(0))

    def update(self, finite: jax.Array) -> LossScale:
        """Half of it after gradients that are not finite, twice after 2000 steps in a row that are."""
        grown = self.good + 1 >= self.GROWTH_INTERVAL
        scale = jnp.where(finite, jnp.where(grown, self.scale * 2, self.scale), self.scale * 0.5)
        return LossScale(scale, jnp.where(finite & ~grown, self.good + 1, 0))


@struct.dataclass
class TrainState:
    """Everything that a step changes: a pytree to donate, shard and checkpoint. step [] int32; params: those that are trained in
    float32; opt_state: of those alone; loss_scale: where the compute dtype is float16."""

    step: jax.Array
    params: Any
    opt_state: Any
    loss_scale: LossScale | None = None


def create_train_state(model: Any, optimizer: optax.GradientTransformation, params: Any, *, frozen: Frozen = ()) -> TrainState:
    """The state before the first step. It owns its arrays, since the step donates them.

    frozen: as in `make_train_step`; frozen parameters keep their dtype, the others are raised to float32."""
    trained, fixed = split(params, frozen)
    if any(name.endswith(".lora_scale") for name in flatten(trained)):
        raise ValueError(
            "the parameters have an adapter, and its scale would be trained: a Trainer's peft_config, or frozen=lora.frozen_by(config), "
            "trains the adapter alone; lora.merge makes plain parameters of it"
        )
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trained)
    fixed = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), fixed)
    scale = LossScale.initial() if model.dtype == jnp.float16 else None
    if model.rules is None:
        return TrainState(jnp.zeros((), jnp.int32), merge(trained, fixed), jax.jit(optimizer.init)(trained), scale)
    put = lambda tree: jax.device_put(tree, placement(model, tree))
    trained = put(trained)
    # (A plain jit of optimizer.init would replicate the moments.)
    opt_state = jax.jit(optimizer.init, out_shardings=placement(model, jax.eval_shape(optimizer.init, trained), "optimizer"))(trained)
    return TrainState(put(jnp.zeros((), jnp.int32)), merge(trained, put(fixed)), opt_state, put(scale))


def state_placement(model: Any, state: TrainState) -> TrainState:
    """A sharding for every leaf of a state, or of its shapes, when the model has rules."""
    return placement(model, state).replace(opt_state=placement(model, state.opt_state, "optimizer"))


def count_items(model: Any, batch: Batch) -> jax.Array:
    """Over how many labels [] a model's loss is the mean: those other than -100, shifted for a causal model; answers within the text; else
    the rows."""
    labels, starts = batch.get("labels"), batch.get("start_positions")
    if starts is not None and "input_ids" in batch:
        return jnp.sum(answer_labels(starts, batch["input_ids"].shape[1], batch.get("attention_mask")) != IGNORE)
    if labels is None or jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.int32(len(next(iter(batch.values()))))
    if isinstance(model, CausalLM):
        if batch.get("segment_ids") is not None:
            labels = pack(batch["segment_ids"], None, labels)[1]
        labels = labels[:, 1:]  # type: ignore[index]
    return jnp.sum(labels != IGNORE)


def model_loss(model: Any, options: LossOptions, chunk: int | str | None) -> Loss:
    """The loss that the model itself computes from its labels, weighed by how many of them count."""

    def own(apply: Callable[..., Any], params: Any, batch: Batch, num_items: jax.Array) -> tuple[jax.Array, Metrics]:
        _need_labels(batch)
        resolved = LossOptions(options.label_smoothing, options.z_loss, _chunk(model, batch, chunk))
        return apply(params, **batch, loss_options=resolved, num_items_in_batch=num_items).loss, {}

    def mean(apply: Callable[..., Any], params: Any, batch: Batch, num_items: jax.Array) -> tuple[jax.Array, Metrics]:
        value = apply(params, **batch).loss
        if value is None:
            _need_labels(batch)
        return value * count_items(model, batch) / num_items, {}

    if "num_items_in_batch" in inspect.signature(type(model).__call__).parameters:
        return own

    def smoothed(apply: Callable[..., Any], params: Any, batch: Batch, num_items: jax.Array) -> tuple[jax.Array, Metrics]:
        _need_labels(batch)
        labels, out = batch["labels"], apply(params, **batch)
        if not jnp.issubdtype(labels.dtype, jnp.integer) or getattr(out, "logits", None) is None:
            found = f"labels of {labels.dtype}, outputs {', '.join(out.keys())}"
            raise ValueError(f"label_smoothing is for a head that chooses among classes; {type(model).__name__} has {found}")
        return jnp.sum(token_losses(out.logits, labels, options)) / num_items, {}

    if options.z_loss:
        raise ValueError(f"{type(model).__name__} computes its loss whole: z_loss and chunks are for causal language models")
    return smoothed if options.label_smoothing else mean


def _need_labels(batch: Batch) -> None:
    if "labels" not in batch:
        raise ValueError(
            f"a batch of {', '.join(batch)} has no `labels`, of which this loss is made; the examples have none, or the collator makes "
            "none (DataCollatorForLanguageModeling(tokenizer, mlm=False) does)"
        )


def _chunk(model: Any, batch: Batch, chunk: int | str | None) -> int | None:
    if chunk != "auto":
        return chunk  # type: ignore[return-value]
    B, T = batch["labels"].shape
    devices = 1 if model.rules is None else model.rules.mesh.size
    rows = CHUNK_LOGITS * devices // (B * model.config.vocab_size)
    return None if rows >= T else max(1, rows)


def _noisy(apply: Callable[..., Any], key: jax.Array, alpha: float) -> Callable[..., Any]:
    """`apply` with NEFTune's noise (arXiv:2310.05914): uniform within alpha/sqrt(T·D) on the word embeddings [B,T,D]."""

    def add(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        x = forward(*args, **kwargs)
        words = isinstance(context.module, Embedding) and context.module.axis == "vocab" and context.method_name == "__call__"
        if not words:
            return x
        bound = alpha / math.sqrt(x.shape[-2] * x.shape[-1])
        return x + jax.random.uniform(key, x.shape, x.dtype, -bound, bound)

    def call(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(add):
            return apply(*args, **kwargs)

    return call


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    loss: Loss | None = None,
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_chunk: int | str | None = "auto",
    neftune_noise_alpha: float | None = None,
    frozen: Frozen = (),
    count: Callable[[Batch], jax.Array] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted `(state, batch, key=None) -> (state, metrics)`; the old state is donated.

    batch: the model's arguments by name, for a causal model `input_ids` and `labels` [B,T] int (-100 left out, shifted inside as in HF)
    and, if wanted, `attention_mask` or `segment_ids`. key: for dropout and NEFTune; without one there is no dropout. metrics, each []:
    `loss` (mean over the labels that count), `tokens` (how many), `grad_norm` (before clipping), `loss_scale` in float16.

    loss: in place of the model's own, as `Loss` says; `count` tells how many items a batch has for it (labels that count).
    accumulation_steps: the batch is cut into so many parts, one after the other; the result is the whole batch's, every label weighing
        the same.
    max_grad_norm: gradients are scaled down to this norm, as torch.nn.utils.clip_grad_norm_ does.
    label_smoothing, z_loss: see LossOptions; the second for causal models alone. loss_chunk: tokens of each row whose logits exist at one
        time; "auto" keeps all while they are at most 2**26 on a device; None always.
    frozen: parameters that get no gradient and no optimizer state, as `create_train_state` was told: regular expressions of whole names,
        or a function of the name.
    float16 (the model's dtype) brings a dynamic loss scale; a step whose gradients are not finite changes only that."""
    options = LossOptions(label_smoothing, z_loss)
    loss_of = loss or model_loss(model, options, loss_chunk)
    if loss is not None and options != LossOptions():
        raise ValueError("label_smoothing and z_loss belong to the model's own loss; a loss of your own applies them itself")
    count_of = count or partial(count_items, model)

    def caller(key: jax.Array | None) -> Callable[..., Any]:
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, 0)}
        apply = lambda params, **inputs: model.apply({"params": params}, **inputs, rngs=rngs)
        if neftune_noise_alpha is None:
            return apply
        if key is None:
            raise ValueError("neftune_noise_alpha needs a key: step(state, batch, jax.random.key(0))")
        return _noisy(apply, jax.random.fold_in(key, 1), neftune_noise_alpha)

    def step(state: TrainState, batch: Batch, key: jax.Array | None = None) -> tuple[TrainState, Metrics]:
        trained, fixed = split(state.params, frozen)
        batch = dict(batch)
        own = batch.pop(ROW_COUNTS, None)
        num_items = count_of(batch)
        key = None if key is None else jax.random.fold_in(key, state.step)
        scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale

        def part(batch: Batch, number: Any) -> tuple:
            apply = caller(None if key is None else jax.random.fold_in(key, number))

            def value(trained: Any) -> tuple:
                loss, extra = loss_of(apply, merge(trained, fixed), batch, num_items)
                return loss * scale, (loss, extra)

            grads, seen = jax.grad(value, has_aux=True)(trained)
            return grads, seen

        def counted(batch: Batch, number: Any) -> tuple:  # a mean over no labels has no gradient
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, batch, number))
            return lax.cond(count_of(batch) > 0, lambda: part(batch, number), lambda: nothing)

        if accumulation_steps == 1:
            grads, (value, extra) = part(batch, 0)
        else:
            parts = jax.tree.map(partial(_cut, accumulation_steps), batch)
            body = lambda sums, xs: (jax.tree.map(jnp.add, sums, counted(*xs)), None)
            first = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, batch, 0))
            (grads, (value, extra)), _ = lax.scan(body, first, (parts, jnp.arange(accumulation_steps)))
        if model.rules is not None:
            grads = lax.with_sharding_constraint(grads, placement(model, grads, "gradients"))
        if state.loss_scale is not None:
            grads = jax.tree.map(lambda g: g / scale, grads)
        norm = optax.tree.norm(grads)
        metrics = {"loss": value, "tokens": num_items, "grad_norm": norm, **extra}
        if own is not None:
            metrics[ROW_COUNTS] = jnp.sum(own, (0, 1))
        if max_grad_norm is not None:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, max_grad_norm / (norm + 1e-6)), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        new = TrainState(state.step + 1, optax.apply_updates(trained, updates), opt_state, state.loss_scale)
        if state.loss_scale is not None:
            finite = jnp.isfinite(norm)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
            scaling = state.loss_scale.update(finite)
            new = TrainState(new.step, keep(new.params, trained), keep(opt_state, state.opt_state), scaling)
            metrics["loss_scale"] = scale
        return TrainState(new.step, merge(new.params, fixed), new.opt_state, new.loss_scale), metrics

    return jax.jit(step, donate_argnums=0) if model.rules is None else _PlacedStep(model, step)


class _PlacedStep:
    """The jitted step of a model with rules. Where the new state lives is said outright, or the compiler might choose another place and
    the next call another program; it follows from the state's structure, which adapters add to."""

    def __init__(self, model: Any, step: Callable[..., tuple[TrainState, Metrics]]):
        self.model, self.step, self.programs = model, step, {}  # type: ignore[var-annotated]

    def program(self, state: TrainState) -> Any:
        structure = jax.tree.structure(state)
        if structure not in self.programs:
            self.programs[structure] = jax.jit(self.step, donate_argnums=0, out_shardings=(state_placement(self.model, state), None))
        return self.programs[structure]

    def __call__(self, state: TrainState, batch: Batch, key: jax.Array | None = None) -> tuple[TrainState, Metrics]:
        return self.program(state)(state, batch, key)

    def lower(self, state: TrainState, batch: Batch, key: jax.Array | None = None) -> Any:
        """As the method of a jitted function: the program for arguments that may be shapes."""
        return self.program(state).lower(state, batch, key)

    def _cache_size(self) -> int:
        return sum(program._cache_size() for program in self.programs.values())


def _cut(parts: int, x: jax.Array) -> jax.Array:
    """[B, …] -> [A, B/A, …]; every part takes rows from all over the batch, so that each device keeps its rows."""
    if len(x) % parts:
        raise ValueError(f"a batch of {len(x)} rows cannot be cut into accumulation_steps = {parts} equal parts")
    return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def make_eval_step(model: Any, loss: Loss | None = None, *, count: Callable[[Batch], jax.Array] | None = None) -> Callable[..., Metrics]:
    """A jitted `(params, batch) -> {loss, tokens, …}` without noise; weigh the losses of several batches by their tokens."""
    loss_of, count_of = loss or model_loss(model, LossOptions(), "auto"), count or partial(count_items, model)

    def step(params: Any, batch: Batch) -> Metrics:
        tokens = count_of(batch)
        value, extra = loss_of(lambda params, **inputs: model.apply({"params": params}, **inputs), params, batch, tokens)
        return {"loss": value, "tokens": tokens, **extra}

    return jax.jit(step)
