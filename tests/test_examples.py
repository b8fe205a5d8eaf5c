"""The examples as their pages say, in shorter runs: the loss falls, a run that was stopped goes on, torch loads what comes out."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]


def python(directory, *arguments):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAXMODELS_COMPILATION_CACHE": "off"}
    out = subprocess.run([sys.executable, *map(str, arguments)], cwd=directory, env=env, capture_output=True, text=True, timeout=400)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    return out.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkout's examples and shipped checkpoint, and the data that the first of them makes."""
    path = tmp_path_factory.mktemp("examples")
    for name in ("examples", "jaxmodels"):
        (path / name).symlink_to(ROOT / name)
    python(path, "examples/prepare_data.py", "data")
    return path


def logged(path, name):
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def loads_in_torch(path, kind):
    model, report = kind.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def test_pretraining(directory):
    """Over eight virtual devices, begun with 40 steps and gone on with to 60."""
    command = [
        "-m",
        "jaxmodels.cli.main",
        "train",
        "examples/pretrain.yaml",
        "training.save_steps=20",
        "lr_scheduler_kwargs.num_decay_steps=10",
    ]
    assert "step 40/40" in python(directory, *command, "max_steps=40")
    assert "step 45/60" in (out := python(directory, *command, "max_steps=60")) and "step 40/60" not in out
    losses = logged(directory / "runs" / "pretrain", "loss")
    assert len(losses) == 12 and losses[-1] < losses[0] - 1
    model, tokenizer = loads_in_torch(directory / "runs" / "pretrain" / "hf", transformers.AutoModelForCausalLM)
    ids = tokenizer("import os\nimport sys\n\n\nclass Error(Exception):\n    def __init__(self", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < losses[0] - 1


def test_classification(directory):
    out = python(directory, "examples/classify.py", "--data", "data", "--out", "runs/classify", "--pretraining-steps", 60, "--steps", 100)
    losses = logged(directory / "runs" / "classify" / "fine-tuning", "loss")
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    assert logged(directory / "runs" / "classify" / "fine-tuning", "eval_accuracy")[-1] > 0.4
    masked = logged(directory / "runs" / "classify" / "pretraining", "loss")
    assert masked[-1] < masked[0] - 0.5
    model, tokenizer = loads_in_torch(directory / "runs" / "classify" / "hf", transformers.AutoModelForSequenceClassification)
    rows = [json.loads(line) for line in (directory / "data" / "functions_held_out.jsonl").read_text().splitlines()]
    with torch.no_grad():
        batch = tokenizer([row["text"] for row in rows], truncation=True, padding=True, return_tensors="pt")
        accuracy = (model(**batch).logits.argmax(-1).numpy() == [row["label"] for row in rows]).mean()
    assert ast.literal_eval(out.splitlines()[-1])["eval_accuracy"] == pytest.approx(accuracy)


def test_sft_with_lora(directory):
    python(directory, "-m", "jaxmodels.cli.main", "train", "examples/sft_lora.yaml")
    run = directory / "runs" / "sft_lora"
    losses = logged(run, "loss")
    assert losses[-1] < losses[0] / 4 and logged(run, "eval_loss")[-1] < losses[0] / 4
    model, tokenizer = loads_in_torch(run / "hf", transformers.AutoModelForCausalLM)
    question = [{"role": "user", "content": "Which arguments does this take?\ndef write(self, text, flush):"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=16, do_sample=False, repetition_penalty=1.0)[0, ids.shape[1] :])
        base = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "jaxmodels" / "assets" / "tiny-python", dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
        assert (adapted - model(ids).logits).abs().max() < 1e-3
    assert answer.startswith("self and text"), answer
