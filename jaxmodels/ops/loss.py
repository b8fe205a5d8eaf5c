"""Losses in float32, with HF's meaning of labels: -100 is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

IGNORE = -100


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over labels [...] other than -100 of -log softmax(logits [..., V])[label]; nan when there is none, as in torch."""
    logits = logits.astype(jnp.float32)
    real = labels != IGNORE
    target = jnp.take_along_axis(logits, jnp.where(real, labels, 0)[..., None], -1)[..., 0]
    losses = jax.nn.logsumexp(logits, -1) - target
    return jnp.sum(losses * real) / jnp.sum(real)


def causal_lm_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of logits [B,T,V] against the following label of labels [B,T]."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What training may ask of a language model's loss.

    label_smoothing: the share of the mean of -log softmax over the whole vocabulary, as in HF's LabelSmoother. z_loss: this times
    logsumexp² is added (arXiv:2204.02311 §5). chunk: tokens of each row whose logits exist at one time, None for all of them.
    by_row: the loss is a sum for every row, [B]."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int | None = None
    by_row: bool = False


def token_losses(logits: jax.Array, labels: jax.Array, options: LossOptions = LossOptions()) -> jax.Array:
    """float32 [...]: the loss of every label [...] under logits [..., V], 0 where the label is -100."""
    logits = logits.astype(jnp.float32)
    real = labels != IGNORE
    target = jnp.take_along_axis(logits, jnp.where(real, labels, 0)[..., None], -1)[..., 0]
    if options.label_smoothing:
        target = (1 - options.label_smoothing) * target + options.label_smoothing * jnp.mean(logits, -1)
    normalizer = jax.nn.logsumexp(logits, -1)
    losses = normalizer - target
    if options.z_loss:
        losses = losses + options.z_loss * normalizer**2
    return jnp.where(real, losses, 0)


def row_losses(head: Callable[[jax.Array], jax.Array], x: jax.Array, labels: jax.Array, options: LossOptions) -> jax.Array:
    """As `summed_loss`, but a sum for every row, [B]. In chunks the logits are computed again for the gradient, since what weighs a row
    is not known sooner."""
    piece = lambda x, labels: jnp.sum(token_losses(head(x), labels, options), 1)
    if options.chunk is None or options.chunk >= x.shape[1]:
        return piece(x, labels)
    body = jax.checkpoint(lambda sums, xs: (sums + piece(*xs), None), prevent_cse=False)
    return lax.scan(body, jnp.zeros(len(x), jnp.float32), _pieces(x, labels, options.chunk))[0]


def _pieces(x: jax.Array, labels: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """[B,T,D] and [B,T] as [pieces,B,chunk,D] and [pieces,B,chunk], padded with labels that do not count."""
    (B, T), pieces = labels.shape, -(-labels.shape[1] // chunk)
    pad = pieces * chunk - T
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(B, pieces, chunk, -1).swapaxes(0, 1)
    return x, jnp.pad(labels, ((0, 0), (0, pad)), constant_values=IGNORE).reshape(B, pieces, chunk).swapaxes(0, 1)


def summed_loss(head: Callable[[jax.Array], jax.Array], x: jax.Array, labels: jax.Array, options: LossOptions) -> jax.Array:
    """The sum [] of `token_losses` of head(x [B,T,D]) -> [B,T,V] against labels [B,T].

    With options.chunk the logits of so many tokens a row exist at a time, forward and backward: where a gradient is wanted the forward
    loop makes it at once, so no logits are computed twice."""
    if options.chunk is None or options.chunk >= x.shape[1]:
        return jnp.sum(token_losses(head(x), labels, options))
    x, labels = _pieces(x, labels, options.chunk)
    head, weights = jax.closure_convert(head, x[0])
    piece = lambda x, labels, weights: jnp.sum(token_losses(head(x, *weights), labels, options))

    @jax.custom_vjp
    def total(x: jax.Array, labels: jax.Array, weights: list[jax.Array]) -> jax.Array:
        return lax.scan(lambda sum, xs: (sum + piece(*xs, weights), None), jnp.float32(0), (x, labels))[0]

    def forward(x: jax.Array, labels: jax.Array, weights: list[jax.Array]) -> tuple:
        def body(carry: tuple, xs: tuple) -> tuple:
            value, (dx, dw) = jax.value_and_grad(piece, (0, 2))(*xs, weights)
            return jax.tree.map(jnp.add, carry, (value, dw)), dx  # the sums in float32, whatever dw's dtype

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        scanned: Any = lax.scan(body, (jnp.float32(0), zeros), (x, labels))
        (value, dw), dx = scanned
        return value, (dx, dw)

    def backward(gradients: tuple, cotangent: jax.Array) -> tuple:
        dx, dw = gradients
        return (cotangent * dx).astype(x.dtype), None, [(cotangent * g).astype(w.dtype) for g, w in zip(dw, weights)]

    total.defvjp(forward, backward)
    return total(x, labels, weights)


def classification_loss(logits: jax.Array, labels: jax.Array, problem_type: str | None) -> jax.Array:
    """HF's sequence-classification loss of logits [B,C]; `problem_type` None is inferred from C and the labels' dtype.

    regression: mean squared error; single_label_classification: cross-entropy of labels [B];
    multi_label_classification: binary cross-entropy of labels [B,C] in {0, 1}."""
    logits = logits.astype(jnp.float32)
    if problem_type is None:
        integral = jnp.issubdtype(labels.dtype, jnp.integer)
        problem_type = (
            "regression" if logits.shape[-1] == 1 else "single_label_classification" if integral else "multi_label_classification"
        )
    if problem_type == "regression":
        return jnp.mean((logits.reshape(labels.shape) - labels) ** 2)
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    if problem_type == "multi_label_classification":
        return jnp.mean(jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits))))
    raise ValueError(
        f"problem_type {problem_type!r} is none of regression, single_label_classification, multi_label_classification; "
        "set it in the config, or leave it None to infer it"
    )


def span_loss(start_logits: jax.Array, end_logits: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """Mean of the two cross-entropies of logits [B,T] against positions [B]; positions outside 0..T-1 are left out."""
    T = start_logits.shape[-1]

    def one(logits: jax.Array, position: jax.Array) -> jax.Array:
        position = jnp.maximum(position.reshape(-1), 0)
        return cross_entropy(logits, jnp.where(position < T, position, IGNORE))

    return (one(start_logits, start) + one(end_logits, end)) / 2
