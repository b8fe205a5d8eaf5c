"""HF's Trainer on the jitted train step: the same arguments, events, logs and results, for a model and its parameters.

    trainer = Trainer(model, params, TrainingArguments(output_dir="out", max_steps=1000), train_dataset=examples)
    trainer.train()
    trainer.save_model()                        # a directory that torch loads

Axis letters: B rows, T tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmodels.auto import save_pretrained
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.ops.loss import LossOptions
from jaxmodels.params import flatten, unflatten
from jaxmodels.sharding.processes import agree, lockstep, spans, telling
from jaxmodels.training.arguments import Seq2SeqTrainingArguments, TrainingArguments
from jaxmodels.training.batches import Collator, Dataset, Stream, batch_devices, inputs_of, label_names_of
from jaxmodels.training.callbacks import REPORTERS, CallbackHandler, DefaultFlowCallback, ProgressCallback, TrainerControl, TrainerState
from jaxmodels.training.collators import default_data_collator
from jaxmodels.training.evaluation import EvalLoopOutput, PredictionOutput, evaluation_loop, make_loss_step, make_predict_step
from jaxmodels.training.lora import LoraConfig, adapter_of, add_lora, check_adapter, frozen_by, save_adapter
from jaxmodels.training.meter import trim_host_memory
from jaxmodels.training.optimizers import make_optimizer
from jaxmodels.training.run import Run, TrainOutput
from jaxmodels.training.schedules import Schedule, make_schedule
from jaxmodels.training.step import Batch, Loss, Metrics, count_items, make_train_step, model_loss
from jaxmodels.training.trainable import Frozen, split

Metric = Callable[..., Mapping[str, Any]]


class Trainer:
    """HF's, of a model and its parameters, which it does not change: `params` is a property that follows the training.

    data_collator: examples of a dataset to a batch of arrays, by default `default_data_collator`; one with an argument `step` gets
        a number of the batch, to draw by. train_dataset: a sequence (len and []) of dicts, permuted
        in every epoch by the seed; or an iterable whose iterator makes batches of numpy arrays, each for one step of this process, and has
        get_state and set_state to be resumed where it stopped (grain). eval_dataset: likewise, or {name: dataset}.
    compute_metrics: EvalPrediction -> {name: number}. preprocess_logits_for_metrics: (outputs, labels) -> what is kept of them, a pure
        function, compiled with the model. callbacks: beside those that the arguments ask for.
    optimizers: (optax transformation, schedule or None) in place of what the arguments say.
    loss, count: as make_train_step's, in place of the model's own loss; or override `compute_loss`.
    frozen: as create_train_state's. peft_config: a LoraConfig; the adapter is added where `params` have none, is what is trained, but for
        what is `frozen`, and is what save_model writes.
    A model with rules runs on their mesh; over several processes every process makes its share of each batch."""

    def __init__(
        self,
        model: Any,
        params: Mapping[str, Any],
        args: TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Metric | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[optax.GradientTransformation | None, Schedule | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        *,
        loss: Loss | None = None,
        count: Callable[[Batch], jax.Array] | None = None,
        frozen: Frozen = (),
        peft_config: LoraConfig | None = None,
    ):
        self.args = args = TrainingArguments() if args is None else args
        if model.rules is None and jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes need a mesh: from_pretrained(path, mesh=make_mesh(data=-1))")
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(f"eval_strategy is {args.eval_strategy!r}: evaluation needs an eval_dataset")
        compute = jnp.bfloat16 if args.bf16 else jnp.float16 if args.fp16 else model.dtype
        self.model = dataclasses.replace(model, dtype=compute, remat=args.remat or model.remat)
        whole = jnp.bfloat16 if args.bf16_full_eval else jnp.float16 if args.fp16_full_eval else compute
        self.eval_model = dataclasses.replace(self.model, dtype=whole, remat=None)
        self.data_collator = data_collator or default_data_collator
        self.train_dataset, self.eval_dataset, self.processing_class = train_dataset, eval_dataset, processing_class
        self.compute_metrics, self.preprocess_logits_for_metrics = compute_metrics, preprocess_logits_for_metrics
        self.label_names = args.label_names or label_names_of(model)
        self.columns = inputs_of(model) if args.remove_unused_columns and loss is None else None
        self.optimizers = optimizers
        given = "an optax transformation of the caller's" if optimizers[0] is not None else None
        self.optimizer_name = given or " ".join(str(x) for x in (args.optim, args.optim_args, args.optim_target_modules) if x)
        self.frozen, self.peft_config = frozen, peft_config
        if peft_config is not None:
            if adapter_of(params):
                check_adapter(model, params, peft_config)
            else:
                params = add_lora(model, params, peft_config, jax.random.key(args.seed))
            kept, fixed = set(flatten(split(params, frozen)[1])), frozen_by(peft_config)
            self.frozen = lambda name: name in kept or fixed(name)
        options = LossOptions(args.label_smoothing_factor, args.z_loss)
        if loss is not None and options != LossOptions():
            raise ValueError("label_smoothing_factor and z_loss belong to the model's own loss; a loss of your own applies them itself")
        self._loss = loss or model_loss(self.model, options, args.loss_chunk)
        self._count, self.count = count, count or (lambda batch: count_items(self.model, batch))
        self._params: Any = params
        self._dtypes = {name: leaf.dtype for name, leaf in flatten(params).items()}
        self._run: Run | None = None
        self._eval_steps: dict[bool, Any] = {}
        self.state, self.control = TrainerState(is_world_process_zero=jax.process_index() == 0), TrainerControl()
        reports = [REPORTERS[name] for name in args.report_to or ()]
        shown = [] if args.disable_tqdm else [ProgressCallback]
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, *reports, *(callbacks or ()), *shown], model=self.model, processing_class=processing_class, trainer=self
        )
        self.call_event("on_init_end")

    @property
    def params(self) -> Any:
        """The parameters as trained so far: what was trained in float32."""
        return self._params if self._run is None else self._run.params()

    def is_world_process_zero(self) -> bool:
        return jax.process_index() == 0

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self.callback_handler.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.pop(callback)

    def call_event(self, event: str, **kwargs: Any) -> None:
        self.control = self.callback_handler.call(event, self.args, self.state, self.control, **kwargs)

    # ---- What a subclass may change ------------------------------------------------------------------------------------

    def compute_loss(
        self, apply: Callable[..., Any], params: Any, inputs: Batch, num_items_in_batch: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """A pure function, traced once: the sum over the inputs' items divided by num_items_in_batch [], and further such sums to be
        logged. `apply(params, **inputs)` calls the model. num_items_in_batch: by `count`, the labels of all parts of the step."""
        return self._loss(apply, params, inputs, num_items_in_batch)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> tuple[optax.GradientTransformation, Schedule | float | None]:
        """The optimizer, and the learning rate by step for the log."""
        args = self.args
        if self.optimizers[0] is not None:
            return self.optimizers
        warmup = args.get_warmup_steps(num_training_steps)
        fixed = args.optim.startswith("schedule_free") and args.lr_scheduler_type == "constant"
        options = args.lr_scheduler_kwargs or {}
        steps = {"num_warmup_steps": warmup, "num_training_steps": num_training_steps}
        rate = args.learning_rate if fixed else make_schedule(args.lr_scheduler_type, args.learning_rate, **steps, **options)
        names = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")
        optimizer = make_optimizer(args.optim, rate, self.model, warmup_steps=warmup, **{name: getattr(args, name) for name in names})
        return optimizer, rate

    def make_step(self, model: Any, optimizer: optax.GradientTransformation, parts: int) -> Callable[..., Any]:
        """The jitted step that takes a batch in so many parts."""
        return make_train_step(
            model,
            optimizer,
            self.compute_loss,
            accumulation_steps=parts,
            max_grad_norm=self.args.max_grad_norm or None,
            neftune_noise_alpha=self.args.neftune_noise_alpha,
            frozen=self.frozen,
            count=self.count,
        )

    # ---- Data ----------------------------------------------------------------------------------------------------------

    def train_source(self) -> Dataset | Stream:
        args = self.args
        if self.train_dataset is None:
            raise ValueError("train needs a train_dataset")
        part = args.per_device_train_batch_size * batch_devices(self.model)
        order = {"strategy": args.train_sampling_strategy, "seed": args.seed if args.data_seed is None else args.data_seed}
        order |= {"length_column": args.length_column_name, "part": part, "drop_last": args.dataloader_drop_last}
        return self._source(self.train_dataset, part * args.gradient_accumulation_steps, **order)

    def eval_source(self, dataset: Any) -> Dataset | Stream:
        return self._source(dataset, self.args.per_device_eval_batch_size * batch_devices(self.model))

    def _source(self, dataset: Any, rows: int, **order: Any) -> Dataset | Stream:
        labels = self.label_names if self._count is None else []  # what a count of your own counts is not known to be labels
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            if order.get("strategy") == "group_by_length":
                raise ValueError("group_by_length needs a dataset with a length; an iterable makes its own batches")
            return Stream(dataset, labels=labels, rules=self.model.rules)
        options = {"collator": self.data_collator, "labels": labels, "rules": self.model.rules, "columns": self.columns}
        together = spans(self.model.rules)
        with telling("a dataset", together):
            source = Dataset(dataset, rows, **options, **order)
            if together:
                agree("a dataset", examples=len(dataset), rows=rows)
        return source

    # ---- Training ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run to max_steps or num_train_epochs, from the start or from a checkpoint: a path, or True for the newest in output_dir.

        Resumed, it does bit for bit what the uninterrupted run would have done. SIGTERM saves a checkpoint after the current step and ends
        the process with exit code 143. Raises NonFiniteError with the step, the batch's examples and the last good checkpoint when a loss
        or gradient is not finite; CheckpointError for a checkpoint that does not fit, or that cannot be written."""
        with lockstep("train", spans(self.model.rules)):
            self._run = run = Run(self, resume_from_checkpoint)
        self._params = None
        trim_host_memory()
        try:
            output = run()
        except BaseException:
            self._params, self._run = run.state.params, None
            with contextlib.suppress(CheckpointError):  # what is being written is worth waiting for
                run.checkpoints.wait()
            raise
        self._params, self._run = run.params(), None
        self.call_event("on_train_end")
        return output

    def log(self, logs: dict[str, Any]) -> None:
        """Note a record in state.log_history, as of this step and epoch, and tell the callbacks."""
        logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control.should_log = False
        self.call_event("on_log", logs=logs)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the parameters, in the dtypes that they were given in, as a Hugging Face directory, output_dir by default, with the
        processing class's files; of a peft_config, the adapter's files."""
        path = self.args.output_dir if output_dir is None else output_dir
        if self.peft_config is None:
            self.write(path, self.params)
        else:
            save_adapter(path, self.model, self._as_given(self.params), self.peft_config)
            self._write_processing_class(path)

    def _as_given(self, params: Any) -> Any:
        return unflatten({name: leaf.astype(self._dtypes.get(name, leaf.dtype)) for name, leaf in flatten(params).items()})

    def write(self, path: str | Path, params: Any) -> None:
        """A Hugging Face directory of `params`, in the dtypes that the trainer's were given in, with the processing class's files."""
        save_pretrained(path, self.model, self._as_given(params))
        self._write_processing_class(path)

    def _write_processing_class(self, path: str | Path) -> None:
        if self.is_world_process_zero() and hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(path)

    # ---- Evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and metrics over a dataset, by default eval_dataset; of {name: dataset}, those of each with its name in front. The loss is
        the mean over labels. Logged; the callbacks hear of it."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate needs an eval_dataset")
        if isinstance(dataset, Mapping):
            found: dict[str, float] = {}
            for name, part in dataset.items():
                found |= self.evaluate(part, f"{metric_key_prefix}_{name}")
            return found
        output = self.evaluation_loop(dataset, self.compute_metrics is None or self.args.prediction_loss_only, metric_key_prefix)
        self.log(dict(output.metrics))
        metrics = {**output.metrics, "epoch": self.state.epoch}
        self.control.should_evaluate = False
        self.call_event("on_evaluate", metrics=metrics)
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """The model's outputs for every example (without the loss), its labels, and the metrics where there are labels."""
        output = self.evaluation_loop(test_dataset, self.args.prediction_loss_only, metric_key_prefix)
        self.call_event("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def evaluation_loop(self, dataset: Any, prediction_loss_only: bool, metric_key_prefix: str = "eval") -> EvalLoopOutput:
        return evaluation_loop(self, self.eval_source(dataset), prediction_loss_only, metric_key_prefix)

    def prediction_step(self, params: Any, inputs: dict[str, jax.Array], prediction_loss_only: bool) -> tuple[Metrics, Any]:
        """(loss, tokens and what else is measured, the outputs) of a batch on the devices; nothing is measured without labels, and there
        are no outputs where the loss alone is wanted."""
        if prediction_loss_only not in self._eval_steps:
            loss = (self.eval_model, self.compute_loss, self.count)
            self._eval_steps[prediction_loss_only] = (
                make_loss_step(*loss)
                if prediction_loss_only
                else make_predict_step(*loss, self.label_names, inputs_of(self.model), self.preprocess_logits_for_metrics)
            )
        return self._eval_steps[prediction_loss_only](params, inputs)


class Seq2SeqTrainer(Trainer):
    """HF's: with predict_with_generate, predictions are generated ids [rows, T], filled up with the padding id.

    gen_kwargs of evaluate and predict: options of `generate`, over those of the arguments and of the model."""

    args: Seq2SeqTrainingArguments
    _gen_kwargs: Mapping[str, Any] = {}

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **gen_kwargs: Any) -> dict[str, float]:
        self._gen_kwargs = gen_kwargs
        return super().evaluate(eval_dataset, metric_key_prefix)

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test", **gen_kwargs: Any) -> PredictionOutput:
        self._gen_kwargs = gen_kwargs
        return super().predict(test_dataset, metric_key_prefix)

    def prediction_step(self, params: Any, inputs: dict[str, jax.Array], prediction_loss_only: bool) -> tuple[Metrics, Any]:
        if prediction_loss_only or not self.args.predict_with_generate:
            return super().prediction_step(params, inputs, prediction_loss_only)
        from jaxmodels.generation import generate

        measured, _ = super().prediction_step(params, inputs, True)
        options = dict(self._gen_kwargs)
        if not {"max_length", "max_new_tokens"} & options.keys() and self.args.generation_max_length is not None:
            options["max_length"] = self.args.generation_max_length
        if self.args.generation_num_beams is not None:
            options.setdefault("num_beams", self.args.generation_num_beams)
        if self.args.generation_config is not None:
            options["generation_config"] = self.args.generation_config
        out = generate(self.eval_model, params, inputs["input_ids"], attention_mask=inputs.get("attention_mask"), **options)
        return measured, out.sequences
