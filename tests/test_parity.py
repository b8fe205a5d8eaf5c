"""`parity`, `record` and `check` on a real directory, and what they say when numbers, files or packages are wrong."""

import sys

import jax
import numpy as np
import pytest
import transformers
from cases import Case
from safetensors.numpy import load_file, save_file

from jaxmodels import auto
from jaxmodels.convert import CheckpointError, parity
from jaxmodels.params import flatten, unflatten


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=151,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=60,
    )
    case = Case.make(config, tmp_path_factory.mktemp("parity"))
    # what generation_config.json asks for is not greedy decoding: parity takes no notice
    case.hf.generation_config = transformers.GenerationConfig(do_sample=True, repetition_penalty=1.7, min_length=30, eos_token_id=3)
    case.hf.save_pretrained(case.path)
    return case


@pytest.fixture(scope="module")
def file(case, tmp_path_factory):
    file = tmp_path_factory.mktemp("record") / "answers.safetensors"
    parity.record(case.path, file)
    return file


@pytest.fixture
def no_torch(monkeypatch):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)


def test_parity(case):
    report = parity.parity(case.path)
    assert report.passed, str(report)
    assert [row.name for row in report.layers] == ["embeddings", "layer 0", "layer 1", "layer 2 + norm"]
    assert report.greedy == (16, 16, 16, 16) and len(report.gradients) == 3 * 9 + 3
    assert all(row.torch_error > 0 for row in report.layers[1:]), "torch's own error stands beside ours"
    text = str(report)
    assert text.endswith("PASSED") and "first layer that diverges: none" in text and "16/16" in text and "OVER" not in text


def test_check_needs_no_torch(case, file, no_torch):
    report = parity.check(case.path, file)
    assert report.passed, str(report)
    assert len(report.gradients) == 3 * 9 + 3 and report.greedy == (16, 16, 16, 16)


def test_the_layer_that_diverges_is_named(case, file, no_torch, tmp_path):
    """One weight of layer 1 in 2304 is 1 % off."""
    model, params = auto.from_pretrained(case.path)
    flat = flatten(params)
    key = "model.layers.1.mlp.down_proj.weight"
    auto.save_pretrained(tmp_path, model, unflatten(flat | {key: flat[key].at[5].multiply(1.01)}))
    report = parity.check(tmp_path, file)
    assert report.first_divergent == "layer 1" and not report.passed
    assert not all(row.passed for row in report.gradients)
    text = str(report)
    assert text.endswith("FAILED") and "first layer that diverges: layer 1\n" in text
    lines = {line.split("   ")[0].strip(): line for line in text.splitlines()}
    assert lines["layer 1"].endswith("OVER") and not lines["layer 0"].endswith("OVER")


def test_without_torch_parity_says_what_to_do(case, no_torch):
    with pytest.raises(ImportError, match=r"torch is not installed: pip install 'jaxmodels\[test\]', or run `parity record`"):
        parity.parity(case.path)


def test_files_that_are_none(case, file, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        parity.check(case.path, tmp_path / "absent.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"torn\.safetensors cannot be read as a safetensors file"):
        parity.check(case.path, tmp_path / "torn.safetensors")
    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has format None, expected 'jaxmodels-parity-1'"):
        parity.check(case.path, tmp_path / "other.safetensors")


def test_the_record_holds_no_more_than_a_sample_of_a_gradient(file):
    stored = load_file(file)
    assert all(stored[key].size <= parity.SAMPLE for key in stored if key.startswith("gradient."))
    assert stored["input_ids"].shape == (4, 44)  # the model's 60 positions less 16 new tokens
    wide = np.arange(3 * parity.SAMPLE + 5.0)
    assert parity._sample(wide).size <= parity.SAMPLE and parity._sample(wide)[-1] > 3 * parity.SAMPLE - 4


def test_another_model_is_an_error(case):
    """A record of other layers is no table of nonsense."""
    config = case.loaded[0].config.replace(num_hidden_layers=2)
    model, params = auto.AutoModelForCausalLM.from_config(config, key=jax.random.key(0), scan_layers=True)
    inputs = parity.Inputs(case.inputs.input_ids[:, :9], case.inputs.attention_mask[:, -9:])
    ours = parity.our_answers(model, params, inputs, greedy=False, gradients=False)
    with pytest.raises(ValueError, match="ours has 3 hidden states, torch 4"):
        parity.compare(ours, case.torch)
