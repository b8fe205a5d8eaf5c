"""The page docs/adding-a-family.md, as a reader would try it: outside this repository, in files of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")


def blocks(kind):
    return "\n".join(re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S))


def commands():
    """The command lines of the page, by the place that their checkout has here."""
    return [line.strip().replace("path/to/checkout", str(ROOT)) for line in re.findall(r"^    (?=python|PYTHONPATH)(.*)$", PAGE, re.M)]


@pytest.mark.slow
def test_the_page(tmp_path):
    (tmp_path / "arcee.py").write_text(blocks("python"))
    (tmp_path / "use.py").write_text("import jax\nimport jaxmodels\n" + blocks("python-use") + COMPARE)
    (tmp_path / "test_arcee.py").write_text(blocks("python-test"))
    show, test = commands()
    for command in ("python use.py", show, f"{test} -q -k 'full_size or (Tied and logits)'"):
        words = command.replace("python ", f"{sys.executable} ", 1)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}"}
        words = words.replace("PYTHONPATH=", f"PYTHONPATH={ROOT}:")
        done = subprocess.run(words, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.M) and "skipped" not in done.stdout


COMPARE = """
import numpy as np
import torch
import transformers

ids = np.arange(14, dtype=np.int32).reshape(2, 7)
theirs = transformers.AutoModelForCausalLM.from_pretrained("tiny")(torch.tensor(ids).long()).logits.detach().numpy()
np.testing.assert_allclose(model.apply({"params": params}, ids).logits, theirs, atol=1e-5)
out = jaxmodels.generate(model, params, ids, max_new_tokens=5)
assert out.sequences.shape == (2, 12)
"""
