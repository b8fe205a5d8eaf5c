"""Training: the Trainer with its arguments and callbacks; below it the state, the jitted step and the evaluation step, optimizers and
schedules by HF's names; adapters in `lora`, labels and preference losses in `objectives`."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "arguments": ("Seq2SeqTrainingArguments", "TrainingArguments"),
    "callbacks": (
        "EarlyStoppingCallback",
        "JSONLCallback",
        "ProgressCallback",
        "TensorBoardCallback",
        "TrainerCallback",
        "TrainerControl",
        "TrainerState",
    ),
    "checkpoints": ("get_last_checkpoint",),
    "collators": (
        "DataCollatorForLanguageModeling",
        "DataCollatorForPermutationLanguageModeling",
        "DataCollatorForPreference",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorWithFlattening",
        "DataCollatorWithPadding",
        "default_data_collator",
    ),
    "data": ("batches", "mixture", "packed_batches", "write_packed"),
    "evaluation": ("EvalPrediction", "PredictionOutput"),
    "examples": ("Examples",),
    "optimizers": ("make_optimizer",),
    "run": ("NonFiniteError", "TrainOutput"),
    "schedules": ("make_schedule",),
    "sources": ("read_rows",),
    "step": ("LossScale", "TrainState", "create_train_state", "make_eval_step", "make_train_step"),
    "trainer": ("Seq2SeqTrainer", "Trainer"),
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"jaxmodels.training has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"jaxmodels.training.{_WHERE[name]}"), name)
