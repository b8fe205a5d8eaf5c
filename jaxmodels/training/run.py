"""One call of Trainer.train: the loop around the jitted step, which never waits for the step it has just begun."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.sharding.processes import agree, described, spans
from jaxmodels.training.batches import Batch, Dataset, Stream, put
from jaxmodels.training.callbacks import TrainerState, best_metric
from jaxmodels.training.checkpoints import Checkpoints, checkpoints_in, describe, get_last_checkpoint, restore
from jaxmodels.training.evaluation import plain, speed
from jaxmodels.training.meter import Meter, input_tokens
from jaxmodels.training.step import ROW_COUNTS, TrainState, create_train_state
from jaxmodels.training.trainable import merge, split

SHOWING = ("disable_tqdm", "report_to", "run_name")  # arguments in which processes may differ
PREEMPTED = 143  # the exit code after SIGTERM: 128 + 15, as a shell reports a process that the signal ended


KEPT = ("epoch", "closed", "steps", "sums", "last", "total_loss", "updates")  # of a Run, in its checkpoints


class TrainOutput(NamedTuple):
    """training_loss: the mean over all steps of the run, those before it was resumed included."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class NonFiniteError(ArithmeticError):
    """A loss or a gradient that is not a finite number."""


def lengths(args: Any, source: Dataset | Stream) -> tuple[int, int]:
    """(max_steps, epochs) of a run over the source."""
    if args.max_steps > 0:
        return args.max_steps, sys.maxsize if source.steps is None else math.ceil(args.max_steps / source.steps)
    if source.steps is None:
        raise ValueError("a train dataset without a length needs max_steps")
    return math.ceil(args.num_train_epochs * source.steps), math.ceil(args.num_train_epochs)


@contextlib.contextmanager
def listening() -> Iterator[Callable[[int], bool]]:
    """Whether to leave after a step, because SIGTERM has come: (step) -> bool, to be asked after every step.

    Several processes agree on a step when any of them has heard it. Alone, signals are heard in the main thread."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        yield reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


class Run:
    """The state of a training run, from a checkpoint or from the start. trainer: whose arguments, data and callbacks these are."""

    def __init__(self, trainer: Any, resume: str | bool | None):
        self.trainer, self.args, self.model = trainer, trainer.args, trainer.model
        path = self._resumed(resume)
        self.source = trainer.train_source()
        self.max_steps, self.epochs = lengths(self.args, self.source)
        if spans(self.model.rules):
            asked = {name: value for name, value in self.args.to_dict().items() if name not in SHOWING}
            asked |= {"max_steps": self.max_steps, "optimizer": trainer.optimizer_name, "resume_from_checkpoint": path}
            agree("train", **asked, **described(self.model.rules))
        self.optimizer, self.schedule = trainer.create_optimizer_and_scheduler(self.max_steps)
        self.key = jax.random.key(self.args.seed)
        self.state: TrainState = create_train_state(self.model, self.optimizer, trainer.params, frozen=trainer.frozen)
        self.programs: dict[int, Any] = {}
        self.meter = Meter(self.model, self._without_remat)
        self.epoch, self.closed = 0, False  # closed: this epoch's last event has been
        self.waiting: deque[tuple[int, str, dict[str, jax.Array]]] = deque()
        self.steps, self.sums, self.last = 0, {}, {}  # type: int, dict[str, float], dict[str, float]  # since the last log
        self.total_loss, self.updates = 0.0, 0  # updates: steps but for those that float16 skips
        self.about = describe(self.model, trainer.optimizer_name, trainer.peft_config)
        trainer.state = TrainerState(
            max_steps=self.max_steps,
            num_train_epochs=min(self.epochs, 2**31),
            train_batch_size=self.args.per_device_train_batch_size,
            is_world_process_zero=jax.process_index() == 0,
        )
        trainer.state.compute_steps(self.args, self.max_steps)
        self.checkpoints = Checkpoints(self.args.output_dir, self.args.save_total_limit)
        if path is not None:
            self._restore(path)
        newer = [path.name for step, path in checkpoints_in(self.args.output_dir).items() if step > trainer.state.global_step]
        if newer and self.args.save_strategy != "no":
            raise CheckpointError(
                f"{path} is older than {', '.join(newer)} in {self.args.output_dir}: remove those or choose another output_dir"
            )
        self.saved_at = trainer.state.global_step if path else -1
        self.first = trainer.state.global_step

    def _resumed(self, resume: str | bool | None) -> Path | None:
        last = get_last_checkpoint(self.args.output_dir)
        if resume is True:
            if last is None:
                raise CheckpointError(f"resume_from_checkpoint=True, but {self.args.output_dir} has no checkpoint")
            return Path(last)
        if resume:
            return Path(resume)
        if last is not None and self.args.save_strategy != "no":
            raise CheckpointError(
                f"{self.args.output_dir} has the checkpoints of an earlier run, up to {Path(last).name}: resume_from_checkpoint=True goes "
                "on from there; for a new run choose another output_dir or remove them"
            )
        return None

    def _restore(self, path: Path) -> None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state)
        jax.tree.map(lambda leaf: leaf.delete(), self.state)
        self.state, saved = restore(path, shapes, self.about)
        state = self.trainer.state
        for name, value in saved["trainer_state"].items():
            if name not in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "is_world_process_zero"):
                setattr(state, name, value)
        if state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint)
            places = (self.checkpoints.directory / best.name, best)  # the whole directory may have been moved or copied
            state.best_model_checkpoint = next((str(path) for path in places if path.is_dir()), None)
        self.checkpoints.best = state.best_model_checkpoint
        known = {"updates": state.global_step, **saved}  # which earlier versions did not count
        for name in KEPT:
            setattr(self, name, known[name])
        self.source.set_position(saved["data"])
        self.key = jax.random.wrap_key_data(jnp.asarray(saved["key"], jnp.uint32))
        self.trainer.callback_handler.restore(state.stateful_callbacks)

    def params(self) -> Any:
        """The parameters; of a schedule-free optimizer, those to evaluate."""
        if not self.trainer.optimizer_name.startswith("schedule_free"):
            return self.state.params
        trained, fixed = split(self.state.params, self.trainer.frozen)
        return merge(optax.contrib.schedule_free_eval_params(self.state.opt_state, trained), fixed)

    def call(self, event: str, **kwargs: Any) -> None:
        self.trainer.call_event(event, **kwargs)

    @property
    def control(self) -> Any:
        return self.trainer.control

    def __call__(self) -> TrainOutput:
        began = time.perf_counter()
        with listening() as self.preempted:
            self.control.should_training_stop = False
            self.call("on_train_begin")
            if self.args.eval_on_start and not self.trainer.state.global_step:
                self.trainer.evaluate()
            if self.trainer.state.global_step < self.max_steps:
                while self.epoch < self.epochs and not self.control.should_training_stop:
                    self._one_epoch()
            elif not self.closed:  # ended between the last step and the end of its epoch
                self._close_epoch()
            return self._finish(time.perf_counter() - began)

    def _one_epoch(self) -> None:
        self.control.should_epoch_stop = self.closed = False
        self.call("on_epoch_begin")
        complete = True
        for batch in self.source.epoch(self.epoch):
            self._step(batch)
            if self.control.should_training_stop or self.control.should_epoch_stop:
                complete = self.control.should_epoch_stop or self.source.at_end()
                break
        if isinstance(self.source, Stream) and not self.source.read:
            step = self.trainer.state.global_step
            raise ValueError(f"the train dataset has nothing more after {step} steps, and max_steps is {self.max_steps}")
        if complete:
            self.source.restart()
            self.epoch += 1
        self._close_epoch()

    def _close_epoch(self) -> None:
        self.closed = True
        self.call("on_epoch_end")
        self._act()

    def _step(self, batch: Batch) -> None:
        state, args = self.trainer.state, self.args
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.call("on_step_begin")
        tokens = self._tokens(batch)
        if self.source.pieces > 1:  # the step adds up what the processes have
            counts = np.zeros((len(next(iter(batch.arrays.values()))), 1, len(tokens)), np.int32)
            counts[0], tokens = tokens, (0, 0)
            batch = dataclasses.replace(batch, arrays=batch.arrays | {ROW_COUNTS: counts})
        arrays = put(self.model, batch)
        parts = math.gcd(args.gradient_accumulation_steps, batch.rows)
        flops = self.meter.flops_of(arrays, parts, self.state, self.key)
        self.state, metrics = self._program(parts)(self.state, arrays, self.key)
        state.global_step += 1
        state.epoch = self.epoch + self.source.share(state.max_steps)
        state.num_input_tokens_seen += tokens[0]
        state.total_flos += flops
        self.meter.add(tokens[1], flops)
        self.waiting.append((state.global_step, batch.name, metrics))
        self._collect(leave=1)
        if self.meter.begun is None:
            jax.block_until_ready(metrics)
            self.meter.start()
        self.call("on_step_end")
        self._act()
        if self.preempted(state.global_step):
            self._leave()

    def _tokens(self, batch: Batch) -> tuple[int, int]:
        """Of this process's rows that do not just fill the batch up: as include_num_input_tokens_seen says, and without padding."""
        pad = getattr(self.trainer.processing_class, "pad_token_id", None)
        arrays = {name: array[: batch.own] for name, array in batch.arrays.items()}
        whole = self.args.include_num_input_tokens_seen == "all"
        return input_tokens(arrays, padding=whole, pad_token_id=pad), input_tokens(arrays, pad_token_id=pad)

    def _program(self, parts: int) -> Any:
        if parts not in self.programs:
            self.programs[parts] = self.trainer.make_step(self.model, self.optimizer, parts)
        return self.programs[parts]

    def _without_remat(self, parts: int) -> Any:
        """The step as it would be without recomputation."""
        if self.model.remat is None:
            return self._program(parts)
        return self.trainer.make_step(dataclasses.replace(self.model, remat=None), self.optimizer, parts)

    def _collect(self, leave: int = 0) -> None:
        """Read what steps have measured, but for the last `leave`, and stop at what is not finite."""
        while len(self.waiting) > leave:
            step, name, metrics = self.waiting.popleft()
            seen, real = np.asarray(jax.device_get(metrics.pop(ROW_COUNTS, (0, 0)))).tolist()
            self.trainer.state.num_input_tokens_seen += seen
            self.meter.tokens += real if step > self.first + 1 else 0  # the first is not timed
            found = {key: float(value) for key, value in jax.device_get(metrics).items()}
            wrong = [key for key in ("loss", "grad_norm") if not math.isfinite(found[key])]
            empty = not found["tokens"]
            if empty or (wrong and ("loss" in wrong or self.state.loss_scale is None)):
                self.checkpoints.wait()
                what = "there is no label that counts, and so no loss," if empty else f"{wrong[0]} is {found[wrong[0]]}"
                last = self.checkpoints.last() or "none"
                raise NonFiniteError(f"{what} at step {step}, of {name}. The last good checkpoint: {last}")
            del found["tokens"]
            self.steps, self.last = self.steps + 1, found
            self.sums = {key: self.sums.get(key, 0.0) + value for key, value in found.items()}
            self.total_loss += found["loss"]
            self.updates += not wrong

    def _act(self) -> None:
        """Log, evaluate and save, as the control says."""
        args, control, began = self.args, self.control, time.perf_counter()
        if control.should_log or control.should_evaluate or control.should_save:
            self._collect()
        if control.should_log and self.steps:
            self._log()
            began = time.perf_counter()
        if control.should_evaluate:
            better = self._better(self.trainer.evaluate())
            if args.save_strategy == "best":
                control.should_save = better
        if control.should_save:
            control.should_save = False
            self._save()
            self.call("on_save")
        self.meter.pause(time.perf_counter() - began)

    def _log(self) -> None:
        """Means since the last log; the gradients' norm and the loss scale are the last step's, as in HF."""
        logs = {name: value / self.steps for name, value in self.sums.items()}
        logs |= {name: self.last[name] for name in ("grad_norm", "loss_scale") if name in logs}
        step = self.trainer.state.global_step
        if self.schedule is not None:
            at = self.updates - math.isfinite(self.last["grad_norm"])  # the schedule stands still where an update is skipped
            logs["learning_rate"] = float(self.schedule(at)) if callable(self.schedule) else float(self.schedule)
        self.steps, self.sums = 0, {}
        self.trainer.log({**logs, **self.meter.read(self.max_steps - step)})

    def _better(self, metrics: dict[str, float]) -> bool:
        """Whether the evaluation is the best so far; then the state says so."""
        args, state = self.args, self.trainer.state
        if args.metric_for_best_model is None:
            return False
        value = best_metric(args, metrics)
        better = state.best_metric is None or (value > state.best_metric if args.greater_is_better else value < state.best_metric)
        if better and math.isfinite(value):
            state.best_metric = value
            if args.save_strategy != "no":
                state.best_global_step = state.global_step
        return better and math.isfinite(value)

    def _save(self) -> None:
        state = self.trainer.state
        best = self.checkpoints.path(state.best_global_step) if state.best_global_step is not None else None
        if best is not None and (best.is_dir() or state.best_global_step == state.global_step):
            state.best_model_checkpoint = str(best)
        self.checkpoints.wait()
        self.checkpoints.best = state.best_model_checkpoint
        if state.global_step == self.saved_at:  # evaluated after it was saved
            return
        state.stateful_callbacks = plain(self.trainer.callback_handler.states())
        run = {
            "trainer_state": dataclasses.asdict(state),
            **{name: getattr(self, name) for name in KEPT},
            "data": self.source.position(),
            "key": np.asarray(jax.random.key_data(self.key)).tolist(),
            "arguments": self.args.to_dict(),
        }
        self.checkpoints.save(state.global_step, self.state, self.about, run)
        self.saved_at = state.global_step

    def _leave(self) -> None:
        """After SIGTERM: the work so far is saved, and the process ends."""
        self._collect()
        self._save()
        self.checkpoints.close()
        if jax.process_index() == 0:
            print(f"SIGTERM: saved {self.checkpoints.last()}, exiting with {PREEMPTED}", file=sys.stderr, flush=True)
        raise SystemExit(PREEMPTED)

    def _finish(self, seconds: float) -> TrainOutput:
        self._collect()
        state = self.trainer.state
        steps = state.global_step - self.first
        rows = self.source.rows * steps
        loss = self.total_loss / max(state.global_step, 1)
        metrics = speed("train", seconds, rows, steps) | {"total_flos": state.total_flos, "train_loss": loss}
        self.trainer.log(metrics)
        self.checkpoints.close()
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), self.state)
            self.state = restore(state.best_model_checkpoint, shapes, self.about)[0]
        return TrainOutput(state.global_step, loss, metrics)
