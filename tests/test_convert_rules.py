"""Conversion rules: round trips and slice pull-backs, on random shapes and compositions, and exact counts of what is read."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmodels.convert import rules as R
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.rules import Alias, Ignore, Rename, Split, StackExperts, Tie, Transpose
from jaxmodels.convert.tensors import Cast, NumpyTensor, Spec, _transfer, as_tensor

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8]
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


class Counting(NumpyTensor):
    """A leaf that counts the bytes it is asked for."""

    asked = 0

    def _fill(self, out, index):
        self.asked += out.size * self.dtype.itemsize
        super()._fill(out, index)


def numbers(shape, dtype=np.float32, start=0):
    bits = np.random.default_rng(start).integers(0, 256, (math.prod(shape), np.dtype(dtype).itemsize), np.uint8)
    return bits.view(dtype).reshape(shape)  # every bit pattern, NaNs included


def lazy(arrays):
    return {key: Counting(array) for key, array in arrays.items()}


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_same(tensors, arrays):
    assert set(tensors) == set(arrays)
    for key, array in arrays.items():
        assert same(tensors[key].read(), array), key


@st.composite
def slices(draw, shape):
    index = []
    for n in shape:
        a = draw(st.integers(0, n))
        index.append(slice(a, draw(st.integers(a, n))))
    return tuple(index[: draw(st.integers(0, len(index)))])


@st.composite
def splits(draw):
    """A Split rule and the shape and dtype of its fused tensor."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    groups, rank = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    axis = draw(st.integers(-rank, rank - 1))
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    shape[axis] = groups * sum(sizes)
    wide = draw(st.sampled_from([1, 1, 3000]))  # runs longer than a page are read one by one
    if rank > 1 and axis % rank != rank - 1:
        shape[-1] *= wide
    targets = tuple(f"h.*.{name}.*" for name in "qkv"[: len(sizes)])
    return Split("h.*.qkv.*", targets, sizes, axis, groups), tuple(shape), draw(st.sampled_from(DTYPES))


def split_by_hand(array, rule):
    axis = rule.axis % array.ndim
    grouped = array.reshape(*array.shape[:axis], rule.groups, sum(rule.sizes), *array.shape[axis + 1 :])
    ends = list(itertools.accumulate(rule.sizes))
    parts = np.split(grouped, ends[:-1], axis=axis + 1)
    return [p.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :]) for p in parts]


@given(splits())
@quick
def test_split_takes_the_rows_of_every_group(case):
    rule, shape, dtype = case
    array = numbers(shape, dtype)
    file = {"h.0.qkv.weight": array, "h.0.norm.weight": numbers((3,), dtype)}
    tree = rule.forward(lazy(file))
    for name, part in zip("qkv", split_by_hand(array, rule)):
        assert same(tree[f"h.0.{name}.weight"].read(), part)
    back = rule.inverse(tree)
    assert list(back) == list(file)
    assert_same(back, file)


@given(splits(), st.data())
@quick
def test_split_slices_pull_back(case, data):
    rule, shape, dtype = case
    fused, array = lazy({"h.0.qkv.weight": numbers(shape, dtype)}), numbers(shape, dtype)
    tree = rule.forward(fused)
    for name, part in zip("qkv", split_by_hand(array, rule)):
        index = data.draw(slices(part.shape))
        fused["h.0.qkv.weight"].asked = 0
        assert same(tree[f"h.0.{name}.weight"].read(index), part[index])
        asked, wanted = fused["h.0.qkv.weight"].asked, part[index].nbytes
        row = math.prod(part.shape[rule.axis % part.ndim + 1 :]) * part.itemsize
        if rule.groups == 1 or row >= 4096:
            assert asked == wanted
        else:  # runs shorter than a page come with what lies between them
            assert asked <= wanted * sum(rule.sizes) / min(rule.sizes) + part[index].nbytes * sum(rule.sizes)
    index = data.draw(slices(shape))
    assert same(rule.inverse(tree)["h.0.qkv.weight"].read(index), array[index])


@given(splits(), st.data())
@quick
def test_fusing_reads_each_part_once(case, data):
    rule, shape, dtype = case
    array = numbers(shape, dtype)
    parts = lazy({f"h.0.{name}.weight": part for name, part in zip("qkv", split_by_hand(array, rule))})
    index = data.draw(slices(shape))
    assert same(rule.inverse(parts)["h.0.qkv.weight"].read(index), array[index])
    assert sum(part.asked for part in parts.values()) == array[index].nbytes


LAYOUTS = {
    "plain qkv": (Split("a.*", ("q.*", "k.*", "v.*"), (8, 4, 4)), (16, 6)),
    "gate_up": (Split("a.*", ("gate.*", "up.*"), (8, 8)), (16, 6)),
    "gpt-neox": (Split("a.*", ("q.*", "k.*", "v.*"), (4, 4, 4), groups=3), (36, 6)),
    "falcon": (Split("a.*", ("q.*", "k.*", "v.*"), (12, 4, 4), groups=2), (40, 6)),
    "gpt_oss": (Split("a.*", ("gate.*", "up.*"), (1, 1), axis=-1, groups=8), (3, 6, 16)),
    "gpt2": (Split("a.*", ("q.*", "k.*", "v.*"), (4, 4, 4), axis=-1), (6, 12)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts_weight_and_bias(name):
    rule, shape = LAYOUTS[name]
    bias = (shape[0], shape[-1]) if len(shape) == 3 else (shape[rule.axis],)
    file = {"a.weight": numbers(shape), "a.bias": numbers(bias, start=1)}
    tree = rule.forward(lazy(file))
    assert_same(rule.inverse(tree), file)
    grouped = {"gpt_oss": lambda x: (x[..., 0::2], x[..., 1::2]), "gate_up": lambda x: (x[:8], x[8:])}
    if name in grouped:
        for key in file:
            gate, up = grouped[name](file[key])
            kind = key.split(".")[1]
            assert same(tree[f"gate.{kind}"].read(), np.ascontiguousarray(gate))
            assert same(tree[f"up.{kind}"].read(), np.ascontiguousarray(up))
    if name == "gpt-neox":  # [heads, 3, head_dim, in]
        heads = file["a.weight"].reshape(3, 3, 4, 6)
        assert same(tree["k.weight"].read(), np.ascontiguousarray(heads[:, 1]).reshape(12, 6))
    if name == "falcon":  # [kv groups, queries of the group + key + value, head_dim, in]
        heads = file["a.weight"].reshape(2, 5, 4, 6)
        assert same(tree["q.weight"].read(), heads[:, :3].reshape(24, 6))
        assert same(tree["v.weight"].read(), heads[:, 4].reshape(8, 6))


def test_rename_is_one_to_one():
    rule = Rename("transformer.h.*.ln.**", "model.layers.*.norm.**")
    file = {"transformer.h.3.ln.weight": numbers((2,)), "transformer.h.12.ln.x.y": numbers((1,)), "other": numbers((1,))}
    tree = rule.forward(lazy(file))
    assert list(tree) == ["model.layers.3.norm.weight", "model.layers.12.norm.x.y", "other"]
    assert list(rule.inverse(tree)) == list(file)
    with pytest.raises(CheckpointError, match="no way back"):
        rule.forward(lazy({"model.layers.0.norm.weight": numbers((1,))}))
    with pytest.raises(CheckpointError, match="no way back"):
        Rename("**.a.**", "**.b.**").forward(lazy({"x.a.y.b.z": numbers((1,))}))
    with pytest.raises(CheckpointError, match="two tensors would be called 'w'"):
        Alias("w", ("x.w",)).forward(lazy({"w": numbers((1,)), "x.w": numbers((1,))}))
    with pytest.raises(ValueError, match="same wildcards"):
        Rename("a.*", "b.**")


@given(st.permutations(range(3)), st.data())
@quick
def test_transpose(axes, data):
    array = numbers((3, 4, 5))
    rule = Transpose("**.w", tuple(axes))
    file = lazy({"x.w": array, "x.b": numbers((3,))})
    tree = rule.forward(file)
    index = data.draw(slices(array.transpose(axes).shape))
    expected = np.ascontiguousarray(array.transpose(axes)[index])
    assert same(tree["x.w"].read(index), expected)
    assert file["x.w"].asked == expected.nbytes
    assert_same(rule.inverse(tree), {"x.w": array, "x.b": numbers((3,))})
    with pytest.raises(CheckpointError, match=r"x\.w: shape \[3\]"):
        rule.forward(lazy({"x.w": numbers((3,))}))


@given(st.integers(1, 12), st.sampled_from([(), (3,), (3, 4)]), st.data())
@quick
def test_experts(count, shape, data):
    rule = StackExperts("l.*.experts.#.w1.*", "l.*.experts.w1.*")
    order = data.draw(st.permutations(range(count)))  # files list expert 10 before expert 2
    file = {f"l.0.experts.{e}.w1.weight": numbers(shape, start=e) for e in order}
    tensors = lazy(file)
    tree = rule.forward(tensors)
    assert list(tree) == ["l.0.experts.w1.weight"]
    whole = np.stack([file[f"l.0.experts.{e}.w1.weight"] for e in range(count)])
    index = data.draw(slices(whole.shape))
    assert same(tree["l.0.experts.w1.weight"].read(index), whole[index])
    assert sum(t.asked for t in tensors.values()) == whole[index].nbytes
    assert_same(rule.inverse(tree), file)


def test_experts_that_do_not_stack():
    rule = StackExperts("experts.#.w", "experts.w")
    with pytest.raises(CheckpointError, match=r"missing: \['experts.1.w'\]"):
        rule.forward(lazy({"experts.0.w": numbers((2,)), "experts.2.w": numbers((2,))}))
    with pytest.raises(CheckpointError, match=r"experts.1.w: .*float32\[3\].* cannot be stacked"):
        rule.forward(lazy({"experts.0.w": numbers((2,)), "experts.1.w": numbers((3,))}))
    assert list(rule.forward(lazy({"experts.00.w": numbers((2,))}))) == ["experts.00.w"]
    with pytest.raises(ValueError, match="expected one `#`"):
        StackExperts("experts.*.w", "experts.*.w")


def test_alias_tie_ignore_leave_the_canonical_form():
    clean = (
        Alias("**.weight", ("**.gamma",)),
        Alias("**.bias", ("**.beta",)),
        Ignore(("**.inv_freq", "h.*.attn.mask")),
        Tie("lm_head.weight", "embed.weight"),
    )
    canonical = {"h.0.norm.weight": numbers((2,)), "h.0.norm.bias": numbers((2,)), "embed.weight": numbers((5, 2))}
    legacy = {
        "h.0.norm.gamma": canonical["h.0.norm.weight"],
        "h.0.norm.beta": canonical["h.0.norm.bias"],
        "rope.inv_freq": numbers((1,)),
        "h.0.attn.mask": numbers((1,)),
        "lm_head.weight": canonical["embed.weight"],
    }
    for file in (canonical, legacy, legacy | {"embed.weight": canonical["embed.weight"]}):
        tree = R.forward(clean, lazy(file))
        assert_same(tree, canonical)
        assert_same(R.inverse(clean, tree), canonical)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[4, 2\].*tied to embed.weight of shape \[5, 2\]"):
        R.forward(clean, lazy({"lm_head.weight": numbers((4, 2)), "embed.weight": numbers((5, 2))}))


def test_split_errors_name_the_key():
    rule = LAYOUTS["falcon"][0]
    with pytest.raises(CheckpointError, match=r"a.weight: shape \[39, 6\], expected 40 rows on axis 0"):
        rule.forward(lazy({"a.weight": numbers((39, 6))}))
    with pytest.raises(CheckpointError, match=r"cannot be fused into 'a.\*' without \['v.weight'\]"):
        rule.inverse(lazy({"q.weight": numbers((24, 6)), "k.weight": numbers((8, 6))}))
    with pytest.raises(CheckpointError, match=r"k.weight: cannot be fused"):
        rule.inverse(lazy({"k.weight": numbers((8, 6))}))


SCANNED = ["model.embed.weight", "model.layers.0.w", "model.layers.1:5:2.w", "model.layers.2:5:2.w", "model.layers.5.w", "model.norm"]


def test_scanned_names_are_the_table():
    assert R.members("model.layers.1:24:6.w") == ["model.layers.1.w", "model.layers.7.w", "model.layers.13.w", "model.layers.19.w"]
    assert R.members("model.layers.25.w") is None
    for bad in ("l.0:0:1.w", "l.0:4.w", "l.a:b:c.w", "l.0:2:1.e.0:2:1.w", "l.0:4:0.w"):
        with pytest.raises(ValueError, match="start:stop:step"):
            R.members(bad)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_stack_and_unstack_arrays(array):
    plain = {f"model.layers.{i}.w": array(numbers((2, 3), np.int8, i)) for i in range(6)}
    plain |= {"model.embed.weight": array(numbers((4,), np.int8)), "model.norm": array(numbers((4,), np.int8))}
    scanned = R.stack(plain, SCANNED)
    assert list(scanned) == SCANNED
    assert scanned["model.layers.1:5:2.w"].shape == (2, 2, 3)
    assert isinstance(scanned["model.layers.1:5:2.w"], type(plain["model.norm"]))
    back = R.unstack(scanned)
    assert set(back) == set(plain)
    assert all(np.array_equal(back[key], plain[key]) for key in plain)
    lazily = R.stacks(SCANNED).forward({key: as_tensor(x) for key, x in plain.items()})
    assert_same(lazily, {key: np.asarray(x) for key, x in scanned.items()})
    assert_same(R.stacks(SCANNED).inverse(lazily), {key: np.asarray(x) for key, x in plain.items()})


def test_stack_takes_every_parameter_once():
    plain = {f"l.{i}.w": np.zeros(2) for i in range(3)}
    with pytest.raises(ValueError, match=r"l\.2\.w"):
        R.stack(plain, ["l.0:2:1.w"])
    with pytest.raises(ValueError, match=r"l\.1\.w"):
        R.stack(plain, ["l.0:3:1.w", "l.1.w"])
    with pytest.raises(ValueError, match="expected 3 layers"):
        R.unstack({"l.0:3:1.w": np.zeros((2, 2))})
    with pytest.raises(CheckpointError, match=r"without \['l\.3\.w'\]"):
        R.stacks(["l.0:4:1.w"]).forward(lazy(plain))
    with pytest.raises(CheckpointError, match="expected 4 layers"):
        R.stacks(["l.0:4:1.w"]).inverse(lazy({"l.0:4:1.w": np.zeros((3, 2))}))


def test_stack_and_unstack_trace():
    names = ["l.0:2:1.w"]
    plain = {"l.0.w": jnp.arange(3.0), "l.1.w": jnp.arange(3.0) + 1}
    grads = jax.jit(jax.grad(lambda p: sum(jnp.sum(x**2) for x in R.stack(p, names).values())))(plain)
    assert np.array_equal(grads["l.1.w"], 2 * plain["l.1.w"])
    assert list(jax.jit(R.unstack)(R.stack(plain, names))) == ["l.0.w", "l.1.w"]


@st.composite
def families(draw):
    """A random list of rules that may follow each other, and the file they apply to."""
    layers, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))
    groups, sizes = draw(st.integers(1, 3)), tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=2)))
    experts, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = groups * sum(sizes)
    file = {}
    for i in range(layers):
        file[f"h.{i}.attn.qkv.weight"] = numbers((width, rows), dtype, i)
        file[f"h.{i}.attn.qkv.bias"] = numbers((rows,), dtype, i + 10)
        for e in range(experts):
            file[f"h.{i}.moe.{e}.gate_up"] = numbers((width, rows), dtype, 100 * i + e)
    file["emb.weight"] = numbers((7, width), dtype)
    steps = [
        [Transpose("h.*.attn.qkv.weight"), Split("h.*.attn.qkv.*", ("h.*.attn.q.*", "h.*.attn.k.*"), sizes, 0, groups)],
        [Split("h.*.attn.qkv.*", ("h.*.attn.q.*", "h.*.attn.k.*"), sizes, -1, groups), Transpose("h.*.attn.q.weight")],
        [StackExperts("h.*.moe.#.gate_up", "h.*.moe.gate_up"), Split("h.*.moe.gate_up", ("h.*.moe.g", "h.*.moe.u"), sizes, 2, groups)],
        [Split("h.*.moe.*.gate_up", ("h.*.moe.*.g", "h.*.moe.*.u"), sizes, 1, groups), StackExperts("h.*.moe.#.g", "h.*.moe.g")],
    ]
    chosen = [draw(st.sampled_from(steps[:2])), draw(st.sampled_from(steps[2:])), [Rename("emb.weight", "model.embed_tokens.weight")]]
    rules = [rule for step in draw(st.permutations(chosen)) for rule in step] + [Rename("h.**", "model.layers.**")]
    return rules, file, layers


@given(families(), st.booleans(), st.data())
@quick
def test_compositions_round_trip_and_pull_back(case, scan, data):
    rules, file, layers = case
    if scan:
        names = list(R.forward(rules, {key: Spec(x.shape, x.dtype) for key, x in file.items()}))
        rules = [*rules, R.stacks(name.replace("layers.0.", f"layers.0:{layers}:1.") for name in names if "layers.0." in name)]
    tree = R.forward(rules, lazy(file))
    assert_same(R.inverse(rules, tree), file)
    for tensor in tree.values():
        index = data.draw(slices(tensor.shape))
        assert same(tensor.read(index), np.ascontiguousarray(tensor.read()[index]))
    specs = R.inverse(rules, {key: Spec(t.shape, t.dtype) for key, t in tree.items()})
    assert {key: (t.shape, t.dtype) for key, t in specs.items()} == {key: (x.shape, x.dtype) for key, x in file.items()}


def test_cast_is_to_nearest_even():
    array = np.array([1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, -0.0, np.nan], np.float32)
    read = Cast(NumpyTensor(array), ml_dtypes.bfloat16).read((slice(1, 6),))
    assert same(read, np.asarray(jnp.asarray(array).astype(jnp.bfloat16))[1:])
    once = Cast(NumpyTensor(array), ml_dtypes.bfloat16)
    wide = np.empty(6, np.float32)
    once.read_into(wide)  # through bfloat16, whatever the destination
    assert np.array_equal(wide, once.read().astype(np.float32), equal_nan=True)


@given(st.data())
@quick
def test_jax_arrays_are_read_by_shards(data):
    devices = np.array(jax.devices())
    if len(devices) < 2:
        mesh = jax.sharding.Mesh(devices[:1].reshape(1, 1), ("a", "b"))
    else:
        n = len(devices) // 2
        mesh = jax.sharding.Mesh(devices[: 2 * n].reshape(2, n), ("a", "b"))
    array = numbers((4, 8), np.int8)
    spec = data.draw(st.sampled_from([("a", "b"), ("b", None), (None, "a"), (None, None), (("a", "b"), None)]))
    sizes = [math.prod(mesh.shape[m] for m in ((axis,) if isinstance(axis, str) else axis or ())) for axis in spec]
    if any(n % size for n, size in zip(array.shape, sizes)):
        return
    placed = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    index = data.draw(slices(array.shape))
    assert same(as_tensor(placed).read(index), np.ascontiguousarray(array[index]))


def test_slices_cut_on_a_device_share_one_program():
    array = numbers((6, 5), np.int8)
    placed = jax.device_put(array, jax.devices()[-1])
    assert same(_transfer(placed, (slice(0, 6), slice(0, 5))), array)
    assert same(_transfer(placed, (slice(0, 2), slice(1, 3))), array[0:2, 1:3])
    events = []
    listen = lambda event, *_, **__: events.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for row in range(5):
            assert same(_transfer(placed, (slice(row, row + 2), slice(1, 3))), array[row : row + 2, 1:3])
        assert not [event for event in events if "compile" in event]
        _transfer(placed, (slice(0, 3), slice(1, 3)))
        assert [event for event in events if "compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_leaves():
    assert as_tensor(jnp.float32(3)).read().shape == ()
    assert as_tensor(np.float32(3)).read() == 3
    spec = as_tensor(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16))
    assert (spec.shape, spec.dtype, spec.size, spec.nbytes) == ((2, 3), np.dtype(ml_dtypes.bfloat16), 6, 12)
    with pytest.raises(ValueError, match="no data"):
        spec.read()
    with pytest.raises(IndexError, match="step 1"):
        as_tensor(np.zeros(4)).read((slice(0, 4, 2),))
    with pytest.raises(ValueError, match=r"has shape \(4,\), the destination has \(3,\)"):
        as_tensor(np.zeros(4)).read_into(np.zeros(3))
    assert as_tensor(np.zeros((0, 3), np.int8)).read().shape == (0, 3)
