"""The code of docs/training.md runs as printed."""

import re
from pathlib import Path

import jax
import numpy as np
import transformers

import jaxmodels as jm
from jaxmodels.cli.settings import read_settings
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.yaml")))
CODE = re.search(r"## The Trainer.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]
SHAPE = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_every_command_is_understood():
    """What the pages and the examples themselves write behind `jaxmodels train`."""
    commands = {tuple(line.split()) for page in PAGES for line in re.findall(r"jaxmodels train (examples/[^`\n]+)", page.read_text())}
    found = {words: read_settings(ROOT / words[0], words[1:]) for words in commands}
    assert {len(words) for words in found} >= {1, 3, 4}
    changed = next(settings for words, settings in found.items() if "training.max_steps=50" in words)
    assert changed.training.max_steps == 50 and changed.training.learning_rate == 1e-3


def test_finetune(tmp_path, capsys):
    """Counting upwards is learnt, and torch loads the result."""
    scope: dict = {}
    exec(CODE, scope)  # the page's own code
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    jm.save_pretrained(tmp_path / "start", model, jm.init_params(model, jax.random.key(0)))
    ids = np.arange(90)[:, None] % 32 + np.arange(10)
    rows = [{"input_ids": row % 32, "labels": row % 32} for row in ids]
    trainer = scope["finetune"](tmp_path / "start", rows[:80], rows[80:], str(tmp_path / "out"))
    accuracies = [record["eval_accuracy"] for record in trainer.state.log_history if "eval_accuracy" in record]
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(accuracies) == 3 and accuracies[-1] == 1 and losses[-1] < losses[0] - 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"step 3/30  epoch 0.30  loss \d\.\d{4}  lr \S+  grad \S+  [\d,]+ tokens/s  \S+ TFLOP/s  host \S+ GB  0:00:\d\d left", lines[2]
    )
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").config.vocab_size == 32
