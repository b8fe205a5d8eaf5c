"""safetensors directories: whole files equal to torch's, one clear error for each way of being broken, saving that survives a kill."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import kill_worker
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxmodels.convert import atomic
from jaxmodels.convert.atomic import replacing
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import DTYPES, read_checkpoint, read_file, write_checkpoint, write_file
from jaxmodels.convert.tensors import Spec, as_tensor


def as_numpy(tensor):
    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=12)).bfloat16()


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name.startswith("model")}


@pytest.mark.parametrize("size", ["50GB", "20KB", 12000, 1])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_whole_files_equal_those_of_save_pretrained(llama, tmp_path, size, variant):
    llama.save_pretrained(tmp_path / "torch", max_shard_size=size, variant=variant)
    tensors = {key: as_tensor(as_numpy(value)) for key, value in llama.state_dict().items()}
    write_checkpoint(tmp_path / "ours", tensors, max_shard_size=size, variant=variant)
    theirs = contents(tmp_path / "torch")
    assert len(theirs) > 100 if size == 1 else len(theirs) == 1 if size == "50GB" else len(theirs) > 5
    assert contents(tmp_path / "ours") == theirs
    read = read_checkpoint(tmp_path / "torch", variant=variant)
    assert set(read) == set(tensors)
    assert all(read[key].read().tobytes() == tensors[key].read().tobytes() for key in tensors)


def test_every_dtype_shape_and_name_as_the_library_writes_it(tmp_path):
    known = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
    for name, dtype in DTYPES.items():
        alias = {"C64": "complex64", "BOOL": "bool", "BF16": "bfloat16", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn"}
        assert alias.get(name, dtype.name) in known, name
    raw = {name: torch.from_numpy(np.arange(6 * dtype.itemsize, dtype=np.uint8) % 2) for name, dtype in DTYPES.items()}
    tensors = {f"{i % 3}.{name}": raw[name].view(known[dtype.name]).reshape(2, 3) for i, (name, dtype) in enumerate(DTYPES.items())}
    tensors |= {
        'odd "name"\té': torch.zeros(3),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
        "long": torch.zeros(1, 1, 1, 1, 7),
    }
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    read = read_file(tmp_path / "theirs")
    assert list(read)[:2] == ["0.U64", "1.I64"]
    write_file(tmp_path / "ours", dict(reversed(read.items())))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for key, tensor in tensors.items():
        assert read[key].shape == tuple(tensor.shape)
        assert read[key].read().tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert read["empty"].read().shape == (0, 4)
    assert read["long"].read((slice(None),) * 4 + (slice(2, 5),)).shape == (1, 1, 1, 1, 3)


# ---- bad input -----------------------------------------------------------------------------------------------------


def arrays(value=0.0, n=4):
    return {f"layers.{i}.w": as_tensor(np.full((8, 8), value + i, np.float32)) for i in range(n)}


@pytest.fixture
def sharded(tmp_path):
    write_checkpoint(tmp_path / "m", arrays(), max_shard_size=256, files={"config.json": "{}"})
    return tmp_path / "m"


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def broken(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
BAD_FILES = {
    "no bytes": (b"", "truncated: 0 bytes"),
    "short": (b"\x10\0\0", "truncated: 3 bytes"),
    "header cut": (broken(ONE)[:30], "truncated: 30 bytes, expected at least"),
    "data cut": (broken(ONE, b"\0" * 7), r"truncated: \d+ bytes, its header says \d+"),
    "too long": (broken(ONE, b"\0" * 9), "bad safetensors header"),
    "not one": (b"PK\x03\x04" + b"\xff" * 40, "not a safetensors file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "bad json": (broken(b'{"w": '), "not readable as JSON"),
    "a list": (broken([1, 2]), "a JSON list, expected an object"),
    "bad entry": (broken({"w": 3}), "bad safetensors header"),
    "bad offsets": (broken({"w": {"dtype": "F32", "shape": [2], "data_offsets": "no"}}, b"\0" * 8), "bad safetensors header"),
    "wrong shape": (broken({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8), "bad safetensors header"),
    "overlap": (broken(ONE | {"v": ONE["w"]}, b"\0" * 8), "bad safetensors header"),
    "doubled": (
        broken(b'{"w":' + json.dumps(ONE["w"]).encode() + b',"w":' + json.dumps(ONE["w"]).encode() + b"}", b"\0" * 8),
        "doubled key 'w'",
    ),
    "dtype": (broken({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"\0" * 2), "w: dtype F4 is not supported"),
    "unknown dtype": (broken({"w": {"dtype": "Q7", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4), "bad safetensors header"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    write_file(tmp_path / "whole", arrays())
    whole = (tmp_path / "whole").read_bytes()
    for stop in range(0, len(whole), 61):
        (tmp_path / "cut").write_bytes(whole[:stop])
        with pytest.raises(CheckpointError, match="truncated"):
            read_file(tmp_path / "cut")


def test_bad_directories(tmp_path, sharded):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="the directory is empty"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model.safetensors .*found \['config.json'\]"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "empty/pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*never loaded.*save_pretrained"):
        read_checkpoint(tmp_path / "empty")
    (tmp_path / "empty/adapter.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter.safetensors'\]: pass the file itself"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"no model.fp16.safetensors or model.safetensors.index.fp16.json"):
        read_checkpoint(sharded, variant="fp16")
    assert list(read_checkpoint(sharded / "model-00002-of-00004.safetensors")) == ["layers.1.w"]


def test_bad_indexes(sharded):
    index, shard = sharded / "model.safetensors.index.json", sharded / "model-00002-of-00004.safetensors"
    good = index.read_bytes()
    edit_index(sharded, lambda table: table.update({"layers.9.w": shard.name}))
    with pytest.raises(CheckpointError, match=r"'layers.9.w' \(not in model-00002-of-00004.safetensors\)"):
        read_checkpoint(sharded)
    edit_index(sharded, lambda table: table.update({"layers.9.w": "../../etc/passwd"}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        read_checkpoint(sharded)
    for content, message in ((b"{", "not readable as JSON"), (b"[]", "expected an object"), (b'{"weight_map": 3}', "`weight_map`")):
        index.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(sharded)
    index.write_bytes(good)
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"missing shards \['model-00002-of-00004.safetensors'\] of 4"):
        read_checkpoint(sharded)
    shutil.copy(sharded / "model-00001-of-00004.safetensors", shard)
    with pytest.raises(CheckpointError, match=r"doubled key 'layers.0.w': in model-00001\S* and in model-00002"):
        read_checkpoint(sharded)
    shard.write_bytes(kept)
    assert set(read_checkpoint(sharded)) == set(arrays())


# ---- replacing a directory ---------------------------------------------------------------------------------------------


def assert_holds(directory, value, n=4):
    read = read_checkpoint(directory)
    assert set(read) == set(arrays(n=n))
    assert all((read[f"layers.{i}.w"].read() == value + i).all() for i in range(n))


@pytest.fixture(params=["exchange", "aside"])
def swap(request, monkeypatch):
    if request.param == "aside":  # systems without an atomic exchange
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)


@pytest.mark.usefixtures("swap")
def test_other_files_are_kept_and_old_weights_are_not(sharded):
    (sharded / "tokenizer.json").write_text("tok")
    (sharded / "notes/deep").mkdir(parents=True)
    (sharded / "notes/deep/a.txt").write_text("a")
    (sharded / "link").symlink_to("tokenizer.json")
    (sharded / "broken").symlink_to("nowhere")
    (sharded / "model.fp16.safetensors").write_text("another variant")
    (sharded / "notes").chmod(0o750)
    sharded.chmod(0o705)
    write_checkpoint(sharded, arrays(10), files={"config.json": '{"new": 1}'})
    assert_holds(sharded, 10)
    assert sorted(os.listdir(sharded)) == [
        *("broken", "config.json", "link", "model.fp16.safetensors", "model.safetensors", "notes", "tokenizer.json"),
    ]
    assert (sharded / "config.json").read_text() == '{"new": 1}'
    assert (sharded / "link").read_text() == "tok"
    assert os.readlink(sharded / "link") == "tokenizer.json"
    assert (sharded / "notes/deep/a.txt").read_text() == "a"
    assert sharded.stat().st_mode & 0o777 == 0o705
    write_checkpoint(sharded, arrays(20), max_shard_size=256)
    assert_holds(sharded, 20)
    assert not (sharded / "model.safetensors").exists()
    assert os.listdir(sharded.parent) == ["m"]


@pytest.mark.usefixtures("swap")
def test_an_error_leaves_the_old_checkpoint(sharded):
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    with pytest.raises(ValueError, match="no data"):
        write_checkpoint(sharded, arrays(10) | {"z": Spec((2,), np.dtype(np.float32))})
    with pytest.raises(CheckpointError, match=r"no safetensors dtype for \['z: complex128'\]"):
        write_checkpoint(sharded, arrays(10) | {"z": as_tensor(np.zeros(2, complex))})
    with pytest.raises(CheckpointError, match="no tensors"):
        write_checkpoint(sharded, {})
    with pytest.raises(ValueError, match=r"max_shard_size .* expected bytes, or a number with KB"):
        write_checkpoint(sharded, arrays(10), max_shard_size="many GB")
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
    assert os.listdir(sharded.parent) == ["m"]


def test_destinations_that_cannot_be(sharded, monkeypatch):
    with pytest.raises(CheckpointError, match="is a file"):
        write_checkpoint(sharded / "config.json", arrays())
    monkeypatch.chdir(sharded)
    with pytest.raises(CheckpointError, match="working directory"):
        write_checkpoint(".", arrays(10))
    assert_holds(sharded, 0)


def test_a_link_to_a_directory_stays_a_link(sharded):
    link = sharded.with_name("latest")
    link.symlink_to(sharded)
    write_checkpoint(link, arrays(10))
    assert link.is_symlink()
    assert_holds(sharded, 10)


def test_writing_over_the_files_being_read(sharded):
    tensors = read_checkpoint(sharded)
    write_checkpoint(sharded, {key: tensors[key] for key in reversed(tensors)})
    assert_holds(sharded, 0)


def test_leftovers_of_the_dead_are_swept_and_of_the_living_are_not(sharded):
    dead = sharded.with_name(".m.saving-0123456789ab")
    dead.mkdir()
    (dead / "model.safetensors").write_text("half")
    other = sharded.with_name(".model2.saving-0123456789ab")
    other.mkdir()
    with replacing(sharded) as mine:
        write_checkpoint(sharded, arrays(10))
        assert mine.exists()
        assert not dead.exists()
        assert_holds(sharded, 10)
        write_file(mine / "model.safetensors", arrays(20))
    assert_holds(sharded, 20)
    assert sorted(os.listdir(sharded.parent)) == [".model2.saving-0123456789ab", "m"]


def test_a_kill_between_the_two_renames_of_the_fallback_is_undone_by_the_next_save(sharded):
    os.rename(sharded, sharded.with_name(".m.old-0123456789ab"))
    write_checkpoint(sharded.with_name("n"), arrays(10))
    with replacing(sharded):
        assert_holds(sharded, 0)
    assert_holds(sharded, 0)
    assert sorted(os.listdir(sharded.parent)) == ["m", "n"]


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("task", ["write", "consolidate", slow("convert"), slow("stack"), slow("unstack"), slow("train")])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(task, tmp_path):
    """Also of `jaxmodels convert`: to safetensors in another dtype and shard size, to an Orbax checkpoint with stacked layers, and back;
    of parts that become files; of a run's checkpoints, the oldest of which goes. Over an old one and where there is none; what is left
    behind goes with the next save."""
    command = [sys.executable, kill_worker.__file__, task, tmp_path, "24"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(atomic.__file__).parents[1], timeout=300)
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout.splitlines()[-1])
    assert counts["inside"] >= 4  # kills did land in the middle of saves
    assert counts["old"] + counts["new"] == 24
