"""One pass over a dataset without training: losses, predictions, metrics, as HF's evaluation loop returns them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.ops.loss import IGNORE
from jaxmodels.sharding.processes import to_host
from jaxmodels.training.batches import put
from jaxmodels.training.step import Loss, Metrics

HIDDEN = ("loss", "cache")  # fields of an output that are no predictions


@dataclasses.dataclass(frozen=True)
class EvalPrediction:
    """HF's: what compute_metrics is given. Arrays [rows, …], or tuples of them; unpacks as (predictions, label_ids) and what was asked for
    by include_for_metrics."""

    predictions: Any
    label_ids: Any
    inputs: Any = None
    losses: Any = None

    def __iter__(self) -> Iterator[Any]:
        return iter([self.predictions, self.label_ids, *(x for x in (self.inputs, self.losses) if x is not None)])

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]


class PredictionOutput(NamedTuple):
    """What `Trainer.predict` returns, as HF's: arrays [rows, …] or tuples of them, and metrics by name."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


class EvalLoopOutput(NamedTuple):
    """PredictionOutput, and how many examples there were."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int


Count = Callable[[Any], jax.Array]


def make_loss_step(model: Any, loss: Loss, count: Count) -> Callable[..., tuple[Metrics, None]]:
    """A jitted `(params, batch) -> ({loss, tokens, …}, None)`; without noise, and weighed by labels."""

    def step(params: Any, batch: Any) -> tuple[Metrics, None]:
        return _measure(lambda params, **inputs: model.apply({"params": params}, **inputs), params, batch, loss, count), None

    return jax.jit(step)


def _measure(apply: Callable[..., Any], params: Any, batch: Any, loss: Loss, count: Count) -> Metrics:
    tokens = count(batch)
    value, extra = loss(apply, params, batch, tokens)
    return {"loss": value, "tokens": tokens, **extra}


def make_predict_step(
    model: Any, loss: Loss, count: Count, labels: Sequence[str], names: set[str], preprocess: Callable[[Any, Any], Any] | None
) -> Callable[..., tuple[Metrics, Any]]:
    """As make_loss_step's, with the model's outputs: a tuple without the loss, or the one that there is, or what `preprocess(outputs,
    labels)` makes of them. names: the arrays of a batch that the model takes. Nothing is measured of a batch without labels."""

    def step(params: Any, batch: Any) -> tuple[Metrics, Any]:
        apply = lambda params, **inputs: model.apply({"params": params}, **inputs)
        given = [batch[name] for name in labels if name in batch]
        measured = _measure(apply, params, batch, loss, count) if given else {}
        inputs = {name: array for name, array in batch.items() if name in names}
        if not inputs:
            raise ValueError(f"a batch of {', '.join(batch)} is not the model's inputs: prediction_loss_only=True evaluates the loss alone")
        out = apply(params, **inputs)
        predicted = one_or_all([value for name, value in zip(out.keys(), out) if name not in HIDDEN])
        return measured, predicted if preprocess is None else preprocess(predicted, one_or_all(given))

    return jax.jit(step)


def evaluation_loop(trainer: Any, source: Any, prediction_loss_only: bool, prefix: str) -> EvalLoopOutput:
    """One pass over the source's batches by the trainer's prediction_step; the first and only epoch, in the dataset's order."""
    began, args, params = time.perf_counter(), trainer.args, trainer.params
    measured: list[tuple[dict[str, float], int]] = []
    kept: dict[str, list[Any]] = {"predictions": [], "label_ids": [], "inputs": []}
    by_batch = args.batch_eval_metrics and trainer.compute_metrics is not None and not prediction_loss_only
    computed: Any = None
    batches = iter(source.epoch(0))
    batch = next(batches, None)
    while batch is not None:
        inputs = put(trainer.eval_model, batch)
        found, predicted = trainer.prediction_step(params, inputs, prediction_loss_only)
        measured.append(({name: float(value) for name, value in found.items()}, batch.real))
        following = next(batches, None)
        if not prediction_loss_only:
            given = one_or_all([inputs[name] for name in trainer.label_names if name in inputs])
            shown = inputs.get("input_ids") if "inputs" in args.include_for_metrics else None
            arrays = first_rows({"predictions": predicted, "label_ids": given, "inputs": shown}, batch.real)
            if by_batch:
                computed = trainer.compute_metrics(_prediction(trainer, arrays, measured[-1:]), compute_result=following is None)
            else:
                for name, value in arrays.items():
                    kept[name] += [] if value is None else [value]
        trainer.call_event("on_prediction_step")
        batch = following
    whole = {name: joined(values) if args.eval_do_concat_batches else values for name, values in kept.items() if values}
    predictions, label_ids = whole.get("predictions"), whole.get("label_ids")
    if trainer.compute_metrics is not None and not by_batch and predictions is not None and label_ids is not None:
        computed = trainer.compute_metrics(_prediction(trainer, whole, measured))
    metrics = plain(dict(computed or {})) | _means([values for values, _ in measured if values])
    metrics = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}
    samples = sum(rows for _, rows in measured)
    metrics |= speed(prefix, time.perf_counter() - began, samples, len(measured))
    return EvalLoopOutput(predictions, label_ids, metrics, samples)


def _prediction(trainer: Any, arrays: dict[str, Any], measured: list[tuple[dict[str, float], int]]) -> EvalPrediction:
    wanted = "loss" in trainer.args.include_for_metrics
    losses = np.concatenate([np.repeat(values["loss"], rows) for values, rows in measured]) if wanted else None
    return EvalPrediction(arrays["predictions"], arrays.get("label_ids"), arrays.get("inputs"), losses)


def _means(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over the labels of all batches; those of a batch without any do not count."""
    counted = [values for values in measured if values["tokens"] > 0]
    tokens = sum(values["tokens"] for values in counted)
    names = [name for name in (counted[0] if counted else ()) if name != "tokens"]
    return {name: sum(values[name] * values["tokens"] for values in counted) / tokens for name in names}


def one_or_all(found: Sequence[Any]) -> Any:
    """HF's form of labels: an array, a tuple of several, None."""
    return None if not found else found[0] if len(found) == 1 else tuple(found)


def first_rows(tree: Any, rows: int) -> Any:
    """The first `rows` rows as numpy arrays, on every process."""
    return jax.tree.map(lambda leaf: leaf[:rows] if np.ndim(leaf) else np.asarray(leaf)[None], to_host(tree))


def joined(batches: Sequence[Any]) -> Any:
    """Trees of arrays [rows, …] as one, rows after rows; where the second axes differ, the shorter are filled up with -100."""
    return jax.tree.map(lambda *leaves: _joined(leaves), *batches)


def _joined(leaves: Sequence[np.ndarray]) -> np.ndarray:
    if leaves[0].ndim > 1:
        width = max(leaf.shape[1] for leaf in leaves)
        fill = lambda leaf: [(0, 0), (0, width - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2)
        leaves = [np.pad(leaf, fill(leaf), constant_values=IGNORE) if leaf.shape[1] < width else leaf for leaf in leaves]
    return np.concatenate(leaves)


def plain(metrics: Any) -> Any:
    """Numbers of numpy and JAX as Python's, in dicts and lists."""
    if isinstance(metrics, dict):
        return {name: plain(value) for name, value in metrics.items()}
    if isinstance(metrics, list | tuple):
        return [plain(value) for value in metrics]
    if isinstance(metrics, np.generic | np.ndarray | jnp.ndarray):
        return metrics.item() if metrics.size == 1 else np.asarray(metrics).tolist()
    return metrics


def speed(prefix: str, seconds: float, samples: int, steps: int) -> dict[str, float]:
    """HF's three fields."""
    found = {f"{prefix}_runtime": round(seconds, 4)}
    if seconds:
        found |= {f"{prefix}_samples_per_second": round(samples / seconds, 3), f"{prefix}_steps_per_second": round(steps / seconds, 3)}
    return found
