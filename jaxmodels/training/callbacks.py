"""What listens to a run: HF's events, state and control; progress, logs in JSONL and TensorBoard, early stopping."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jaxmodels.convert.atomic import replace_text
from jaxmodels.training.arguments import TrainingArguments

EVENTS = (
    "on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_step_end", "on_evaluate",
    "on_predict", "on_save", "on_log", "on_prediction_step",
)  # fmt: skip
INSIDE = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")  # HF's events within what is one program here


@dataclasses.dataclass
class TrainerState:
    """HF's: where a run is. Part of every checkpoint. epoch: its decimals are the share of the epoch that is done; global_step: updates
    done; total_flos: of the model, without recomputation; log_history: what was logged, each with its step."""

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    stateful_callbacks: dict[str, Any] = dataclasses.field(default_factory=dict)

    def compute_steps(self, args: TrainingArguments, max_steps: int) -> None:
        """Intervals that are shares of all steps as numbers of steps."""
        for kind in ("logging", "eval", "save"):
            steps = getattr(args, f"{kind}_steps")
            if steps is not None:
                setattr(self, f"{kind}_steps", math.ceil(max_steps * steps) if steps < 1 else int(steps))


@dataclasses.dataclass
class TrainerControl:
    """HF's: what a callback may ask for, by setting a field or returning another control."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class TrainerCallback:
    """Methods named as HF's events, each called with (args, state, control, **kwargs): kwargs has model, processing_class, and, where it is
    so, logs or metrics. A method may return a control. What happens between the parts of a step (INSIDE) is one compiled program here:
    a callback with a method of that name is refused. One with `state()` is saved with every checkpoint and set again on resuming, by the
    entries of its "attributes"."""


for _event in EVENTS:
    setattr(TrainerCallback, _event, lambda self, args, state, control, **kwargs: None)


class CallbackHandler:
    """The callbacks of a run, called in turn."""

    def __init__(self, callbacks: Sequence[Any], **context: Any):
        self.callbacks: list[Any] = []
        self.context = context
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        callback = callback() if isinstance(callback, type) else callback
        inside = [name for name in INSIDE if hasattr(callback, name)]
        if inside:
            raise ValueError(
                f"{type(callback).__name__} has {', '.join(inside)}: a step is one compiled program, which no callback interrupts; "
                "use on_step_begin or on_step_end, or an optax transformation"
            )
        self.callbacks.append(callback)

    def pop(self, callback: Any) -> Any:
        """Remove and return the callback, or the first of that class; None when there is none."""
        for found in self.callbacks:
            if found is callback or (isinstance(callback, type) and isinstance(found, callback)):
                self.callbacks.remove(found)
                return found
        return None

    def call(self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        for callback in self.callbacks:
            control = getattr(callback, event)(args, state, control, **self.context, **kwargs) or control
        return control

    def states(self) -> dict[str, list[Any]]:
        """What the callbacks want to be saved, by class, in order."""
        found: dict[str, list[Any]] = {}
        for callback in self.callbacks:
            if hasattr(callback, "state"):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        return found

    def restore(self, states: Mapping[str, list[Any]]) -> None:
        left = {name: list(values) for name, values in states.items()}
        for callback in self.callbacks:
            if left.get(type(callback).__name__):
                for name, value in left[type(callback).__name__].pop(0)["attributes"].items():
                    setattr(callback, name, value)


class DefaultFlowCallback(TrainerCallback):
    """When the arguments ask for a log, an evaluation, a checkpoint, the end."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        due = lambda kind: getattr(args, f"{kind}_strategy") == "steps" and (step % getattr(state, f"{kind}_steps") == 0)
        control.should_log |= due("logging") or (step == 1 and args.logging_first_step)
        control.should_evaluate |= (due("eval") or (last and args.eval_strategy == "steps")) and args.eval_delay <= step
        control.should_save |= due("save") or (last and args.save_strategy == "steps")
        control.should_training_stop |= last

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= args.logging_strategy == "epoch"
        control.should_evaluate |= args.eval_strategy == "epoch" and args.eval_delay <= state.epoch
        control.should_save |= args.save_strategy == "epoch"


class ProgressCallback(TrainerCallback):
    """One readable line for every log, and a bar below it where the output is a terminal."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, leave=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(readable(logs, state), file=sys.stdout)
            sys.stdout.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def readable(logs: Mapping[str, Any], state: TrainerState) -> str:
    """A record of a log in one line, such as
    step 120/1000  epoch 0.48  loss 2.3452  lr 3e-05  grad 1.23  12,345 tokens/s  …  device 12.1 GB  host 2.0 GB  0:12:34 left"""
    forms = {
        "epoch": lambda v: f"epoch {v:.2f}",
        "loss": lambda v: f"loss {v:.4f}",
        "learning_rate": lambda v: f"lr {v:.3g}",
        "grad_norm": lambda v: f"grad {v:.3g}",
        "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
        "model_flops_per_second": lambda v: f"{v / 1e12:.3g} TFLOP/s",
        "mfu": lambda v: f"MFU {100 * v:.1f} %",
        "device_memory": lambda v: f"device {v / 1e9:.1f} GB",
        "host_memory": lambda v: f"host {v / 1e9:.1f} GB",
        "seconds_left": lambda v: f"{_clock(v)} left",
        "total_flos": lambda v: f"{v:.3g} FLOPs",
    }
    other = lambda name, v: f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}"
    order = [name for name in forms if name in logs] + [name for name in logs if name not in forms]
    parts = [forms[name](logs[name]) if name in forms else other(name, logs[name]) for name in order]
    return "  ".join([f"step {state.global_step}/{state.max_steps}", *parts])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


class JSONLCallback(TrainerCallback):
    """output_dir/log.jsonl: what HF keeps in log_history, a line each. Resuming drops the lines after the checkpoint's step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / "log.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "".join(json.dumps(line) + "\n" for line in state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir) / "log.jsonl"
        if state.is_world_process_zero and path.parent.is_dir():
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**logs, "step": state.global_step}) + "\n")


class TensorBoardCallback(TrainerCallback):
    """Event files in output_dir/runs/RUN_NAME, written by tensorboardX or torch's writer, whichever is installed; by HF's names:
    train/loss, eval/accuracy. ValueError where neither is."""

    def __init__(self) -> None:
        self.make, self.writer = _writer_class(), None  # type: Any, Any

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.writer = self.make(str(Path(args.output_dir) / "runs" / (args.run_name or "")), purge_step=state.global_step + 1)
            self.writer.add_text("args", args.to_json_string())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any, **kwargs: Any) -> None:
        if self.writer is None:
            return
        for name, value in logs.items():
            kind, _, rest = name.partition("_")
            tag = f"{kind}/{rest}" if kind in ("eval", "test") else f"train/{name}"
            if isinstance(value, int | float):
                self.writer.add_scalar(tag, value, state.global_step)
        self.writer.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _writer_class() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("report_to='tensorboard' needs a writer of its files: pip install tensorboardX") from None
    return SummaryWriter


REPORTERS = {"jsonl": JSONLCallback, "tensorboard": TensorBoardCallback}


class EarlyStoppingCallback(TrainerCallback):
    """Stop after `early_stopping_patience` evaluations in a row whose metric_for_best_model is not better than the best by more than
    `early_stopping_threshold`."""

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0):
        self.early_stopping_patience, self.early_stopping_threshold = early_stopping_patience, early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.metric_for_best_model is None or args.eval_strategy == "no":
            raise ValueError(
                f"EarlyStoppingCallback needs metric_for_best_model (found {args.metric_for_best_model!r}) and an eval_strategy of steps "
                f"or epoch (found {args.eval_strategy!r})"
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> None:
        if metric_name(args) not in metrics:  # of another of several datasets
            return
        value = best_metric(args, metrics)
        better = state.best_metric is None or (
            (value > state.best_metric if args.greater_is_better else value < state.best_metric)
            and abs(value - state.best_metric) > self.early_stopping_threshold
        )
        self.early_stopping_patience_counter = 0 if better else self.early_stopping_patience_counter + 1
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience

    def state(self) -> dict[str, Any]:
        return {"attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter}}


def metric_name(args: TrainingArguments) -> str:
    name = str(args.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"


def best_metric(args: TrainingArguments, metrics: Mapping[str, Any]) -> float:
    """The value of metric_for_best_model; ValueError names those that there are."""
    name = metric_name(args)
    if name not in metrics:
        raise ValueError(f"metric_for_best_model is {args.metric_for_best_model!r}; the evaluation has {', '.join(metrics)}")
    return float(metrics[name])
