import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmodels.generation import enable_compilation_cache
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.sharding import Rules, agree, explain, global_batch, lockstep, make_mesh, process_rows, resolve_rules, to_host


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=2, tensor=-1)


def test_mesh_takes_what_is_left(mesh):
    assert dict(mesh.shape) == {"fsdp": 2, "tensor": 4}
    for sizes in ({"fsdp": 3, "tensor": -1}, {"fsdp": -1, "tensor": -1}, {"fsdp": 4}):
        with pytest.raises(ValueError, match="does not fit 8 devices"):
            make_mesh(**sizes)
    for size in (0, -2, 2.0, "8", None):
        with pytest.raises(ValueError, match="expected whole numbers from 1, or -1"):
            make_mesh(fsdp=size, tensor=-4 if size == -2 else 2)
    with pytest.raises(ValueError, match="does not fit 0 devices"):
        make_mesh([], fsdp=-1)


def test_heads_are_cut_whole(mesh):
    rules = Rules.preset("fsdp+tensor", mesh)
    units = {"heads": 16, "kv_heads": 16}
    assert rules.spec(("heads", "embed"), (128, 64), units) == P("tensor", "fsdp")
    assert rules.spec(("kv_heads", "embed"), (32, 64), units) == P(None, "fsdp")  # 2 heads over 4 devices
    assert rules.spec(("vocab", "embed"), (151, 63)) == P(None, None)
    assert rules.spec(("batch", "seq", "act_heads", None), (4, 7, 8, 16)) == P("fsdp", None, "tensor", None)


def test_a_mesh_axis_serves_once(mesh):
    rules = Rules.preset("tensor", mesh)
    assert rules.spec(("heads", "mlp"), (64, 64)) == P("tensor", None)


def test_constrain_places(mesh):
    rules = Rules.preset("fsdp", mesh)
    x = jax.jit(lambda x: rules.constrain(x, ("batch", "seq")))(jax.numpy.zeros((4, 6)))
    assert x.sharding.spec == P("fsdp")


def test_choices(mesh):
    assert resolve_rules(None, None) is None
    assert resolve_rules("tensor", mesh) == Rules.preset("tensor", mesh)
    with pytest.raises(ValueError, match="not known"):
        resolve_rules("tensro", mesh)
    with pytest.raises(ValueError, match="needs a mesh"):
        resolve_rules("tensor", None)


def test_explain(mesh):
    """Where everything lives, and why two kv heads stay whole on four devices."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    told = explain(LlamaForCausalLM(config), mesh, "fsdp+tensor").splitlines()
    lines = {line.split()[0]: line for line in told}
    assert "[heads 64 / tensor, embed 64 / fsdp]  2,048 B" in lines["model.layers.0.self_attn.q_proj.weight"]
    assert "kv_heads: 2 heads of 16 over tensor = 4 does not divide" in lines["model.layers.0.self_attn.k_proj.weight"]
    held = sum(int(line.split("]")[1].split()[0].replace(",", "")) for line in told[:-1])
    assert told[-1].startswith(f"in all {held:,} of ") and told[-1].endswith("on each of 8 devices (fsdp=2, tensor=4)")
    with pytest.raises(ValueError, match="explain needs rules"):
        explain(LlamaForCausalLM(config))


def test_unknown_mesh_axes_are_refused(mesh):
    with pytest.raises(ValueError, match=r"the rules name mesh axes \['tensro'\]"):
        Rules(mesh, (("heads", ("tensro",)),))
    with pytest.raises(ValueError, match=r"no preset knows the mesh axes \['tensro'\]"):
        Rules.preset("tensor", make_mesh(fsdp=2, tensro=4))


def test_no_compilation_cache_on_cpu(tmp_path, monkeypatch):
    """Programs from it start their collectives in any order."""
    monkeypatch.setenv("JAXMODELS_COMPILATION_CACHE", str(tmp_path))
    assert enable_compilation_cache.__wrapped__() is None and not list(tmp_path.iterdir())
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with pytest.warns(UserWarning, match="3 CPU devices with a compilation cache .* JAX_ENABLE_COMPILATION_CACHE=false"):
            Rules.preset("fsdp", make_mesh(jax.devices()[:3], fsdp=3))
        Rules.preset("fsdp", make_mesh(jax.devices()[7:], fsdp=1))
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_what_is_no_mesh_and_no_table(mesh):
    for other in (8, {"fsdp": 8}, jax.devices()):
        with pytest.raises(ValueError, match=r"expected a mesh as jaxmodels\.make_mesh"):
            resolve_rules(None, other)
    with pytest.raises(ValueError, match=r"make it by jaxmodels.make_mesh\(fsdp=4, tensor=2\)"):
        resolve_rules("fsdp", jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2))
    for table in ({"embed": ("fsdp",)}, (("embed", "fsdp"),), (("embed", None),)):
        with pytest.raises(ValueError, match="expected lines such as"):
            Rules(mesh, table)
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    Rules(mesh, (("state", ("fsdp",)), ("act_state", ("fsdp",)))).check_axes(["state"])  # a family's own
    with pytest.raises(ValueError, match=r"the rules place the axes \['embd'\], which no parameter has; there are act_embed, .* vocab"):
        explain(LlamaForCausalLM(config), rules=Rules(mesh, (("embd", ("fsdp",)), ("mlp", ("tensor",)))))


def test_several_slices():
    """The first axis crosses the slices, the others stay inside one."""

    class Device:  # what a mesh looks at of a device of a multi-slice TPU job, which no machine here has
        def __init__(self, n):
            self.id, self.slice_index, self.process_index, self.platform, self.device_kind = n, n // 4, n // 4, "cpu", "cpu"

    grid = make_mesh([Device(n) for n in range(8)], data=4, tensor=2).devices
    assert [[d.slice_index for d in row] for row in grid] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match="must be a multiple of that number"):
        make_mesh([Device(n) for n in range(8)], data=1, tensor=8)


def test_rows_of_one_process(mesh):
    """What several processes do, one does alone: test_processes.py has them."""
    rules = Rules.preset("fsdp+tensor", mesh)
    assert process_rows(rules, 6) == slice(0, 6)
    rows = np.arange(24).reshape(6, 4)
    batch = global_batch(rules, {"input_ids": rows})["input_ids"]
    assert batch.shape == (6, 4) and batch.sharding.spec == P("fsdp", None)
    np.testing.assert_array_equal(to_host({"x": batch})["x"], rows)
    both = Rules.preset("sequence", make_mesh(fsdp=2, sequence=4))
    assert global_batch(both, {"input_ids": rows})["input_ids"].sharding.spec == P("fsdp", "sequence")
    for call in (lambda: process_rows(rules, 5), lambda: global_batch(rules, {"input_ids": rows[:5]})):
        with pytest.raises(ValueError, match=r"a batch of 5 rows over mesh .*: expected a multiple of 2"):
            call()
    agree("alone", mesh=8)
    with pytest.raises(KeyError), lockstep("alone"):
        raise KeyError("its own")
