import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxmodels.sharding import Rules, make_mesh, resolve_rules


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=2, tensor=-1)


def test_mesh_takes_what_is_left(mesh):
    assert dict(mesh.shape) == {"fsdp": 2, "tensor": 4}
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(fsdp=3, tensor=-1)


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
