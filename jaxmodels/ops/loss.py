"""Losses in float32, with HF's meaning of labels: -100 is left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
