"""What a `Trainer` is told: HF's TrainingArguments, where they have a meaning in JAX; the others are refused with the reason."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jaxmodels.convert.hub import local_directory

INTERVALS = ("no", "steps", "epoch")
SAMPLING = ("random", "sequential", "group_by_length")
REPORTS = ("jsonl", "tensorboard")

# what must be at least 0 -> and below this
BELOW = {"learning_rate": math.inf, "weight_decay": math.inf, "adam_beta1": 1, "adam_beta2": 1, "adam_epsilon": math.inf}
BELOW |= {"max_grad_norm": math.inf, "label_smoothing_factor": 1, "z_loss": math.inf, "neftune_noise_alpha": math.inf}
BELOW |= {"num_train_epochs": math.inf, "seed": 2**32, "data_seed": 2**32}

_MESH = "where arrays live is the model's `rules`: from_pretrained(path, mesh=make_mesh(fsdp=4, tensor=2))"
_HUB = "save_model writes a directory, which huggingface_hub uploads"
_COMPILED = "every step is compiled here"
_LOADER = "examples are read in this process; data that needs workers comes as a grain pipeline, given as train_dataset"
_TRACKIO = "reports go to jsonl and tensorboard; a callback's on_log reaches any other tracker"
# name -> (the values that mean "off" or change nothing here, why any other is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "average_tokens_across_devices": ((True,), "every label of a batch weighs the same, on whatever device it is"),
    "tf32": ((None,), "the precision of products is jax_default_matmul_precision"),
    "torch_compile": ((False,), _COMPILED),
    "torch_compile_backend": ((None,), _COMPILED),
    "torch_compile_mode": ((None,), _COMPILED),
    "use_liger_kernel": ((False,), "the loss never holds all logits here, and XLA fuses the rest"),
    "liger_kernel_config": ((None,), "there are no Liger kernels here"),
    "use_cache": ((False,), "a training step has no cache of keys and values"),
    "torch_empty_cache_steps": ((None,), "XLA plans memory before the run; there is no cache to empty"),
    "auto_find_batch_size": ((False,), "jaxmodels.sharding.plan tells what fits before anything runs"),
    "log_on_each_node": ((True,), "the first process alone writes"),
    "logging_nan_inf_filter": ((True,), "a loss that is not finite stops the run; none is left out of the log"),
    "log_level": (("passive",), "set levels with the logging module"),
    "log_level_replica": (("warning",), "the first process alone writes"),
    "logging_dir": ((None,), "TensorBoard's files are in output_dir/runs"),
    "project": (("huggingface",), _TRACKIO),
    "trackio_space_id": ((None, "trackio"), _TRACKIO),
    "trackio_bucket_id": ((None,), _TRACKIO),
    "trackio_static_space_id": ((None,), _TRACKIO),
    "eval_use_gather_object": ((False,), "predictions are arrays"),
    "eval_accumulation_steps": ((None,), "predictions leave the device after every batch"),
    "save_only_model": ((False,), "a checkpoint is what a run resumes from; save_model writes the model alone"),
    "save_on_each_node": ((False,), "all processes write one checkpoint together"),
    "enable_jit_checkpoint": ((False, True), ""),  # always so: SIGTERM saves and exits
    "push_to_hub": ((False,), _HUB),
    "hub_token": ((None, "<HUB_TOKEN>"), _HUB),
    "hub_private_repo": ((None,), _HUB),
    "hub_model_id": ((None,), _HUB),
    "hub_strategy": (("every_save",), _HUB),
    "hub_always_push": ((False,), _HUB),
    "hub_revision": ((None,), _HUB),
    "ignore_data_skip": ((False,), "resuming skips no data: the position is part of the checkpoint"),
    "restore_callback_states_from_checkpoint": ((False, True), ""),  # always so
    "full_determinism": ((False, True), ""),  # on CPU and TPU always so
    "use_cpu": ((False,), "JAX_PLATFORMS=cpu chooses the CPU"),
    "no_cuda": ((False,), "JAX_PLATFORMS=cpu chooses the CPU"),
    "accelerator_config": ((None,), _MESH),
    "parallelism_config": ((None,), _MESH),
    "dataloader_num_workers": ((0,), _LOADER),
    "dataloader_pin_memory": ((True,), _LOADER),
    "dataloader_persistent_workers": ((False,), _LOADER),
    "dataloader_prefetch_factor": ((None,), _LOADER),
    "dataloader_multiprocessing_context": ((None,), _LOADER),
    "dataloader_in_order": ((True,), _LOADER),
    "ddp_find_unused_parameters": ((None,), _MESH),
    "ddp_bucket_cap_mb": ((None,), _MESH),
    "ddp_broadcast_buffers": ((None,), _MESH),
    "ddp_static_graph": ((None,), _MESH),
    "ddp_backend": ((None,), "processes are joined by jax.distributed.initialize"),
    "ddp_timeout": ((1800,), "processes are joined by jax.distributed.initialize"),
    "fsdp": ((None, "", [], False), _MESH),
    "fsdp_config": ((None,), _MESH),
    "deepspeed": ((None,), _MESH),
    "debug": (("", []), "jax_debug_nans and jax.profiler are JAX's own"),
    "skip_memory_metrics": ((True,), "memory is logged with every line"),
    "local_rank": ((-1, 0), "jax.process_index() tells it"),
    "warmup_ratio": ((None, 0, 0.0), "give it as warmup_steps: a number below 1 is a share of all steps"),
    "evaluation_strategy": ((), "its name is eval_strategy"),
    "overwrite_output_dir": ((False,), "an earlier run's checkpoints are resumed from or removed by hand, never overwritten"),
    "half_precision_backend": (("auto",), "bf16 and fp16 choose the compute dtype"),
    "past_index": ((-1,), "a training step has no cache of keys and values"),
    "torchdynamo": ((None,), _COMPILED),
    "sortish_sampler": ((False,), "train_sampling_strategy='group_by_length' sorts by length"),
}


def known_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without what changes nothing here; ValueError on a name that is refused or unknown."""
    names = {f.name for f in dataclasses.fields(cls)}
    refused = [name for name, value in values.items() if name in REFUSED and value not in REFUSED[name][0]]
    if refused:
        reasons = (f"{name}={values[name]!r}: {REFUSED[name][1]}" for name in refused)
        raise ValueError(f"{cls.__name__} does not take {'; '.join(reasons)}")
    unknown = sorted(set(values) - names - set(REFUSED))
    if unknown:
        raise ValueError(f"{cls.__name__} has no argument {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    return {name: value for name, value in values.items() if name in names}


def _checked(cls: type) -> type:
    """The dataclass, refusing by name what it does not take."""
    plain: Any = cls.__init__  # type: ignore[misc]

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **values: Any) -> None:
        plain(self, *args, **known_values(type(self), values))

    cls.__init__ = init  # type: ignore[misc]
    return cls


def _number(name: str, value: Any, kind: str) -> Any:
    """A number of the annotated kind; "1e-4" counts, as YAML reads it as text."""
    if value is None and "None" in kind:
        return None
    try:
        number = float(value)
        if isinstance(value, bool) or (kind.startswith("int") and number != int(number)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}; expected {kind}") from None
    return int(number) if kind.startswith("int") else number


def _fields(name: str, text: str) -> dict[str, Any]:
    """Of a JSON object, as HF's command line takes them."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {text!r}; expected fields, or a JSON object of them")
    return found


@_checked
@dataclasses.dataclass
class TrainingArguments:
    """HF's names, defaults and meaning, but for: `report_to`, by default output_dir/log.jsonl; `optim`, also `adamw`, `lion`, `muon`.

    per_device_train_batch_size: rows of one part of a step on one device of the mesh's batch axes; a step takes that times those devices
    times gradient_accumulation_steps. warmup_steps, logging_steps, eval_steps, save_steps: below 1 a share of all steps.
    activation_checkpointing (or gradient_checkpointing): rematerialise by the policy of its kwargs, {"policy": "full"} by default. bf16,
    fp16: the compute dtype; trained parameters are float32. z_loss, loss_chunk: as make_train_step's. ValueError on what is refused (see
    REFUSED), unknown or contradictory."""

    output_dir: str = "trainer_output"
    per_device_train_batch_size: int = 8
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    optim_target_modules: str | list[str] | None = None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    label_smoothing_factor: float = 0.0
    z_loss: float = 0.0
    loss_chunk: int | str | None = "auto"
    bf16: bool = False
    fp16: bool = False
    bf16_full_eval: bool = False
    fp16_full_eval: bool = False
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | None = None
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    neftune_noise_alpha: float | None = None
    logging_strategy: str = "steps"
    logging_steps: float = 500
    logging_first_step: bool = False
    include_num_input_tokens_seen: str | bool = "no"
    disable_tqdm: bool = False
    report_to: str | list[str] | None = "jsonl"
    run_name: str | None = None
    eval_strategy: str = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    per_device_eval_batch_size: int = 8
    prediction_loss_only: bool = False
    eval_on_start: bool = False
    eval_do_concat_batches: bool = True
    include_for_metrics: list[str] = dataclasses.field(default_factory=list)
    batch_eval_metrics: bool = False
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    seed: int = 42
    data_seed: int | None = None
    dataloader_drop_last: bool = False
    remove_unused_columns: bool = True
    label_names: list[str] | None = None
    train_sampling_strategy: str = "random"
    group_by_length: bool = False
    length_column_name: str = "length"
    do_train: bool = False  # these four are for scripts, as in HF
    do_eval: bool = False
    do_predict: bool = False
    resume_from_checkpoint: str | bool | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type in ("int", "float", "int | None", "float | None"):
                setattr(self, field.name, _number(field.name, getattr(self, field.name), str(field.type)))
            elif field.type == "dict[str, Any] | None" and isinstance(getattr(self, field.name), str):
                setattr(self, field.name, _fields(field.name, getattr(self, field.name)))
        self.output_dir = str(local_directory(self.output_dir).expanduser())
        self._choices()
        self._checkpointing()
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        if isinstance(self.include_num_input_tokens_seen, bool):
            self.include_num_input_tokens_seen = "all" if self.include_num_input_tokens_seen else "no"
        reports = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ())
        self.report_to = list(REPORTS) if reports == ["all"] else [name for name in reports if name != "none"]
        self.do_eval = self.do_eval or self.eval_strategy != "no"
        if self.eval_strategy == "steps" and not self.eval_steps:
            self.eval_steps = self.logging_steps
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self._validate()

    def _choices(self) -> None:
        """Enumerations come as their values; every choice is one of those that are known."""
        known = {"logging_strategy": INTERVALS, "eval_strategy": INTERVALS, "save_strategy": (*INTERVALS, "best")}
        known |= {"train_sampling_strategy": SAMPLING}
        for name in (*known, "lr_scheduler_type", "optim"):
            value = getattr(self, name)
            setattr(self, name, getattr(value, "value", value))
            if name in known and getattr(self, name) not in known[name]:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known[name])}")

    def _checkpointing(self) -> None:
        """The older name's values are the newer's where that has none."""
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.gradient_checkpointing = self.activation_checkpointing
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        wrong = sorted(set(self.activation_checkpointing_kwargs or ()) - {"policy"})
        if wrong:
            names = ", ".join(wrong)
            raise ValueError(
                f"activation_checkpointing_kwargs has {names}, which are torch's; it takes policy, the name of a jax.checkpoint policy"
            )

    def _validate(self) -> None:
        for name, below in BELOW.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < below:
                raise ValueError(f"{name} is {value}; expected at least 0 and below {below}")
        if self.loss_chunk not in ("auto", None) and (not isinstance(self.loss_chunk, int) or self.loss_chunk < 1):
            raise ValueError(f"loss_chunk is {self.loss_chunk!r}; expected 'auto', None or a number of tokens")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for kind in ("logging", "eval", "save"):
            steps = getattr(self, f"{kind}_steps")
            if getattr(self, f"{kind}_strategy") == "steps" and (not steps > 0 or (steps > 1 and steps != int(steps))):
                raise ValueError(f"{kind}_steps is {steps}; expected a number of steps, or below 1 a share of all steps")
        if (self.fp16 and self.bf16) or (self.fp16_full_eval and self.bf16_full_eval):
            raise ValueError("fp16 and bf16 exclude each other")
        if self.warmup_steps < 0 or (self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps)):
            raise ValueError(f"warmup_steps is {self.warmup_steps}; expected a number of steps, or below 1 a share of all steps")
        unknown = sorted(set(self.report_to or ()) - set(REPORTS))
        if unknown:
            known = ", ".join(REPORTS)
            raise ValueError(f"report_to has {', '.join(unknown)}; known are {known}. A callback's on_log reaches any other tracker")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(f"save_total_limit is {self.save_total_limit}; expected at least 1, or None to keep every checkpoint")
        if self.load_best_model_at_end and self.save_strategy != "best":
            needs = "load_best_model_at_end needs"
            if self.eval_strategy != self.save_strategy:
                raise ValueError(f"{needs} eval_strategy {self.eval_strategy!r} and save_strategy {self.save_strategy!r} to be the same")
            if self.eval_strategy == "steps" and not _multiple(self.save_steps, self.eval_steps):
                raise ValueError(f"{needs} save_steps {self.save_steps} to be a multiple of eval_steps {self.eval_steps}")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise ValueError("save_strategy 'best' needs metric_for_best_model, such as 'loss'")

    @property
    def remat(self) -> str | None:
        """The policy by which a step recomputes activations."""
        return (self.activation_checkpointing_kwargs or {}).get("policy", "full") if self.activation_checkpointing else None

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As a number of steps."""
        return math.ceil(num_training_steps * self.warmup_steps) if self.warmup_steps < 1 else int(self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From to_dict's, or from HF's where what they say has a meaning here."""
        return cls(**values)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _multiple(steps: float, of: float | None) -> bool:
    """Whether steps are a whole number of times the other, both absolute or both shares."""
    if not of or (steps < 1) != (of < 1):
        return False
    return abs(steps / of - round(steps / of)) < 1e-9


@_checked
@dataclasses.dataclass
class Seq2SeqTrainingArguments(TrainingArguments):
    """predict_with_generate: metrics are computed of generated ids, not of logits. generation_max_length, generation_num_beams: of that
    generation, over the model's generation_config. generation_config: a GenerationConfig in its place."""

    predict_with_generate: bool = False
    generation_max_length: int | None = None
    generation_num_beams: int | None = None
    generation_config: Any = None

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if hasattr(self.generation_config, "to_dict"):
            values["generation_config"] = self.generation_config.to_dict()
        return values
