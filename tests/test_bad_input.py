"""A bad checkpoint ends every command with one message that names file, key, found and expected; nothing is written, nothing raised."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmodels as jm
from jaxmodels.assets import TINY_PYTHON
from jaxmodels.cli.main import main

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One file, and in shards/ the same as several."""
    import jax

    path = tmp_path_factory.mktemp("good")
    config = jm.AutoConfig.for_model("llama", vocab_size=4096, max_position_embeddings=64, **SIZES)
    model, params = jm.AutoModelForCausalLM.from_config(config, key=jax.random.key(0))
    for name, size in (("one", "50GB"), ("shards", "100KB")):
        jm.save_pretrained(path / name, model, params, max_shard_size=size)
        for file in TINY_PYTHON.glob("tokenizer*"):
            shutil.copy(file, path / name)
    return path


def config(**changes):
    def change(path):
        values = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return change


def rope(**values):
    return config(rope_theta=..., rope_scaling=..., rope_parameters=values)


def tensors(change):
    def rewrite(path):
        found = load_file(path / WEIGHTS)
        change(found)
        save_file(found, path / WEIGHTS, {"format": "pt"})

    return rewrite


def text(name, content):
    return lambda path: (path / name).write_text(content)


def cut(name, by):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:by])


def only_pickle(path):
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def doubled(path):
    shards = sorted(path.glob("*.safetensors"))
    save_file(load_file(shards[0]) | load_file(shards[1]), shards[1], {"format": "pt"})


def nothing(path):
    shutil.rmtree(path)
    path.mkdir()


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj"
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
# name: (what is done to the checkpoint, what the message says of it)
CASES = {
    "truncated": (cut(WEIGHTS, -100), [WEIGHTS, "truncated", "its header says", "fetch the file again"]),
    "truncated to nothing": (cut(WEIGHTS, 0), [WEIGHTS, "truncated: 0 bytes, expected at least 8"]),
    "bad header": (lambda p: (p / WEIGHTS).write_bytes(b"\x10" + bytes(7) + b"{xyz: not json}  "), [WEIGHTS, "not readable as JSON"]),
    "missing key": (tensors(lambda t: t.pop(NORM)), ["missing, the model expects (1)", f"{NORM} [16]"]),
    "unexpected key": (
        tensors(lambda t: t.update({"lm_head.bias": t[NORM], "model.more": t[NORM]})),
        ["unexpected, the model has no (2)", "lm_head.bias [16]", "model.more [16]"],
    ),
    "wrong shape": (tensors(lambda t: t.update({NORM: t[NORM][:5]})), [WEIGHTS, f"{NORM}: found float32 [5]", "expected float32 [16]"]),
    "wrong dtype": (tensors(lambda t: t.update({NORM: t[NORM].astype(np.int32)})), [f"{NORM}: found int32 [16]"]),
    "unknown model_type": (config(model_type="lama"), ["'lama' in", "config.json", "did you mean 'llama'?", "Known are bert, bloom"]),
    "no model_type": (config(model_type=...), ["model_type None in", "config.json is not known. Known are"]),
    "model_type of no name": (config(model_type=["llama"]), ["model_type ['llama'] in"]),
    "unknown rope": (rope(rope_type="helix"), ["config.json", "rope_type 'helix'", "supported are default, linear"]),
    "yarn without factor": (rope(rope_type="yarn"), ["config.json", "'yarn' needs factor"]),
    "rope of no numbers": (rope(rope_type="linear", factor="two"), ["factor in rope_parameters is 'two'; expected a number"]),
    "rope of no object": (config(rope_parameters="linear"), ["rope_parameters (rope_scaling) is 'linear'; expected an object"]),
    "longrope of another head": (rope(**LONG), ["short_factor in rope_parameters has 3 numbers; expected 4, half of 8"]),
    "pickle alone": (only_pickle, ["pytorch_model.bin", "never loaded", "save_pretrained"]),
    "empty directory": (nothing, ["config.json is missing"]),
    "unreadable config": (text("config.json", "{"), ["config.json is not readable JSON"]),
    "config of no object": (text("config.json", "[]"), ["config.json holds a JSON list, expected an object"]),
    "config of another type": (config(hidden_size="16"), ["config.json: hidden_size", "is '16'; expected int"]),
    "config below zero": (config(num_hidden_layers=-1), ["config.json: num_hidden_layers", "is -1; expected at least 1"]),
    "no positions": (config(max_position_embeddings=0), ["config.json: max_position_embeddings", "is 0; expected at least 1"]),
    "rope that turns back": (rope(rope_theta=-1), ["config.json: rope_theta in", "is -1; expected a number above 0"]),
    "rope of no factor": (rope(rope_type="linear", factor=0), ["config.json: factor in", "is 0; expected a number above 0"]),
    "unknown dtype": (config(torch_dtype="float33"), ["config.json: torch_dtype in", "'float33'; expected float32, bfloat16"]),
    "unknown activation": (config(hidden_act="gellu"), ["hidden_act 'gellu' is not known; known are silu"]),
    "packed": (
        tensors(lambda t: t.update({f"{UP}.qweight": t.pop(f"{UP}.weight")})),
        ["up_proj.qweight: quantised weights", "fp8 and mxfp4", "unquantised checkpoint"],
    ),
    "quantised by no object": (config(quantization_config="fp8"), ["quantization_config is 'fp8', expected an object"]),
}
SHARDED = {
    "missing shard": (lambda p: sorted(p.glob("*-00002-of-*"))[0].unlink(), ["missing shards ['model-00002-of-", "fetch them again"]),
    "doubled key": (doubled, ["doubled key", "in model-00001", "and in model-00002"]),
    "index cut": (cut(INDEX, 20), [INDEX, "not readable as JSON"]),
    "shard cut": (lambda p: cut(sorted(p.glob("*-00002-of-*"))[0].name, -8)(p), ["model-00002-of-", "truncated"]),
}


@pytest.mark.parametrize("name", [*CASES, *SHARDED])
def test_every_command_says_what_is_wrong(good, tmp_path, capsys, name):
    damage, said = {**CASES, **SHARDED}[name]
    bad = tmp_path / "bad"
    shutil.copytree(good / ("shards" if name in SHARDED else "one"), bad)
    damage(bad)
    old = tmp_path / "old"  # a checkpoint that is there stays as it is
    shutil.copytree(good / "one", old)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    commands = [["generate", "x", "--model", bad], ["parity", bad], ["parity", "record", bad, tmp_path / "answers"]]
    commands += [["convert", bad, tmp_path / "new"], ["convert", bad, old], ["convert", bad, tmp_path / "orbax", "--format", "orbax"]]
    for command in commands:
        assert main([str(word) for word in command]) == 1, command
        out, err = capsys.readouterr()
        assert err.startswith("jaxmodels: ") and "Traceback" not in err
        assert all(word in err for word in said), err
        assert not out
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "old"}
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    with pytest.raises(ValueError, match=re.escape(said[0])) as error:
        jm.AutoModelForCausalLM.from_pretrained(bad)[0].apply({"params": {}}, np.zeros((1, 1), np.int32))
    assert all(word in str(error.value) for word in said)


def test_another_head_is_left_out_and_said(good, tmp_path, caplog):
    shutil.copytree(good / "one", tmp_path / "model")
    tensors(lambda t: t.update({"v_head.summary.weight": t[NORM]}))(tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert "model: left out, as another head's: v_head.summary.weight" in caplog.text
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(good / "one" / WEIGHTS).keys()


def test_token_ids_out_of_range(good, tmp_path, capsys):
    model, params = jm.AutoModelForCausalLM.from_pretrained(good / "one")
    for ids in ([[0, 4096]], [[-1, 3]]):
        for call in (lambda ids: jm.generate(model, params, ids), lambda ids: model.apply({"params": params}, ids)):
            with pytest.raises(ValueError, match=r"token ids run from .* the model's vocabulary has 4096 \(0..4095\)"):
                call(np.array(ids, np.int32))
    shutil.copytree(good / "one", tmp_path / "small")
    config(vocab_size=100)(tmp_path / "small")
    tensors(lambda t: t.update({k: t[k][:100] for k in ("model.embed_tokens.weight", "lm_head.weight")}))(tmp_path / "small")
    (tmp_path / "answers").write_text("of another time")
    for more in ([], ["--jsonl", str(tmp_path / "answers")]):
        assert main(["generate", "def fibonacci", "--model", str(tmp_path / "small"), *more]) == 1
        assert "the model's vocabulary has 100 (0..99)" in capsys.readouterr().err
    assert (tmp_path / "answers").read_text() == "of another time"


@pytest.mark.parametrize(
    "template",
    [
        *("{% for m in messages %}", "{{ raise_exception('no system') }}", "{{ messages[5].content.x }}", "{{ 1 + 'a' }}"),
        *("{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}", "{% break %}", "{{ '{:d}'.format('x') }}"),
    ],
)
def test_chat_with_a_template_that_fails(good, tmp_path, capsys, monkeypatch, template):
    shutil.copytree(good / "one", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("builtins.input", lambda _: "hello")
    assert main(["chat", "--model", str(tmp_path / "model")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"jaxmodels: {tmp_path / 'model'}: its chat template fails on this conversation: ") and err.count("\n") == 1
