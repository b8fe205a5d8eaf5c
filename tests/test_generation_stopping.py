"""Stop strings against transformers' and against the text, token healing, transition scores, hidden states and attentions."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from generation_fixtures import LENGTHS, VOCAB, T, compilations, ours, prompts, torch_greedy, torch_model
from hypothesis import given, settings
from processing_fixtures import gemma_sentencepiece, llama3
from transformers.generation.stopping_criteria import StopStringCriteria

from jaxmodels.generation import Sequences, generate
from jaxmodels.generation.healing import heal_tokens
from jaxmodels.generation.scores import compute_transition_scores
from jaxmodels.generation.stopping import StopStrings
from jaxmodels.processing.tokenizer import AutoTokenizer

NEVER = VOCAB + 5
TEXT = "def f(x):\n\treturn 日本語 🙂👍🏽 naïve  # ok\n\nstop"
WORDS = ["return", "本語", "🙂", "👍🏽 n", "\n\n", "日", " ", "ok\n", "x):", "never", "ï", "stop", "rn 日"]


@functools.cache
def tokenizers(maker, folder):
    path = maker(folder)
    return AutoTokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module", params=[llama3, gemma_sentencepiece], ids=lambda maker: maker.__name__)
def pair(request, tmp_path_factory):
    return tokenizers(request.param, tmp_path_factory.mktemp("tokenizer"))


def stops(tokenizer, words, ids):
    """Whether a row [T] of ids ends with each of its tokens."""
    follower = StopStrings.of(tokenizer, words, len(tokenizer) + 3)
    sequences = Sequences.of(np.zeros((1, 1), int)).follow((follower,)).followers[0]
    step = jax.jit(lambda follower, token: follower.append(token, jnp.ones(1, bool)))
    found = []
    for token in ids:
        sequences = step(sequences, jnp.array([token]))
        found.append(bool(sequences.hit[0]))
    return found


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True), cut=st.integers(0, 20))
@settings(deadline=None, max_examples=10)
def test_stop_strings_are_transformers(pair, words, cut):
    """Token by token, characters split over tokens included."""
    mine, theirs = pair
    ids = mine.encode(TEXT[cut:], add_special_tokens=False)
    criterion = StopStringCriteria(theirs, words)
    want = [bool(criterion(torch.tensor([ids[: n + 1]]), None)[0]) for n in range(len(ids))]
    assert stops(mine, words, ids) == want


def test_tables_outlive_the_trace_that_made_them(pair):
    tokenizer, _ = pair
    states = lambda: StopStrings.of(tokenizer, ["within a trace"], len(tokenizer)).table
    np.testing.assert_array_equal(jax.jit(states)(), np.asarray(states()))


def test_a_string_may_begin_in_the_prompt(pair):
    tokenizer, _ = pair
    ids = np.array([tokenizer.encode("a return", add_special_tokens=False)])
    follower = StopStrings.of(tokenizer, ["return"], len(tokenizer))
    begun = Sequences.of(ids[:, :-1]).follow((follower,)).followers[0]
    assert not begun.hit[0] and begun.append(jnp.asarray(ids[:, -1]), jnp.ones(1, bool)).hit[0]
    assert not begun.append(jnp.asarray(ids[:, -1]), jnp.zeros(1, bool)).hit[0]


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_stops_at_strings(pair, beams):
    """Each row at its own; another string compiles nothing. The tokenizer's tokens stand for the model's first ones."""
    tokenizer, theirs = pair
    ids, mask = prompts()
    text = [tokenizer.decode(torch_greedy(row)[6:9]) for row in (1, 2)]
    words = [next(w for w in (t[-3:], t) if w) for t in text]
    options = {"max_new_tokens": 20, "num_beams": beams, "stop_strings": words}
    run = lambda **changes: generate(*ours(), ids[1:3], mask[1:3], eos_token_id=NEVER, tokenizer=tokenizer, **options | changes)
    out = run()
    for row, n, (tokens, real) in zip(out.sequences, out.lengths, zip(ids[1:3], mask[1:3])):
        prompt = torch.tensor(tokens[real == 1])[None]
        with torch.no_grad():
            want = torch_model().generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, tokenizer=theirs, **options
            )
        assert row[T : T + n].tolist() == want[0, prompt.shape[1] :].tolist()
    with compilations() as found:
        run(stop_strings=["zzz"])
    assert found == []


def test_healing_equals_transformers(tmp_path):
    mine, theirs = tokenizers(llama3, tmp_path)
    for tokenizer in (mine, theirs):
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(theirs), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        bos_token_id=theirs.bos_token_id, eos_token_id=theirs.eos_token_id, pad_token_id=theirs.pad_token_id, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    import jaxmodels as jm

    model.save_pretrained(tmp_path / "model")
    net, params = jm.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for texts in (["return fib", "def f", "http:"], ["the", "n if n < 2 else f"]):
        ids = np.asarray(mine(texts, padding=True)["input_ids"])
        want = model.heal_tokens(torch.tensor(ids), theirs).numpy()
        again = functools.partial(generate, net, params, do_sample=False)
        got, real = heal_tokens(again, ids, mine)
        np.testing.assert_array_equal(got, want)
        assert (real == (want != mine.pad_token_id)).all()
    out = generate(net, params, ids, max_new_tokens=3, token_healing=True, tokenizer=mine)
    np.testing.assert_array_equal(out.sequences[:, :-3], want)
    with pytest.raises(ValueError, match="token_healing reads prompts from their beginning"):
        generate(net, params, ids, max_new_tokens=3, token_healing=True, tokenizer=mine, cache=out.cache)
    with pytest.raises(ValueError, match="token_healing runs on the host"):
        jax.jit(lambda ids: generate(net, params, ids, max_new_tokens=3, token_healing=True, tokenizer=mine).sequences)(ids)
    with pytest.raises(ValueError, match="token_healing reads the prompt as text"):
        generate(net, params, ids, max_new_tokens=3, token_healing=True)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores_equal_torch(beams, normalize):
    ids, mask = prompts()
    row = torch.tensor(ids[2:3, -LENGTHS[2] :])
    options = {"max_new_tokens": 8, "num_beams": beams, "output_scores": True, "repetition_penalty": 1.3}
    with torch.no_grad():
        theirs = torch_model().generate(row, attention_mask=torch.ones_like(row), do_sample=False, return_dict_in_generate=True, **options)
    out = generate(*ours(), ids[2:3], mask[2:3], **options)
    want = torch_model().compute_transition_scores(theirs.sequences, theirs.scores, getattr(theirs, "beam_indices", None), normalize)
    got = compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize)
    assert got.shape == want.shape and np.abs(got - want.numpy()).max() <= 2e-4
    if beams > 1:
        with pytest.raises(ValueError, match="needs its beam_indices"):
            compute_transition_scores(out.sequences, out.scores)


def test_states_equal_torch():
    """Step by step, in transformers' shapes; of padded rows where these have tokens."""
    ids, mask = prompts()
    options = {"max_new_tokens": 5, "output_hidden_states": True, "output_attentions": True}
    row = torch.tensor(ids[2:3, -LENGTHS[2] :])
    model = torch_model()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            want = model.generate(
                row, attention_mask=torch.ones_like(row), do_sample=False, eos_token_id=None, return_dict_in_generate=True, **options
            )
    finally:
        model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="eager"):
        out = generate(*ours(), ids[1:3], mask[1:3], eos_token_id=NEVER, **options)
    assert out.sequences[1, T:].tolist() == want.sequences[0, LENGTHS[2] :].tolist()
    skip = T - LENGTHS[2]
    for got, wanted in ((out.hidden_states, want.hidden_states), (out.attentions, want.attentions)):
        assert [len(step) for step in got] == [len(step) for step in wanted]
        for n, (layers, others) in enumerate(zip(got, wanted)):
            for a, b in zip(layers, others):
                a, b = a[1:], b.numpy()
                a = a[..., skip:] if a.ndim == 4 else a
                a = a[..., skip:, :] if n == 0 else a
                assert a.shape == b.shape and np.abs(a - b).max() <= 1e-4 * max(1, b.std())
    assert set(generate(*ours(), ids[1:3], mask[1:3], max_new_tokens=2, output_hidden_states=True).keys()) >= {"hidden_states", "sequences"}
    with pytest.raises(ValueError, match="need the whole conversation"):
        generate(*ours(), ids[1:3, :5], max_new_tokens=2, output_hidden_states=True, cache=out.cache)
