"""Streams: the same tokens as a call without one, exact text, threads and timeouts."""

import queue
import threading

import jax
import numpy as np
import pytest
from generation_fixtures import VOCAB, compilations, ours, prompts, torch_greedy
from processing_fixtures import llama3

from jaxmodels.generation import TextIteratorStreamer, TextStreamer, generate
from jaxmodels.processing.tokenizer import AutoTokenizer

NEVER = VOCAB + 5
TEXT = "日本語 🙂👍🏽 naïve\n  def f(x):\n\treturn x\n"


class Recorder:
    def __init__(self):
        self.values, self.ends = [], 0

    def put(self, value):
        self.values.append(np.array(value))

    def end(self):
        self.ends += 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(llama3(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("sampled", [False, True])
def test_streamed_tokens_are_the_same(sampled):
    """Prompt first, then every step, padding of ended rows included, and no program of the stream's own."""
    ids, mask = prompts()
    options = {"max_new_tokens": 30, "eos_token_id": [torch_greedy(row)[n] for row, n in enumerate((3, 9, 20, 14))]}
    if sampled:
        options |= {"do_sample": True, "key": jax.random.key(5)}
    want = generate(*ours(), ids, mask, **options)
    recorder = Recorder()
    with compilations() as found:
        got = generate(*ours(), ids, mask, streamer=recorder, **options)
    assert found == [] and recorder.ends == 1
    np.testing.assert_array_equal(got.sequences, want.sequences)
    np.testing.assert_array_equal(recorder.values[0], ids)
    np.testing.assert_array_equal(np.stack(recorder.values[1:], 1), want.sequences[:, ids.shape[1] :])


def test_a_streamer_that_fails_ends_the_call():
    class Failing(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.values) == 3:
                raise RuntimeError("disk full")

    streamer = Failing()
    with pytest.raises(RuntimeError, match="disk full"):
        generate(*ours(), *prompts(), max_new_tokens=30, eos_token_id=NEVER, streamer=streamer)
    assert streamer.ends == 1  # so a reader in another thread does not wait for ever


def test_text_is_exact(tokenizer, capsys):
    """No half character is ever printed, and the pieces are the whole."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = np.asarray(ids).reshape(1, -1)
    assert ids.shape[1] > 15
    pieces = []

    class Keeping(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)
            super().on_finalized_text(text, stream_end)

    streamer = Keeping(tokenizer, skip_special_tokens=True)
    for _ in range(2):  # usable again after its end
        pieces.clear()
        streamer.put(ids[:, :4])
        for token in ids[0, 4:]:
            streamer.put(np.array([token]))
        streamer.end()
        assert "".join(pieces) == tokenizer.decode(ids[0], skip_special_tokens=True) == TEXT
        assert "�" not in "".join(pieces) and sum(map(bool, pieces)) > 5
        assert capsys.readouterr().out == TEXT + "\n"
    with pytest.raises(ValueError, match="a batch of 2"):
        streamer.put(np.zeros((2, 3), int))


def test_iterating_in_another_thread(tokenizer):
    """generate in one thread, text in the other: the text of the tokens that were generated."""
    prompt = np.full((1, 5), 80)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=120)
    results = []
    options = {"max_new_tokens": 25, "eos_token_id": NEVER, "do_sample": True, "key": jax.random.key(0)}
    thread = threading.Thread(target=lambda: results.append(generate(*ours(), prompt, streamer=streamer, **options)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(results[0].sequences[0, 5:], skip_special_tokens=False)
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))
