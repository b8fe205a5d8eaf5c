"""TrainingArguments against HF's: the same names and defaults, or a reason; JSON there and back."""

import dataclasses
import json
import warnings

import pytest
import transformers

from jaxmodels.training import Seq2SeqTrainingArguments, TrainingArguments
from jaxmodels.training.arguments import REFUSED

OTHER = {"output_dir", "report_to", "disable_tqdm", "activation_checkpointing", "optim"}  # None or told by the machine in HF


def fields(cls):
    made = lambda f: f.default if f.default is not dataclasses.MISSING else f.default_factory()
    return {f.name: made(f) for f in dataclasses.fields(cls) if f.init}


@pytest.mark.parametrize("name", ["TrainingArguments", "Seq2SeqTrainingArguments"])
def test_every_argument_of_hf_is_known(name):
    ours, theirs = fields({c.__name__: c for c in (TrainingArguments, Seq2SeqTrainingArguments)}[name]), fields(getattr(transformers, name))
    assert not theirs.keys() - ours.keys() - REFUSED.keys()
    assert not ours.keys() & REFUSED.keys()
    for key, value in theirs.items():
        if key in ours and key not in OTHER:
            assert ours[key] == getattr(value, "value", value), key
        elif key in REFUSED:
            assert value in REFUSED[key][0], f"HF's default of {key} must pass"


def test_what_hf_wrote_is_read(tmp_path):
    """A whole to_dict of HF's, whose defaults mean nothing here, and what was chosen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = {"learning_rate": 1e-4, "eval_strategy": "epoch", "save_strategy": "epoch", "warmup_steps": 0.1}
        chosen |= {"load_best_model_at_end": True, "gradient_checkpointing": True}
        theirs = transformers.Seq2SeqTrainingArguments(str(tmp_path), report_to="none", **chosen)
    values = theirs.to_dict()
    values["accelerator_config"] = None  # filled in by accelerate
    read = Seq2SeqTrainingArguments.from_dict(values)
    assert all(getattr(read, name) == value for name, value in chosen.items())
    assert (read.metric_for_best_model, read.greater_is_better, read.report_to, read.remat) == ("loss", False, [], "full")
    path = tmp_path / "arguments.json"
    path.write_text(read.to_json_string())
    assert Seq2SeqTrainingArguments.from_json_file(path) == read
    assert json.loads(read.to_json_string())["generation_config"] is None


def test_shares_and_numbers_written_as_text():
    args = TrainingArguments(learning_rate="1e-4", max_steps="100", logging_steps=0.05, warmup_steps=0.25, eval_strategy="steps")
    assert (args.learning_rate, args.max_steps, args.eval_steps, args.get_warmup_steps(10)) == (1e-4, 100, 0.05, 3)
    assert TrainingArguments(group_by_length=True).train_sampling_strategy == "group_by_length"
    assert TrainingArguments(lr_scheduler_kwargs='{"num_cycles": 2}').lr_scheduler_kwargs == {"num_cycles": 2}
    assert TrainingArguments(max_grad_norm=None).max_grad_norm is None  # no clipping
    assert TrainingArguments(report_to="all").report_to == ["jsonl", "tensorboard"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fsdp": "full_shard"}, "does not take fsdp='full_shard': where arrays live is the model's `rules`"),
        ({"dataloader_num_workers": 4, "torch_compile": True}, r"dataloader_num_workers=4: .* grain .*; torch_compile=True: every step is"),
        ({"learningrate": 1}, "has no argument learningrate; it has .* learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected float"),
        ({"max_steps": 1.5}, "max_steps is 1.5; expected int"),
        ({"save_strategy": "never"}, "save_strategy is 'never'; expected one of no, steps, epoch, best"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"eval_strategy": "steps", "load_best_model_at_end": True, "eval_steps": 200}, "save_steps 500.* multiple of eval_steps 200"),
        ({"load_best_model_at_end": True}, "eval_strategy 'no' and save_strategy 'steps' to be the same"),
        ({"save_strategy": "best"}, "'best' needs metric_for_best_model"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "use_reentrant, which are torch's"),
        ({"report_to": ["wandb"]}, "report_to has wandb; known are jsonl, tensorboard"),
        ({"save_total_limit": 0}, "save_total_limit is 0"),
        ({"logging_steps": 0}, "logging_steps is 0"),
        ({"learning_rate": -1}, "learning_rate is -1.0; expected at least 0 and below inf"),
        ({"learning_rate": ".nan"}, "expected float"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; expected"),
        ({"adam_beta2": 1}, "adam_beta2 is 1.0; expected at least 0 and below 1"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1.0; expected at least 0"),
        ({"data_seed": -1}, "data_seed is -1; expected at least 0"),
        ({"loss_chunk": 0}, "loss_chunk is 0; expected 'auto', None or a number"),
        ({"loss_chunk": "128k"}, "loss_chunk is '128k'; expected"),
        ({"lr_scheduler_kwargs": "{num_cycles"}, "lr_scheduler_kwargs is '{num_cycles'; expected fields, or a JSON object"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**values)
