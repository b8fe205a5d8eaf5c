"""The TPU kernel: its numbers in interpret mode against eager attention, and the program that a TPU would run."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.cache import init_cache
from jaxmodels.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.ops.attention import IMPLEMENTATIONS, Implementation, attention, eager, resolve_attention
from jaxmodels.ops.splash import _Band, splash
from jaxmodels.params import flatten, init_params, unflatten
from jaxmodels.sharding import Rules, make_mesh

interpreted = partial(splash, interpret=True)


def positions(B, T, padding):
    """[B,T]: row b has 37 b columns of padding on that side, or every third column between its tokens."""
    if padding == "between":
        real = (np.arange(T) % 3 > 0) | (np.arange(B)[:, None] == 0)
        return jnp.asarray(np.where(real, real.cumsum(1) - 1, -1), jnp.int32)
    columns = np.arange(T) if padding == "left" else np.arange(T)[::-1]
    real = columns[None] >= 37 * np.arange(B)[:, None]
    return jnp.asarray(np.where(real, real.cumsum(1) - 1, -1), jnp.int32)


def inputs(T, N, K, H, dtype=jnp.float32, padding="left", Hv=None):
    rng = np.random.default_rng(T + H)
    shapes = ((2, T, N, H), (2, T, K, H), (2, T, K, Hv or H))
    return *(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes), positions(2, T, padding)


def run(function, q, k, v, p):
    """The output [B,T,N,H], padding zeroed, and the gradients of a random projection of it by q, k and v, in float32."""
    real = np.asarray(p >= 0)[:, :, None, None]

    def loss(q, k, v):
        out = function(q, k, v, p, p, 0.11)[0].astype(jnp.float32)
        return jnp.sum(out * real * jax.random.normal(jax.random.key(3), out.shape)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(out).all()  # padding too: its nan would spread
    return [np.asarray(x, np.float32) for x in (out * real, *gradients)]


def errors(got, expected):
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, expected)]


def mean_errors(got, expected):
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(got, expected)]


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "padding"),
    [
        (601, 3, 1, 80, "right"),
        (20, 4, 2, 128, "left"),
    ],
)
def test_numbers_and_gradients(T, N, K, H, padding):
    """Odd lengths, several blocks, groups, one key head, head sizes around a tile, both paddings, a row of padding alone."""
    q, k, v, p = inputs(T, N, K, H, padding=padding)
    got = run(interpreted, q, k, v, p)
    assert got[0].shape == (2, T, N, H)
    assert max(errors(got, run(eager, q, k, v, p))) < 5e-6


@pytest.mark.parametrize(
    ("T", "N", "K", "padding", "options"),
    [
        (601, 2, 1, "left", {"window": 37}),
        (260, 4, 2, "right", {"window": 150, "softcap": 1.5}),
        (150, 2, 2, "between", {"window": 20}),
        (130, 4, 1, "left", {"softcap": 0.7}),
    ],
)
def test_windows_and_soft_caps(T, N, K, padding, options):
    """Windows of tokens, not columns, within a block and across; logits that the cap bends; gradients."""
    q, k, v, p = inputs(T, N, K, 64, padding=padding)
    got, expected = (run(partial(f, **options), q, k, v, p) for f in (interpreted, eager))
    assert max(errors(got, expected)) < 5e-6
    assert max(errors(got[:1], run(eager, q, k, v, p)[:1])) > 1e-2  # the options matter


@pytest.mark.parametrize("window", [None, 1, 7, 128, 200, 512])
def test_blocks_of_the_mask(window):
    """A block that is answered by one element is that element everywhere."""
    whole = np.tril(np.ones((512, 512), bool)) & ~np.tril(np.ones((512, 512), bool), -(window or 512))
    mask = _Band(512, window)
    for size in (64, 128):
        for i in range(0, 512, size):
            for j in range(0, 512, size):
                found, wanted = mask[i : i + size, j : j + size], whole[i : i + size, j : j + size]
                assert (found == wanted).all()
                assert found.size == 1 or not (wanted.all() or not wanted.any())


def test_values_of_another_size_and_a_cache_of_another_dtype():
    q, k, v, p = inputs(130, 2, 1, 64, Hv=96)
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    got, _ = jax.jit(interpreted)(q, k, v, p, p, 0.11)
    expected, _ = jax.jit(eager)(q, k.astype(jnp.float32), v.astype(jnp.float32), p, p, 0.11)
    assert got.shape == (2, 130, 2, 96) and got.dtype == jnp.float32
    np.testing.assert_allclose(got[0], expected[0], atol=5e-6)


def test_bfloat16():
    """At most 1.5 times as far from float32 as our eager attention in bfloat16 is, which is about half as far as torch's."""
    q, k, v, p = inputs(200, 4, 2, 80, jnp.bfloat16)
    truth = run(eager, *(x.astype(jnp.float32) for x in (q, k, v)), p)
    got = mean_errors(run(interpreted, q, k, v, p), truth)
    assert jax.eval_shape(lambda: interpreted(q, k, v, p, p, 0.11)[0]).dtype == jnp.bfloat16
    for mine, theirs in zip(got, mean_errors(run(eager, q, k, v, p), truth)):
        assert mine < 1.5 * theirs


@pytest.mark.parametrize(
    ("preset", "mesh", "T", "N", "K", "options"),
    [
        ("fsdp+tensor", {"fsdp": 2, "tensor": 4}, 41, 4, 2, {}),  # two devices for each key head
        ("sequence", {"sequence": 2, "tensor": 2}, 258, 2, 2, {"window": 100}),  # a key head for each device, and half of the queries
    ],
)
def test_on_a_mesh(preset, mesh, T, N, K, options):
    rules = Rules.preset(preset, make_mesh(jax.devices()[: int(np.prod(list(mesh.values())))], **mesh))
    q, k, v, p = inputs(T, N, K, 64)
    got = run(partial(interpreted, rules=rules, **options), q, k, v, p)
    assert max(errors(got, run(partial(eager, **options), q, k, v, p))) < 5e-6


def test_heads_without_whole_groups_stay_together():
    rules = Rules.preset("tensor", make_mesh(jax.devices()[:2], tensor=2))
    q, k, v, p = inputs(41, 6, 3, 64)
    got, expected = (jax.jit(f)(q, k, v, p, p, 0.11)[0] for f in (partial(interpreted, rules=rules), eager))
    real = np.asarray(p >= 0)
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=5e-6)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "splash", Implementation(interpreted, ("window", "softcap", "rules")))


CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=20
)


def sensitive(model):
    """Random parameters large enough that attention is not flat."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.float32))
    flat = {key: jnp.asarray(rng.normal("norm" in key, 0.15, x.shape), x.dtype) for key, x in flatten(shapes).items()}
    return unflatten(flat)


GEMMA_2 = Gemma2Config(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=20,
    sliding_window=30, attn_logit_softcapping=1.0, query_pre_attn_scalar=20,
)  # fmt: skip


@pytest.mark.parametrize("cls", [LlamaForCausalLM, Gemma2ForCausalLM])
def test_a_model(cls, on_cpu):
    """Logits of a left-padded batch and the loss's gradients, scanned and rematerialised. The loss leaves out the first real token: a
    padding query predicts it, and what that gives is anybody's. Gemma 2 adds windows and soft caps."""
    reference = cls(CONFIG if cls is LlamaForCausalLM else GEMMA_2, scan_layers=True, attn_implementation="eager")
    model = dataclasses.replace(reference, attn_implementation="splash", remat="full")
    ids = jax.random.randint(jax.random.key(2), (2, 133), 0, 97)
    places = positions(2, 133, "left")
    mask = (places >= 0).astype(jnp.int32)
    params = sensitive(reference)

    @partial(jax.jit, static_argnums=0)
    def step(model, params, ids, mask):
        def loss(params):
            out = model.apply({"params": params}, ids, attention_mask=mask, labels=jnp.where(places > 0, ids, -100))
            return out.loss, out.logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    ((_, got), got_gradients), ((_, expected), expected_gradients) = (step(m, params, ids, mask) for m in (model, reference))
    real = np.asarray(mask, bool)
    assert float(jnp.std(expected)) > 0.3
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-4 * max(1, float(jnp.std(expected))))
    for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(expected_gradients)):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_packed_documents(on_cpu):
    """Several documents in a row, also with padding between them, each seeing itself alone."""
    model = Gemma2ForCausalLM(GEMMA_2, attn_implementation="splash")
    ids = jax.random.randint(jax.random.key(2), (2, 150), 0, 97)
    ends = jnp.array([[40, 41, 120, 150], [75, 80, 100, 140]])  # the second row's second segment is padding
    segments = (jnp.arange(150) >= ends[:, :, None]).sum(1) + 1
    segments = jnp.where((jnp.arange(2)[:, None] == 1) & ((segments == 2) | (segments == 5)), 0, segments)
    params = sensitive(model)
    got, expected = (
        jax.jit(lambda p, m=m: m.apply({"params": p}, ids, segment_ids=segments).logits)(params)
        for m in (model, dataclasses.replace(model, attn_implementation="eager"))
    )
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-4 * max(1, float(jnp.std(expected))))


def test_llama_fills_a_cache_and_decodes(on_cpu):
    """The prompt of a fresh cache runs the kernel, the token after it runs xla."""
    model = LlamaForCausalLM(dataclasses.replace(CONFIG, num_hidden_layers=1), attn_implementation="splash")
    ids = jax.random.randint(jax.random.key(2), (2, 141), 0, 97)
    mask = (positions(2, 141, "left") >= 0).astype(jnp.int32)
    params = sensitive(model)
    apply = jax.jit(lambda model, *args: model.apply({"params": params}, *args), static_argnums=0)
    prompt = apply(model, ids[:, :140], mask[:, :140], None, None, init_cache(model, 2, 150))
    last = apply(model, ids[:, 140:], None, None, None, prompt.cache)
    expected = apply(dataclasses.replace(model, attn_implementation="eager"), ids, mask).logits[:, -2:]
    got = jnp.concatenate([prompt.logits[:, -1:], last.logits], 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * max(1, float(jnp.std(expected))))


def test_another_platform_is_refused():
    q, k, v, p = inputs(9, 2, 1, 8)
    call = lambda q, k, v, kp: attention(q, k, v, p, kp, implementation="splash")[0]
    assert jax.eval_shape(call, q, k, v, p).shape == q.shape  # shapes are known anywhere
    longer = [jnp.pad(x, ((0, 0), (0, 4)) + ((0, 0),) * (x.ndim - 2), constant_values=-1) for x in (k, v, p)]
    for rest in ((k, v, p), longer):  # the kernel, and the lengths for which it stands back
        for f in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=r"'splash' is a kernel for TPU; this program is compiled for cpu, where eager, xla run"):
                f(q, *rest)


def test_what_cannot_be_shown_is_not_registered():
    with pytest.raises(ValueError, match=r"'cudnn' is not registered \(.*NVIDIA GPU.*\); possible are eager, splash, xla"):
        resolve_attention("cudnn")


def subprocess_output(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_nobody_else_imports_pallas():
    code = "import sys, jaxmodels.ops.attention; print([m for m in sys.modules if 'pallas.ops' in m or m == 'jaxmodels.ops.splash'])"
    assert subprocess_output(code).strip() == "[]"


COMPILE = """
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxmodels.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.ops.precision import parity_mode
from jaxmodels.params import init_params
from jaxmodels.sharding import Rules, make_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
B, T, block = 4, 300, 384
shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
llama = LlamaForCausalLM, LlamaConfig(**shape, num_hidden_layers=1)
gemma = Gemma2ForCausalLM, Gemma2Config(**shape, num_hidden_layers=2, head_dim=64, sliding_window=100)

def compiled(attention, mesh, grad=False, family=llama):
    rules = Rules.preset("fsdp+tensor", make_mesh(devices[: mesh["fsdp"] * mesh["tensor"]], **mesh))
    cls, config = family
    model = cls(config, dtype=jnp.bfloat16, attn_implementation=attention, rules=rules)
    here = rules.sharding((None,), (1,))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                          jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.bfloat16)))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rules.sharding(("batch", None), (B, T)))
    loss = lambda params, ids, mask: model.apply({"params": params}, ids, attention_mask=mask, labels=ids).loss
    text = jax.jit(jax.grad(loss) if grad else loss).lower(params, ids, ids).compile().as_text()
    dense = re.findall(rf"\\[[0-9,]*(?:{T},{T}|{block},{block})[0-9,]*\\]", text)
    print(text.count('custom_call_target="tpu_custom_call"'), bool(dense))

one = {"fsdp": 1, "tensor": 1}
compiled("xla", one)
compiled("splash", {"fsdp": 2, "tensor": 2}, grad=True)
compiled("splash", {"fsdp": 2, "tensor": 2}, grad=True, family=gemma)
with parity_mode():
    compiled("splash", one)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, with which a CPU machine compiles for TPU")
def test_the_program_for_tpu():
    """A whole Llama compiled for v5e: the kernel once for its layer, three times with gradients, and nothing of shape [T,T]; so for each of
    two layers of Gemma 2, one with a window, both with soft caps."""
    topology = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    found = subprocess_output(COMPILE, **topology, ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled")
    assert found.split("\n")[:-1] == ["0 True", "3 False", "6 False", "1 False"]
