"""Files of parts: what torch.distributed.checkpoint writes is read here and the other way round, and what is missing is said."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_worker
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Job
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

import jaxmodels as jm
from jaxmodels.convert import sharded
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import PART, SHARDING_INFO, read_annotated, read_checkpoint, write_checkpoint, write_file
from jaxmodels.convert.rules import Split, Stack, StackExperts, Transpose, inverse
from jaxmodels.convert.tensors import as_tensor, lengths
from jaxmodels.sharding.rules import MESH_AXES, PRESETS


def as_numpy(tensor):
    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


FULL = {key: as_numpy(tensor) for key, tensor in torch_worker.full().items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What three ranks of torch have written, after they have read `ours`."""
    path = tmp_path_factory.mktemp("torch")
    write_checkpoint(path / "ours", {key: as_tensor(x) for key, x in FULL.items()}, consolidate=False, max_shard_size=100)
    assert all(PART.fullmatch(file.name) for file in (path / "ours").iterdir())
    Job(torch_worker.__file__, path, 3, 1).finish()
    return path


def assert_whole(path, tensors=FULL):
    found = read_checkpoint(path)
    assert set(found) == set(tensors)
    for key, x in tensors.items():
        assert found[key].dtype == x.dtype
        np.testing.assert_array_equal(found[key].read(), x)


@pytest.mark.parametrize("name", ["parts", "one", "consolidated", "consolidated/sharded"])
def test_what_torch_wrote(directory, name):
    found = read_checkpoint(directory / name)
    assert set(found) == set(FULL)
    for key, x in FULL.items():
        if name == "consolidated" and x.shape == ():
            continue  # torch's consolidation leaves a number of no axes zero
        assert found[key].dtype == x.dtype
        np.testing.assert_array_equal(found[key].read(), x)
        index = tuple(slice(n // 3, n) for n in x.shape)
        np.testing.assert_array_equal(found[key].read(index), x[index])


def test_consolidated_here_as_written_whole(directory, tmp_path):
    sharded.consolidate(directory / "parts", tmp_path / "final")
    tensors = {key: as_tensor(x) for key, x in FULL.items()}
    write_checkpoint(tmp_path / "whole", tensors, fqn_to_index_mapping=torch_worker.NUMBERS)
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == {file.name for file in (tmp_path / "final").iterdir()} and len(names) == 3
    assert all((tmp_path / "final" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    with pytest.raises(CheckpointError, match="no files of parts"):
        sharded.consolidate(tmp_path / "final")


def test_consolidated_by_torch(directory, tmp_path):
    (tmp_path / "out").mkdir()
    consolidate_safetensors_files(str(directory / "ours"), str(tmp_path / "out"), dict.fromkeys(FULL, 1))
    found = read_checkpoint(tmp_path / "out")
    assert all(found[key].read().tobytes() == x.tobytes() for key, x in FULL.items() if x.shape)


def test_what_is_missing(directory, tmp_path):
    shutil.copytree(directory / "parts", tmp_path / "cut")
    (tmp_path / "cut/shard-00002-model-00002-of-00002.safetensors").unlink()
    gap = r"thin.weight: the parts \[\[\[0, 1\], \[0, 3\]\], \[\[2, 2\], \[0, 3\]\]\] are no whole tensor \[2, 3\]: .* 5 files of parts"
    with pytest.raises(CheckpointError, match=gap):
        read_checkpoint(tmp_path / "cut")
    write_file(tmp_path / "cut/shard-00002-model-00002-of-00002.safetensors", {"model.norm.weight": as_tensor(FULL["model.norm.weight"])})
    with pytest.raises(CheckpointError, match=r"shard-00002-model-00002-of-00002.safetensors: its metadata do not say where"):
        read_checkpoint(tmp_path / "cut")
    other = {SHARDING_INFO: json.dumps({"scale": {"saved_offsets": [3]}})}
    name = "shard-00007-model-00001-of-00002.safetensors"
    write_file(tmp_path / "cut" / name, {"scale": as_tensor(np.zeros(2, np.float32))}, metadata=other)
    shutil.copy(directory / "parts/shard-00002-model-00002-of-00002.safetensors", tmp_path / "cut")
    with pytest.raises(CheckpointError, match="scale: parts of different dtypes or ranks"):
        read_checkpoint(tmp_path / "cut")


def test_a_mapping_that_does_not_fit(tmp_path):
    tensors = {key: as_tensor(x) for key, x in FULL.items()}
    for wrong, message in (({"scale": 1}, "in one of the two only"), (dict.fromkeys(FULL, 2), r"its numbers are \[2\]")):
        with pytest.raises(CheckpointError, match=rf"must number the files of all tensors from 1 on; {message}"):
            write_checkpoint(tmp_path / "m", tensors, fqn_to_index_mapping=wrong)
    with pytest.raises(CheckpointError, match="files of parts have no variant"):
        write_checkpoint(tmp_path / "m", tensors, variant="fp16", consolidate=False)
    assert not list(tmp_path.iterdir())


def test_parts_and_whole_files_take_each_others_place(tmp_path):
    tensors = {key: as_tensor(x) for key, x in FULL.items()}
    for consolidate in (True, False, True, False):
        write_checkpoint(tmp_path / "m", tensors, consolidate=consolidate, files={"config.json": "{}"}, max_shard_size=200)
        names = [file.name for file in (tmp_path / "m").iterdir() if file.suffix == ".safetensors"]
        assert names and all((PART.fullmatch(name) is None) == consolidate for name in names)
        assert_whole(tmp_path / "m")


# ---- any mesh --------------------------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIGS = {
    "mixtral": SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
    "gpt2": SHAPE | {"n_positions": 64},  # fused and transposed
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: a checkpoint of it, saved by one device}."""
    path = tmp_path_factory.mktemp("models")
    for name, values in CONFIGS.items():
        config = jm.AutoConfig.for_model(name, **values)
        model = jm.AutoModelForCausalLM.class_for(config)(config)
        params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).random(leaf.shape, np.float32), jm.abstract_params(model))
        jm.save_pretrained(path / name, model, params, max_shard_size="40KB")
    return path


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_saved_under_one_mesh_loaded_under_any_other(models, data):
    """Whatever axes, preset and form: every leaf lies where the rules say, and what is saved has the bytes of what was loaded."""
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    source, whole = models / name, {file.name: file.read_bytes() for file in (models / name).glob("*.safetensors")}
    for turn in range(2):
        axes, sizes = data.draw(st.permutations(MESH_AXES)), data.draw(st.sampled_from([(8,), (4, 2), (2, 4), (2, 2, 2)]))
        mesh = jm.make_mesh(**dict(zip(axes, sizes)))
        where = {"rules": data.draw(st.sampled_from(sorted(PRESETS))), "scan_layers": data.draw(st.booleans())}
        model, params = jm.AutoModelForCausalLM.from_pretrained(source, mesh=mesh, dtype="float32", **where)
        for leaf, spec in zip(*map(jax.tree.leaves, (params, jm.abstract_params(model))), strict=True):
            assert leaf.sharding.is_equivalent_to(spec.sharding, leaf.ndim)
        consolidate = turn == 1 or data.draw(st.booleans())
        source = models / f"{name}-{turn}"
        jm.save_pretrained(source, model, params, max_shard_size="40KB", consolidate=consolidate)
    assert {file.name: file.read_bytes() for file in source.glob("*.safetensors")} == whole


# ---- who holds what --------------------------------------------------------------------------------------------------

RULES = {  # rules, and the tree's shapes
    "plain": ([], {"w": (8, 16)}),
    "transposed": ([Transpose("w")], {"w": (8, 16)}),
    "fused": ([Split("qkv", ("q", "k", "v"), (8, 4, 4))], {"q": (8, 16), "k": (4, 16), "v": (4, 16)}),
    "by heads": ([Split("qkv", ("q", "k", "v"), (2, 2, 2), groups=4)], {"q": (8, 16), "k": (8, 16), "v": (8, 16)}),
    "by kv heads": ([Split("qkv", ("q", "k", "v"), (8, 2, 2), groups=2)], {"q": (16, 16), "k": (4, 16), "v": (4, 16)}),
    "interleaved": ([Split("gu", ("g", "u"), (1, 1), axis=-1, groups=16)], {"g": (8, 16), "u": (8, 16)}),
    "experts": ([StackExperts("e.#.w", "e.w")], {"e.w": (4, 8, 16)}),
    "layers": ([Stack(("l.0:4:1.w",))], {"l.0:4:1.w": (4, 8, 16)}),
    "experts, fused": ([Split("e.gu", ("e.g", "e.u"), (8, 8), axis=1)], {"e.g": (4, 8, 16), "e.u": (4, 8, 16)}),
}


@given(st.sampled_from(sorted(RULES)), st.data())
@settings(max_examples=80, deadline=None)
def test_regions_are_a_partition_that_its_holders_can_read(name, data):
    """Each device here is taken for a process of its own: what is said to lie on it is read from its shards alone."""
    rules, shapes = RULES[name]
    mesh = jm.make_mesh(a=2, b=4)

    def placed(shape):
        axes = data.draw(st.permutations(["a", "b", *[None] * (len(shape) - 1)]))[: len(shape)]
        fits = [axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in zip(axes, shape)]
        values = np.random.default_rng(0).standard_normal(shape, np.float32)
        return jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*fits)))

    arrays = {key: placed(shape) for key, shape in shapes.items()}
    whole = {key: tensor.read() for key, tensor in inverse(rules, {key: as_tensor(x) for key, x in arrays.items()}).items()}

    def of_device(number):
        """The file's tensors over what one device holds; the rest is nan."""
        seen = {key: np.full(x.shape, np.nan, np.float32) for key, x in arrays.items()}
        for key, x in arrays.items():
            for shard in (shard for shard in x.addressable_shards if shard.device.id == number):
                seen[key][shard.index] = np.asarray(shard.data)
        return inverse(rules, {key: as_tensor(x) for key, x in seen.items()})

    with pytest.MonkeyPatch.context() as patch:
        process = jax.devices()[0]
        patch.setattr(type(process), "process_index", property(lambda device: device.id), raising=False)
        sharded._shards.cache_clear()
        tensors = inverse(rules, {key: as_tensor(x) for key, x in arrays.items()})
        patch.setattr(jax, "process_count", lambda: 8)
        assembled = {key: np.full(x.shape, np.nan, np.float32) for key, x in whole.items()}
        written = 0
        for number in range(8):
            patch.setattr(jax, "process_index", lambda number=number: number)
            mine = of_device(number)
            for key, indices in sharded.parts(tensors).items():
                for index in indices:
                    assembled[key][index] = mine[key].read(index)
                    written += int(np.prod(lengths(index)))
    sharded._shards.cache_clear()
    assert written == sum(x.size for x in whole.values())  # once
    for key, x in whole.items():
        np.testing.assert_array_equal(assembled[key], x)


def test_neighbours_are_one_part():
    grid = [(slice(a, a + 4), slice(b, b + 2)) for b in (2, 0) for a in (4, 0)]
    assert sharded._merged(grid) == [(slice(0, 8), slice(0, 4))]
    assert len(sharded._merged(grid[:3])) == 2


def test_metadata_are_torchs(tmp_path):
    write_checkpoint(tmp_path / "m", {"w": as_tensor(np.zeros((4, 2), np.float32))}, consolidate=False)
    tensors, metadata = read_annotated(tmp_path / "m/shard-00001-model-00001-of-00001.safetensors")
    assert list(tensors) == ["w"]
    assert metadata == {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}'}
