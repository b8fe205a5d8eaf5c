"""A limit on the size of files stands for a full disk: real failures of real writes. What was saved is whole, nothing half-written is
left, and the error says what could not be written and why."""

import contextlib
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.auto import save_pretrained
from jaxmodels.cli.main import main
from jaxmodels.convert.files import write_checkpoint
from jaxmodels.convert.sharded import consolidate
from jaxmodels.convert.tensors import as_tensor
from jaxmodels.generation import GenerationConfig
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import init_params
from jaxmodels.processing import train_bpe
from jaxmodels.training.lora import LoraConfig, add_lora, save_adapter

LIMIT = 20_000  # bytes a file; more than configs take
SHAPE = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))
LORA = LoraConfig(r=64, target_modules=["q_proj"])


@contextlib.contextmanager
def full(size=LIMIT):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def source(params, tmp_path_factory):
    """hf/ and orbax/, in bfloat16, and parts/."""
    path = tmp_path_factory.mktemp("disk")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_pretrained(path / "hf", MODEL, half)
    assert main(["convert", str(path / "hf"), str(path / "orbax"), "--format", "orbax"]) == 0
    tensors = {f"w{i}": as_tensor(np.full((100, 100), i, np.float32)) for i in range(4)}
    write_checkpoint(path / "parts", tensors, consolidate=False, max_shard_size=30_000, files={"config.json": "{}"})
    train_bpe(["a text that repeats"] * 9, 300).save_pretrained(path / "hf")
    GenerationConfig(max_new_tokens=3).save_pretrained(path / "hf")
    save_adapter(path / "adapter", MODEL, add_lora(MODEL, params, LORA, jax.random.key(1)), LORA)
    return path


def tokenizer():
    return train_bpe([chr(i) * 3 + chr(i + 1) for i in range(0x4E00, 0x4F00)], 1500)


WAYS = {
    "convert": lambda path, params: main(["convert", f"{path}/hf", f"{path}/hf", "--dtype", "float32"]),
    "orbax": lambda path, params: main(["convert", f"{path}/hf", f"{path}/orbax", "--format", "orbax", "--scan", "--dtype", "float32"]),
    "from orbax": lambda path, params: main(["convert", f"{path}/orbax", f"{path}/hf"]),
    "save_pretrained": lambda path, params: save_pretrained(path / "hf", MODEL, params),
    "consolidate": lambda path, params: consolidate(path / "parts"),
    "adapter": lambda path, params: save_adapter(path / "adapter", MODEL, add_lora(MODEL, params, LORA, jax.random.key(2)), LORA),
    "tokenizer": lambda path, params: tokenizer().save_pretrained(path / "hf"),
}
PLACES = {"orbax": "orbax", "consolidate": "parts", "adapter": "adapter", "tokenizer": "hf/tokenizer.json"}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_and_the_reason_named(way, source, params, capsys):
    held = lambda: {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    before = held()
    with full():
        try:
            told = f"status {WAYS[way](source, params)}"
        except (OSError, ValueError) as error:
            told = str(error)
    shown = capsys.readouterr().err
    if "convert" in way or "orbax" in way:
        assert told == "status 1" and shown.startswith("jaxmodels: ") and shown.count("\n") == 1, shown
        told = shown
    assert "File too large" in told and str(source / PLACES.get(way, "hf")) in told, told
    assert held() == before


def test_generation_config(source):
    file = source / "hf" / "generation_config.json"
    before = file.read_bytes()
    with full(9), pytest.raises(OSError, match=rf"File too large: '{file}'"):
        GenerationConfig(max_new_tokens=77).save_pretrained(source / "hf")
    assert file.read_bytes() == before and not list(file.parent.glob("*.part"))
    assert json.loads(before)["max_new_tokens"] == 3
