"""Loading into trees and back: prefixes, heads, dtypes, scanned trees, shardings, errors that name both sides."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import LlamaConfig, LlamaForCausalLM

from jaxmodels.convert import files, rules
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.load import LoadReport, load, unload
from jaxmodels.convert.rules import Alias, Ignore, Rename, Split, Tie
from jaxmodels.convert.tensors import NumpyTensor, as_tensor

BF16 = np.dtype(ml_dtypes.bfloat16)


def numbers(shape, start=0):
    return np.random.default_rng([start, *shape]).standard_normal(shape).astype(np.float32)


def lazy(arrays):
    return {key: as_tensor(array) for key, array in arrays.items()}


def specs(arrays, dtype=None, sharding=None):
    return {key: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding) for key, x in arrays.items()}


def base(prefix="", layers=12):
    tree = {f"{prefix}layers.{i}.w": numbers((4, 6), i) for i in range(layers)}
    return {f"{prefix}embed.weight": numbers((8, 6)), **tree, f"{prefix}norm.weight": numbers((6,))}


HEAD = {"lm_head.weight": numbers((8, 6), 1)}
SCORE = {"score.weight": numbers((2, 6), 2), "score.bias": numbers((2,), 2)}


def assert_equal(arrays, expected):
    assert set(arrays) == set(expected)
    for key, array in arrays.items():
        assert array.dtype == expected[key].dtype
        assert np.asarray(array).tobytes() == expected[key].tobytes(), key


@pytest.mark.parametrize("from_base", [False, True])
@pytest.mark.parametrize("to_base", [False, True])
def test_prefix_is_added_and_removed(from_base, to_base):
    source = base() if from_base else base("model.") | HEAD
    tree = base() if to_base else base("model.") | SCORE

    def init(names):
        assert names == list(SCORE)
        return {name: jnp.full(SCORE[name].shape, 7.0) for name in names}

    if to_base:
        arrays, report = load(lazy(source), specs(tree), base_prefix="model", init=init)
    else:
        with pytest.warns(UserWarning, match=r"no weights for score.weight, score.bias: initialised at random"):
            arrays, report = load(lazy(source), specs(tree), base_prefix="model", init=init)
        assert all((arrays[name] == 7).all() for name in SCORE)
    assert list(arrays) == list(tree)
    assert_equal({k: x for k, x in arrays.items() if k not in SCORE}, base("" if to_base else "model."))
    assert report.dropped == (() if from_base else ("lm_head.weight",))
    assert report.initialized == (() if to_base else tuple(SCORE))
    assert report.nbytes == sum(x.nbytes for x in base().values())


def test_unload_is_what_save_pretrained_of_that_class_writes():
    assert list(unload(base("model.") | HEAD, base_prefix="model")) == [*HEAD, *base("model.")]
    arrays = unload(base(), base_prefix="model")
    assert list(arrays) == list(base())  # layer 2 before layer 10
    assert all(tensor.read().tobytes() == base()[key].tobytes() for key, tensor in arrays.items())


def test_llama_of_torch_comes_back_byte_for_byte(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=12))
    model.save_pretrained(tmp_path / "torch")
    source = files.read_checkpoint(tmp_path / "torch")
    arrays, report = load(source, specs(source), base_prefix="model")
    assert report == LoadReport(nbytes=sum(t.nbytes for t in source.values()))
    for key, value in model.state_dict().items():
        assert np.array_equal(arrays[key], value.numpy())
    files.write_checkpoint(tmp_path / "ours", unload(arrays, base_prefix="model"))
    name = "model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()
    # and through scanned layers
    scanned = [key for key in source if ".layers." not in key]
    scanned += [key.replace("layers.0.", "layers.0:12:1.") for key in source if "layers.0." in key]
    stacked = rules.stack(arrays, scanned)
    loaded, _ = load(source, specs(stacked), base_prefix="model")
    assert_equal(loaded, {key: np.asarray(x) for key, x in stacked.items()})
    files.write_checkpoint(tmp_path / "ours", unload(loaded, base_prefix="model"))
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()


FUSED = (
    Alias("**.weight", ("**.gamma",)),
    Ignore(("**.inv_freq",)),
    Tie("lm_head.weight", "model.embed.weight"),
    Split("model.layers.*.qkv.*", ("model.layers.*.q.*", "model.layers.*.k.*", "model.layers.*.v.*"), (2, 1, 1), groups=3),
    Rename("model.emb_in.*", "model.embed_norm.*"),
)


def fused_file(prefix="model."):
    file = {f"{prefix}layers.{i}.qkv.weight": numbers((12, 5), i) for i in range(4)}
    file |= {f"{prefix}layers.{i}.qkv.bias": numbers((12,), i) for i in range(4)}
    return file | {f"{prefix}embed.weight": numbers((8, 5)), f"{prefix}emb_in.weight": numbers((5,))}


@pytest.mark.parametrize("to_base", [False, True])
@pytest.mark.parametrize("file_prefix", ["", "model."])
@pytest.mark.parametrize("scan", [False, True])
def test_rules_prefix_aliases_and_scan_together(to_base, file_prefix, scan):
    source = fused_file(file_prefix) | {f"{file_prefix}layers.0.inv_freq": numbers((2,))}
    source[f"{file_prefix}emb_in.gamma"] = source.pop(f"{file_prefix}emb_in.weight")
    if file_prefix:
        source["lm_head.weight"] = source["model.embed.weight"]
    prefix, layer = "" if to_base else "model.", "0:4:1" if scan else "0"
    tree = {key.removeprefix("" if prefix else "model."): t for key, t in rules.forward(FUSED, lazy(fused_file())).items()}
    if scan:
        names = [key.replace("layers.0", "layers.0:4:1") for key in tree if "layers." not in key or "layers.0" in key]
        tree = rules.stacks(names).forward(tree)
    arrays, report = load(lazy(source), specs(tree), rules=FUSED, base_prefix="model")
    q = np.asarray(arrays[f"{prefix}layers.{layer}.q.weight"])
    assert np.array_equal(q[0] if scan else q, fused_file()["model.layers.0.qkv.weight"].reshape(3, 4, 5)[:, :2].reshape(6, 5))
    assert report.ignored == ("model.layers.0.inv_freq",)
    assert report.tied == (("lm_head.weight",) if file_prefix else ())
    assert report.dropped == report.initialized == ()
    back = {key: tensor.read() for key, tensor in unload(arrays, rules=FUSED, base_prefix="model").items()}
    assert_equal(back, fused_file(prefix))


def test_gradients_go_back_to_file_keys():
    source = fused_file()
    tree = rules.forward(FUSED, lazy(source))
    arrays, _ = load(lazy(source), specs(tree), rules=FUSED, base_prefix="model")
    grads = jax.grad(lambda p: sum(jnp.sum(x**3) for x in p.values()))(arrays)
    for key, tensor in unload(grads, rules=FUSED, base_prefix="model").items():
        assert np.allclose(tensor.read(), 3 * source[key] ** 2)


# ---- dtypes and devices ---------------------------------------------------------------------------------------------


def test_dtypes_are_cast_on_the_way():
    source = {"a": numbers((3, 300)), "b": numbers((4,)).astype(np.float16), "n": np.arange(3, dtype=np.int64)}
    target = {"a": BF16, "b": np.dtype(np.float32), "n": np.dtype(np.int32)}
    expected = {key: jax.ShapeDtypeStruct(x.shape, target[key]) for key, x in source.items()}
    arrays, _ = load(lazy(source), expected)
    assert_equal(
        arrays,
        {"a": np.asarray(jnp.asarray(source["a"]).astype(BF16)), "b": source["b"].astype(np.float32), "n": np.arange(3, dtype=np.int32)},
    )
    kept, _ = load(lazy(source), expected, keep_dtypes=True)
    assert [kept[key].dtype for key in "abn"] == [np.float32, np.float16, np.int32]


@pytest.mark.parametrize("stored", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn, np.bool_])
def test_quantised_numbers_are_not_taken_for_values(stored):
    with pytest.raises(CheckpointError, match=rf"a: found {np.dtype(stored)} \[3\], expected float32 \[3\]"):
        load(lazy({"a": np.zeros(3, stored)}), {"a": jax.ShapeDtypeStruct((3,), np.float32)})


class Counting(NumpyTensor):
    def __init__(self, array):
        super().__init__(array)
        self.reads = []

    def _fill(self, out, index):
        self.reads.append(out.nbytes)
        super()._fill(out, index)


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "y"), P("x", "y"), P(("x", "y"))])
def test_shards_read_only_what_they_cover(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = numbers((16, 8))
    tensor = Counting(array)
    expected = {"w": jax.ShapeDtypeStruct(array.shape, BF16, sharding=NamedSharding(mesh, spec))}
    (loaded,) = load({"w": tensor}, expected)[0].values()
    assert loaded.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert np.array_equal(loaded, array.astype(BF16))
    shards = len({tuple((s.start, s.stop) for s in shard.index) for shard in loaded.addressable_shards})
    assert len(tensor.reads) == shards
    assert sum(tensor.reads) == loaded.nbytes
    assert unload({"w": loaded})["w"].read().tobytes() == array.astype(BF16).tobytes()


def test_a_fused_and_stacked_leaf_reads_only_its_shard():
    mesh = jax.make_mesh((3,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    sharding = NamedSharding(mesh, P(None, "heads"))
    rule = Split("layers.*.qkv", ("layers.*.q", "layers.*.k"), (8, 2), groups=3)
    source = {f"layers.{i}.qkv": Counting(numbers((30, 512), i)) for i in range(2)}
    shapes = {"layers.0:2:1.q": (2, 24, 512), "layers.0:2:1.k": (2, 6, 512)}
    expected = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding) for name, shape in shapes.items()}
    arrays, _ = load(source, expected, rules=[rule])
    for shard in arrays["layers.0:2:1.q"].addressable_shards:
        head = shard.index[1].start // 8
        assert np.array_equal(shard.data, np.stack([t.array.reshape(3, 10, 512)[head, :8] for t in source.values()]))
    assert all(sum(t.reads) == t.nbytes for t in source.values())


def test_default_device_and_donation():
    source = {f"w{i}": numbers((64, 64), i) for i in range(20)}
    arrays, _ = load(lazy(source), specs(source))
    assert all(not x.committed and x.devices() == {jax.devices()[0]} for x in arrays.values())
    with jax.default_device(jax.devices()[3]):
        arrays, _ = load(lazy(source), specs(source))
    assert all(x.devices() == {jax.devices()[3]} for x in arrays.values())
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays, _ = load(lazy(source), specs(source, sharding=NamedSharding(mesh, P())))
    step = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
    for _ in range(3):  # memory that the replicas share must not be written in place
        arrays = step(arrays)
    for key, x in arrays.items():
        assert all(np.array_equal(shard.data, 8 * source[key]) for shard in x.addressable_shards)


# ---- errors ------------------------------------------------------------------------------------------------------------


def test_errors_list_both_sides_before_anything_is_read():
    source = base("model.") | HEAD
    source["model.layers.3.weight"] = source.pop("model.layers.3.w")
    source["model.norm.weight"] = numbers((5,))
    tensors = {key: Counting(array) for key, array in source.items()}
    with pytest.raises(CheckpointError) as error:
        load(tensors, specs(base("model.") | HEAD), base_prefix="model", where="/some/dir")
    assert str(error.value).splitlines() == [
        "/some/dir does not fit the model (another config.json, or another class?):",
        "  missing, the model expects (1):",
        "    model.layers.3.w [4, 6]; closest on the other side: model.layers.3.weight",
        "  unexpected, the model has no (1):",
        "    model.layers.3.weight [4, 6]; closest on the other side: model.layers.3.w",
        "  wrong (1):",
        "    model.norm.weight: found float32 [5], expected float32 [6]",
    ]
    assert not any(tensor.reads for tensor in tensors.values())


def test_errors_speak_of_file_keys_and_files(tmp_path):
    file = fused_file()
    tree = specs(rules.forward(FUSED, lazy(file)))
    file["model.layers.2.qkv.weight"] = numbers((11, 5))
    files.write_checkpoint(tmp_path, lazy(file))
    message = r"model.layers.2.qkv.weight: found float32 \[11, 5\] in \S*model.safetensors, expected float32 \[12, 5\]"
    with pytest.raises(CheckpointError, match=message):
        load(files.read_checkpoint(tmp_path), tree, rules=FUSED, base_prefix="model")


def test_many_problems_are_counted():
    with pytest.raises(CheckpointError, match=r"missing, the model expects \(14\):(.|\n)*… and 6 more") as error:
        load(lazy({"x": numbers((1,))}), specs(base()))
    assert "unexpected, the model has no (1):\n    x [1]" in str(error.value)


def test_heads():
    with pytest.raises(CheckpointError, match=r"missing, the model expects \(2\):\s+score.weight \[2, 6\]"):
        load(lazy(base("model.")), specs(base("model.") | SCORE), base_prefix="model")
    resized = base("model.") | SCORE | {"score.weight": numbers((3, 6))}
    with pytest.raises(CheckpointError, match=r"score.weight: found float32 \[3, 6\], expected float32 \[2, 6\]"):
        load(lazy(resized), specs(base("model.") | SCORE), base_prefix="model", init=lambda names: {})
    with pytest.raises(CheckpointError, match="unexpected"):  # without a base prefix every key counts
        load(lazy(base() | HEAD), specs(base()))
    with pytest.warns(UserWarning, match="no weights"), pytest.raises(ValueError, match=r"init gave score.bias the shape \[9\]"):
        load(
            lazy(base("model.")),
            specs(base("model.") | SCORE),
            base_prefix="model",
            init=lambda names: {"score.weight": jnp.zeros((2, 6)), "score.bias": jnp.zeros(9)},
        )


def test_doubled_and_incomplete():
    source = fused_file() | {"model.emb_in.gamma": numbers((5,))}
    tree = specs(rules.forward(FUSED, lazy(fused_file())))
    with pytest.raises(CheckpointError, match=r"two tensors would be called 'model\.emb_in\.weight'"):
        load(lazy(source), tree, rules=FUSED, base_prefix="model")
    expected = {"layers.0:3:1.w": jax.ShapeDtypeStruct((3, 4, 6), np.float32)}
    with pytest.raises(CheckpointError, match=r"layers.2.w \[4, 6\]"):
        load(lazy({f"layers.{i}.w": numbers((4, 6)) for i in range(2)}), expected)
    with pytest.raises(CheckpointError, match="expected 3 layers"):
        load({}, {"layers.0:3:1.w": jax.ShapeDtypeStruct((2, 4, 6), np.float32)})


class Failing(NumpyTensor):
    def _fill(self, out, index):
        raise OSError("disk on fire")


def test_a_failing_read_stops_the_load():
    source = lazy({f"w{i}": numbers((64, 64), i) for i in range(100)}) | {"w50": Failing(numbers((64, 64)))}
    with pytest.raises(OSError, match="disk on fire"):
        load(source, specs(source))


def test_progress_bar(capsys):
    source = base()
    load(lazy(source), specs(source), progress=False)
    load(lazy(source), specs(source), progress=None)
    assert capsys.readouterr().err == ""
