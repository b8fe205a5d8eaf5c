"""What goes with assisted decoding: streams, records, stops, functions, turns, jit, two tokenizers; and what does not."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from generation_fixtures import VOCAB, T, compilations, ours, prompts, torch_greedy
from processing_fixtures import llama3
from test_generation_assisted import NEVER, SOME_SLOW, SURE, draft, family, forms, noisy

import jaxmodels as jm
from jaxmodels.generation import Grammar, generate
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import init_params
from jaxmodels.sharding.rules import Rules, make_mesh

TINY = Path(jm.__file__).parent / "assets" / "tiny-python"
WAYS = ["lookup", "draft", "exit"]


@pytest.mark.parametrize("way", [*SOME_SLOW, pytest.param("lookup", marks=pytest.mark.slow)])
def test_records_and_streams(way):
    """Scores and logits of every row's tokens, whatever round they came in; columns as soon as all rows have them."""
    ids, mask = prompts()
    ends = [torch_greedy(1)[9], torch_greedy(2)[15]]
    call = functools.partial(generate, *ours(), ids, mask, max_new_tokens=20, eos_token_id=ends, output_scores=True, output_logits=True)
    seen = []
    stream = type("Stream", (), {"put": lambda self, x: seen.append(np.array(x)), "end": lambda self: seen.append(None)})()
    want, got = call(repetition_penalty=1.2), call(repetition_penalty=1.2, streamer=stream, **forms()[way])
    np.testing.assert_array_equal(got.sequences, want.sequences)
    np.testing.assert_array_equal(np.stack(seen[1:-1], 1), want.sequences[:, T:])
    alive = np.arange(20)[:, None] < want.lengths
    for one, other in ((got.scores, want.scores), (got.logits, want.logits)):
        assert one.shape == other.shape and np.abs(one - other)[alive].max() < 2e-5


def test_functions_of_the_callers_see_every_row_as_it_is():
    ids, mask = prompts()
    lengths = set()

    def allowed(row, said):
        lengths.add((row, len(said)))
        return range(3 + len(said) % 2, VOCAB, 2)

    options = {"prefix_allowed_tokens_fn": allowed, "logits_processor": [lambda ids, scores: scores * 1.5], "max_new_tokens": 12}
    options |= {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 7 == 0], "eos_token_id": NEVER}
    want = generate(*ours(), ids[1:3], mask[1:3], **options)
    assert lengths == {(row, T + n) for row in range(2) for n in range(want.lengths.max())}
    for way in WAYS[:2]:
        got = generate(*ours(), ids[1:3], mask[1:3], **options, **forms()[way])
        np.testing.assert_array_equal(got.sequences, want.sequences)


def test_watermark_and_time_limit():
    """SynthID looks at what each row has generated; a time limit ends a call between two rounds."""
    ids, mask = prompts()
    mark = {"ngram_len": 3, "keys": [11, 5, 9], "context_history_size": 64, "sampling_table_size": 64, "sampling_table_seed": 0}
    options = {"do_sample": True, "key": jax.random.key(2), "max_new_tokens": 20, "watermarking_config": mark, "eos_token_id": NEVER}
    want, got = (generate(*ours(), ids, mask, **options, **more) for more in ({}, forms()["lookup"]))
    np.testing.assert_array_equal(got.sequences, want.sequences)
    options = {"max_new_tokens": 700, "eos_token_id": NEVER}
    out = generate(*ours(), ids, mask, max_time=0.3, **options, **forms()["lookup"])
    assert T < out.sequences.shape[1] == T + out.lengths.max() < T + 700
    for row, n in enumerate(out.lengths):
        assert out.sequences[row, T : T + min(n, 40)].tolist() == torch_greedy(row)[:n] and not out.sequences[row, T + n :].any()


SLOW_TURNS = [pytest.param("lookup", False, marks=pytest.mark.slow), pytest.param("exit", True, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("way", "scan_layers"), [("draft", False), *SLOW_TURNS])
def test_turns(way, scan_layers):
    """A cache goes on, to assisted and plain decoding; a draft model's own with it."""
    ids, mask = prompts()
    model, options = ours(scan_layers), {"max_new_tokens": 12, "eos_token_id": NEVER}
    first = generate(*model, ids, mask, **options, **forms(scan_layers)[way])
    turn = np.array([[9, 8], [7, 6], [5, 9], [11, 12]])
    second = generate(*model, turn, cache=first.cache, **options, **forms(scan_layers)[way])
    plain = generate(*model, turn, cache=first.cache, **options)
    whole = generate(*model, np.concatenate([first.sequences, turn], 1), np.pad(mask, ((0, 0), (0, 14)), constant_values=1), **options)
    for out in (second, plain):
        np.testing.assert_array_equal(out.sequences[:, 2:], whole.sequences[:, -12:])
    assert second.assistance.accepted.any()
    again = generate(*model, np.zeros((4, 0), int), cache=second.cache.take(np.array([3, 1, 1, 0])), **options, **forms(scan_layers)[way])
    more = generate(*model, whole.sequences, np.pad(mask, ((0, 0), (0, 26)), constant_values=1), **options)
    np.testing.assert_array_equal(again.sequences, more.sequences[[3, 1, 1, 0], -12:])


@pytest.mark.slow
def test_an_encoder_decoder_goes_on_with_its_assistant():
    model, params = family("t5", False)
    ids = np.random.default_rng(1).integers(3, 60, (2, 9))
    options = {"max_new_tokens": 10, "assistant_model": (model, noisy(params)), "num_assistant_tokens": 6, **SURE}
    whole = generate(model, params, ids, max_new_tokens=20)
    first = generate(model, params, ids, **options)
    second = generate(model, params, cache=first.cache, **options)
    np.testing.assert_array_equal(np.concatenate([first.sequences, second.sequences], 1), whole.sequences)
    with pytest.raises(ValueError, match="nothing of the assistant's"):
        generate(model, params, cache=generate(model, params, ids, max_new_tokens=2).cache, **options)


def test_under_jit_and_over_devices():
    ids, mask = prompts()
    model, params = ours()
    want = generate(model, params, ids, mask, max_new_tokens=20, eos_token_id=NEVER).sequences
    drafts = draft()[1]
    options = {"max_new_tokens": 20, "eos_token_id": NEVER, "num_assistant_tokens": 5}

    @jax.jit
    def run(params, drafts, sure):
        assistant = {"assistant_model": (model, drafts), "assistant_confidence_threshold": sure}
        return generate(model, params, ids, mask, **options, **assistant).sequences

    np.testing.assert_array_equal(run(params, drafts, 0.1), want)
    rules = Rules.preset("fsdp+tensor", make_mesh(jax.devices()[:4], fsdp=2, tensor=2))
    model = model.clone(rules=rules)
    spread = jax.device_put(params, jax.tree.map(lambda x: x.sharding, init_params(model, jax.random.key(0))))
    out = generate(model, spread, ids, mask, max_new_tokens=20, eos_token_id=NEVER, prompt_lookup_num_tokens=5)
    np.testing.assert_array_equal(out.sequences, want)


@functools.cache
def tiny_python():
    """In float32: in its own bfloat16 one column and several round differently."""
    return *jm.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32"), jm.AutoTokenizer.from_pretrained(TINY)


def code(*texts):
    rows = [tiny_python()[2].encode(text) for text in texts]
    width = max(map(len, rows))
    return np.array([[0] * (width - len(row)) + row for row in rows]), np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])


TEXTS = ("def add(a, b):\n    ", "class Foo:\n    def __init__(self", "for i in range(")
LONG = {"max_new_tokens": 40, "repetition_penalty": 1.0, "eos_token_id": NEVER + 5000, "pad_token_id": 0}


def test_drafts_go_through_text():
    """Nearly all are right where the assistant is the model itself."""
    model, params, tokenizer = tiny_python()
    ids, mask = code(*TEXTS)
    want = generate(model, params, ids, mask, **LONG).sequences
    seen = []
    stream = type("Stream", (), {"put": lambda self, x: seen.append(x), "end": lambda self: None})()
    options = {"tokenizer": tokenizer, "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic", **LONG, **SURE}
    options |= {"assistant_model": (model, params), "assistant_tokenizer": tokenizer}
    own = generate(model, params, ids, mask, streamer=stream, **options)
    np.testing.assert_array_equal(own.sequences, want)
    np.testing.assert_array_equal(np.stack(seen[1:], 1), want[:, ids.shape[1] :])
    assert own.assistance.rounds < 16 and (own.assistance.accepted > 0.7 * own.assistance.drafted).all()


@pytest.mark.slow
def test_two_tokenizers(tmp_path):
    """The tokens of plain decoding whatever an assistant babbles. (Samples: test_generation_universal.py.)"""
    model, params, tokenizer = tiny_python()
    ids, mask = code(*TEXTS)
    other = jm.AutoTokenizer.from_pretrained(llama3(tmp_path))
    config = LlamaConfig(vocab_size=len(other), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    babble = LlamaForCausalLM(config)
    assistant = (babble, noisy(init_params(babble, jax.random.key(0)), 0.2))
    babbling = {"tokenizer": tokenizer, "assistant_model": assistant, "assistant_tokenizer": other}
    plain, got = (generate(model, params, ids, mask, **LONG, **extra) for extra in ({}, babbling))
    np.testing.assert_array_equal(got.sequences, plain.sequences)


def test_grammar_and_stop_strings():
    model, params, tokenizer = tiny_python()
    ids, mask = code("x = ", "answer: ")
    grammar = Grammar.regex(tokenizer, r"\[[0-9]{2}(, [0-9]{2})*\]", 4096)
    options = {"max_new_tokens": 24, "tokenizer": tokenizer, "stop_strings": [", 1", "]"], "grammar": grammar}
    want, got = (generate(model, params, ids, mask, **options, **more) for more in ({}, {"prompt_lookup_num_tokens": 4}))
    np.testing.assert_array_equal(got.sequences, want.sequences)
    texts = [tokenizer.decode(row[ids.shape[1] :][:n]) for row, n in zip(got.sequences, got.lengths)]
    assert all(text.startswith("[") for text in texts)


ALL = {"prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ALL | {"assistant_early_exit": 1}, "assistant_early_exit and prompt_lookup_num_tokens are both set"),
        (ALL | {"num_beams": 2}, "goes with greedy decoding and sampling of one sequence per prompt; found num_beams=2"),
        (ALL | {"do_sample": True, "key": jax.random.key(0), "num_return_sequences": 2}, "num_return_sequences=2"),
        (ALL | {"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha=0.5 and top_k=4"),
        (ALL | {"dola_layers": "low"}, "dola_layers='low'"),
        (ALL | {"guidance_scale": 1.5}, "guidance_scale=1.5"),
        (ALL | {"use_cache": False}, "use_cache=False"),
        (ALL | {"cache_implementation": "quantized"}, "cache_implementation='quantized': drafts .* taken back"),
        (ALL | {"assistant_ensemble_weight": 0.5}, "prompt_lookup_num_tokens has none"),
        ({"assistant_early_exit": 2}, "assistant_early_exit=2 leaves the model after its last layer: it has 2, use 1 to 1"),
        ({"assistant_early_exit": 0}, "assistant_early_exit is 0; expected an integer above 0"),
        ({"num_assistant_tokens_schedule": "often"}, "expected one of 'constant', 'heuristic', 'heuristic_transient'"),
        ({"assistant_model": 3}, r"assistant_model is a pair \(model, params\), as from_pretrained returns it; found int"),
        ({"assistant_tokenizer": 3}, "assistant_tokenizer belongs to an assistant_model"),
        ({"use_mtp": True}, "use_mtp=True is not supported: the layers .* are not loaded.*assistant_early_exit"),
        ({"speculation_type": "dflash"}, "speculation_type='dflash' is not supported"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options, words):
    ours()  # made now, if no test before has
    with compilations() as found, pytest.raises(ValueError, match=words):
        generate(*ours(), np.full((1, 9), 5), **{"max_new_tokens": 4, **options})
    assert found == []


def test_bad_assistants():
    ids = np.full((1, 9), 5)
    other, encoder = family("mistral", True), family("t5", False)
    with pytest.raises(ValueError, match="vocabulary of 60 tokens and the model of 211: with two tokenizers pass both"):
        generate(*ours(), ids, max_new_tokens=4, assistant_model=other)
    with pytest.raises(ValueError, match="the assistant is an encoder-decoder and the model a decoder alone"):
        generate(*ours(), ids, max_new_tokens=4, assistant_model=encoder)
    with pytest.raises(ValueError, match="assistant_tokenizer is one of two"):
        generate(*ours(), ids, max_new_tokens=4, assistant_model=draft(), assistant_tokenizer=object())
    with pytest.raises(ValueError, match="this model is an encoder-decoder"):
        generate(*encoder, ids, max_new_tokens=4, assistant_early_exit=1)
    few = jm.init_cache(encoder[0], 1, 64, implementation=jm.QuantizedCache(8, q_group_size=4))
    with pytest.raises(ValueError, match="drafts that are wrong are taken back"):
        generate(*encoder, None, decoder_input_ids=ids, cache=few, max_new_tokens=4, prompt_lookup_num_tokens=3)
    json.dumps(jm.GenerationConfig(prompt_lookup_num_tokens=3).to_dict())
