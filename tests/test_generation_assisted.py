"""Assisted decoding: the tokens of plain decoding, drafts as transformers makes them, and what does not go together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from generation_fixtures import VOCAB, T, compilations, ours, prompts, torch_greedy, torch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from jaxmodels.cache import init_cache
from jaxmodels.generation import Sequences, generate
from jaxmodels.generation.assisted import Ragged
from jaxmodels.generation.drafts import PromptLookup
from jaxmodels.generation.sampling import State
from jaxmodels.models import gemma2, gpt2, jamba, llama, mamba, mistral, recurrent_gemma, t5
from jaxmodels.params import flatten, init_params

NEVER = VOCAB + 5
SURE = {"assistant_confidence_threshold": 0.0}


def noisy(params, scale=0.02):
    """A draft model that is right now and then."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(tree, [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)])


@functools.cache
def draft(scan_layers=False):
    model, params = ours(scan_layers)
    return model, noisy(params)


def forms(scan_layers=False):
    """Options of every way to draft."""
    return {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "draft": {"assistant_model": draft(scan_layers), "num_assistant_tokens": 6, **SURE},
        "exit": {"assistant_early_exit": 1, "num_assistant_tokens": 4, **SURE},
    }


@functools.cache
def family(name, scan_layers):
    shared = {"vocab_size": 60, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 65, "pad_token_id": 0}
    heads = {**shared, "num_attention_heads": 4}
    deep = {**heads, "num_hidden_layers": 4, "intermediate_size": 24, "num_key_value_heads": 2}
    griffin = {"num_key_value_heads": 1, "attention_window_size": 9, "lru_width": 16}
    mixed = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
    module, prefix, options = {
        "mistral": (mistral, "Mistral", {**deep, "num_hidden_layers": 3, "sliding_window": 5}),
        "gemma2": (gemma2, "Gemma2", {**deep, "head_dim": 8, "sliding_window": 20}),
        "gpt2": (gpt2, "GPT2", {**heads, "num_hidden_layers": 3, "max_position_embeddings": 128}),
        "mamba": (mamba, "Mamba", {**shared, "num_hidden_layers": 2, "state_size": 4}),
        "jamba": (jamba, "Jamba", {**deep, **mixed}),
        "recurrent_gemma": (recurrent_gemma, "RecurrentGemma", {**deep, **griffin}),
        "t5": (t5, "T5", {**heads, "num_hidden_layers": 2, "head_dim": 8, "d_ff": 40, "decoder_start_token_id": 0}),
    }[name]
    head = {"gpt2": "LMHeadModel", "t5": "ForConditionalGeneration"}.get(name, "ForCausalLM")
    model = getattr(module, prefix + head)(getattr(module, prefix + "Config")(**options), scan_layers=scan_layers)
    return model, noisy(init_params(model, jax.random.key(0)), 0.3)


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [
        ("mistral", True),
        pytest.param("mamba", False, marks=pytest.mark.slow),
        pytest.param("t5", False, marks=pytest.mark.slow),
        pytest.param("mistral", False, marks=pytest.mark.slow),
        pytest.param("gemma2", False, marks=pytest.mark.slow),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
        pytest.param("gemma2", True, marks=pytest.mark.slow),
        pytest.param("jamba", False, marks=pytest.mark.slow),
        pytest.param("recurrent_gemma", True, marks=pytest.mark.slow),
    ],
)
def test_families_say_what_they_say_alone(name, scan_layers):
    """Windows shorter than a round, recurrent layers, encoders; ragged rows, each with its own number of drafts."""
    lengths = np.array([30, 7, 18, 1])
    mask = (np.arange(30) >= 30 - lengths[:, None]).astype(int)
    ids = np.random.default_rng(0).integers(3, 60, mask.shape) * mask
    model, params = family(name, scan_layers)
    call = functools.partial(generate, model, params, ids, mask, max_new_tokens=30)
    want = call().sequences
    ways = {"lookup": {"prompt_lookup_num_tokens": 5}, "draft": {"assistant_model": (model, noisy(params)), "num_assistant_tokens": 6}}
    if name != "t5":
        ways["exit"] = {"assistant_early_exit": model.config.num_hidden_layers - 1, "num_assistant_tokens": 4}
    rejected = 0
    for way, options in ways.items():
        out = call(**options, **(SURE if way != "lookup" else {}))
        np.testing.assert_array_equal(out.sequences, want, err_msg=way)
        assert out.assistance.accepted.any() and out.assistance.rounds < 30
        rejected += (out.assistance.drafted - out.assistance.accepted).sum()
    assert rejected > 20


SOME_SLOW = [pytest.param("exit", marks=pytest.mark.slow), "draft"]


@pytest.mark.parametrize("way", [*SOME_SLOW, "lookup"])
def test_options_vary_and_nothing_compiles(way):
    """Any values of the options that are active, against plain greedy decoding with them."""
    ids, mask = prompts()
    always = {"repetition_penalty": 1.0001, "no_repeat_ngram_size": 50, "min_new_tokens": 1, "exponential_decay_length_penalty": (90, 1.1)}
    always |= {"max_new_tokens": 24, "begin_suppress_tokens": [5]}
    call = functools.partial(generate, *ours(True), ids[1:], mask[1:])
    call(**always, eos_token_id=NEVER)
    call(**always, eos_token_id=NEVER, **forms(True)[way])
    numbers = {"lookup": ["prompt_lookup_num_tokens", "max_matching_ngram_size"]}.get(way, ["num_assistant_tokens"])
    taken = {name: st.integers(1, 7) for name in numbers} | ({} if way == "lookup" else {"assistant_confidence_threshold": st.floats(0, 1)})

    @given(
        options=st.fixed_dictionaries(
            {
                "repetition_penalty": st.floats(1.01, 1.5), "no_repeat_ngram_size": st.integers(1, 5), "min_new_tokens": st.integers(1, 9),
                "exponential_decay_length_penalty": st.tuples(st.integers(0, 9), st.floats(0.9, 1.4)),
                "max_new_tokens": st.integers(17, 32), "begin_suppress_tokens": st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=4),
            }
        ),
        ends=st.lists(st.sampled_from(torch_greedy(1)[:24] + torch_greedy(2)[:24]), min_size=1, max_size=3),
        drafts=st.fixed_dictionaries(taken),
    )  # fmt: skip
    @settings(deadline=None, max_examples=12)
    def check(options, ends, drafts):
        with compilations() as found:
            want = call(**options, eos_token_id=ends)
            got = call(**options, eos_token_id=ends, **forms(True)[way] | drafts)
        assert found == []
        np.testing.assert_array_equal(got.sequences, want.sequences)
        np.testing.assert_array_equal(got.lengths, want.lengths)

    check()


def test_sampling_with_looked_up_drafts_is_plain_sampling():
    """Draft or not, a token is drawn from the same key: the samples are the same ones."""
    ids, mask = prompts()
    options = {"do_sample": True, "top_k": 3, "temperature": 0.7, "key": jax.random.key(3), "max_new_tokens": 24, "eos_token_id": NEVER}
    want, got = (generate(*ours(), ids, mask, **options, **more) for more in ({}, forms()["lookup"]))
    np.testing.assert_array_equal(got.sequences, want.sequences)
    assert got.assistance.accepted.sum() > 0


@functools.cache
def tiny():
    config = llama.LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, eos_token_id=9
    )
    model = llama.LlamaForCausalLM(config)
    return model, noisy(init_params(model, jax.random.key(1)), 0.4)


def check_distribution(model, params, prompt, sequences):
    """Continuations [B,N] sampled from the five likeliest of six tokens at temperature 0.8, against the probabilities of all 6^N."""
    B, N = sequences.shape
    every = np.stack(np.meshgrid(*[np.arange(6)] * N, indexing="ij"), -1).reshape(-1, N)
    rows = np.concatenate([np.tile(prompt, (len(every), 1)), every], 1)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, rows).logits, np.float64)[:, len(prompt) - 1 : -1] / 0.8
    logits[logits < np.sort(logits, -1)[..., 1:2]] = -np.inf
    p = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    p = np.take_along_axis(p, every[..., None], -1)[..., 0].prod(1)
    counts = np.bincount((sequences * 6 ** np.arange(N)[::-1]).sum(1), minlength=6**N)
    assert counts[p == 0].sum() == 0 and abs(p.sum() - 1) < 1e-6
    common = p * B >= 5
    rest = lambda x: np.append(x[common], x[~common].sum())
    assert stats.chisquare(rest(counts), rest(p * B)).pvalue > 1e-3


@pytest.mark.parametrize("way", SOME_SLOW)
def test_samples_follow_the_models_distribution(way):
    model, params = tiny()
    prompt = [1, 4, 2]
    ways = {"draft": {"assistant_model": (model, noisy(params, 0.25))}, "exit": {"assistant_early_exit": 1}}
    options = {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.2, "temperature": 0.8, "top_k": 5, "max_new_tokens": 3}
    out = generate(model, params, np.tile(prompt, (6_000, 1)), do_sample=True, key=jax.random.key(11), **options, **ways[way])
    accepted = out.assistance.accepted.sum() / out.assistance.drafted.sum()
    assert 0.2 < accepted < 0.97
    check_distribution(model, params, prompt, out.sequences[:, 3:])


def torch_draft():
    model = transformers.LlamaForCausalLM(torch_model().config).eval()
    model.load_state_dict(torch_model().state_dict())
    _, params = draft()
    state = {name: torch.tensor(np.asarray(x)) for name, x in flatten(params).items()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def rounds_of(row, assistant=None, **options):
    """transformers' tokens after one row, how often its model ran and how many drafts it checked."""
    seen = []
    hook = torch_model().register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    ids = torch.tensor(np.asarray(row))[None]
    try:
        with torch.no_grad():
            options |= {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
            out = torch_model().generate(ids, assistant_model=assistant, **options)
    finally:
        hook.remove()
    return out[0, ids.shape[1] :].tolist(), len(seen), sum(seen) - ids.shape[1] - len(seen) + 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0},
        {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic_transient", "assistant_confidence_threshold": 0.0},
        {"num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.6},
        {"num_assistant_tokens": 4, "assistant_ensemble_weight": 0.4, "assistant_confidence_threshold": 0.0},
    ],
    ids=str,
)
def test_a_draft_model_drafts_as_in_transformers(options):
    """Rounds and drafts. transformers drafts before it has read the prompt: it begins where our first token is said."""
    assistant, weight = torch_draft(), {name: value for name, value in options.items() if name == "assistant_ensemble_weight"}
    for name, value in options.items():
        setattr(assistant.generation_config, name, value)
    if transformers.utils.is_sklearn_available() and options["assistant_confidence_threshold"]:
        pytest.skip("with scikit-learn transformers changes the threshold as it goes")
    ids, mask = prompts()
    out = generate(*ours(), ids, mask, max_new_tokens=32, eos_token_id=NEVER, assistant_model=draft(), **options)
    for row in range(1, 4):
        prompt = [*ids[row][mask[row] == 1], torch_greedy(row)[0]]
        tokens, rounds, drafted = rounds_of(prompt, assistant, max_new_tokens=31, **weight)
        assert out.sequences[row, T + 1 :].tolist() == tokens
        assert (out.assistance.drafted[row], out.assistance.accepted[row]) == (drafted, 31 - rounds)


@given(
    ids=st.lists(st.lists(st.integers(3, 5), min_size=2, max_size=24), min_size=3, max_size=3),
    num=st.integers(1, 7),
    ngram=st.integers(1, 5),
)
@settings(deadline=None, max_examples=40)
def test_prompt_lookup_finds_what_transformers_finds(ids, num, ngram):
    real = np.stack([np.arange(24) >= 24 - len(row) for row in ids])
    tokens = np.stack([np.pad(row, (24 - len(row), 0)) for row in ids])
    drafts = lookup(tokens, real, np.int32(num), np.int32(ngram))
    theirs = PromptLookupCandidateGenerator(num_output_tokens=num, max_matching_ngram_size=ngram, max_length=1000)
    for row, got, count in zip(ids, np.asarray(drafts.tokens), np.asarray(drafts.counts)):
        assert got[:count].tolist() == theirs.get_candidates(torch.tensor([row]))[0][0, len(row) :].tolist()


@jax.jit
def lookup(tokens, real, num, ngram):
    sequences = Ragged.begin(Sequences.of(tokens, real))
    state = State(sequences, None, jnp.zeros(len(tokens), bool), None, None)
    limit = type("Limit", (), {"room": lambda state: 1000})
    return PromptLookup(num, ngram, columns=8).propose(limit, state, ~state.finished)[0]


SLOW_WAYS = [pytest.param("lookup", None, marks=pytest.mark.slow), pytest.param("exit", "offloaded", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("way", "made"), [("draft", None), *SLOW_WAYS])
def test_rows_that_differ_fill_the_cache(way, made, monkeypatch):
    """With room for one round only, rejected slots are given back again and again."""
    monkeypatch.setattr("jaxmodels.generation.loop.ROUNDS", 1)
    rows = np.random.default_rng(4).integers(3, VOCAB, (7, 9))
    want = generate(*ours(), rows, max_new_tokens=70, eos_token_id=NEVER)
    out = generate(*ours(), rows, max_new_tokens=70, eos_token_id=NEVER, cache_implementation=made, **forms()[way])
    np.testing.assert_array_equal(out.sequences, want.sequences)
    assert out.cache.slots < 16 + out.assistance.rounds + out.assistance.accepted.sum()


def test_a_cache_gives_back_slots_and_tokens():
    """After `rewind` and `compact` the next logits are those of a cache that never held more."""
    model, params = family("mistral", True)
    step = jax.jit(model.apply)
    ids = np.random.default_rng(0).integers(3, 60, (2, 12))
    read = lambda ids, real, cache: step({"params": params}, ids, attention_mask=real, cache=cache)
    cache = read(ids[:, :6], np.ones((2, 6), int), init_cache(model, 2, 24)).cache.spare(6)
    kept = np.array([4, 1])
    after = read(ids[:, 6:], np.ones((2, 6), int), cache).cache
    back = after.rewind(cache.lengths + kept, cache.index + 4).compact()
    assert back.index == 10 and back.positions[:, :10].tolist() == [[*range(10)], [*range(7), -1, -1, -1]]
    once = read(ids[:, 6:10], np.arange(4) < kept[:, None], cache).cache
    more = [read(np.full((2, 1), 7), np.ones((2, 1), int), c).logits for c in (back, once)]
    np.testing.assert_allclose(*more, atol=1e-5)


@pytest.mark.parametrize(("spare", "late"), [(0, 0), (2, 0), (0, 2)])
def test_a_window_gives_back_what_it_can_and_says_what_it_cannot(spare, late):
    """Layers over 5 tokens that have read 9, with room to spare before or, too late, after that: no number of tokens taken back changes
    the next logits silently."""
    model, params = family("mistral", True)
    step = jax.jit(model.apply)
    ids = np.random.default_rng(1).integers(3, 60, (2, 10))
    read = lambda ids, cache, **mask: step({"params": params}, ids, cache=cache, **mask)
    whole = read(ids[:, :9], init_cache(model, 2, 12).spare(spare)).cache
    whole = whole.spare(late) if late else whole
    for taken in ([0, 0], [2, 0], [1, 2], [0, 3], [9, 9]):
        lengths = 9 - np.array(taken)
        if max(taken) > spare:
            with pytest.raises(ValueError, match="layers over a window have lost tokens"):
                whole.rewind(lengths, whole.index)
            continue
        got = read(ids[:, 9:], whole.rewind(lengths, whole.index))
        once = read(ids[:, :9], init_cache(model, 2, 12), attention_mask=(np.arange(9) < lengths[:, None]).astype(int)).cache
        np.testing.assert_allclose(got.logits, read(ids[:, 9:], once).logits, atol=1e-5)
        np.testing.assert_array_equal(got.cache.lengths, lengths + 1)


def test_recurrent_states_give_nothing_back():
    with pytest.raises(ValueError, match="recurrent state cannot forget"):
        init_cache(family("mamba", False)[0], 1, 4).rewind(np.array([2]), np.int32(2))
