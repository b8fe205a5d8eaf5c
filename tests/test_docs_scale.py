"""The job of docs/scale.md runs as printed."""

import re
from pathlib import Path

import jax
import numpy as np

import jaxmodels as jm
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM

PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
CODE = re.search(r"## Pick a mesh.*?```python\n(.*?)```", PAGE, re.DOTALL)[1]
SHAPE = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_the_job(tmp_path, capsys):
    """Counting upwards is learnt on one mesh and said on another; the second time there is nothing left to train."""
    scope: dict = {}
    exec(CODE, scope)  # the page's own code
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=None))
    jm.save_pretrained(tmp_path / "start", model, jm.init_params(model, jax.random.key(0)))
    rows = (np.arange(80)[:, None] + np.arange(12)) % 32
    prompts, mask = rows[:4, :6], np.ones((4, 6), int)
    mask[1, :3] = 0
    for _ in range(2):
        said = scope["job"](tmp_path / "start", [{"input_ids": r, "labels": r} for r in rows], prompts, mask, str(tmp_path / "out"))
        np.testing.assert_array_equal(said[:, 6:], (prompts[:, -1:] + 1 + np.arange(8)) % 32)
        steps = re.findall(r"^step (\d+)/60", capsys.readouterr().out, re.MULTILINE)
        assert steps == [] or steps[-1] == "60"
