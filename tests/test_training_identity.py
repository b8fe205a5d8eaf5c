"""A run goes on in the data that it stopped in: other tokens of the same files are refused, with both sides named."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import tokenizers
import transformers
from chat_templates import CHATML
from processing_fixtures import CORPUS, write_jsonl

from jaxmodels.processing import AutoTokenizer, train_bpe
from jaxmodels.training.batches import Dataset, Stream
from jaxmodels.training.collators import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq
from jaxmodels.training.data import Examples, batches, mixture, packed_batches, sft_example, text_example
from jaxmodels.training.identity import described, tokenizer_in_words
from jaxmodels.training.sources import read_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """rows.jsonl, and two tokenizers of as many tokens."""
    path = tmp_path_factory.mktemp("identity")
    write_jsonl(path / "rows.jsonl", [{"text": text} for text in CORPUS[:2] * 20])
    for name, texts in (("one", CORPUS[:4]), ("two", ["another language altogether, as anybody reading it sees"] * 9)):
        tokenizer = train_bpe(texts * 9, 280, special_tokens=["<|end|>", "<|mask|>"])
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(path / name)
    return path


def load(place, name="one", **options):
    return AutoTokenizer.from_pretrained(place / name, mask_token="<|mask|>", **options)


def packed(place, make, **options):
    return iter(packed_batches(mixture([Examples(read_rows([place / "rows.jsonl"]), make)]), 2, 32, **options))


HASH = r"[0-9a-f]{12}"


def test_other_tokens_of_the_same_rows_are_refused(place):
    make = partial(text_example, tokenizer=load(place))
    state = json.loads(json.dumps(packed(place, make).get_state()))
    packed(place, partial(text_example, tokenizer=load(place))).set_state(state)
    for other, message in {
        partial(text_example, tokenizer=load(place, "two")): rf"of \d+ tokens \({HASH}\) .* now .*of \d+ tokens \({HASH}\)",
        partial(text_example, tokenizer=load(place, pad_token="<|mask|>")): rf"tokens \({HASH}\)",
        partial(text_example, tokenizer=load(place, chat_template=CHATML + " ")): f"chat template {HASH}', now .*chat template {HASH}'",
        partial(text_example, tokenizer=load(place), max_length=9): "saved 'text_example, tok.* now 'text_example, max_length 9, tok",
        partial(sft_example, tokenizer=load(place)): "saved 'text_example, .* now 'sft_example, ",
        lambda row: make(row): r"saved 'text_example, .* now 'test_other.*<lambda>'",
    }.items():
        with pytest.raises(ValueError, match=f"taken in another stream: examples: .*{message}"):
            packed(place, other).set_state(state)
    with pytest.raises(ValueError, match=r"another stream: pad_token_id: saved 0, now 1$"):
        packed(place, make, pad_token_id=1).set_state(state)

    tokens = Examples(read_rows([place / "rows.jsonl"]), make)
    masked = lambda **options: iter(batches(mixture([tokens]), 2, DataCollatorForLanguageModeling(load(place), **options)))
    with pytest.raises(ValueError, match=r"collator: saved .*mlm_probability 0\.15.*, now .*mlm_probability 0\.3"):
        masked(mlm_probability=0.3).set_state(masked().get_state())
    rows = lambda name: Dataset(Examples(tokens.rows, partial(text_example, tokenizer=load(place, name))), 2, collator=None, labels=[])
    with pytest.raises(ValueError, match="that the checkpoint stopped in: examples: saved 'text_example, "):
        rows("two").set_position(rows("one").position())
    with pytest.raises(ValueError, match="stopped in an iterable, and this is a dataset"):
        rows("one").set_position({"shares": []})


def test_a_function_of_ones_own(place):
    """By name, with what is bound to it and the tokenizers that it uses; values around it may change while it runs."""
    tokenizer, other, seen = load(place), load(place, "two"), 0

    def example(row):
        return {"input_ids": tokenizer(row["text"])["input_ids"], "seen": seen}

    class Maker:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def make(self, row):
            return self.tokenizer(row["text"])

        __call__ = make

    before = described(example)
    assert re.fullmatch(rf"test_a_function.*\.example, tokenizer of \d+ tokens \({HASH}\) with chat template {HASH}", before)
    seen = 1
    assert described(example) == before
    tokenizer = other
    assert described(example) != before
    assert described(Maker(tokenizer).make) != described(Maker(load(place)).make) and described(Maker(tokenizer)) != described(
        Maker(load(place))
    )
    assert described(partial(max, {"b": [1, None], "a": np.ones(2)})) == "max, 0 {a: ndarray, b: [1, None]}"
    assert "model object" in described(DataCollatorForSeq2Seq(tokenizer, model=object()))


def test_the_same_everywhere(place):
    """In another process, from transformers, after a call that cuts and fills up, and where the file spells out what it leaves off."""
    ours = tokenizer_in_words(load(place))
    say = "from jaxmodels.training import identity; from jaxmodels.processing import AutoTokenizer; import sys; "
    say += "print(identity.tokenizer_in_words(AutoTokenizer.from_pretrained(sys.argv[1], mask_token='<|mask|>')))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", say, str(place / "one")], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == ours
    theirs = transformers.AutoTokenizer.from_pretrained(place / "one", mask_token="<|mask|>", padding_side="left")
    theirs(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_in_words(theirs) == ours
    bare = tokenizers.Tokenizer.from_file(str(place / "one/tokenizer.json"))
    before = tokenizer_in_words(bare)
    bare.enable_padding(length=9)
    assert tokenizer_in_words(bare) == before != tokenizer_in_words(tokenizers.Tokenizer.from_file(str(place / "two/tokenizer.json")))


def test_checkpoints_of_earlier_versions_go_on(place):
    """What they did not save is not known, and agrees with anything."""
    make = partial(text_example, tokenizer=load(place))
    source = lambda: packed(place, make)
    taken = source()
    next(taken)
    state, wanted = taken.get_state(), next(taken)
    bare = {name: value for name, value in state["of"].items() if name in ("data", "length")}
    for earlier in ({"parent": state["parent"], "of": bare}, state["parent"]):
        again = source()
        again.set_state(json.loads(json.dumps(earlier)))
        np.testing.assert_array_equal(next(again)["input_ids"], wanted["input_ids"])
    stream = Stream(packed_batches(mixture([Examples(read_rows([place / "rows.jsonl"]), make)]), 2, 32), labels=["labels"])
    stream.set_position({"read": 1, "rows": 2, "state": {"value": state}})
    np.testing.assert_array_equal(next(stream.epoch(0)).arrays["input_ids"], wanted["input_ids"])
    stream.pieces = 2
    with pytest.raises(ValueError, match="stopped in an iterable of one process's rows, and this is an iterable in 2 shares"):
        stream.set_position({"read": 1, "rows": 2, "state": {"value": state}})
    rows = Dataset(Examples(read_rows([place / "rows.jsonl"]), make), 2, collator=None, labels=[])
    rows.set_position({name: value for name, value in rows.position().items() if name != "examples"})
