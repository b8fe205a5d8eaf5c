"""Plans for TPU slices that are not here, and what reads the compiled programs."""

import importlib.util
import json
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmodels.cli.main import main
from jaxmodels.models.bert import BertConfig, BertForMaskedLM
from jaxmodels.models.gemma2 import Gemma2Config
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mamba import MambaConfig
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.models.t5 import T5Config
from jaxmodels.ops.moe import gated_mlp, mix_experts
from jaxmodels.ops.splash import splash
from jaxmodels.sharding import Rules, make_mesh
from jaxmodels.sharding.chips import chip_of
from jaxmodels.sharding.flops import count_flops
from jaxmodels.sharding.hlo import analyse, size
from jaxmodels.sharding.plan import _class_for, _uncached, plan, preset_for, rank, sweep_meshes, topology_devices
from jaxmodels.training import make_train_step

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, with which a CPU machine compiles for TPU"
)

TINY = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64}
LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": False}
LLAMA_8B = LlamaConfig.from_dict(
    LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
)
LLAMA_70B = LlamaConfig.from_dict(
    LLAMA_3 | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
)


def kinds(program, least=0):
    """{(kind, devices): how often} of the collectives of at least so many bytes."""
    found = {}
    for c in program.collectives:
        if c.bytes >= least:
            found[c.kind, c.group] = found.get((c.kind, c.group), 0) + c.count
    return found


def test_collectives_count_as_often_as_their_loops_run():
    mesh = make_mesh(jax.devices()[:4], tensor=4)
    split = NamedSharding(mesh, P(None, "tensor"))

    def program(x, w):  # [8,64] by five [64,64] whose contracted axis is split: one all-reduce of [8,64] each
        return lax.scan(lambda x, w: (lax.with_sharding_constraint(x, split) @ w, None), x, w)[0]

    rows = NamedSharding(mesh, P(None, "tensor", None))
    shapes = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=rows)
    found = analyse(jax.jit(program, out_shardings=NamedSharding(mesh, P())).lower(*shapes).compile().as_text(), 4)
    assert sum(kinds(found).get((kind, 4), 0) for kind in ("all-reduce", "reduce-scatter")) == 5
    assert found.unknown_loops == 0


def test_traffic_of_slices_and_of_unknown_loops():
    """A loop that reads one of 100 slices a turn moves a slice a turn, and a loop that ends by its data is told apart."""
    stack = jax.ShapeDtypeStruct((100, 256, 256), jnp.float32)
    vector = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    text = jax.jit(lambda x, w: lax.scan(lambda x, w: (jnp.sin(x) + w, None), x, w)[0]).lower(vector, stack).compile().as_text()
    found = analyse(text, 1)
    turn = 3 * 256 * 256 * 4  # x read, w read, x written
    assert 90 * turn < found.traffic < 140 * turn

    until = jax.jit(lambda x: lax.while_loop(lambda x: x.sum() < 1e6, lambda x: jnp.sin(x) + 2, x)).lower(vector).compile().as_text()
    found = analyse(until, 1)
    assert found.unknown_loops == 1 and 2 * 256 * 256 * 4 <= found.traffic < 6 * 256 * 256 * 4


def test_shapes():
    assert size("(bf16[4,8]{1,0:T(8,128)}, f32[3]{0:S(1)}, pred[])") == 64 + 1
    assert size("f32[3]{0:T(128)S(1)}") == 0 and size("f32[3]{0:T(128)S(1)}", hbm=False) == 12


def test_flops():
    x, w = jnp.ones((3, 8, 16)), jnp.ones((16, 32))
    assert count_flops(lambda x, w: jnp.sin(x @ w), x, w) == 2 * 3 * 8 * 16 * 32
    assert count_flops(lambda x, w: lax.scan(lambda c, x: (c, x @ w), 0, x), x, w) == 2 * 3 * 8 * 16 * 32
    assert count_flops(jax.grad(lambda w: (x @ w).sum()), w) == 2 * (2 * 3 * 8 * 16 * 32)
    assert count_flops(lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w.T @ w), x, w) == 3 * 2 * 3 * 8 * 16 * 32
    groups = jnp.array([3, 5])
    assert count_flops(lambda x, w: lax.ragged_dot(x, w, groups), x[0], jnp.ones((2, 16, 32))) == 2 * 8 * 16 * 32
    share, experts = jnp.ones((8, 2)), {name: jnp.ones((4, 16, 16)) for name in ("gate_proj", "up_proj", "down_proj")}
    mixed = lambda w, x: mix_experts(partial(gated_mlp, jnp.sin), w, x, share, jnp.array([[0, 1]] * 8)).sum()
    assert count_flops(jax.grad(mixed, (0, 1)), experts, x[0]) == 3 * 3 * 2 * (8 * 2) * 16 * 16  # no product twice
    q, k, p = jnp.ones((1, 256, 4, 128)), jnp.ones((1, 256, 2, 128)), jnp.arange(256)[None]
    flash = lambda q, k, v: splash(q, k, v, p, p, 0.1, interpret=True)[0].sum()
    forward, backward = count_flops(flash, q, k, k), jax.grad(flash, (0, 1, 2))
    assert forward == 2 * 2 * 4 * 256 * 256 * 128
    again = 3 / 7 * 7 / 2  # three of seven products of the backward pass, each half as dear as the forward pass
    assert count_flops(backward, q, k, k) == pytest.approx((3 + again) * forward, rel=1e-2)
    assert count_flops(backward, q, k, k, recomputed=False) == pytest.approx(3 * forward, rel=1e-2)
    mesh = make_mesh(data=8)
    shard = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert count_flops(shard, jnp.ones((64, 16))) == 8 * 2 * 8 * 8 * 16


def test_presets_by_mesh():
    assert [preset_for(m) for m in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"expert": 8, "tensor": 2})] == ["fsdp", "fsdp+tensor", "expert"]


def test_meshes_to_try():
    assert sweep_meshes(8, "train", {}) == [
        {"fsdp": 8, "tensor": 1},
        {"fsdp": 4, "tensor": 2},
        {"fsdp": 2, "tensor": 4},
        {"fsdp": 1, "tensor": 8},
    ]
    assert sweep_meshes(12, "decode", {}) == [{"data": 12, "tensor": 1}, {"data": 6, "tensor": 2}, {"data": 3, "tensor": 4}]
    assert sweep_meshes(16, "train", {"stage": 8}) == [{"stage": 8, "data": 2, "tensor": 1}, {"stage": 8, "data": 1, "tensor": 2}]
    assert sweep_meshes(8, "train", {"tensor": 2, "expert": 2}) == [{"fsdp": 2, "tensor": 2, "expert": 2}]
    assert sweep_meshes(8, "prefill", {"fsdp": 2}) == [{"fsdp": 2, "tensor": 4}]
    assert sweep_meshes(8, "train", {"fsdp": 2, "tensor": 4}) == [{"fsdp": 2, "tensor": 4}]
    for fixed in ({"stage": 3}, {"fsdp": 2, "tensor": 2}, {"fsdp": -1}):
        with pytest.raises(ValueError, match="a sweep over 8 chips that keeps"):
            sweep_meshes(8, "train", fixed)
    with pytest.raises(ValueError, match=r"mesh axes \['tensro'\] are none of stage"):
        sweep_meshes(8, "train", {"tensro": 2})


@needs_libtpu
@pytest.mark.parametrize("job", ["decode", pytest.param("train", marks=pytest.mark.slow)])
def test_a_sweep_ranks_what_can_be(tmp_path, capsys, job):
    """The fastest that fits first, and last what the mesh cannot do, with the reason: three layers in two stages."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    arguments = ["--topology", "v5e:2x2", "--batch", "8", "--length", "256", "--sweep", "--job", job]
    assert main(["plan", str(tmp_path / "config.json"), *arguments]) == 0
    tried, ranked = (part.splitlines() for part in capsys.readouterr().out.split("\n\nranked\n"))
    assert sorted(tried) == sorted(ranked) and len(ranked) == {"decode": 3, "train": 6}[job]
    milliseconds = [float(line.split(" ms ")[0].split()[-1]) for line in ranked]
    assert milliseconds == sorted(milliseconds)
    if job == "train":
        assert main(["plan", str(tmp_path / "config.json"), *arguments, "--mesh", "stage=2", "--remat", "none"]) == 1
        ranked = capsys.readouterr().out.split("\n\nranked\n")[1].splitlines()
        assert len(ranked) == 2 and all("the stack cannot be cut into 2 stages" in line for line in ranked)
        assert main(["plan", str(tmp_path / "config.json"), *arguments, "--mesh", "stage=3"]) == 1
        assert "the sizes must divide them" in capsys.readouterr().err


@pytest.fixture
def cached(tmp_path):
    """Where JAX keeps programs, however small, meanwhile."""
    options = {"jax_compilation_cache_dir": str(tmp_path / "programs"), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@needs_libtpu
def test_a_plan(tmp_path, capsys, cached):
    """Tensor-parallel decoding needs two all-reduces of [B, hidden] a layer and one for the split embedding, and no weight is gathered; the
    command prints the same. A compilation cache keeps none of it, as it could not read it back."""
    found = plan(LlamaConfig(**TINY), topology="v5e:2x2", mesh={"tensor": 4}, job="decode", batch=8, length=256)
    assert kinds(found.program, 8 * 256 * 2) == {("all-reduce", 4): 7}
    assert found.fits and found.program.unknown_loops == 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    arguments = ["--topology", "v5e:2x2", "--mesh", "tensor=-1", "--job", "decode", "--batch", "8", "--length", "256"]
    assert main(["plan", str(tmp_path / "config.json"), *arguments]) == 0
    assert "all-reduce over 4" in capsys.readouterr().out
    assert not cached.exists()
    jax.jit(lambda x: x * 2)(jnp.ones(3)).block_until_ready()
    assert list(cached.iterdir())  # what runs here is kept as before


FAMILIES = {  # configs, and how many all-reduces of [B, hidden] a layer needs
    "windows, soft caps": (Gemma2Config(**TINY | {"num_hidden_layers": 4}, num_key_value_heads=4, sliding_window=100), 2),
    "biases": (GPT2Config.from_dict({"vocab_size": 512, "n_embd": 256, "n_layer": 3, "n_head": 4}), 2),
    "recurrent": (MambaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=3, state_size=16), 1),
    "encoder-decoder": (
        T5Config(vocab_size=512, hidden_size=256, head_dim=64, d_ff=512, num_hidden_layers=3, num_decoder_layers=3, num_attention_heads=4),
        3,
    ),
}


@needs_libtpu
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_of_model_decodes_without_gathering_weights(kind):
    config, reductions = FAMILIES[kind]
    found = plan(config, topology="v5e:2x2", mesh={"tensor": 4}, job="decode", batch=16, length=256)
    assert kinds(found.program, 16 * 256 * 2) == {("all-reduce", 4): reductions * config.num_hidden_layers + 1}


@needs_libtpu
def test_jobs_of_encoders():
    """An encoder-decoder reads the prompt with its encoder; an encoder alone trains, by its masked head, and writes nothing."""
    config, (batch, length) = FAMILIES["encoder-decoder"][0], (16, 256)
    found = plan(config, topology="v5e:2x2", mesh={"fsdp": 4}, job="prefill", batch=batch, length=length)
    token = 2 * (4 * 256 * 256 + 2 * 256 * 512) + 4 * 256 * length  # projections and MLP of an encoder's token, and its attention
    assert found.fits and found.flops == pytest.approx(batch * length * 3 * (token + 2 * 2 * 256 * 256), rel=0.05)  # and cross keys, values
    bert = BertConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    for job in ("prefill", "decode"):
        with pytest.raises(ValueError, match=rf"job '{job}' is for models that write text; bert reads all tokens at once"):
            plan(bert, topology="v5e:2x2", mesh={"fsdp": 4}, job=job, batch=batch, length=length)
    assert _class_for(bert, "train") is BertForMaskedLM


@needs_libtpu
def test_slices():
    """Real devices of two slices: the first axis crosses them, and a program compiles for both."""
    topology_devices("v5e:2x2")  # libtpu's settings
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    rules = Rules.preset("fsdp+tensor", make_mesh(devices, data=2, fsdp=2, tensor=-1))
    assert [{device.slice_index for device in part.flat} for part in rules.mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="its first axis crosses the 2 slices"):
        make_mesh(devices, data=1, fsdp=8)
    spec = lambda axes, shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rules.sharding(axes, shape))
    arguments = spec(("mlp", "embed"), (512, 256)), spec(("batch", None), (64, 256))
    with _uncached():
        compiled = jax.jit(jax.grad(lambda w, x: jnp.square(x @ w.T).sum())).lower(*arguments).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * (512 * 256 // 4 + 64 * 256 // 4)


@needs_libtpu
def test_a_v4_is_one_device_a_chip():
    devices = topology_devices("v4:2x2x1")
    assert dict(make_mesh(devices, tensor=4).shape) == {"tensor": 4}
    assert chip_of(devices[0].device_kind).flops == 275e12


@needs_libtpu
def test_what_does_not_fit_is_a_plan_too():
    build = partial(plan, LLAMA_70B, topology="v5e:2x2", mesh={"tensor": 4}, job="decode")
    found = build(batch=1, length=256)
    assert not found.fits and "does NOT fit" in str(found)
    small = plan(LlamaConfig(**TINY), topology="v5e:2x2", mesh={"data": 4}, job="decode", batch=6, length=256)
    assert rank([found, small])[0] is small
    assert "6 are no multiple of 4: every chip computes all of them" in str(small) and "multiple" not in str(found)


@needs_libtpu
def test_refusals(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    arguments = ["--job", "decode", "--batch", "8", "--length", "256"]
    for extra, words in [
        (["--topology", "v5e:2x2", "--mesh", "tensor=3"], "does not fit 4 devices"),
        (["--topology", "v5e:2x2", "--mesh", "tensor:4"], "expected sizes such as"),
        (["--topology", "v5e:2x2", "--mesh", "tensor=4,tensor=4"], "expected sizes such as"),
        (["--topology", "v9:2x2", "--mesh", "tensor=4"], "topology 'v9:2x2'"),
        (["--topology", "v5e:2x2"], "--mesh is needed"),
    ]:
        assert main(["plan", str(tmp_path / "config.json"), *arguments, *extra]) == 1
        assert words in capsys.readouterr().err


@needs_libtpu
@pytest.mark.slow
def test_8b_trains_on_v5e():
    found = plan(LLAMA_8B, topology="v5e:16x16", mesh={"fsdp": 64, "tensor": 4}, job="train", batch=256, length=2048)
    assert found.fits and found.parameters == 8_030_261_248
    large = kinds(found.program, 1 << 20)
    # seven weights a layer are gathered for the forward pass and again for the backward pass, attention's four once more, and their
    # gradients scattered; activations are reduced over the tensor axis: twice a layer forward, twice backward, once of the two recomputed
    assert 5 * 32 <= large["all-reduce", 4] <= 5 * 32 + 6
    assert 7 * 32 * 2 <= large["all-gather", 64] <= (7 * 2 + 4) * 32 + 4
    assert large["reduce-scatter", 64] == 5 * 32  # some of attention's together
    assert set(large) <= {
        ("all-gather", 64),
        ("reduce-scatter", 64),
        ("all-reduce", 4),
        ("all-to-all", 64),
        ("all-reduce", 64),
        ("all-gather", 4),
    }
    assert found.program.kernels["tpu_custom_call"] == 4 * 32  # forward, recomputed, and two of the backward pass


@needs_libtpu
@pytest.mark.slow
def test_8b_trains_in_parts(monkeypatch):
    """Four parts of the batch one after the other, recomputed, their losses in chunks: four times the collectives of a part, which holds
    a quarter of the activations."""
    monkeypatch.setattr("jaxmodels.training.step.make_train_step", partial(make_train_step, accumulation_steps=4))
    found = plan(LLAMA_8B, topology="v5e:16x16", mesh={"fsdp": 64, "tensor": 4}, job="train", batch=256, length=2048)
    assert found.fits and found.temporaries < 3e9
    large = kinds(found.program, 1 << 20)
    assert 4 * 5 * 32 <= large.pop(("all-reduce", 4)) <= 4 * (5 * 32 + 6)
    assert 4 * 7 * 32 * 2 <= large.pop(("all-gather", 64)) <= 4 * ((7 * 2 + 4) * 32 + 4)
    assert large.pop(("reduce-scatter", 64)) == 4 * 5 * 32
    assert sum(large.values()) <= 8 * 4  # a few of embeddings and logits
    assert found.program.kernels["tpu_custom_call"] == 4 * 4 * 32


@needs_libtpu
@pytest.mark.slow
def test_8b_trains_in_a_pipeline():
    """Eight stages: activations go to the neighbours in each of 39 ticks, a stage's gradients are reduced over its replicas once, and no
    parameter is gathered."""
    mesh = {"stage": 8, "tensor": 4, "data": 8}
    found = plan(LLAMA_8B, topology="v5e:16x16", mesh=mesh, job="train", batch=256, length=2048, microbatches=32)
    assert found.fits and found.bubble == 7 / 39 and "32 microbatches: stages idle 18 %" in str(found)
    large = kinds(found.program, 1 << 23)  # a microbatch of one replica is 16 MB
    assert large["collective-permute", 8] == 4 * 39
    assert set(large) == {("collective-permute", 8), ("all-reduce", 4), ("all-reduce", 8), ("all-reduce", 64)}
    assert large["all-reduce", 8] + large["all-reduce", 64] < 39


@needs_libtpu
@pytest.mark.slow
def test_experts_and_windows_in_a_pipeline():
    """Grouped products and windowed flash attention compile for TPU with the axis that stages add."""
    experts = MixtralConfig(**TINY | {"num_hidden_layers": 4}, num_key_value_heads=2, num_local_experts=4, sliding_window=100)
    options = {"topology": "v5e:2x4", "job": "train", "batch": 16, "length": 512, "microbatches": 4}
    found = plan(experts, mesh={"stage": 2, "data": 2, "expert": 2}, **options)
    assert found.fits and found.program.kernels["tpu_custom_call"] > 0
    alone = plan(experts, mesh={"data": 4, "expert": 2}, **options | {"microbatches": None})
    assert found.useful_flops == alone.useful_flops < found.flops


@needs_libtpu
@pytest.mark.slow
def test_70b_decodes_on_v5p():
    found = plan(LLAMA_70B, topology="v5p:4x4x4", mesh={"data": 8, "tensor": 8}, job="decode", batch=64, length=4096)
    assert found.fits and found.parameters == 70_553_706_496
    assert kinds(found.program, 8 * 8192 * 2) == {("all-reduce", 8): 161}  # two a layer and the split embedding's rows


@needs_libtpu
@pytest.mark.slow
def test_128k_tokens_prefill_with_sequence_parallelism():
    found = plan(LLAMA_8B, topology="v5e:16x16", mesh={"sequence": 32, "tensor": 8}, job="prefill", batch=1, length=131072)
    assert found.fits and found.program.kernels["tpu_custom_call"] == 32
    assert found.temporaries < 1e9  # no logits, no [T,T]
    large = kinds(found.program, 1 << 22)
    assert set(large) == {("all-gather", 32), ("all-reduce", 8)}  # keys and values over the sequence, activations over the tensor axis


@needs_libtpu
@pytest.mark.slow
def test_mixtral_trains_with_expert_parallelism():
    """Tokens are gathered over the expert axis and their results scattered back: twice a layer forward, recomputed, and backward. Expert
    weights are gathered over fsdp alone; what is reduced as a whole is two of the gradients of a device's expert, never a result."""
    config = MixtralConfig.from_dict({"sliding_window": None, "tie_word_embeddings": False})
    found = plan(config, topology="v5p:4x4x4", mesh={"fsdp": 8, "expert": 8}, job="train", batch=64, length=2048)
    assert found.fits and found.parameters == 46_702_792_704
    large = [c for c in found.program.collectives if c.bytes >= 1 << 26]
    assert {c.kind for c in large} <= {"all-gather", "reduce-scatter", "all-reduce"}
    expert_bytes = 4096 * 14336 * 2
    assert all(c.bytes <= 3 * expert_bytes and c.group == 8 for c in large if c.kind == "all-gather")  # one expert's weights, never all
    reduced = [c for c in large if c.kind == "all-reduce"]
    assert sum(c.count for c in reduced if c.bytes == expert_bytes) == 2 * 32
    assert sum(c.count * c.bytes for c in reduced if c.bytes != expert_bytes) < 2e9


@needs_libtpu
@pytest.mark.slow
def test_zero_reduces_whole_gradients_and_split_ones():
    """ZeRO-1 sums whole gradients over all chips; of ZeRO-2 each chip keeps its part, by the same collectives as ZeRO-3. Both hold whole
    parameters and split moments, and gather the parameters once, updated."""
    config, mesh = LlamaConfig(**TINY | {"hidden_size": 512, "intermediate_size": 1024}), {"data": 2, "fsdp": 4}
    found = {}
    for rules in ("zero1", "zero2", "fsdp"):
        found[rules] = plan(config, topology="v5e:2x4", mesh=mesh, job="train", batch=16, length=512, rules=rules)
    held = 4 * found["zero1"].parameters
    for rules, parts in (("zero1", 1 + 2 / 4), ("zero2", 1 + 2 / 4), ("fsdp", 3 / 4)):
        assert found[rules].arguments == pytest.approx(parts * held, rel=0.02)
    sums = {rules: Counter() for rules in found}
    for rules, report in found.items():
        for c in report.program.collectives:
            sums[rules][c.kind, c.group] += c.count * c.bytes
    reduced = [key for key in sums["fsdp"] if key[0] in ("all-reduce", "reduce-scatter")]
    assert {key: sums["zero2"][key] for key in reduced} == {key: sums["fsdp"][key] for key in reduced}
    assert sums["zero1"]["all-reduce", 8] > 0.9 * held / 2 > 4 * sums["zero2"]["all-reduce", 8]  # gradients are bfloat16
    assert sums["zero2"]["reduce-scatter", 4] and not sums["zero1"]["reduce-scatter", 4]
    assert all(sums[rules]["all-gather", 4] == pytest.approx(held, rel=0.02) for rules in ("zero1", "zero2"))
