"""Hugging Face checkpoints in JAX: load, run, generate, train, save.

    import jax, jaxmodels as jm
    model, params = jm.AutoModelForCausalLM.from_pretrained(path)
    out = model.apply({"params": params}, input_ids, attention_mask=mask)
    res = jm.generate(model, params, input_ids, attention_mask=mask, max_new_tokens=64)
    jm.save_pretrained(other_path, model, params)

Names are imported on first use, so that `import jaxmodels` itself costs nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# In a checkout `generation/`, `sharding/` and `convert/` stand beside this folder: they are found from here too, so that
# `import jaxmodels` from the checkout's root works however the package was installed.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "generation" / "__init__.py").is_file():
    __path__.append(str(_root))

_PUBLIC = {
    "auto": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForNextSentencePrediction",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTextEncoding",
        "AutoModelForTokenClassification",
        "from_pretrained",
        "register",
        "save_pretrained",
    ),
    "cache": ("Cache", "init_cache"),
    "caches": ("OffloadedCache", "QuantizedCache", "SinkCache"),
    "config": ("Config",),
    "convert": ("CheckpointError",),
    "family": ("Family",),
    "generation": (
        "GenerationConfig",
        "Grammar",
        "TextIteratorStreamer",
        "TextStreamer",
        "WatermarkDetector",
        "WatermarkingConfig",
        "compute_transition_scores",
        "generate",
    ),
    "ops.attention": ("register_attention",),
    "ops.precision": ("parity_mode",),
    "params": ("abstract_params", "count_params", "flatten", "init_params", "param_axes", "unflatten"),
    "processing": ("AutoTokenizer",),
    "sharding": ("ProcessError", "Rules", "explain", "global_batch", "make_mesh", "process_rows"),
    "training": (
        "EarlyStoppingCallback",
        "Seq2SeqTrainer",
        "Seq2SeqTrainingArguments",
        "TrainState",
        "Trainer",
        "TrainerCallback",
        "TrainingArguments",
        "create_train_state",
        "get_last_checkpoint",
        "make_eval_step",
        "make_optimizer",
        "make_schedule",
        "make_train_step",
    ),
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"jaxmodels has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"jaxmodels.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
