"""A training run of its own process, for tests that end it: python trainer_job.py OUT STEPS. Resumes whatever OUT holds.

Everything that a resumed run could get wrong is in it: noise from keys, a shuffled order in groups of length, parts, a schedule, logs and
evaluations out of step with checkpoints, a counting callback."""

import sys
from pathlib import Path

import jax
import numpy as np

from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import init_params
from jaxmodels.training import EarlyStoppingCallback, Trainer, TrainingArguments, get_last_checkpoint

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def examples(number=61):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(number):
        ids, mask = rng.integers(1, 97, 16), (np.arange(16) < rng.integers(4, 17)).astype(np.int32)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100), "length": mask.sum()})
    return made


def trainer(out, steps, rules=None, **options):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2), scan_layers=True, rules=rules)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": steps, "learning_rate": 1e-2}
    settings |= {"neftune_noise_alpha": 5.0, "group_by_length": True, "warmup_steps": 0.1, "logging_steps": 3, "disable_tqdm": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 2, "save_total_limit": 2, "metric_for_best_model": "loss"}
    data = examples()
    return Trainer(
        model,
        init_params(model, jax.random.key(0)),
        TrainingArguments(str(out), **settings | options),
        train_dataset=data,
        eval_dataset=data[:9],
        callbacks=[EarlyStoppingCallback(1000)],
    )


if __name__ == "__main__":
    out = Path(sys.argv[1])
    job = trainer(out, int(sys.argv[2]))
    job.train(resume_from_checkpoint=get_last_checkpoint(out))
    job.save_model(out / "hf")
