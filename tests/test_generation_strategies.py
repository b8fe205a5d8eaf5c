"""Contrastive search, DoLa, diverse and constrained beams against what transformers 4.45.2 wrote into tests/fixtures, and at the edges."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_generation_fixtures import ALONE, CASES, CHOICES, CONFIG, FORCED, GROUPS, HERE, LENGTHS, SAID, UNSCORED, prompts, weights
from generation_fixtures import compilations

from jaxmodels.convert.rules import stack
from jaxmodels.generation import generate
from jaxmodels.generation.constraints import DisjunctiveConstraint, PhrasalConstraint, Tries, all_constraints
from jaxmodels.generation.dola import early_layers
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import abstract_params, flatten, unflatten

T = max(LENGTHS)
NEVER = CONFIG["vocab_size"] + 5


@functools.cache
def ours(scan_layers=False):
    model = LlamaForCausalLM(LlamaConfig.from_dict(CONFIG))
    shapes = {name: x.shape for name, x in flatten(abstract_params(model)).items()}
    flat = {name: jnp.asarray(x) for name, x in weights(shapes).items()}
    if scan_layers:
        model = model.clone(scan_layers=True)
        flat = stack(flat, list(flatten(abstract_params(model))))
    return model, unflatten(flat)


@functools.cache
def written():
    about = json.loads((HERE / "generation.json").read_text())
    assert about["written_by"]["transformers"] == "4.45.2" and about["config"] == CONFIG
    assert about["cases"] == json.loads(json.dumps(CASES))
    with np.load(HERE / "generation.npz") as file:
        return dict(file)


def cases(*prefixes):
    return [name for name in CASES if name.startswith(prefixes)]


def assert_scores(got, want, lengths):
    """[N,B,V] up to each row's end, without pad_token_id 0: to transformers the padding of a prompt is a token that was said before."""
    got, want = got[..., 1:], want[..., 1:]
    alive = np.arange(len(want))[:, None] < lengths
    finite = np.isfinite(want) & alive[..., None]
    np.testing.assert_array_equal(np.isfinite(got)[alive], np.isfinite(want)[alive])
    assert np.abs(got[finite] - want[finite]).max() <= 1e-4 * max(1, want[finite].std())


@pytest.mark.parametrize("name", cases("contrastive"))
def test_contrastive_search(name):
    out = generate(*ours(), *prompts(), output_scores=True, **CASES[name])
    want = written()[f"{name}/tokens"]
    np.testing.assert_array_equal(out.sequences[:, T:], want)
    assert_scores(out.scores, written()[f"{name}/scores"], out.lengths)


@pytest.mark.parametrize("name", cases(*ALONE))
def test_dola(name):
    out = generate(*ours(scan_layers=True), *prompts(), output_scores=True, **CASES[name])
    for row in range(len(LENGTHS)):
        want = written()[f"{name}/tokens {row}"]
        np.testing.assert_array_equal(out.sequences[row, T : T + len(want)], want)
        scores = written()[f"{name}/scores {row}"][:, None]
        assert_scores(out.scores[: len(want), row : row + 1], scores, out.lengths[row])


def test_dola_samples():
    """Drawn from the contrast's probabilities: at a low temperature the likeliest."""
    options = CASES["dola low"] | {"do_sample": True, "temperature": 1e-4, "top_k": 0, "key": jax.random.key(0), "num_return_sequences": 2}
    out = generate(*ours(scan_layers=True), *prompts(), **options)
    for row in range(2 * len(LENGTHS)):
        want = written()[f"dola low/tokens {row // 2}"]
        assert out.sequences[row, T : T + len(want)].tolist() == want.tolist()


@pytest.mark.parametrize("name", cases("groups", "phrase", "choices"))
def test_diverse_and_constrained_beams(name):
    out = generate(*ours(scan_layers=True), *prompts(), **CASES[name])
    np.testing.assert_array_equal(out.sequences[:, T:], written()[f"{name}/tokens"])
    if not name.startswith(UNSCORED):
        np.testing.assert_allclose(out.sequences_scores, written()[f"{name}/sequences_scores"], rtol=1e-5, atol=1e-5)


def test_progress_of_constraints():
    """Banks, and tokens that go on, after every token of some sayings."""
    want = iter(json.loads((HERE / "generation.json").read_text())["progress"])
    for words, said in SAID:
        tries = Tries.of(all_constraints(None, words))
        progress, add = tries.begin((1,)), jax.jit(tries.add)
        for token in said:
            progress = add(progress, np.array([token]))
            options = sorted(set(np.asarray(tries.options(progress)).flatten().tolist()) - {-1})
            assert [int(tries.bank(progress)[0]), options] == next(want)
            assert bool(progress.completed[0]) == (not options)


def test_constraints_as_objects():
    """The same as lists of ids."""
    lists = generate(*ours(True), *prompts(), **FORCED, force_words_ids=CHOICES)
    objects = [DisjunctiveConstraint(CHOICES[0]), PhrasalConstraint(CHOICES[1])]
    given = generate(*ours(True), *prompts(), **FORCED, constraints=objects)
    np.testing.assert_array_equal(lists.sequences, given.sequences)


def test_early_layers():
    """By the rules of the paper's authors: every second layer of a half, of 20 layers in deep models, not the tied embeddings."""
    assert early_layers("low", 32, False) == tuple(range(0, 16, 2)) and early_layers("high", 32, True) == tuple(range(16, 32, 2))
    assert early_layers("low", 30, True) == tuple(range(2, 15, 2)) and early_layers("low", 80, True) == tuple(range(2, 20, 2))
    assert early_layers("high", 80, False) == tuple(range(60, 80, 2)) and early_layers((1, 3, 99), 32, True) == (1, 3)
    assert early_layers("low", 2, True) == (1,) and early_layers("low", 4, True) == (2,) and early_layers("low", 1, True) == (0,)


def test_contrastive_search_goes_on():
    """The cache has read every token; streams and a second turn are as in one call over everything."""
    ids, mask = prompts()
    options = {"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": NEVER}
    want = written()["contrastive 0.6/tokens"]
    seen = []
    stream = type("Stream", (), {"put": lambda self, x: seen.append(np.array(x)), "end": lambda self: seen.append(None)})()
    out = generate(*ours(), ids, mask, max_new_tokens=11, streamer=stream, **options)
    np.testing.assert_array_equal(out.sequences[:, T:], want[:, :11])
    np.testing.assert_array_equal(np.stack(seen[1:-1], 1), want[:, :11])
    assert not np.asarray(out.cache.unread).any() and out.cache.positions.shape[0] == len(LENGTHS)
    more = np.array([[9], [9], [9], [9]])
    turn = generate(*ours(), more, cache=out.cache, max_new_tokens=1, eos_token_id=NEVER)
    model, params = ours()
    whole = np.concatenate([ids[1:2, -5:], out.sequences[1:2, T:], more[:1]], 1)
    assert turn.sequences[1, 1] == jax.jit(model.apply)({"params": params}, whole).logits[0, -1].argmax()


def test_other_values_compile_nothing():
    call = functools.partial(generate, *ours(), *prompts(), max_new_tokens=24)
    call(penalty_alpha=0.6, top_k=4, eos_token_id=3)
    with compilations() as found:
        call(penalty_alpha=0.2, top_k=4, eos_token_id=[4, 9], pad_token_id=5)
    assert found == []
    call = functools.partial(generate, *ours(scan_layers=True), *prompts())
    call(**CASES["choices"])
    call(**CASES["groups 0.7"])
    with compilations() as found:
        call(**CASES["choices"] | {"force_words_ids": [[[5, 6], [8]], [9], [3]], "eos_token_id": 4, "length_penalty": 0.1})
        call(**CASES["groups 0.7"] | {"diversity_penalty": 0.1, "eos_token_id": 4, "early_stopping": True})
    assert found == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty_alpha": 1.5, "top_k": 4}, "penalty_alpha is 1.5; expected a number from 0 to 1"),
        ({"dola_layers": "middle"}, "dola_layers is 'middle'; expected 'low', 'high' or a list of layers"),
        ({"dola_layers": [6, 7]}, r"dola_layers=\(6, 7\) names no layer below the last of 6"),
        ({"dola_layers": "low", "num_beams": 2}, "dola_layers goes with greedy decoding and sampling"),
        ({"dola_layers": "low", "guidance_scale": 2.0}, "guidance_scale=2.0 and dola_layers cannot be combined"),
        (GROUPS | {"num_beams": 4, "num_return_sequences": 1, "diversity_penalty": 1.0}, "num_beams=4 is no multiple"),
        (GROUPS, "num_beam_groups=3 without a diversity_penalty"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "diversity_penalty=1.0 is between groups"),
        (GROUPS | {"diversity_penalty": 1.0, "do_sample": True, "key": jax.random.key(0)}, "num_beam_groups=3 and do_sample=True"),
        ({"force_words_ids": [[3]]}, "set num_beams to 2 or more"),
        ({"num_beams": 2, "force_words_ids": []}, "force_words_ids is a list of phrases"),
        ({"num_beams": 2, "force_words_ids": [[]]}, "a phrase is a list of token ids"),
        ({"num_beams": 2, "force_words_ids": [[3, -1]]}, "a phrase is a list of token ids"),
        ({"num_beams": 2, "force_words_ids": [[[3], [3, 4]]]}, r"the phrase \[3\] begins another"),
        ({"num_beams": 2, "force_words_ids": [[101]]}, "a constraint names token 101; the model's vocabulary has 101"),
        ({"num_beams": 2, "constraints": ["no"]}, "expected PhrasalConstraint and DisjunctiveConstraint"),
        (GROUPS | {"diversity_penalty": 1.0, "force_words_ids": [[3]]}, "constraints and num_beam_groups=3 cannot be combined"),
        ({"penalty_alpha": 0.5, "top_k": 4, "num_return_sequences": 2}, "num_return_sequences=2"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with compilations() as found, pytest.raises(ValueError, match=words):
        generate(*ours(), np.full((1, 9), 5), **{"max_new_tokens": 4, **options})
    assert found == []


def allowed(row, ids):
    return [(int(ids[-1]) * 7 + k * 13 + int(row) * 5) % 98 + 3 for k in range(6)]


def test_groups_follow_prefixes():
    """transformers 4.45.2's first hypotheses of prompts 0 and 2, with a function that also looks at the row."""
    ids, mask = prompts()
    options = GROUPS | {"num_beams": 4, "num_beam_groups": 2, "num_return_sequences": 2, "diversity_penalty": 0.7, "max_new_tokens": 10}
    out = generate(*ours(), ids[[0, 2]], mask[[0, 2]], prefix_allowed_tokens_fn=allowed, **options)
    want = [
        [33, 5, 5, 5, 77, 19, 5, 5, 5, 51],
        [33, 5, 5, 5, 77, 19, 5, 5, 5, 5],
        [43, 54, 20, 89, 43, 67, 98, 8, 31, 81],
        [43, 54, 20, 89, 43, 67, 98, 8, 31, 94],
    ]
    assert out.sequences[:, T:].tolist() == want


def test_hypotheses_that_forbidden_tokens_end():
    """Constraints against another processor: what cannot be said is no reason for an empty row, or for the same hypothesis twice."""
    ids, mask = prompts()
    options = FORCED | {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2, "force_words_ids": [[11, 12], [40]]}
    for other in ({"prefix_allowed_tokens_fn": allowed}, {"forced_eos_token_id": FORCED["eos_token_id"]}):
        out = generate(*ours(), ids[[0, 2]], mask[[0, 2]], **options, **other)
        rows = out.sequences[:, T:].tolist()
        assert len(set(map(tuple, rows))) == 4 and (out.lengths == 12).all(), rows
