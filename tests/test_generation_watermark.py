"""Watermarks against transformers': green lists bit by bit, scores, detectors; torch's generator; 64-bit arithmetic."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from generation_fixtures import LENGTHS, VOCAB, T, compilations, ours, prompts, torch_model, torch_row
from hypothesis import given, settings
from test_generation_processors import run

from jaxmodels.generation import GenerationConfig, Sequences, generate
from jaxmodels.generation.synthid import BayesianDetector, SynthIDTextWatermarkDetector
from jaxmodels.generation.torch_random import bits, chosen, is_chosen, permutation
from jaxmodels.generation.watermark import SynthIDTextWatermarkingConfig, WatermarkDetector, WatermarkingConfig
from jaxmodels.generation.wide import add, least, multiply, remainder, wide

NEVER = VOCAB + 5
hf = transformers.generation
example = functools.partial(settings, deadline=None)
KEYS = (654, 400, 836, 123, 340, 443, -597, 2**62 + 5)


def torch_permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40))
@example(max_examples=25)
def test_permutations_and_bits_are_torchs(n, seed):
    np.testing.assert_array_equal(permutation(n, seed), torch_permutation(n, seed))
    want = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_array_equal(bits(n, seed), want)


@pytest.mark.parametrize(("V", "g"), [(2, 1), (50, 12), (50, 49), (2000, 1300)])
def test_chosen_ids_are_torchs(V, g):
    seeds = np.array([0, 1, 77, 2**32 - 1, 15485863 * 9001 % 2**32, 31337], np.uint32)
    want = np.zeros((len(seeds), V), bool)
    for row, seed in enumerate(seeds):
        want[row, torch_permutation(V, int(seed))[:g]] = True
    np.testing.assert_array_equal(jax.jit(chosen, static_argnums=(1, 2))(seeds, V, g), want)
    rows, ids = np.indices((len(seeds), min(V, 60))).reshape(2, -1)
    np.testing.assert_array_equal(jax.jit(is_chosen, static_argnums=(2, 3))(seeds[rows], ids, V, g), want[rows, ids])


@given(a=st.integers(0, 2**64 - 1), b=st.integers(0, 2**64 - 1), m=st.integers(1, 2**24))
@example(max_examples=60)
def test_wide_integers(a, b, m):
    pair = lambda n: tuple(jnp.asarray(x)[None] for x in wide(n))
    value = lambda x: int(x[0][0]) << 32 | int(x[1][0])
    signed = lambda n: n - (n >> 63 << 64)
    assert value(add(pair(a), pair(b))) == (a + b) % 2**64
    assert value(multiply(pair(a), pair(b))) == a * b % 2**64
    assert int(remainder(pair(a), m)[0]) == signed(a) % m
    both = tuple(jnp.concatenate(x) for x in zip(pair(a), pair(b)))
    assert (int(least(both, 0)[0]) << 32 | int(least(both, 0)[1])) == min(a, b, key=signed)


CONFIGS = [
    {}, {"greenlist_ratio": 0.6, "bias": 3.5, "hashing_key": 99991}, {"hashing_key": 2**61 + 7, "context_width": 3},
    {"seeding_scheme": "selfhash"}, {"seeding_scheme": "selfhash", "context_width": 4, "greenlist_ratio": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("V", [50, 500])
def test_scores_are_transformers(options, V):
    rng = np.random.default_rng(V)
    logits = (rng.normal(size=(4, V)) * 3).astype(np.float32)
    logits[:, ::7] = -np.inf
    ids = rng.integers(0, V, (4, 9))
    want = hf.WatermarkLogitsProcessor(vocab_size=V, device="cpu", **options)(torch.tensor(ids), torch.tensor(logits)).numpy()
    got = run(WatermarkingConfig(**options).construct_processor(V), logits, ids)
    np.testing.assert_array_equal(got, want)
    short = run(WatermarkingConfig(**options | {"context_width": 10}).construct_processor(V), logits, ids)
    np.testing.assert_array_equal(short, logits)


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("repeated", [False, True])
def test_detectors_agree(options, repeated):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, (3, 120))
    config = torch_model().config
    ids[:, 0] = config.bos_token_id
    theirs = hf.WatermarkDetector(config, "cpu", hf.WatermarkingConfig(**options), repeated)
    mine = WatermarkDetector(ours()[0].config, options, ignore_repeated_ngrams=repeated)
    want, got = theirs(torch.tensor(ids), return_dict=True), mine(ids, return_dict=True)
    for name in ("num_tokens_scored", "num_green_tokens", "green_fraction", "z_score", "prediction"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.p_value, want.p_value, rtol=1e-12)
    np.testing.assert_array_equal(mine(ids, z_threshold=0.1), theirs(torch.tensor(ids), z_threshold=0.1))
    with pytest.raises(ValueError, match=r"rows \[0\] begin with"):
        mine(np.where(np.arange(120) + np.arange(3)[:, None] == 0, 1, 5))
    with pytest.raises(ValueError, match="cannot be scored"):
        mine(ids[:, :2])


@pytest.mark.parametrize("options", [CONFIGS[0], CONFIGS[4]], ids=str)
def test_generated_text_is_marked_as_transformers_marks_it(options):
    ids, mask = prompts()
    config = WatermarkingConfig(**options)
    out = generate(*ours(), ids, mask, max_new_tokens=25, eos_token_id=NEVER, watermarking_config=config)
    for row in (1, 2):
        want = torch_row(ids[row][mask[row] == 1], new=25, eos_token_id=None, watermarking_config=hf.WatermarkingConfig(**options))
        assert out.sequences[row, T:].tolist() == want
    with compilations() as found:
        other = WatermarkingConfig(**options | {"bias": 5.0, "hashing_key": 12345})
        generate(*ours(), ids, mask, max_new_tokens=25, eos_token_id=NEVER, watermarking_config=other)
    assert found == []


def synthid(options):
    return hf.SynthIDTextWatermarkLogitsProcessor(
        **{"context_history_size": 1024, "sampling_table_seed": 0, "sampling_table_size": 2**16} | options, device="cpu"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"ngram_len": 5, "keys": KEYS},
        {"ngram_len": 2, "keys": KEYS[:3], "context_history_size": 3, "sampling_table_size": 1000, "sampling_table_seed": 9},
        {"ngram_len": 3, "keys": KEYS, "skip_first_ngram_calls": True},
        {"ngram_len": 3, "keys": KEYS[:1], "debug_mode": True},
    ],
    ids=str,
)
def test_synthid_scores_are_transformers(options):
    """Step by step over few distinct tokens, so that contexts repeat."""
    rng = np.random.default_rng(0)
    prompt, new, V = rng.integers(0, 40, (3, 4)), rng.integers(0, 2, (3, 14)), 40
    theirs, mine = synthid(options | {"keys": list(options["keys"])}), SynthIDTextWatermarkingConfig(**options).construct_processor(V)
    sequences = Sequences(
        jnp.zeros((3, 20), jnp.int32).at[:, :4].set(prompt),
        jnp.arange(20)[None] < np.full((3, 1), 4),
        np.int32(4),
        np.int32(4),
        np.int32(0),
    )
    step = jax.jit(lambda processor, sequences, logits: processor(sequences, logits))
    for n in range(14):
        logits = (rng.normal(size=(3, V)) * 2).astype(np.float32)
        logits[:, :3] = -np.inf
        want = theirs(torch.tensor(np.concatenate([prompt, new[:, :n]], 1)), torch.tensor(logits)).numpy()
        np.testing.assert_allclose(step(mine, sequences, logits), want, rtol=2e-5, atol=2e-6)
        sequences = sequences.append(jnp.asarray(new[:, n]), jnp.ones(3, bool))
    ids = np.concatenate([prompt, new], 1)
    np.testing.assert_array_equal(mine.compute_g_values(ids), theirs.compute_g_values(torch.tensor(ids)).numpy())
    np.testing.assert_array_equal(
        mine.compute_context_repetition_mask(ids), theirs.compute_context_repetition_mask(torch.tensor(ids)).numpy()
    )


def test_tables_outlive_the_trace_that_made_them():
    made = lambda: jax.tree.leaves(WatermarkingConfig(hashing_key=12345, seeding_scheme="selfhash").construct_processor(9))
    for traced, later in zip(jax.jit(made)(), made()):
        np.testing.assert_array_equal(traced, np.asarray(later))


def test_synthid_in_generate():
    ids, mask = prompts()
    options = {"ngram_len": 5, "keys": list(KEYS[:4])}
    out = generate(*ours(), ids, mask, max_new_tokens=20, eos_token_id=NEVER, watermarking_config=SynthIDTextWatermarkingConfig(**options))
    row = ids[1, -LENGTHS[1] :]
    want = torch_row(row, new=20, eos_token_id=None, watermarking_config=hf.SynthIDTextWatermarkingConfig(**options))
    assert out.sequences[1, T:].tolist() == want


def torch_detector(depth, seed):
    torch.manual_seed(seed)
    model = transformers.BayesianDetectorModel(transformers.BayesianDetectorConfig(watermarking_depth=depth, base_rate=0.3))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand(1) if name == "prior" else torch.randn_like(weight))
    return model


@pytest.mark.parametrize("rows", [1, 3])
def test_detectors_of_synthid_agree(tmp_path, rows):
    """A detector of transformers', saved and loaded, on text with ends and repeated contexts; the loss that it is trained on."""
    theirs = torch_detector(len(KEYS), rows)
    marks = {"ngram_len": 3, "keys": list(KEYS), "context_history_size": 16, "sampling_table_seed": 0, "sampling_table_size": 2**16}
    theirs.config.set_detector_information("none", marks | {"device": "cpu"})
    theirs.save_pretrained(tmp_path)
    mine = SynthIDTextWatermarkDetector(BayesianDetector.from_pretrained(tmp_path), eos_token_id=5)
    ids = np.random.default_rng(rows).integers(0, 9, (rows, 24))
    ids[:, :15] = np.where(ids[:, :15] == 5, 6, ids[:, :15])
    processor = synthid(marks)
    tokenizer = type("Tokenizer", (), {"eos_token_id": 5})
    want = hf.SynthIDTextWatermarkDetector(theirs, processor, tokenizer)(torch.tensor(ids))[0].detach().numpy()
    np.testing.assert_allclose(mine(ids), want, rtol=1e-4, atol=1e-7)
    g, mask, labels = processor.compute_g_values(torch.tensor(ids)), torch.ones(rows, 22), torch.tensor([1.0, 0.0, 1.0])[:rows]
    loss = theirs(g, mask, labels, loss_batch_weight=0.1, return_dict=True).loss
    loss.backward()
    got, grads = jax.value_and_grad(lambda d: d.loss(g.numpy(), mask.numpy(), labels.numpy(), 0.1))(mine.detector)
    np.testing.assert_allclose(got, loss.item(), rtol=1e-5)
    for name, weight in theirs.named_parameters():
        np.testing.assert_allclose(getattr(grads, name.split(".")[-1]), weight.grad.numpy(), rtol=1e-3, atol=1e-5)


def test_a_detector_learns():
    """Marked text of one tournament against text at random."""
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=KEYS[:4])
    processor, rng = config.construct_processor(50), np.random.default_rng(0)
    ids = rng.integers(0, 50, (60, 40))
    g = np.asarray(processor.compute_g_values(ids)).astype(np.float32)
    g[:30] = np.maximum(g[:30], rng.integers(0, 2, g[:30].shape))  # as a tournament of two leaves them
    labels, mask = np.arange(60) < 30, np.ones(g.shape[:2])
    detector = BayesianDetector.initial(jax.random.key(0), config)
    step = jax.jit(lambda d: jax.tree.map(lambda w, dw: w - 0.05 * dw, d, jax.grad(lambda d: d.loss(g, mask, labels, 0.01))(d)))
    for _ in range(60):
        detector = step(detector)
    assert ((np.asarray(detector(g, mask)) > 0.5) == labels).mean() > 0.95


def test_detectors_complain(tmp_path):
    torch_detector(4, 0).save_pretrained(tmp_path)
    detector = BayesianDetector.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="watermarking_config is None"):
        SynthIDTextWatermarkDetector(detector)
    with pytest.raises(ValueError, match="2 keys; this detector was trained for 4"):
        SynthIDTextWatermarkDetector(detector, {"ngram_len": 3, "keys": [1, 2]})
    with pytest.raises(ValueError, match="ngram_len=5"):
        SynthIDTextWatermarkDetector(detector, {"ngram_len": 5, "keys": [1, 2, 3, 4]})(np.ones((2, 4), int))
    (tmp_path / "config.json").write_text('{"watermarking_depth": 3}')
    with pytest.raises(ValueError, match="a detector of watermarking_depth=3 has"):
        BayesianDetector.from_pretrained(tmp_path)


def test_configurations_load_and_complain(tmp_path):
    theirs = transformers.GenerationConfig(watermarking_config=hf.WatermarkingConfig(bias=3.0, seeding_scheme="selfhash"))
    theirs.save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.watermarking_config == WatermarkingConfig(bias=3.0, seeding_scheme="selfhash")
    assert config.save_pretrained(tmp_path / "again").read_text() == (tmp_path / "generation_config.json").read_text()
    assert GenerationConfig(watermarking_config=hf.SynthIDTextWatermarkingConfig(5, [1, 2])).watermarking_config.keys == (1, 2)
    for options, words in [
        ({"seeding_scheme": "righthash"}, "seeding_scheme is 'righthash'"), ({"greenlist_ratio": 1.0}, "greenlist_ratio is 1.0"),
        ({"context_width": 0}, "context_width is 0"), ({"hashing_key": -1}, "hashing_key is -1"), ({"biass": 1}, "has biass"),
        ({"ngram_len": 1, "keys": [1]}, "ngram_len is 1"), ({"ngram_len": 3, "keys": []}, "keys are"),
        ({"ngram_len": 3, "keys": [1], "sampling_table_size": 2**25}, "sampling_table_size"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            GenerationConfig(watermarking_config=options)
    with pytest.raises(ValueError, match="of 211 tokens is none"):
        WatermarkingConfig(greenlist_ratio=0.001).construct_processor(211)
