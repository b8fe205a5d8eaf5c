"""Post-training on the same step: labels for supervised fine-tuning, and preference losses (DPO, arXiv:2305.18290, and its variants).

Axis letters: B pairs, T tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid, sigmoid

from jaxmodels.ops.loss import IGNORE, LossOptions
from jaxmodels.training.step import Batch, Loss, Metrics


def sft_labels(
    input_ids: np.ndarray,
    *,
    attention_mask: np.ndarray | None = None,
    completion_mask: np.ndarray | None = None,
    assistant_masks: np.ndarray | None = None,
) -> np.ndarray:
    """Labels [B,T] of ids [B,T] where every mask [B,T] that is given is 1, and -100 elsewhere: padding, the prompt, the user's turns.

    assistant_masks: as `apply_chat_template(return_assistant_tokens_mask=True)` returns them. ValueError when a row has no label, since it
    would teach nothing without a word."""
    labels = np.array(input_ids)
    for mask in (attention_mask, completion_mask, assistant_masks):
        if mask is not None:
            labels = np.where(np.asarray(mask).astype(bool), labels, IGNORE)
    empty = np.flatnonzero((labels == IGNORE).all(-1))
    if len(empty):
        raise ValueError(f"rows {empty[:8].tolist()} have no token to learn from: their masks leave nothing")
    return labels


# Every variant: log-probabilities [B] over the reference's of the chosen and the rejected answer, beta, the smoothing -> [B].


def _sigmoid(chosen: jax.Array, rejected: jax.Array, b: float, s: float) -> jax.Array:
    margin = b * (chosen - rejected)
    return -(1 - s) * log_sigmoid(margin) - s * log_sigmoid(-margin)


def _robust(chosen: jax.Array, rejected: jax.Array, b: float, s: float) -> jax.Array:
    """arXiv:2403.00409: unbiased when a share s of the labels is wrong."""
    margin = b * (chosen - rejected)
    return (-(1 - s) * log_sigmoid(margin) + s * log_sigmoid(-margin)) / (1 - 2 * s)


def _exo_pair(chosen: jax.Array, rejected: jax.Array, b: float, s: float) -> jax.Array:
    """arXiv:2402.00856, equation 16."""
    margin, s = b * (chosen - rejected), s or 1e-3
    first = sigmoid(margin) * (log_sigmoid(margin) - math.log(1 - s))
    return first + sigmoid(-margin) * (log_sigmoid(-margin) - math.log(s))


def _nca_pair(chosen: jax.Array, rejected: jax.Array, b: float, s: float) -> jax.Array:
    """arXiv:2402.05369."""
    return -log_sigmoid(b * chosen) - 0.5 * log_sigmoid(-b * chosen) - 0.5 * log_sigmoid(-b * rejected)


VARIANTS: dict[str, Callable[[jax.Array, jax.Array, float, float], jax.Array]] = {
    "sigmoid": _sigmoid,
    "hinge": lambda chosen, rejected, b, s: jax.nn.relu(1 - b * (chosen - rejected)),  # arXiv:2305.10425
    "ipo": lambda chosen, rejected, b, s: (chosen - rejected - 1 / (2 * b)) ** 2,  # arXiv:2310.12036, on means over tokens
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "sppo_hard": lambda chosen, rejected, b, s: (chosen - 0.5 / b) ** 2 + (rejected + 0.5 / b) ** 2,  # arXiv:2405.00675
    "apo_zero": lambda chosen, rejected, b, s: 1 - sigmoid(b * chosen) + sigmoid(b * rejected),  # arXiv:2408.06266
    "apo_down": lambda chosen, rejected, b, s: sigmoid(b * chosen) + 1 - sigmoid(b * (chosen - rejected)),
}
SIDES = ("chosen", "rejected")


def pair_log_probs(apply: Callable[..., Any], params: Any, batch: Batch, loss_type: str, chunk: int | None = None) -> dict[str, jax.Array]:
    """{"chosen": [B], "rejected": [B]} float32: the log-probability of each answer's labels, for `ipo` their mean.

    batch: `chosen_input_ids`, `chosen_labels`, `chosen_attention_mask` [B,T] and the same `rejected_…`, of one length T; both sides go
    through the model together."""
    joined = {name: jnp.concatenate([batch[f"{side}_{name}"] for side in SIDES]) for name in ("input_ids", "labels", "attention_mask")}
    total = -apply(params, **joined, loss_options=LossOptions(chunk=chunk, by_row=True)).loss
    if loss_type == "ipo":
        total = total / jnp.sum(joined["labels"][:, 1:] != IGNORE, 1)
    return dict(zip(SIDES, jnp.split(total, 2)))


def make_reference(
    model: Any, loss_type: str = "sigmoid", *, loss_chunk: int | None = None
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """A jitted `(params, batch) -> {"reference_chosen_logps": [B], "reference_rejected_logps": [B]}`, to be joined to the batch once,
    before training. With an adapter the reference is `lora.without_adapter(params)`."""

    @jax.jit
    def reference(params: Any, batch: Batch) -> dict[str, jax.Array]:
        apply = lambda params, **inputs: model.apply({"params": params}, **inputs)
        found = pair_log_probs(apply, params, batch, loss_type, loss_chunk)
        return {f"reference_{side}_logps": found[side] for side in SIDES}

    return reference


def dpo_loss(
    loss_type: str = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    rpo_alpha: float | None = None,
    reference_free: bool = False,
    loss_chunk: int | None = None,
) -> tuple[Loss, Callable[[Batch], jax.Array]]:
    """The `loss` and the `count` for make_train_step: step = make_train_step(model, optimizer, loss, count=count), batches as
    `pair_log_probs` and `make_reference` say.

    loss_type: TRL's names, see VARIANTS. label_smoothing: the share of labels taken for wrong (sigmoid: conservative DPO; robust;
    exo_pair). rpo_alpha: this times the mean loss per token of the chosen answer is added (arXiv:2404.19733). reference_free: the
    reference is uniform. Metrics, means over pairs: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen,
    logps/rejected."""
    if loss_type not in VARIANTS:
        raise ValueError(f"loss_type {loss_type!r} is not known; known are {', '.join(VARIANTS)}")
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta {beta} must be above 0 and label_smoothing {label_smoothing} in [0, 0.5)")

    def loss(apply: Callable[..., Any], params: Any, batch: Batch, num_items: jax.Array) -> tuple[jax.Array, Metrics]:
        if not reference_free and "reference_chosen_logps" not in batch:
            raise ValueError("the batch has no reference_chosen_logps; make_reference computes them, or choose reference_free=True")
        logps = pair_log_probs(apply, params, batch, loss_type, loss_chunk)
        ratios = {side: logps[side] - (0 if reference_free else batch[f"reference_{side}_logps"]) for side in SIDES}
        losses = VARIANTS[loss_type](ratios["chosen"], ratios["rejected"], beta, label_smoothing)
        if rpo_alpha is not None:
            tokens = 1 if loss_type == "ipo" else jnp.sum(batch["chosen_labels"][:, 1:] != IGNORE, 1)
            losses = losses - rpo_alpha * logps["chosen"] / tokens
        rewards = {side: beta * jax.lax.stop_gradient(ratios[side]) for side in SIDES}
        margins = rewards["chosen"] - rewards["rejected"]
        seen = {f"rewards/{side}": rewards[side] for side in SIDES} | {f"logps/{side}": logps[side] for side in SIDES}
        seen |= {"rewards/margins": margins, "rewards/accuracies": (margins > 0).astype(jnp.float32)}
        return jnp.sum(losses) / num_items, {name: jnp.sum(value) / num_items for name, value in seen.items()}

    return loss, lambda batch: jnp.int32(len(batch["chosen_input_ids"]))
