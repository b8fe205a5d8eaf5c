"""Orbax checkpoints: scanned and unrolled trees, other shardings and dtypes, errors that leave nothing behind."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodels.convert import orbax, rules
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import read_checkpoint, write_checkpoint
from jaxmodels.convert.load import load, unload

CONFIG = {"model_type": "llama", "hidden_size": 6}
NAMES = ["model.embed.weight", "model.layers.0:3:1.w", "lm_head.weight"]


def params():
    key = jax.random.key(0)
    plain = {f"model.layers.{i}.w": jax.random.normal(jax.random.fold_in(key, i), (4, 6), jnp.bfloat16) for i in range(3)}
    return {"model.embed.weight": jax.random.normal(key, (8, 6)), **plain, "lm_head.weight": jax.random.normal(key, (8, 6))}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in found.items():
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
        assert np.asarray(array).tobytes() == np.asarray(expected[name]).tobytes(), name


@pytest.mark.parametrize("scan", [False, True])
def test_round_trip(tmp_path, scan):
    tree = rules.stack(params(), NAMES) if scan else params()
    orbax.save_orbax(tmp_path / "o", tree, CONFIG)
    assert sorted(os.listdir(tmp_path / "o")) == ["config.json", "params"]
    found, config = orbax.restore_orbax(tmp_path / "o")
    assert_same(found, tree)
    assert config == CONFIG
    assert orbax.is_orbax(tmp_path / "o")
    assert not orbax.is_orbax(tmp_path)


def test_other_shardings_and_dtypes(tmp_path, monkeypatch):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tree = rules.stack(params(), NAMES)
    placed = {name: jax.device_put(x, NamedSharding(mesh, P("x") if x.ndim == 2 else P())) for name, x in tree.items()}
    monkeypatch.chdir(tmp_path)
    orbax.save_orbax("o", placed, CONFIG)
    assert_same(orbax.restore_orbax("o")[0], tree)
    assert all(x.devices() == {jax.devices()[0]} for x in orbax.restore_orbax("o")[0].values())
    spec = {2: NamedSharding(mesh, P("y", None)), 3: NamedSharding(mesh, P(None, "x", "y"))}
    expected = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=spec[x.ndim]) for name, x in tree.items()}
    found, _ = orbax.restore_orbax("o", expected)
    assert_same(found, {name: x.astype(jnp.float32) for name, x in tree.items()})
    assert all(x.sharding == spec[x.ndim] for x in found.values())


def test_safetensors_to_scanned_orbax_and_back_is_byte_for_byte(tmp_path):
    write_checkpoint(tmp_path / "hf", unload(params(), base_prefix="model"))
    source = read_checkpoint(tmp_path / "hf")
    scanned = jax.eval_shape(lambda p: rules.stack(p, NAMES), params())
    arrays, _ = load(source, scanned, base_prefix="model")
    orbax.save_orbax(tmp_path / "orbax", arrays, CONFIG)
    back, _ = orbax.restore_orbax(tmp_path / "orbax", scanned)
    write_checkpoint(tmp_path / "back", unload(back, base_prefix="model"))
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_errors(tmp_path):
    orbax.save_orbax(tmp_path / "o", params(), CONFIG)
    with pytest.raises(CheckpointError, match="no Orbax checkpoint here"):
        orbax.restore_orbax(tmp_path)
    specs = orbax.orbax_specs(tmp_path / "o")
    specs["model.norm"] = specs.pop("lm_head.weight")
    specs["model.embed.weight"] = jax.ShapeDtypeStruct((9, 6), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        orbax.restore_orbax(tmp_path / "o", specs)
    assert str(error.value).splitlines()[1:] == [
        "  lm_head.weight: found [8, 6], expected nothing",
        "  model.norm: found nothing, expected [8, 6]",
        "  model.embed.weight: found [8, 6], expected [9, 6]",
    ]
    with pytest.raises(TypeError):
        orbax.save_orbax(tmp_path / "o", {}, {"not": object()})
    with pytest.raises(CheckpointError, match=r"expected jax or numpy arrays, found \['w: object'\]"):
        orbax.save_orbax(tmp_path / "o", {"w": object()}, CONFIG)
    assert_same(orbax.restore_orbax(tmp_path / "o")[0], params())
    assert os.listdir(tmp_path) == ["o"]
    (tmp_path / "o/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        orbax.restore_orbax(tmp_path / "o")
    (tmp_path / "o/params/_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable Orbax checkpoint"):
        orbax.restore_orbax(tmp_path / "o")
