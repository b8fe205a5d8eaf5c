"""Checkpoints at URLs: read by ranges, equal to the files, and one clear error for each way that a server fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event

import fsspec
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import serving

import jaxmodels as jm
from jaxmodels.convert import remote
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import read_checkpoint, read_file, write_checkpoint
from jaxmodels.convert.hub import is_url, resolve
from jaxmodels.convert.orbax import save_orbax
from jaxmodels.convert.tensors import as_tensor, lengths
from jaxmodels.processing import AutoTokenizer
from jaxmodels.training import TrainingArguments
from jaxmodels.training.checkpoints import Checkpoints
from jaxmodels.training.lora import LoraConfig, add_lora, save_adapter

FIRST = "model-00001-of-00004.safetensors"


def tensors():
    rng = np.random.default_rng(0)
    return {f"layers.{i}.w": as_tensor(rng.standard_normal((8, 6, 4), np.float32)) for i in range(4)} | {"scale": as_tensor(np.float32(2))}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "model"
    write_checkpoint(path, tensors(), max_shard_size=800, files={"config.json": "{}"})
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with everything a model and a tokenizer have."""
    import jaxmodels.assets

    path = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(jaxmodels.assets.__path__[0] + "/tiny-python", path)
    return path


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Requests that fail are repeated without a pause."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


@pytest.fixture
def memory():
    """Copies a directory to memory:// and gives its URL."""
    fs = fsspec.filesystem("memory")

    def put(directory, name="model"):
        for file in (file for file in directory.rglob("*") if file.is_file()):
            fs.pipe(f"/{name}/{file.relative_to(directory)}", file.read_bytes())
        return f"memory://{name}"

    yield put
    fs.store.clear()


def test_what_is_a_url():
    assert all(map(is_url, ("s3://a/b", "memory://m", "https://h/m", "simplecache::s3://a/b", "gs://a")))
    assert not any(map(is_url, ("org/name", "/a/b", "C:\\model", "./a:b", "a:b/c")))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_slice_in_every_cut_of_requests(directory, data):
    """Whatever gaps are read over and however long a request may be: the slice's bytes, and none from outside where gaps are not read."""
    tensor = read_checkpoint(directory)["layers.1.w"]
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in tensor.shape]
    index = tuple(slice(a, b) for a, b in bounds)
    gap, request = data.draw(st.sampled_from([0, 8, 40, 10**6])), data.draw(st.sampled_from([4, 30, 200, 10**6]))
    fs = fsspec.filesystem("memory")
    fs.pipe("/slice", tensor.read().tobytes())
    path, asked = remote.RemotePath("memory://slice"), []
    read = path.read
    path.read = lambda start, stop: asked.append(stop - start) or read(start, stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "GAP", gap)
        patch.setattr(remote, "REQUEST", request)
        found = remote.RangeTensor(path, 0, tensor.shape, tensor.dtype).read(index)
    np.testing.assert_array_equal(found, tensor.read(index))
    if gap == 0:
        assert sum(asked) == 4 * np.prod(lengths(index))
    assert all(count <= max(request, 4) for count in asked)


def test_a_checkpoint_over_http_is_that_of_its_directory(directory):
    with serving(directory) as (url, sent):
        found = read_checkpoint(url)
        headers = sum(count for _, count in sent)
        assert headers < sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in directory.glob("*.safetensors")) + 2000
        for key, tensor in read_checkpoint(directory).items():
            assert found[key].read().tobytes() == tensor.read().tobytes()
        assert sum(count for _, count in sent) - headers == sum(tensor.nbytes for tensor in found.values())
        assert list(read_file(f"{url}/{FIRST}")) == list(read_file(directory / FIRST))


def test_devices_of_a_process_are_read_for_together(directory, memory, monkeypatch):
    """Eight columns of pieces are one request, not eight."""
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxmodels.convert.load import load

    url, asked, read = memory(directory), [], remote.RemotePath.read
    monkeypatch.setattr(remote.RemotePath, "read", lambda self, start, stop: asked.append(stop - start) or read(self, start, stop))
    mesh = jm.make_mesh(fsdp=2, tensor=4)
    spec = {0: PartitionSpec(), 3: PartitionSpec(None, "fsdp", "tensor")}
    source = read_checkpoint(url)
    expected = {k: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=NamedSharding(mesh, spec[len(t.shape)])) for k, t in source.items()}
    arrays, _ = load(source, expected)
    assert sorted(asked) == sorted(tensor.nbytes for tensor in source.values())
    for key, tensor in tensors().items():
        np.testing.assert_array_equal(arrays[key], tensor.read())


def test_a_model_from_memory(model, memory):
    url = memory(model)
    found, params = jm.AutoModelForCausalLM.from_pretrained(url, mesh=jm.make_mesh(fsdp=8))
    own, local = jm.AutoModelForCausalLM.from_pretrained(model)
    assert found.config == own.config and found.config.generation_config == own.config.generation_config
    for name, leaf in jm.flatten(local).items():
        np.testing.assert_array_equal(leaf, jm.flatten(params)[name])
    assert (
        AutoTokenizer.from_pretrained(url)("def f(x):")["input_ids"].tolist()
        == AutoTokenizer.from_pretrained(model)("def f(x):")["input_ids"].tolist()
    )
    assert jm.GenerationConfig.from_pretrained(url) == jm.GenerationConfig.from_pretrained(model)
    assert jm.AutoConfig.from_pretrained(f"file://{model}") == own.config
    assert set(read_checkpoint(f"file://{model}")) == set(read_checkpoint(model))


def test_a_model_from_http(model, tmp_path):
    """A server that lists nothing: files are found by their names."""
    shutil.copytree(model, tmp_path / "root/inner")
    with serving(tmp_path / "root") as (url, _):
        found = resolve(url, subfolder="inner")
        assert {file.name for file in found.iterdir()} == {file.name for file in model.iterdir()} - {"model.safetensors", "README.md"}
        config = jm.AutoConfig.from_pretrained(url, subfolder="inner")
        _, params = jm.AutoModelForCausalLM.from_pretrained(url, subfolder="inner", mesh=jm.make_mesh(tensor=8))
        assert config == jm.AutoConfig.from_pretrained(model)
    np.testing.assert_array_equal(params["model"]["norm"]["weight"], read_checkpoint(model)["model.norm.weight"].read())


def test_what_servers_lack(directory, tmp_path):
    none = pytest.raises(CheckpointError, match=rf"{FIRST}: its server does not answer range requests")
    with serving(directory, ranges=False) as (url, _), none:
        read_checkpoint(url)
    part = "model-00003-of-00004.safetensors"
    size = (directory / part).stat().st_size
    with (
        serving(directory, faults={part: size - 1}) as (url, _),
        pytest.raises(CheckpointError, match=rf"{part}: truncated: .* its header says {size:,}"),
    ):
        read_checkpoint(url)
    with serving(directory, faults={part: 20}) as (url, _), pytest.raises(CheckpointError, match=f"{part}: truncated: 20 bytes"):
        read_checkpoint(url)
    with serving(directory) as (url, _):
        found = read_checkpoint(url)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be read: ClientConnectorError"):
        found["layers.0.w"].read()
    with pytest.raises(CheckpointError, match="cannot be read: ClientConnectorError"):
        read_checkpoint(url)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: ClientConnectorError"):
        jm.AutoConfig.from_pretrained(url)
    shutil.copytree(directory, tmp_path / "cut")
    (tmp_path / "cut" / part).unlink()
    with serving(tmp_path) as (url, _):
        with pytest.raises(CheckpointError, match=rf"cut: missing shards \['{part}'\] of 4"):
            read_checkpoint(f"{url}/cut")
        with pytest.raises(CheckpointError, match=r"nothing: no model.safetensors or model.safetensors.index.json"):
            read_checkpoint(f"{url}/nothing")
        with pytest.raises(CheckpointError, match=r"nothing/config.json: no such file"):
            jm.AutoConfig.from_pretrained(f"{url}/nothing")
    with pytest.raises(CheckpointError, match="nosuch"):
        read_checkpoint("nosuch://bucket/model")
    with pytest.raises(CheckpointError, match=r"s3://bucket/model: cannot be opened: Install s3fs"):
        read_checkpoint("s3://bucket/model")


@pytest.mark.slow
def test_the_hosts_peak_of_memory():
    """From files and over HTTP, on one device and eight: within 1.15 × what is resident and the largest tensor."""
    script = Path(__file__).parents[1] / "benchmarks" / "load_memory.py"
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 8, found.stdout + found.stderr


def test_nothing_is_written_to_a_url(model, tmp_path, monkeypatch):
    """As a path s3://bucket would be a directory named `s3:`, and a run's checkpoints gone with the machine."""
    monkeypatch.chdir(tmp_path)
    net, params = jm.AutoModelForCausalLM.from_pretrained(model)
    url, adapter = "s3://bucket/run", LoraConfig(r=2)
    for write in (
        lambda: jm.save_pretrained(url, net, params),
        lambda: write_checkpoint(url, tensors()),
        lambda: save_adapter(url, net, add_lora(net, params, adapter, jax.random.key(0)), adapter),
        lambda: jm.AutoTokenizer.from_pretrained(model).save_pretrained(url),
        lambda: save_orbax(url, jm.flatten(params), {}),
        lambda: jm.GenerationConfig().save_pretrained(url),
        lambda: TrainingArguments(url),
        lambda: Checkpoints(url),
    ):
        with pytest.raises(CheckpointError, match="s3://bucket/run: is written to a local directory"):
            write()
    assert not list(tmp_path.iterdir())


def test_a_file_that_shrinks_while_it_is_read(directory, memory):
    url = memory(directory)
    tensor = read_checkpoint(url)["layers.0.w"]
    name = next(name for name in fsspec.filesystem("memory").store if name.endswith(FIRST))
    fsspec.filesystem("memory").pipe(name, b"short")
    with pytest.raises(CheckpointError, match=rf"{FIRST}: truncated: \d+ bytes from \d+ on were asked for, 0 came"):
        tensor.read()


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(CheckpointError, match="s3://a/b: reading from a URL needs fsspec: pip install fsspec"):
        read_checkpoint("s3://a/b")


def test_a_request_that_fails_is_repeated(directory, memory, monkeypatch):
    path = remote.RemotePath(memory(directory)) / "config.json"
    failures = iter([OSError("reset by peer"), OSError("reset by peer"), None, *[OSError("reset by peer")] * 5])
    cat, monkeypatched = path.fs.cat_file, []

    def flaky(*arguments, **options):
        error = next(failures)
        monkeypatched.append(error)
        if error:
            raise error
        return cat(*arguments, **options)

    monkeypatch.setattr(path.fs, "cat_file", flaky)
    assert json.loads(path.read_bytes()) == {}
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: OSError: reset by peer"):
        path.read_bytes()
    assert len(monkeypatched) == 8


def test_a_server_in_trouble(directory):
    """Ranges of tensors that are answered every third time, and never: what comes is whole, what does not is one error in time."""
    asked = []

    def answers(trouble, every=0):
        def of(start):
            asked.append(start)
            return None if start <= 8 or (every and asked.count(start) % every == 0) else trouble  # headers always come

        return serving(directory, ill=of)

    for trouble in ("cut", 503, 429):
        with answers(trouble, 3) as (url, _):
            found = read_checkpoint(url)
            for key, tensor in read_checkpoint(directory).items():
                assert found[key].read().tobytes() == tensor.read().tobytes()
    for trouble, message, times in (
        ("cut", "cannot be read: ClientPayloadError", 5),
        (500, "cannot be read: ClientResponseError: 500", 5),
        (403, "cannot be read: ClientResponseError: 403", 1),
        (404, "no such file", 1),
    ):
        with answers(trouble) as (url, _):
            found = read_checkpoint(url)
            asked.clear()
            with pytest.raises(CheckpointError, match=f"{FIRST}: {message}"):
                found["layers.0.w"].read()
            assert len(asked) == times


def test_a_server_that_falls_silent(directory, monkeypatch):
    """The second time it answers; later never, and reading ends."""
    monkeypatch.setattr(remote, "SILENCE", 0.1)
    asked = []

    def silent(start):
        if start > 8:  # headers always come
            asked.append(start)
            if len(asked) != 2:
                Event().wait(0.5)

    with serving(directory, ill=silent) as (url, _):
        found = read_checkpoint(url)
        assert found["layers.0.w"].read().tobytes() == read_checkpoint(directory)["layers.0.w"].read().tobytes()
        with pytest.raises(CheckpointError, match=r"cannot be read: .*Timeout"):
            found["layers.1.w"].read()
    assert len(asked) == 2 + 5
