"""Caches by HF's names: what they hold, in how many bytes, and that text comes out the same where it must."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from fixtures.make_generation_fixtures import SINKS, STREAM, WINDOW, stream
from generation_fixtures import VOCAB, compilations, ours, prompts
from test_generation_strategies import ours as six_layers
from test_generation_strategies import written

from jaxmodels.cache import KVSpec, init_cache
from jaxmodels.cache_offloaded import OffloadedCache
from jaxmodels.cache_quantized import QuantizedCache
from jaxmodels.cache_sink import SinkCache
from jaxmodels.generation import GenerationConfig, generate
from jaxmodels.layers import Step
from jaxmodels.models.gemma3_text import Gemma3ForCausalLM, Gemma3TextConfig
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.models.mamba import MambaConfig, MambaForCausalLM
from jaxmodels.models.t5 import T5Config, T5ForConditionalGeneration
from jaxmodels.params import init_params
from jaxmodels.sharding.rules import Rules, make_mesh

NEVER, NEW = VOCAB + 5, 12
WIDTH = 70
SMALL = {"q_group_size": 4, "residual_length": 8}
ALL = {"q_group_size": 12, "residual_length": 96}  # every slot of these tests in full


def texts():
    """Ids and mask [3,70], left-padded; a second turn [3,9] with padding; and five tokens more."""
    ids, mask = (x[1:, -WIDTH:] for x in prompts())
    rng = np.random.default_rng(4)
    turn, real = rng.integers(3, VOCAB, (3, 9)), np.arange(9) >= np.array([[4], [0], [7]])
    single = [(rng.integers(3, VOCAB, (3, 1)), np.ones((3, 1), bool)) for _ in range(5)]
    return [(ids, mask != 0), (turn, real), *single]


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, ids, mask, cache):
    return model.apply({"params": params}, ids, attention_mask=mask, cache=cache)


def read(model, params, cache, chunks):
    """The logits of the chunks one after the other, and the cache."""
    found = []
    for ids, mask in chunks:
        out = step(model, params, ids, mask, cache)
        found.append(np.asarray(out.logits)[mask])
        cache = out.cache
    return found, cache


@functools.cache
def full(scan_layers):
    return read(*ours(scan_layers), init_cache(ours()[0].clone(scan_layers=scan_layers), 3, 96), texts())[0]


@pytest.mark.parametrize(
    ("made", "scan_layers"),
    [("offloaded", True), (SinkCache(96), True), (QuantizedCache(2, **ALL), False), (QuantizedCache(8, **SMALL), True)],
    ids=str,
)
def test_numbers(made, scan_layers):
    """Ragged prompts, a ragged turn, token by token: as the full cache's where nothing is dropped or rounded."""
    model, params = ours(scan_layers)
    got, cache = read(model, params, init_cache(model, 3, 96, implementation=made), texts())
    rounded = made == QuantizedCache(8, **SMALL)
    for chunk, (a, b) in enumerate(zip(got, full(scan_layers))):
        error, unit = np.abs(a - b).max(), max(1, b.std())
        assert error <= 1e-4 * unit or (rounded and chunk and 1e-4 * unit < error <= 0.05 * unit)
    ids, mask = texts()[2]
    (want,), _ = read(model, params, cache, [(ids, mask)])
    (moved,), _ = read(model, params, cache.take(np.array([2, 0, 0])), [(ids[[2, 0, 0]], mask)])
    np.testing.assert_allclose(moved, want[[2, 0, 0]], atol=1e-4)


def kivi(x, real, nbits, group, by_channel):
    """Torch's x [n,K,H] after KIVI's quantiser, group by group; slots where `real` [n] is false say nothing."""
    x, out = torch.tensor(x), torch.zeros(x.shape)
    n, K, H = x.shape
    for k in range(K):
        rows = [(slice(a, a + group), h) for a in range(0, n, group) for h in range(H)] if by_channel else []
        rows = rows or [(s, slice(a, a + group)) for s in range(n) for a in range(0, H, group)]
        for slots, channels in rows:
            part = x[slots, k, channels]
            counted = part[torch.tensor(real)[slots]] if by_channel else part
            low, high = (counted.min(), counted.max()) if len(counted) else (torch.tensor(0.0), torch.tensor(0.0))
            scale = (high - low) / (2**nbits - 1)
            codes = ((part - low) / scale).round().clamp(0, 2**nbits - 1) if scale > 0 else torch.zeros_like(part)
            out[slots, k, channels] = codes * scale + low
    return out.numpy()


@pytest.mark.parametrize(
    ("options", "H", "heads_first"),
    [
        ({"nbits": 2, "q_group_size": 4, "residual_length": 8}, 12, True),
        ({"nbits": 4, "q_group_size": 3, "residual_length": 3}, 9, False),  # an odd number of channels: half a byte is left over
        ({"nbits": 8, "q_group_size": 4, "residual_length": 12, "axis_key": 0, "axis_value": -1}, 8, True),
        ({"nbits": 4, "q_group_size": 4, "residual_length": 4, "backend": "HQQ", "axis_key": 1, "axis_value": 1}, 8, False),
    ],
    ids=str,
)
def test_quantised_slots_are_kivis(options, H, heads_first):
    """Chunk after chunk, in one layer of two stacked ones: the newest slots are exact and older ones what torch makes of their groups."""
    made, slots, B, K, layers = QuantizedCache(**options), 50, 2, 2, (2 if heads_first else None)
    state = made.layer_spec(KVSpec(K, H)).init(B, slots, jnp.float32, layers=layers, heads_first=heads_first)
    layer = None if layers is None else jnp.int32(1)
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, B, slots, K, H)).astype(np.float32) * np.exp(rng.normal(size=H)).astype(np.float32)
    real = rng.random((B, slots)) < 0.8
    positions = np.where(real, real.cumsum(1) - 1, -1).astype(np.int32)
    update = jax.jit(lambda state, k, v, step: state.update(k, v, step))
    R, (key_by_channel, value_by_channel) = made.residual_length, made.by_channel()
    at = 0
    for T in (7, 1, 1, 13, 1, 1, 1, 20, 1, 4):  # to the last slot
        seen = np.where(np.arange(slots) < at + T, positions, -1)
        step = Step(positions[:, at : at + T], seen[:, :T] if at == 0 else seen, jnp.int32(at), layer=layer, fresh=at == 0)
        state, keys, values, _ = update(state, k[:, at : at + T], v[:, at : at + T], step)
        exact = np.arange(slots)[:at][-R:].tolist() + list(range(at, at + T))
        for got, x, by_channel in ((keys, k, key_by_channel), (values, v, value_by_channel)):
            for row in range(B) if at else ():
                group = made.q_group_size if by_channel else min(made.q_group_size, H)
                end = -(-at // made.q_group_size) * made.q_group_size
                known = np.arange(slots)[:end] < at
                want = x[row].copy()
                want[:at] = kivi(x[row, :end], real[row, :end] & known, made.nbits, group, by_channel)[:at]
                want[exact] = x[row, exact]
                judged = real[row] & (np.arange(slots) < at + T)
                np.testing.assert_allclose(np.asarray(got)[row, judged], want[judged], atol=2e-6 * np.abs(x).max())
        at += T
    assert at == slots


def test_sinks_are_transformers():
    """The whole stream in one chunk, its end against the SinkCache of transformers 4.45.2, which read token by token."""
    model, params = six_layers()
    cache = init_cache(model, 1, STREAM, implementation=SinkCache(WINDOW, SINKS))
    got = jax.jit(model.apply)({"params": params}, stream(), cache=cache).logits[0, -8:]
    want = written()["sink"]
    assert np.abs(got - want).max() <= 1e-4 * want.std()


def test_sinks_in_chunks():
    """A window that drops tokens: all chunks of a ragged batch are what its tokens are one by one, and not what a full cache says."""
    model, params = ours()
    make = lambda: init_cache(model, 3, 96, implementation=SinkCache(20, 3))
    chunks = texts()[:2]
    got, cache = read(model, params, make(), chunks)
    single = [(ids[:, i : i + 1], mask[:, i : i + 1]) for ids, mask in chunks for i in range(ids.shape[1])]
    last = read(model, params, make(), single)[0]
    ends = [one[-1] for (_, mask), one in zip(single[-5:], last[-5:]) if mask[-1, 0]]
    np.testing.assert_allclose(got[1][-len(ends) :], ends, atol=1e-4)
    assert np.abs(got[1] - full(False)[1]).max() > 0.1
    assert max(x.shape[1] for x in jax.tree.leaves(cache.layers) if x.ndim == 4) == 17


def mine(model=None, params=None, **options):
    model, params = (model, params) if model else ours()
    ids, mask = texts()[0]
    return generate(model, params, ids, mask, **{"max_new_tokens": NEW, "eos_token_id": NEVER} | options)


@functools.cache
def plain(beams=1):
    return mine(num_beams=beams).sequences


SAME = [
    {"cache_implementation": "static", "max_cache_len": 200}, {"cache_implementation": "offloaded"}, {"use_cache": False},
    {"cache_implementation": "sink", "cache_config": {"window_length": 128, "num_sink_tokens": 2}},
    {"cache_implementation": "quantized", "cache_config": {"nbits": 8, **SMALL}},
]  # fmt: skip


@pytest.mark.parametrize("options", SAME, ids=str)
def test_generate(options):
    """The same tokens, a cache of that kind for the next turn, and nothing compiled twice."""
    out = mine(**options)
    np.testing.assert_array_equal(out.sequences, plain())
    with compilations() as found:
        mine(**options | {"max_new_tokens": NEW - 1})
    assert found == []
    if options == SAME[-1]:
        return  # later, rounding shows
    if options.get("use_cache", True):
        assert options.get("max_cache_len", 0) <= out.cache.slots
        ids, mask = texts()[1]
        second = lambda out: generate(*ours(), ids, mask, cache=out.cache, max_new_tokens=8, eos_token_id=NEVER).sequences
        np.testing.assert_array_equal(second(out), second(mine()))
    else:
        assert out.cache is None


@pytest.mark.parametrize("options", [SAME[2], SAME[4]], ids=str)
def test_beams(options):
    np.testing.assert_array_equal(mine(num_beams=3, **options).sequences, plain(3))


@pytest.mark.parametrize("made", ["offloaded", "quantized", "sink"])
def test_a_cache_as_an_object(made):
    """One prompt read once, many questions to it; under jit."""
    model, params = ours()
    cache = init_cache(model, 1, 96, implementation={"quantized": QuantizedCache(**ALL), "sink": SinkCache(96)}.get(made, made))
    ids, mask = texts()[0]
    _, cache = read(model, params, cache, [(ids[1:2], mask[1:2])])
    turn, real = texts()[1]
    ask = jax.jit(lambda params, cache: generate(model, params, turn, real, cache=cache, max_new_tokens=6, eos_token_id=NEVER).sequences)
    whole = [np.concatenate([ids[1][mask[1]], row[keep]])[None] for row, keep in zip(turn, real)]
    want = [generate(model, params, row, max_new_tokens=6, eos_token_id=NEVER).sequences[0, -6:] for row in whole]
    np.testing.assert_array_equal(ask(params, cache.take(np.zeros(3, int)))[:, -6:], want)


def test_memory_kinds():
    model = ours()[0]
    cache = init_cache(model, 2, 32, implementation="offloaded_static")
    kinds = lambda cache: {x.sharding.memory_kind for x in jax.tree.leaves(cache.layers)}
    assert kinds(cache) == {"pinned_host"} == kinds(cache.resize(48)) == kinds(cache.take(np.array([1])))
    assert kinds(mine(cache_implementation="offloaded").cache) == {"pinned_host"}


@pytest.mark.parametrize("made", ["offloaded", pytest.param("sink", marks=pytest.mark.slow), "quantized"])
def test_sharded(made):
    rules = Rules.preset("fsdp+tensor", make_mesh(jax.devices()[:4], fsdp=2, tensor=2))
    model = ours()[0].clone(rules=rules)
    params = jax.device_put(ours()[1], jax.tree.map(lambda x: x.sharding, init_params(model, jax.random.key(0))))
    ids, mask = (np.concatenate([x, x[:1]]) for x in texts()[0])
    config = {"quantized": ALL, "sink": {"window_length": 96}}.get(made)
    out = generate(model, params, ids, mask, max_new_tokens=NEW, eos_token_id=NEVER, cache_implementation=made, cache_config=config)
    np.testing.assert_array_equal(out.sequences[:3], plain())
    big = [x for x in jax.tree.leaves(out.cache.layers) if x.ndim == 4]
    assert all(x.addressable_shards[0].data.size == x.size // 4 for x in big)


@pytest.mark.slow
def test_mixed_layers():
    """Windows stay what they are beside a full layer in few bits, on the host or of sinks."""
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=12, sliding_window=16, layer_types=("sliding_attention", "sliding_attention", "full_attention"),
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    params = init_params(model, jax.random.key(0))
    chunks = [texts()[0], texts()[2]]
    want, cache = read(model, params, init_cache(model, 3, 80, implementation="hybrid"), chunks)
    assert [type(state).__name__ for state in cache.layers] == ["SlidingKV", "SlidingKV", "KV"]
    for made, name in ((QuantizedCache(**ALL), "QuantizedKV"), ("offloaded", "OffloadedKV"), (SinkCache(96), "SinkKV")):
        got, cache = read(model, params, init_cache(model, 3, 80, implementation=made), chunks)
        assert [type(state).__name__ for state in cache.layers] == ["SlidingKV", "SlidingKV", name]
        for a, b in zip(got, want):
            assert np.abs(a - b).max() <= 1e-4


def test_encoder_decoder():
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=12, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config.from_dict(config.to_dict()))
    params = jax.tree.map(lambda x: x * 4, init_params(model, jax.random.key(0)))
    want = mine(model, params, output_logits=True)
    for options in ({"use_cache": False}, {"cache_implementation": "quantized", "cache_config": ALL}):
        got = mine(model, params, output_logits=True, **options)
        np.testing.assert_array_equal(got.sequences, want.sequences)
        assert np.abs(got.logits - want.logits).max() <= 1e-4 * want.logits.std()
    with pytest.raises(ValueError, match="not rotary"):
        mine(model, params, cache_implementation="sink")


TABLE = re.findall(
    r"^\| `(.+?)`.*?\| ([\d.]+) \| ([\d.]+) \|", (Path(__file__).parents[1] / "docs" / "caches.md").read_text(), re.MULTILINE
)


def test_the_table():
    """Bytes of the arrays of a cache for one row of 4096 slots in bfloat16, in MiB."""
    shapes = (
        transformers.LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, vocab_size=49152),
        transformers.Gemma3TextConfig(num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512),
    )
    families = (LlamaForCausalLM, LlamaConfig), (Gemma3ForCausalLM, Gemma3TextConfig)
    models = [head(config.from_dict(shape.to_dict()), dtype=jnp.bfloat16) for (head, config), shape in zip(families, shapes)]
    assert len(TABLE) == 7
    for made, *sizes in TABLE:
        named = eval(made, {"QuantizedCache": QuantizedCache, "SinkCache": SinkCache, "OffloadedCache": OffloadedCache})
        for model, size in zip(models, sizes):
            cache = jax.eval_shape(lambda model=model, named=named: init_cache(model, 1, 4096, implementation=named))
            assert f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers)) / 2**20:.2f}" == size, (made, size)


MAMBA = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_implementation": "quantised"}, "cache_implementation is 'quantised'.*'?quantized"),
        ({"cache_implementation": "quantized", "cache_config": {"bits": 4}}, "cache_config has bits; quantized knows nbits"),
        ({"cache_implementation": "quantized", "cache_config": {"nbits": 3}}, "nbits is 3; expected 8, 4 or 2"),
        ({"cache_implementation": "quantized", "cache_config": {"q_group_size": 48}}, "residual_length=128 and q_group_size=48"),
        ({"cache_implementation": "quantized", "cache_config": {"axis_key": 2}}, "axis_key is 2; backend quanto has 0 and -1"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "gptq"}}, "backend is 'gptq'"),
        (
            {"cache_implementation": "quantized", "cache_config": {"q_group_size": 8}},
            "q_group_size=8 does not divide the head dimension 12",
        ),
        ({"cache_implementation": "sink", "cache_config": {"window_length": 4}}, "num_sink_tokens=4 of window_length=4"),
        ({"cache_implementation": "sliding_window"}, "no layer of llama has a window"),
        ({"cache_config": {"nbits": 4}}, "the default cache knows no options"),
        ({"cache_config": 4}, "cache_config is 4"),
        ({"use_cache": 1}, "use_cache is 1"),
        ({"use_cache": False, "penalty_alpha": 0.5, "top_k": 4}, "use_cache=False: contrastive"),
        (
            {"model": MAMBA, "params": {}, "cache_implementation": "quantized"},
            r"layers of full attention; those of mamba \(RecurrentSpec\)",
        ),
    ],
    ids=str,
)
def test_bad_options(options, words):
    ours()  # made now, if no test before has
    with compilations() as found, pytest.raises(ValueError, match=words):
        mine(**options)
    assert found == []


def test_options_beside_one_another():
    with pytest.warns(UserWarning, match="cache_implementation='offloaded' is without effect"):
        assert mine(use_cache=False, cache_implementation="offloaded").cache is None
    cache = init_cache(ours()[0], 3, 128)
    for options in ({"use_cache": False}, {"cache_implementation": "quantized"}):
        with pytest.raises(ValueError, match="beside a cache"):
            mine(cache=cache, **options)
    assert mine(cache=cache, cache_implementation="static").sequences.tolist() == plain().tolist()


def test_the_options_are_kept(tmp_path):
    config = GenerationConfig(cache_implementation="quantized", cache_config={"nbits": 2, "backend": "HQQ"}, use_cache=True)
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again == config and hash(again) == hash(config)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.cache_implementation, theirs.cache_config) == ("quantized", {"nbits": 2, "backend": "HQQ"})
