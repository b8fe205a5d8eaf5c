"""examples/train_tiny.py as a user runs it: killed in mid-run and started again, it reports what the uninterrupted run reports."""

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_tiny.py"
TINY = "--vocab 300 --hidden 128 --mlp 64 --layers 2 --length 32 --batch 4 --steps 30 --log-every 1 --eval-every 10 --save-every 8"


def start(out):
    source = Path(sysconfig.get_path("stdlib")) / "json"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--source", str(source), *TINY.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent)


def finish(process):
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    return output


def read_log(out):
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(out))
    return out


def test_resumes_after_a_kill_as_if_nothing_had_happened(uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    log, deadline = out / "log.jsonl", time.monotonic() + 400
    while not (log.exists() and '"step": 12,' in log.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGKILL, output
    reached = read_log(out)[-1]["step"]
    assert 12 <= reached < 30
    assert "resumed at step " in finish(start(out))
    whole = read_log(uninterrupted)
    assert [line["step"] for line in whole] == list(range(1, 31))
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    assert read_log(out) == whole
    assert (out / "hf" / "model.safetensors").read_bytes() == (uninterrupted / "hf" / "model.safetensors").read_bytes()


def test_writes_a_directory_that_torch_reads(uninterrupted):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(uninterrupted / "hf")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(uninterrupted / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = tokenizer("def f(x):\n    return x\n", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer.decode(ids[0, 1:]) == "def f(x):\n    return x\n"
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_pieces_are_whole_definitions(example):
    text = '"""Doc."""\nimport os\n\n# about f\n@cached\ndef f(x):\n    return x\n\nY = 1\nclass A:\n    pass\n# the end\n'
    assert example.pieces(text) == [
        '"""Doc."""\nimport os\n',
        "# about f\n@cached\ndef f(x):\n    return x\n",
        "Y = 1\n",
        "class A:\n    pass\n",
        "# the end\n",
    ]
    module = Path(textwrap.__file__).read_text()
    assert sum(len(ast.parse(piece).body) for piece in example.pieces(module)) == len(ast.parse(module).body)


def test_docstrings_leave_and_code_stays(example):
    text = (
        'class A:\n    """Doc.\n\n    More."""\n\n    x = 1\n\n    def f(self):\n        "only this"\n\n    def g(self): "doc"; return 1\n'
    )
    assert example.without_docstrings(text) == text.replace('    """Doc.\n\n    More."""\n\n', "")
    module = Path(textwrap.__file__).read_text()
    code, kept = ast.parse(module), ast.parse(example.without_docstrings(module))
    for node in ast.walk(code):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None
        if documented and len(node.body) > 1:
            del node.body[0]
    assert ast.dump(code) == ast.dump(kept)


def test_order_is_the_seed_and_the_epoch_alone(example):
    texts = ["a = 1\ndef f():\n    return a\n" * 5, "class B:\n    x = 'y'\n" * 7, "import os\n" * 30]
    tokenizer = example.train_tokenizer(texts, 280)
    corpus, again = (example.Corpus(tokenizer, texts, seed=3) for _ in range(2))
    stream = corpus.batches(2, 8, skip=0)
    batches = [next(stream) for _ in range(60)]
    skipped = again.batches(2, 8, skip=41)
    assert all(np.array_equal(next(skipped), batch) for batch in batches[41:])
    assert not np.array_equal(corpus.epoch(0, 8), corpus.epoch(1, 8))
    assert not np.array_equal(batches[0], next(example.Corpus(tokenizer, texts, seed=4).batches(2, 8, skip=0)))
