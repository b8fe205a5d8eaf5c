"""Regular expressions against Python's, token masks against spelling out every token, and generated text against its schema."""

import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_fixtures import compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_fixtures import llama3

from jaxmodels.generation import Sequences, generate
from jaxmodels.generation.grammar import Grammar, GrammarMask
from jaxmodels.generation.regex import compile_regex
from jaxmodels.generation.vocabulary import token_bytes
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import init_params
from jaxmodels.processing.tokenizer import AutoTokenizer

PATTERNS = [
    "abc", "a|b|cd", "(a|b)*c", "[a-c]{2,4}x?", "日本|[ぁ-ん]+é?",
    r"\d+(\.\d{1,3})?", r'"([^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt]){0,5}"', "[^a-z]+",
    "^(foo|)bar$", "a{3}b{0}c{2,}", "(?:ab)+?", r"\w\s\S\W", "x{,2}y", ".*z", "[é-😀]",
    "(-)?(0|[1-9][0-9]*)", "[]a]+", r"[a\-z]", "a*|b+", "(a?b?)*c",
]  # fmt: skip
LETTERS = 'abcdxyz019."\\-\n é日ぁん本😀]f o/r'


def follows(goto, text, state=0):
    for byte in text:
        state = goto[state, byte] if state >= 0 else -1
    return state


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_match_what_pythons_do(pattern):
    goto, accept = compile_regex(pattern)
    rng, wanted = random.Random(0), re.compile(pattern, re.ASCII)
    for _ in range(600):
        text = "".join(rng.choices(LETTERS, k=rng.randint(0, 6)))
        state = follows(goto, text.encode())
        assert (state >= 0 and bool(accept[state])) == bool(wanted.fullmatch(text)), text


@given(text=st.text(max_size=4))
@settings(deadline=None, max_examples=100)
def test_any_text_is_utf8(text):
    goto, accept = compile_regex(r"[^\u0000]*")
    state = follows(goto, text.encode())
    assert (state >= 0 and bool(accept[state])) == ("\0" not in text)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("(a", "expected"), ("a)", "unbalanced"), ("a(?=b)", "not supported"), (r"\b", "not supported"), 
     ("*a", "stands where"), ("[b-a]", "wrong way"),
     ("a{3,1}", "wrong way"), ("[^\\u0000-\\uFFFF]", None), (r"a[^\s\S]", "no text matches"), ("[ab", "expected")],
)  # fmt: skip
def test_expressions_that_are_not_understood(pattern, words):
    if words is None:
        compile_regex(pattern)
        return
    with pytest.raises(ValueError, match=words):
        compile_regex(pattern)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(llama3(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 9, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return model, init_params(model, jax.random.key(0))


def test_masks_are_what_spelling_out_gives(tokenizer):
    V, eos = len(tokenizer) + 9, tokenizer.eos_token_id
    pattern = r'\{"é+": ("日本"|[0-9]{1,3}), ?"def": [a-z ]*\}'
    goto, accept = compile_regex(pattern)
    grammar = Grammar.regex(tokenizer, pattern, V)
    spelled, special = token_bytes(tokenizer), {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    text = '{"éé": 12,"def": return x}'
    sequences = Sequences(jnp.zeros((1, 80), jnp.int32), jnp.zeros((1, 80), bool), np.int32(1), np.int32(1), np.int32(0)).follow((grammar,))
    mask = jax.jit(lambda sequences: GrammarMask(np.array([eos, -1], np.int32))(sequences, jnp.zeros((1, V)))[0] == 0)
    append = jax.jit(lambda sequences, token: sequences.append(token, jnp.ones(1, bool)))
    state = 0
    for token in [*tokenizer.encode(text, add_special_tokens=False), None]:
        want = [n < len(spelled) and n not in special and len(spelled[n]) > 0 and follows(goto, spelled[n], state) >= 0 for n in range(V)]
        want[eos] = bool(accept[state])
        np.testing.assert_array_equal(mask(sequences), want)
        if token is not None:
            assert want[token]
            sequences, state = append(sequences, jnp.array([token])), follows(goto, spelled[token], state)
    assert accept[state]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0}, "kind": {"enum": ["a", "é", 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "other": {"anyOf": [{"type": "null"}, {"const": "x"}]},
    },
    "required": ["name", "kind", "tags", "other"],
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0, "temperature": 3.0}, {"num_beams": 2}], ids=str)
def test_generated_text_follows_the_schema(tokenizer, model, options):
    """A random model that is made to end soon writes JSON of the schema, in every strategy."""
    V = model[0].config.vocab_size
    grammar = Grammar.json_schema(tokenizer, SCHEMA, V, whitespace="")
    if "do_sample" in options:
        options = options | {"key": jax.random.key(3)}
    ids = np.random.default_rng(0).integers(3, 200, (3, 9))
    bias = {(n,): 4.0 for token, n in tokenizer.get_vocab().items() if token in ('"', "}", "]", ",")}
    out = generate(*model, ids, np.ones_like(ids), max_new_tokens=100, grammar=grammar, sequence_bias=bias, **options)
    finished = 0
    for row, n in zip(out.sequences, out.lengths):
        text = tokenizer.decode(row[9 : 9 + n], skip_special_tokens=True)
        if row[9 + n - 1] != tokenizer.eos_token_id:
            continue  # a string of digits may go on for ever
        finished += 1
        found = json.loads(text)
        assert set(SCHEMA["required"]) <= set(found) <= set(SCHEMA["properties"]) and len(found["name"]) <= 6 and len(found["tags"]) <= 2
        assert found["kind"] in ("a", "é", 3) and found["other"] in (None, "x") and all(isinstance(tag, bool) for tag in found["tags"])
    assert finished > 0


def test_another_grammar_of_the_size_compiles_nothing(tokenizer, model):
    ids, V = np.full((1, 5), 9), model[0].config.vocab_size
    first, second = (Grammar.regex(tokenizer, pattern, V) for pattern in ("(yes|no)", "[0-9]{3}"))
    run = lambda grammar: tokenizer.decode(
        generate(*model, ids, max_new_tokens=9, grammar=grammar).sequences[0, 5:], skip_special_tokens=True
    )
    assert run(first) in ("yes", "no")
    with compilations() as found:
        assert re.fullmatch("[0-9]{3}", run(second))
    assert found == []


def test_what_others_forbid_does_not_break_the_grammar(tokenizer, model):
    """DoLa, for one, leaves -inf for all that the grammar allows."""
    V, end = model[0].config.vocab_size, tokenizer.eos_token_id
    begun = Sequences.of(np.full((2, 1), 5)).follow((Grammar.regex(tokenizer, "(yes|no)", V),))
    logits = np.full((2, V), -np.inf, np.float32)
    logits[:, end], logits[1, tokenizer.encode("n", add_special_tokens=False)[0]] = 1.0, 0.5
    first = [tokenizer.decode([n]) for n in GrammarMask(np.array([end]))(begun, jnp.asarray(logits)).argmax(-1)]
    assert "yes".startswith(first[0]) or "no".startswith(first[0])
    assert first[0] and first[1] == "n"


def test_what_no_token_spells(tokenizer):
    with pytest.raises(ValueError, match="no tokens that spell"):
        Grammar.regex(tokenizer, "a", 3)
