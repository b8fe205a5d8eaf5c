"""`generate` against torch's on ragged prompts of up to 300 tokens: tokens, ends, lengths, records, options, batches, buckets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from generation_fixtures import LENGTHS, PAD, VOCAB, T, compilations, ours, prompts, torch_greedy, torch_model

from jaxmodels.generation import GenerationConfig, bucket, generate
from jaxmodels.generation.loop import _decode
from jaxmodels.params import init_params
from jaxmodels.sharding.rules import Rules, make_mesh

NEVER = VOCAB + 5  # an end-of-sequence id that no model gives


def torch_batch(**options):
    ids, mask = (torch.tensor(x) for x in prompts())
    with torch.no_grad():
        return torch_model().generate(ids, attention_mask=mask, return_dict_in_generate=True, **{"do_sample": False, **options})


def ends(*columns):
    """The tokens that torch's greedy rows hold at these columns, one row each: rows end at different steps."""
    return [torch_greedy(row)[column] for row, column in enumerate(columns)]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_greedy_equals_torch_row_by_row(scan_layers):
    ids, mask = prompts()
    out = generate(*ours(scan_layers), ids, mask, max_new_tokens=40, eos_token_id=NEVER)
    assert isinstance(out.sequences, np.ndarray)
    np.testing.assert_array_equal(out.sequences[:, :T], ids)
    assert [row[T:].tolist() for row in out.sequences] == [torch_greedy(row) for row in range(4)]
    assert out.lengths.tolist() == [40] * 4


def test_padding_anywhere():
    """Right padding and holes: the same continuations, the prompt echoed as it came."""
    ids, _ = prompts()
    right = np.stack([np.roll(row, n - T) for row, n in zip(ids, LENGTHS)])
    out = generate(*ours(), right, np.arange(T) < np.array(LENGTHS)[:, None], max_new_tokens=40, eos_token_id=NEVER)
    np.testing.assert_array_equal(out.sequences[:, :T], right)
    assert [row[T:].tolist() for row in out.sequences] == [torch_greedy(row) for row in range(4)]
    holes = np.full((1, 20), -100)  # what stands in padding does not count
    where = np.array([1, 4, 5, 6, 11, 12, 17])
    holes[0, where] = ids[1, -7:]
    out = generate(*ours(), holes, (holes != -100).astype(int), max_new_tokens=40, eos_token_id=NEVER)
    assert out.sequences[0, 20:].tolist() == torch_greedy(1)


def test_padding_is_inferred_from_pad_token():
    ids, _ = prompts()
    out = generate(*ours(), ids, max_new_tokens=10, eos_token_id=NEVER)  # pad_token_id 0 is in the config
    assert [row[T:].tolist() for row in out.sequences] == [torch_greedy(row)[:10] for row in range(4)]
    same = generate(*ours(), ids[:, -9:], max_new_tokens=3, pad_token_id=5, eos_token_id=[7, 5])  # pad is an end: not inferred
    full = generate(*ours(), ids[:, -9:], np.ones((4, 9)), max_new_tokens=3, pad_token_id=5, eos_token_id=[7, 5])
    np.testing.assert_array_equal(same.sequences, full.sequences)


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": (3, 9, 20, 14)},
        {"eos_token_id": (3, 9), "min_new_tokens": 12, "repetition_penalty": 1.8},
        {"eos_token_id": (3, 9, 20, 14), "min_length": 310},
        {"eos_token_id": (3, 9), "pad_token_id": 99},
        {"eos_token_id": (3,), "max_length": 317, "max_new_tokens": None},
    ],
    ids=str,
)
def test_options_equal_torch(options):
    """Whole batches: ends, padding after them and the width of the result."""
    ids, mask = prompts()
    options = {"max_new_tokens": 30, **options}
    options["eos_token_id"] = ends(*options["eos_token_id"]) if "eos_token_id" in options else NEVER
    want = torch_batch(**options).sequences.numpy()
    out = generate(*ours(), ids, mask, **options)
    np.testing.assert_array_equal(out.sequences, want)
    stops = np.isin(want[:, T:], options["eos_token_id"])
    first = np.where(stops.any(1), stops.argmax(1) + 1, want.shape[1] - T)
    assert out.lengths.tolist() == first.tolist()


def test_pad_defaults_to_the_first_end():
    ids, mask = prompts()
    eos = ends(3, 9, 20, 14)
    config = torch_model().config.to_dict() | {"pad_token_id": None}
    model, params = ours()
    model = model.clone(config=type(model.config).from_dict(config))
    out = generate(model, params, ids, mask, max_new_tokens=30, eos_token_id=eos)
    assert set(out.sequences[0, T + out.lengths[0] :].tolist()) == {eos[0]}


def test_scores_and_logits_equal_torch():
    ids, mask = prompts()
    options = {
        "max_new_tokens": 12,
        "repetition_penalty": 1.5,
        "output_scores": True,
        "output_logits": True,
        "eos_token_id": ends(3, 5, 7, 9),
    }
    want, got = torch_batch(**options), generate(*ours(), ids, mask, **options)
    np.testing.assert_array_equal(got.sequences, want.sequences.numpy())
    alive = np.arange(len(want.scores))[:, None] < got.lengths
    for ours_, theirs in ((got.scores, want.scores), (got.logits, want.logits)):
        theirs = torch.stack(theirs).numpy()
        assert ours_.shape == theirs.shape
        assert np.abs(ours_ - theirs)[alive].max() <= 1e-4 * max(1, theirs.std())
    assert got["scores"] is got[1] and got.past_key_values is got.cache


def test_sampling_is_reproducible_and_rows_are_their_own():
    ids, mask = prompts()
    sample = functools.partial(generate, *ours(), do_sample=True, max_new_tokens=15, eos_token_id=NEVER, temperature=1.5)
    one, same, other = (sample(ids, mask, key=jax.random.key(n)).sequences for n in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one[:, T:] != other[:, T:]).mean() > 0.5
    assert len({tuple(row) for row in one[:, T:].tolist()}) == 4
    alone = sample(ids[:1], mask[:1], key=jax.random.key(0)).sequences
    np.testing.assert_array_equal(alone[0], one[0])
    repeated = sample(np.repeat(ids[:1], 4, 0), np.repeat(mask[:1], 4, 0), key=jax.random.key(0)).sequences
    returned = sample(ids[:1], mask[:1], key=jax.random.key(0), num_return_sequences=4)
    np.testing.assert_array_equal(returned.sequences, repeated)
    assert returned.cache.positions.shape[0] == 4 and len({tuple(row) for row in repeated.tolist()}) == 4


def test_samples_follow_torchs_warped_probabilities():
    """4,000 samples of one prompt against the scores that transformers' sampling draws from."""
    ids, mask = prompts()
    options = {"do_sample": True, "max_new_tokens": 1, "temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02}
    row = torch.tensor(ids[2:3, -LENGTHS[2] :])
    theirs = torch_model().generate(row, attention_mask=torch.ones_like(row), output_scores=True, return_dict_in_generate=True, **options)
    p = torch.softmax(theirs.scores[0][0].double(), -1).numpy()
    tokens = [
        generate(*ours(), ids[2:3], mask[2:3], key=jax.random.key(seed), num_return_sequences=1000, **options).sequences[:, -1]
        for seed in range(4)
    ]
    counts = np.bincount(np.concatenate(tokens), minlength=VOCAB)
    assert 3 < (p > 0).sum() <= 12 and counts[p == 0].sum() == 0
    chi2 = ((counts - 4000 * p)[p > 0] ** 2 / (4000 * p)[p > 0]).sum()
    assert chi2 < 30  # 11 degrees of freedom at most


def test_another_call_in_the_bucket_compiles_nothing():
    ids, mask = prompts()
    call = functools.partial(generate, *ours())
    sampled = {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 5,
        "top_p": 0.8,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "min_new_tokens": 2,
    }
    call(ids, mask, max_new_tokens=40, eos_token_id=3)
    call(ids, mask, max_new_tokens=30, key=jax.random.key(0), **sampled)
    jax.random.key(1)
    with compilations() as found:
        call(ids, mask, max_new_tokens=40, eos_token_id=3)
        call(ids[:, -290:], mask[:, -290:], max_new_tokens=25, eos_token_id=[5, 9, 11], pad_token_id=7)
        call(ids, mask, max_new_tokens=37, eos_token_id=None, max_length=9)
        changed = {k: v * 1.1 for k, v in sampled.items() if isinstance(v, float)} | {"top_k": 190, "min_new_tokens": 9}
        call(ids, mask, max_new_tokens=21, key=jax.random.key(1), eos_token_id=[2, 9], **(sampled | changed))
        assert found == []
        jax.jit(lambda x: x + 1)(1)
    assert found  # the counter counts


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
def test_one_new_token_needs_no_loop(options, monkeypatch):
    """Contrastive search alone, whose first token is read before it is chosen."""
    called = []
    monkeypatch.setattr("jaxmodels.generation.loop._decode", lambda *args: called.append(1) or _decode(*args))
    ids, mask = prompts()
    one = generate(*ours(), ids, mask, max_new_tokens=1, eos_token_id=NEVER, **options)
    assert len(called) == ("penalty_alpha" in options)
    longer = generate(*ours(), ids, mask, max_new_tokens=4, eos_token_id=NEVER, **options | {"num_beams": 1})
    np.testing.assert_array_equal(one.sequences, longer.sequences[:, : T + 1])


def test_buckets():
    sizes = [bucket(n) for n in range(1, 3000)]
    assert all(size >= n for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all(size <= max(1.25 * n, n + 15) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 30


def test_jit_around_generate():
    ids, mask = prompts()
    options = {"max_new_tokens": 12, "eos_token_id": ends(3, 5, 7, 9)}
    want = generate(*ours(), ids, mask, **options)
    model, params = ours()
    jitted = jax.jit(
        functools.partial(generate, eos_token_id=tuple(options["eos_token_id"])), static_argnums=0, static_argnames="max_new_tokens"
    )
    got = jitted(model, params, jnp.asarray(ids), jnp.asarray(mask), max_new_tokens=12)
    np.testing.assert_array_equal(got.sequences[:, : want.sequences.shape[1]], want.sequences)
    assert got.sequences.shape == (4, T + 12) and (np.asarray(got.sequences[:, want.sequences.shape[1] :]) == PAD).all()
    np.testing.assert_array_equal(got.lengths, want.lengths)

    sample = lambda params, ids, mask, key, t: generate(
        model, params, ids, mask, max_new_tokens=9, do_sample=True, key=key, temperature=t, eos_token_id=NEVER
    )
    got = jax.jit(sample)(params, jnp.asarray(ids), jnp.asarray(mask), jax.random.key(3), jnp.float32(0.8))
    want = sample(params, ids, mask, jax.random.key(3), 0.8)
    np.testing.assert_array_equal(got.sequences, want.sequences)


def test_bfloat16():
    """Against the model over the whole sequence, without cache, padding or bucket."""
    model, params = ours(dtype=jnp.bfloat16)
    ids, _ = prompts()
    row, new = ids[1:2, -LENGTHS[1] :], 6
    out = generate(model, params, row, max_new_tokens=new, eos_token_id=NEVER, output_logits=True)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, out.sequences[:, :-1]).logits[0, -new:], np.float32)
    assert np.abs(out.logits[:, 0] - logits).max() <= 0.06 * max(1, logits.std())
    np.testing.assert_array_equal(out.sequences[0, -new:], out.logits[:, 0].argmax(-1))


def test_sharded_equals_one_device():
    ids, mask = prompts()
    rules = Rules.preset("fsdp+tensor", make_mesh(jax.devices()[:4], fsdp=2, tensor=2))
    model = ours()[0].clone(rules=rules)
    shardings = jax.tree.map(lambda x: x.sharding, init_params(model, jax.random.key(0)))
    params = jax.device_put(ours()[1], shardings)
    out = generate(model, params, ids, mask, max_new_tokens=10, eos_token_id=NEVER)
    assert [row[T:].tolist() for row in out.sequences] == [torch_greedy(row)[:10] for row in range(4)]
    with compilations() as found:
        generate(model, params, ids, mask, max_new_tokens=9, eos_token_id=5)
    assert found == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": True}, r"key=jax\.random\.key"),
        ({"do_sample": True, "key": 0}, r"key=jax\.random\.key"),
        ({"temprature": 0.5}, "did you mean 'temperature'"),
        ({"temperature": 0.0, "do_sample": True}, "temperature is 0.0; expected a number above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": None, "max_length": 5}, "9 columns and max_length leaves no room"),
        ({"num_return_sequences": 3}, "num_return_sequences=3.*do_sample=True"),
        ({"input_ids": np.full((2, 9), VOCAB)}, f"run from {VOCAB}"),
        ({"input_ids": np.zeros(9, int)}, r"\[B,T\]"),
        ({"input_ids": np.zeros((2, 9))}, "integer"),
        ({"input_ids": np.zeros((0, 9), int)}, r"\(0, 9\) have no rows"),
        ({"generation_config": {"max_new_tokens": 4}}, r"builtins\.dict.*from_dict"),
        ({"attention_mask": np.ones((2, 8))}, r"\[B,T\] = \[2,9\]"),
        ({"attention_mask": np.eye(2, 9) * [[1], [0]]}, r"rows \[1\].*no token"),
    ],
    ids=str,
)
def test_bad_calls_say_what_is_wrong_before_compiling(options, words):
    arguments = {"input_ids": np.full((2, 9), 5), "attention_mask": None, "max_new_tokens": 4} | options
    model, params = ours()
    with compilations() as found, pytest.raises(ValueError, match=words):
        generate(model, params, **arguments)
    assert found == []


def test_traced_lengths_are_refused():
    run = jax.jit(lambda n: generate(*ours(), np.full((1, 9), 5), max_new_tokens=n).sequences)
    with pytest.raises(ValueError, match="static_argnames"):
        run(3)


def test_default_length_warns():
    with pytest.warns(UserWarning, match="generating 20 tokens at most"):
        out = generate(*ours(), np.full((1, 9), 5), eos_token_id=NEVER)
    assert out.sequences.shape == (1, 29)


def test_config_and_overrides():
    ids, mask = prompts()
    config = GenerationConfig(max_new_tokens=5, eos_token_id=NEVER)
    assert generate(*ours(), ids, mask, generation_config=config).sequences.shape == (4, T + 5)
    assert generate(*ours(), ids, mask, generation_config=config, max_new_tokens=3).sequences.shape == (4, T + 3)
