"""The command as a user runs it, on a small checkpoint of torch's."""

import io
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cases import tensors

from jaxmodels.auto import FAMILIES
from jaxmodels.cli.main import main
from jaxmodels.convert import atomic
from jaxmodels.processing import train_bpe

TEXTS = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n"] * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = train_bpe(TEXTS, 300, special_tokens=["<|end|>"], eos_token="<|end|>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(path)
    return path


def run(capsys, *args):
    status = main([str(arg) for arg in args])
    return status, *capsys.readouterr()


def test_generate_streams_one_prompt(checkpoint, capsys):
    status, out, err = run(capsys, "generate", "def add", "--model", checkpoint, "--max-new-tokens", 7)
    assert status == 0
    assert out.startswith("def add")
    assert err.strip().endswith("tokens/s") and err.startswith("7 tokens in")


def test_generate_a_batch_from_a_file(checkpoint, capsys, tmp_path):
    prompts = ["def add(a", "for i in range(10): print", "x"]
    (tmp_path / "prompts").write_text("\n".join([prompts[0], json.dumps({"prompt": prompts[1]}), prompts[2]]))
    status, _, err = run(
        *(capsys, "generate", "--model", checkpoint, "--file", tmp_path / "prompts", "--jsonl", tmp_path / "out", "--max-new-tokens", 5),
        *("--batch-size", 2),
    )
    assert status == 0 and "15 tokens" in err
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts and all(row["tokens"] == 5 for row in rows)
    alone = run(capsys, "generate", prompts[0], "--model", checkpoint, "--jsonl", "-", "--max-new-tokens", 5)
    assert json.loads(alone[1])["text"] == rows[0]["text"]  # batch mates change nothing


def test_generate_from_standard_input_samples_by_seed(checkpoint, capsys, monkeypatch):
    texts = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("def\n"))
        options = ("--sample", "--seed", seed, "--top-k", 40, "--top-p", 0.95, "--temperature", 1.5, "--max-new-tokens", 12)
        texts.append(run(capsys, "generate", "--model", checkpoint, *options)[1])
    assert texts[0] == texts[1] != texts[2]


def test_chat_keeps_the_conversation(checkpoint, capsys, monkeypatch):
    lines = iter(["def add", "return", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    status, out, err = run(capsys, "chat", "--model", checkpoint, "--system", "code", "--max-new-tokens", 4)
    assert status == 0 and err.count("tokens/s") == 2 and out


@pytest.mark.parametrize("scan", [False, True])
def test_convert_to_orbax_and_back(checkpoint, capsys, tmp_path, scan):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    assert run(capsys, "convert", checkpoint, orbax, "--format", "orbax", *(["--scan"] if scan else []))[0] == 0
    assert f"this is an Orbax checkpoint; `jaxmodels convert {orbax} OUT`" in run(capsys, "info", orbax)[2]
    assert run(capsys, "convert", orbax, back)[0] == 0
    assert tensors(back) == tensors(checkpoint)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (checkpoint / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        old, new = (json.loads((path / name).read_text()) for path in (checkpoint, back))
        assert {key: new.get(key) for key in old} == old


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_what_is_converted_appears_as_a_whole(checkpoint, capsys, tmp_path, monkeypatch, format):
    """With its tokenizer, in the one step that puts the directory there: a kill before it leaves nothing."""
    seen, swap = [], atomic._swap
    monkeypatch.setattr(atomic, "_swap", lambda new, target: seen.append({file.name for file in new.iterdir()}) or swap(new, target))
    (checkpoint / "additional_chat_templates").mkdir(exist_ok=True)
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    assert run(capsys, "convert", checkpoint, tmp_path / "new", "--format", format)[0] == 0
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert seen == [names | {"additional_chat_templates", "params" if format == "orbax" else "model.safetensors"}]
    assert (tmp_path / "new" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ documents }}"
    other = {"orbax": "safetensors", "safetensors": "orbax"}[format]
    status, _, err = run(capsys, "convert", tmp_path / "new", tmp_path / "new", "--format", other)
    assert status == 1 and "which would stay beside the new one: choose another directory" in err


def test_convert_dtype_and_shards(checkpoint, capsys, tmp_path):
    assert run(capsys, "convert", checkpoint, tmp_path / "half", "--dtype", "bfloat16", "--max-shard-size", "20000")[0] == 0
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ours, theirs = load(tmp_path / "half"), load(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_info(checkpoint, capsys):
    _, out, _ = run(capsys, "info", checkpoint, "--mesh", "fsdp=2,tensor=2")
    size = sum(np.prod(shape) for _, shape, _ in tensors(checkpoint).values())
    assert f"{size:,} in 20 tensors" in out and "LlamaForCausalLM" in out and "4 devices" in out


def test_parity(checkpoint, capsys, tmp_path):
    status, out, _ = run(capsys, "parity", checkpoint)
    assert status == 0, out
    assert run(capsys, "parity", "record", checkpoint, tmp_path / "answers")[0] == 0
    assert run(capsys, "parity", "check", checkpoint, tmp_path / "answers")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--model", "nowhere/at-all"], "nowhere/at-all"),
        (["info", "MODEL", "--mesh", "fsdp"], "fsdp=4,tensor=2"),
        (["convert", "MODEL", "out", "--scan"], "--format orbax"),
        (["parity", "a", "b", "c", "d"], "parity record PATH FILE"),
        (["parity", "record", "MODEL", "/no/such/place/answers"], "there is no directory /no/such/place"),
        (["info", "MODEL", "--mesh", "fsdp=0"], "fsdp=4,tensor=2"),
        (["info", "MODEL", "--mesh", "fsdp=-1"], "give every size"),
        (["convert", "MODEL", "out", "--max-shard-size", "tiny"], "max_shard_size 'tiny': expected bytes"),
        (["generate", "x", "--file", "prompts"], "arguments and in --file"),
        (["generate", "--file", "/no/such/file"], "/no/such/file"),
        (["generate", "x", "--jsonl", "/no/such/place/out"], "there is no directory /no/such/place"),
        (["generate", "x", "--model", "MODEL", "--sample", "--temperature", "0"], "temperature is 0.0; expected a number above 0"),
        (["generate", "x", "--model", "MODEL", "--sample", "--top-p", "1.5"], "top_p is 1.5; expected a number from 0 to 1"),
    ],
)
def test_errors_are_one_line(checkpoint, capsys, monkeypatch, args, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = run(capsys, *[checkpoint if arg == "MODEL" else arg for arg in args])
    assert status == 1 and message in err and err.startswith("jaxmodels: ") and not out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 5}', "prompt 2: a JSON line with the keys ['prompt']; expected `prompt`, a string"),
        ('{"text": "x"}', "prompt 2: a JSON line with the keys ['text']"),
        ("\udcff", "prompt 2: bytes that are no UTF-8"),
    ],
)
def test_prompts_that_are_none(checkpoint, capsys, monkeypatch, line, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"fine\n\n{line}\n"))
    status, out, err = run(capsys, "generate", "--model", checkpoint)
    assert status == 1 and err == f"jaxmodels: {err.removeprefix('jaxmodels: ')}" and message in err and not out
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    assert "standard input holds no prompt" in run(capsys, "generate", "--model", checkpoint)[2]


def test_prompts_from_windows(checkpoint, capsys, monkeypatch, tmp_path):
    text = b"\xef\xbb\xbfdef\r\n\r\nfor\r\n"
    (tmp_path / "prompts").write_bytes(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", newline="\n"))  # as CPython opens it
    for more in ([], ["--file", tmp_path / "prompts"]):
        _, out, _ = run(capsys, "generate", "--model", checkpoint, "--max-new-tokens", 1, "--jsonl", "-", *more)
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["def", "for"]
    (tmp_path / "prompts").write_bytes(b"\xff")
    assert "prompts holds bytes that are no UTF-8" in run(capsys, "generate", "--file", tmp_path / "prompts")[2]


def test_a_reader_that_has_enough():
    command = subprocess.Popen([sys.executable, "-m", "jaxmodels.cli.main", "families"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 141
    command.stderr.close()


@pytest.mark.parametrize(
    "args",
    [
        *(["generate", "x", "--dtype", "float33"], ["generate", "x", "--batch-size", "0"], ["generate", "x", "--max-new-tokens", "-5"]),
        *(["generate", "x", "--seed", str(2**64)], ["convert", "a", "b", "--dtype", "int4"], ["nope"], ["convert"]),
        ["plan", "x", "--topology", "v5e:2x2", "--job", "decode", "--batch", "0", "--length", "64"],
    ],
)
def test_usage_errors(capsys, args):
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_convert_in_place(checkpoint, capsys, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    assert run(capsys, "convert", tmp_path / "model", tmp_path / "model", "--dtype", "bfloat16")[0] == 0
    assert {dtype for dtype, _, _ in tensors(tmp_path / "model").values()} == {torch.bfloat16}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"jaxmodels {version('jaxmodels')}, jax {version('jax')}\n"


def test_imports_are_light():
    """import jaxmodels and the parser: no torch, no transformers, nothing heavy."""
    code = "import sys, jaxmodels; from jaxmodels.cli.main import build_parser; build_parser(); print(*sys.modules)"
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=os.environ, check=True)
    assert not {"torch", "transformers", "jax", "numpy"} & set(out.stdout.split())


def test_families_prints_the_readme_s_table(capsys):
    """One row for every family, with numbers that a complete run of its tests recorded, all of them within the limits."""
    _, out, _ = run(capsys, "families")
    assert out in (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    assert [row[0] for row in rows] == sorted(FAMILIES)
    for name, _, logits, own, gradients, half, greedy in rows:
        assert float(logits) < 1e-4 and float(own) < 1e-4 and float(gradients) <= 1e-4 and float(half) <= 1.5, name
        assert greedy == ("encoder" if name == "bert" else "32 of 32"), name
