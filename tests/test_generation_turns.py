"""Conversations: a second and third call with the returned cache, held against torch from scratch on every row's whole history."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_fixtures import LENGTHS, VOCAB, T, ours, prompts, torch_greedy, torch_row
from test_generation_assisted import family

from jaxmodels.cache import Cache, SlidingKVSpec, init_cache
from jaxmodels.cache_quantized import QuantizedCache
from jaxmodels.cache_sink import SinkCache
from jaxmodels.generation import TurnCache, generate

NEVER = VOCAB + 5


def history():
    ids, mask = prompts()
    return [row[real == 1].tolist() for row, real in zip(ids, mask)]


def user_turn(seed, lengths, padding_side="left"):
    width = max(lengths)
    column = np.arange(width)
    mask = np.stack([column >= width - n if padding_side == "left" else column < n for n in lengths]).astype(int)
    return np.random.default_rng(seed).integers(3, VOCAB, mask.shape) * mask, mask


def answers(out, width):
    return [row[width : width + n].tolist() for row, n in zip(out.sequences, out.lengths)]


@pytest.mark.parametrize(("scan_layers", "turns"), [(False, 2), (True, 1)])
def test_ragged_turns_equal_torch_from_scratch(scan_layers, turns):
    """Rows end at different steps, one at the very last one, one never; their next turns are of different lengths too."""
    model, params = ours(scan_layers)
    ids, mask = prompts()
    rows = history()
    eos = [torch_greedy(0)[3], torch_greedy(1)[11], torch_greedy(2)[8]]
    out = generate(model, params, ids, mask, max_new_tokens=12, eos_token_id=eos)
    assert len(set(out.lengths.tolist())) >= 3 and out.lengths.max() == 12
    said = answers(out, T)
    for turn, lengths in enumerate([(3, 40, 1, 7), (9, 2, 2, 30)][:turns]):
        new, real = user_turn(turn, lengths, ("left", "right")[turn])
        rows = [row + answer + part[keep == 1].tolist() for row, answer, part, keep in zip(rows, said, new, real)]
        want = [torch_row(row, new=12, eos_token_id=eos) for row in rows]
        out = generate(model, params, new, real, cache=out.cache, max_new_tokens=12, eos_token_id=eos)
        np.testing.assert_array_equal(out.sequences[:, : new.shape[1]], new)
        said = answers(out, new.shape[1])
        assert said == want


def test_a_call_goes_on_where_the_last_one_stopped():
    """No new tokens at all: 10 and 10 more are the same 20, and those that a whole call gives."""
    ids, mask = prompts()
    first = generate(*ours(), ids, mask, max_new_tokens=10, eos_token_id=NEVER)
    more = generate(*ours(), np.zeros((4, 0), int), cache=first.cache, max_new_tokens=10, eos_token_id=NEVER)
    for row in range(4):
        assert first.sequences[row, T:].tolist() + more.sequences[row].tolist() == torch_greedy(row)[:20]


@pytest.mark.parametrize("options", [{"cache_implementation": "offloaded"}, {"guidance_scale": 1.5}], ids=str)
def test_a_turn_after_beams(options):
    """The best hypotheses of every row, some ended early; what follows is what their whole texts give."""
    ids, mask = (x[1:3, -60:] for x in prompts())
    model, params = ours()
    first = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "eos_token_id": [torch_greedy(1)[4], torch_greedy(2)[2]]}
    out = generate(model, params, ids, mask, **first, **options)
    new, real = user_turn(8, (3, 1, 6, 2))
    again = generate(model, params, new, real, cache=out.cache, max_new_tokens=6, eos_token_id=NEVER)
    alive = np.arange(out.sequences.shape[1] - 60) < out.lengths[:, None]
    whole = np.concatenate([out.sequences, new], 1)
    kept = np.concatenate([np.repeat(mask, 2, 0), alive, real], 1)
    want = generate(model, params, whole, kept, max_new_tokens=6, eos_token_id=NEVER)
    np.testing.assert_array_equal(again.sequences[:, -6:], want.sequences[:, -6:])
    assert len(set(out.lengths.tolist())) > 1


ROUNDED = {"cache_implementation": "quantized", "cache_config": {"nbits": 8, "q_group_size": 4, "residual_length": 64}}
SINKS = {"cache_implementation": "sink", "cache_config": {"window_length": 64}}
OFFLOADED = {"cache_implementation": "offloaded"}
AFTER_BEAMS = [("mamba", False, {}), ("jamba", True, {}), ("gemma2", True, ROUNDED), ("gemma2", True, SINKS)]
AFTER_BEAMS += [("t5", False, ROUNDED), ("t5", False, OFFLOADED)]
SLOW_BEAMS = [pytest.param(*case, marks=pytest.mark.slow) for case in AFTER_BEAMS]


@pytest.mark.parametrize(("name", "scan_layers", "options"), [("mistral", True, {}), *SLOW_BEAMS])
def test_layers_that_cannot_take_back_what_beams_read(name, scan_layers, options):
    """Windows, recurrent states and rounded slots are again what they were after the prompt."""
    model, params = family(name, scan_layers)
    mask = (np.arange(30) >= 30 - np.array([[30], [7]])).astype(int)
    ids = np.random.default_rng(0).integers(3, 60, mask.shape) * mask
    call = functools.partial(generate, model, params, max_new_tokens=9)
    ends = call(ids, mask, eos_token_id=99).sequences[:, -6].tolist()
    out = call(ids, mask, num_beams=3, num_return_sequences=2, eos_token_id=ends, **options)
    new, real = user_turn(8, (3, 1, 6, 2))
    new = new % 57 + 3
    whole = np.concatenate([out.sequences, new], 1)
    alive = np.arange(out.sequences.shape[1])[::-1] >= (out.lengths.max() - out.lengths)[:, None]
    twice = [np.repeat(x, 2, 0) for x in (ids, mask)]
    if name == "t5":
        again = call(decoder_input_ids=new, decoder_attention_mask=real, cache=out.cache, eos_token_id=99)
        alive = np.concatenate([alive, real], 1)
        want = call(*twice, decoder_input_ids=whole, decoder_attention_mask=alive, eos_token_id=99)
    else:
        again = call(new, real, cache=out.cache, eos_token_id=99)
        alive = np.concatenate([twice[1], alive[:, 30:], real], 1)
        want = call(whole, alive, eos_token_id=99)
    np.testing.assert_array_equal(again.sequences[:, -9:], want.sequences[:, -9:])


def test_a_cache_can_be_continued_twice():
    """The cache is an argument, not a thing that a call uses up."""
    ids, mask = prompts()
    out = generate(*ours(), ids, mask, max_new_tokens=5, eos_token_id=NEVER)
    positions = np.array(out.cache.positions)
    new, real = user_turn(3, (5, 2, 4, 1))
    once, again = (generate(*ours(), new, real, cache=out.cache, max_new_tokens=5, eos_token_id=NEVER).sequences for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(out.cache.positions, positions)


def test_a_shared_prompt_is_read_once():
    """A cache filled by the model itself, its rows repeated, and another question in each."""
    model, params = ours()
    prompt = history()[2][:60]
    cache = jax.jit(model.apply)({"params": params}, np.array([prompt]), cache=init_cache(model, 1, 64)).cache
    questions, real = user_turn(4, (3, 8, 5))
    out = generate(model, params, questions, real, cache=cache.take(np.zeros(3, int)), max_new_tokens=12, eos_token_id=NEVER)
    for row in range(3):
        assert answers(out, 8)[row] == torch_row(prompt + questions[row][real[row] == 1].tolist(), new=12, eos_token_id=None)


@pytest.mark.parametrize("made", [None, QuantizedCache(2, q_group_size=12, residual_length=96), SinkCache(96)], ids=str)
def test_a_cropped_cache_is_a_shorter_one(made):
    """Ragged rows cropped to as many tokens, and by as many; what is said next is what a cache of the shorter texts says."""
    model, params = ours()
    ids, mask = (x[1:3, -60:] for x in prompts())
    step = jax.jit(lambda params, ids, mask, cache: model.apply({"params": params}, ids, attention_mask=mask, cache=cache))
    whole = step(params, ids, mask, init_cache(model, 2, 96, implementation=made)).cache
    new, real = user_turn(6, (4, 9))
    for size, left in ((30, [7, 30]), (-5, [2, 55])):
        cropped = whole.crop(size)
        assert cropped.lengths.tolist() == left and int(cropped.index) == (60 if size > 0 else 55)
        kept = np.where(mask.cumsum(1) <= np.array(left)[:, None], mask, 0)
        want = step(params, new, real, step(params, ids, kept, init_cache(model, 2, 96)).cache)
        got = step(params, new, real, cropped)
        assert np.abs(got.logits - want.logits)[real == 1].max() <= 1e-4
        assert got.cache.lengths.tolist() == want.cache.lengths.tolist()


def test_what_cannot_be_cropped():
    spec = SlidingKVSpec(1, 4, 8)
    state = spec.init(2, 32, jnp.float32, layers=None, heads_first=False)
    long = jnp.array([[*range(4, 12)], [-1, -1, *range(6)]])
    positions = jnp.array([[*range(12)], [-1] * 6 + [*range(6)]])
    cache = Cache((state.replace(positions=long),), positions, jnp.int32(12))
    assert cache.crop(12).lengths.tolist() == [12, 6]
    with pytest.raises(ValueError, match="cannot be cropped to 9"):
        cache.crop(9)
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(lambda cache: cache.crop(12))(cache)
    short = cache.take(np.array([1])).crop(-2)
    assert short.layers[0].positions.tolist() == [[-1, -1, 0, 1, 2, 3, -1, -1]] and int(short.index) == 10


def test_what_cannot_be_made_compact():
    for model, made in ((ours()[0], QuantizedCache(8, q_group_size=4)), (family("t5", False)[0], QuantizedCache(8, q_group_size=4))):
        with pytest.raises(ValueError, match="cannot be made compact"):
            init_cache(model, 1, 16, implementation=made).compact()


def test_turn_under_jit():
    """The index is traced: every slot counts as used, the numbers are the same."""
    ids, mask = prompts()
    out = generate(*ours(), ids, mask, max_new_tokens=5, eos_token_id=NEVER)
    new, real = user_turn(3, (5, 2, 4, 1))
    model, params = ours()
    run = jax.jit(lambda params, cache: generate(model, params, new, real, cache=cache, max_new_tokens=5, eos_token_id=NEVER))
    want = generate(model, params, new, real, cache=out.cache, max_new_tokens=5, eos_token_id=NEVER)
    np.testing.assert_array_equal(run(params, out.cache).sequences, want.sequences)


def test_rows_of_a_turn_cache_move_together():
    ids, mask = prompts()
    out = generate(*ours(), ids, mask, max_new_tokens=5, eos_token_id=NEVER)
    assert isinstance(out.cache, TurnCache) and np.asarray(out.cache.unread).all()
    order = np.array([2, 0, 0, 3])
    more = generate(*ours(), np.zeros((4, 0), int), cache=out.cache.take(order), max_new_tokens=5, eos_token_id=NEVER)
    assert [row.tolist() for row in more.sequences] == [torch_greedy(row)[5:10] for row in order]


def test_a_loop_of_ones_own_goes_on():
    """Reading the unread token with model.apply leaves a plain cache, which generate continues in turn."""
    model, params = ours()
    ids, mask = prompts()
    out = generate(model, params, ids, mask, max_new_tokens=5, eos_token_id=NEVER)
    step = jax.jit(model.apply)({"params": params}, out.cache.token[:, None], cache=out.cache)
    sixth = np.asarray(step.logits[:, -1].argmax(-1))
    assert not isinstance(step.cache, TurnCache) and sixth.tolist() == [torch_greedy(row)[5] for row in range(4)]
    more = generate(model, params, sixth[:, None], cache=step.cache, max_new_tokens=5, eos_token_id=NEVER)
    assert [row[1:].tolist() for row in more.sequences] == [torch_greedy(row)[6:11] for row in range(4)]


def test_bad_turns():
    ids, mask = prompts()
    out = generate(*ours(), ids, mask, max_new_tokens=5, eos_token_id=NEVER)
    with pytest.raises(ValueError, match="cache holds 4 rows and input_ids 2"):
        generate(*ours(), ids[:2], mask[:2], cache=out.cache, max_new_tokens=5)
    done = generate(*ours(), ids, mask, max_new_tokens=5, eos_token_id=torch_greedy(0)[1])
    assert done.lengths[0] == 2 and LENGTHS[0] == T
    with pytest.raises(ValueError, match=r"rows \[0.*no token"):
        generate(*ours(), np.zeros((4, 0), int), cache=done.cache, max_new_tokens=5)
