"""Training data: rows of real files, examples as transformers' tokenizers make them, streams that go on exactly where they stopped."""

import itertools
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import transformers
from chat_templates import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_fixtures import CORPUS, bert, llama3, write_jsonl

from jaxmodels.processing import AutoTokenizer
from jaxmodels.training import collators
from jaxmodels.training.batches import Dataset
from jaxmodels.training.data import (
    Examples,
    batches,
    chat_example,
    classification_example,
    completion_example,
    mixture,
    packed_batches,
    preference_example,
    sft_example,
    text_example,
    tokenized_example,
    write_packed,
)
from jaxmodels.training.sources import Rows, read_rows

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "four, doesn't it?"},
    {"role": "user", "content": "日本語"},
    {"role": "assistant", "content": "Größe 🙂"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return llama3(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory, chat_template=CHATML)


@pytest.fixture(scope="module")
def reference(directory):
    found = transformers.AutoTokenizer.from_pretrained(directory)
    found.chat_template = CHATML
    return found


# ---- rows -----------------------------------------------------------------------------------------------------------


BROKEN = {
    "not json": (b'{"text": "a"}\n\n{"text": \n', "line 3: Expecting value"),
    "no object": (b'["text"]\n', "line 1: expected a JSON object, found list"),
    "no text": (b'{"text": "a"}\n{"txt": "b", "n": 1}\n', "line 2: has no field 'text'; it has 'txt', 'n'"),
    "wrong type": (b'{"text": 7}\n', "line 1: field 'text' is '7' (int); expected str"),
    "no value": (b'{"text": null}\n', "line 1: field 'text' is 'None' (NoneType); expected str"),
    "not utf-8": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: 'utf-8' codec can't decode byte 0xff"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_rows_are_named(tmp_path, tokenizer, kind):
    """Also out of a stream of batches that reads ahead in threads."""
    content, message = BROKEN[kind]
    path = tmp_path / "part-7.jsonl"
    path.write_bytes(content)
    examples = Examples(read_rows(path), partial(text_example, tokenizer=tokenizer))
    for stream in (examples, packed_batches(mixture([examples], epochs=1), 1, 8)):
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}, {message}")):
            list(stream)


def test_what_a_template_refuses_is_named(tmp_path, directory):
    """Also what a function of the user's lacks."""
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template += "{% generation %}{{ m['role'] + m.content }}{% endgeneration %}{% endfor %}"
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "tool", "content": "a"}]}, {"messages": [{"content": "b"}]}])
    chats = Examples(read_rows(path), partial(chat_example, tokenizer=AutoTokenizer.from_pretrained(directory, chat_template=template)))
    own = Examples(read_rows(path), lambda row: row["label"])
    for examples, row, message in ((chats, 0, "line 1: no tools$"), (chats, 1, "line 2: .*role"), (own, 1, "line 2: KeyError: 'label'$")):
        with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
            examples[row]


# ---- examples --------------------------------------------------------------------------------------------------------


def test_text(tokenizer, reference):
    for text in CORPUS[:7]:
        example = text_example({"text": text}, tokenizer=tokenizer)
        ids = [*reference(text)["input_ids"], reference.eos_token_id]
        assert example["input_ids"].tolist() == example["labels"].tolist() == ids
        assert example["input_ids"].dtype == example["labels"].dtype == np.int32
        assert text_example({"code": text}, tokenizer=tokenizer, field="code", max_length=5)["labels"].tolist() == ids[:5]


def test_chats_learn_the_assistants_tokens(tokenizer, reference):
    example = chat_example({"messages": CHAT}, tokenizer=tokenizer)
    wanted = reference.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    assert example["input_ids"].tolist() == wanted["input_ids"]
    assert (example["labels"] != -100).astype(int).tolist() == wanted["assistant_masks"]
    assert tokenizer.decode(example["labels"][example["labels"] != -100]) == "four, doesn't it?<|im_end|>Größe 🙂<|im_end|>"
    assert chat_example({"messages": CHAT}, tokenizer=tokenizer, max_length=9)["input_ids"].tolist() == wanted["input_ids"][:9]


@pytest.mark.filterwarnings("ignore:return_assistant_tokens_mask")
def test_chats_without_an_answer_or_tags(tokenizer, directory):
    with pytest.raises(ValueError, match="no token of the assistant's"):
        chat_example({"messages": CHAT[:2]}, tokenizer=tokenizer)
    plain = AutoTokenizer.from_pretrained(directory, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"lacks \{% generation %\} tags"):
        chat_example({"messages": CHAT}, tokenizer=plain)


@pytest.mark.parametrize("prompt", ["def fibonacci(n):", "The quick brown ", "", "naïve café 🙂"])
def test_completions(tokenizer, reference, prompt):
    example = completion_example({"prompt": prompt, "completion": "\n    return n"}, tokenizer=tokenizer)
    assert example["input_ids"].tolist() == [*reference(prompt + "\n    return n")["input_ids"], reference.eos_token_id]
    assert tokenizer.decode(example["labels"][example["labels"] != -100]) == "\n    return n<|eot_id|>"


def test_chat_completions_need_no_tags(tokenizer):
    example = completion_example({"prompt": CHAT[:4], "completion": CHAT[4:]}, tokenizer=tokenizer)
    assert example["input_ids"].tolist() == chat_example({"messages": CHAT}, tokenizer=tokenizer)["input_ids"].tolist()
    assert tokenizer.decode(example["labels"][example["labels"] != -100]).strip() == "Größe 🙂<|im_end|>"
    with pytest.raises(TypeError, match="expected both alike"):
        completion_example({"prompt": "a", "completion": CHAT[4:]}, tokenizer=tokenizer)


def test_sft_goes_by_the_fields(tokenizer):
    same = lambda a, b: all(np.array_equal(a[name], b[name]) for name in a | b)
    chat, pair, text = {"messages": CHAT}, {"prompt": "a b", "completion": " c"}, {"text": "she sells"}
    assert same(sft_example(chat, tokenizer=tokenizer), chat_example(chat, tokenizer=tokenizer))
    assert same(sft_example(pair, tokenizer=tokenizer), completion_example(pair, tokenizer=tokenizer))
    assert same(sft_example(text, tokenizer=tokenizer), text_example(text, tokenizer=tokenizer))


def test_preferences(tokenizer):
    row = {"prompt": "she sells", "chosen": " sea shells", "rejected": " the fox"}
    example = preference_example(row, tokenizer=tokenizer)
    for side in ("chosen", "rejected"):
        wanted = completion_example({"prompt": row["prompt"], "completion": row[side]}, tokenizer=tokenizer)
        assert all(np.array_equal(example[f"{side}_{name}"], wanted[name]) for name in wanted)
    chats = {"chosen": [*CHAT[:4], CHAT[4]], "rejected": [*CHAT[:4], {"role": "assistant", "content": "no"}]}
    shared = preference_example(chats, tokenizer=tokenizer)
    assert tokenizer.decode(shared["rejected_labels"][shared["rejected_labels"] != -100]).strip() == "no<|im_end|>"
    with pytest.raises(ValueError, match="has no field 'prompt'"):
        preference_example({"chosen": "a", "rejected": "b"}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="prompt alone fills max_length = 2: nothing is left of 'chosen'"):
        preference_example(row, tokenizer=tokenizer, max_length=2)


def test_classification(tmp_path):
    path = bert(tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(path), transformers.BertTokenizerFast.from_pretrained(path)
    row = {"premise": CORPUS[1], "hypothesis": CORPUS[6], "label": 2}
    example = classification_example(row, tokenizer=ours, fields=("premise", "hypothesis"), max_length=20)
    wanted = dict(theirs(row["premise"], row["hypothesis"], truncation=True, max_length=20))
    assert example == {**wanted, "label": 2}
    with pytest.raises(TypeError, match=r"field 'label' is 'yes' \(str\); expected int or float or list"):
        classification_example(row | {"label": "yes"}, tokenizer=ours, fields=("premise",))


def test_tokens_as_they_stand():
    assert tokenized_example({"input_ids": [1, 2, 3]}, max_length=2)["labels"].tolist() == [1, 2]
    assert tokenized_example({"input_ids": [1, 2], "labels": [-100, 2]})["labels"].tolist() == [-100, 2]
    with pytest.raises(ValueError, match="has no token"):
        tokenized_example({"input_ids": []})
    for row in ({"input_ids": [1.5]}, {"input_ids": [[1]]}, {"input_ids": [1, 2], "labels": [1]}, {"input_ids": "ab"}):
        with pytest.raises(TypeError, match="expected"):
            tokenized_example(row)


# ---- streams ---------------------------------------------------------------------------------------------------------


def numbers(n, first=0):
    """n examples that are told apart by their only token."""
    return [{"input_ids": np.int32([first + i]), "labels": np.int32([first + i])} for i in range(n)]


def tokens(stream, n):
    return [int(example["input_ids"][0]) for example in itertools.islice(stream, n)]


@given(n=st.integers(5, 40), count=st.integers(1, 5), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=12)
def test_every_process_sees_its_share_of_every_epoch(n, count, seed):
    shares = [mixture([numbers(n)], seed=seed, process_index=i, process_count=count) for i in range(count)]
    sizes = [len(range(i, n, count)) for i in range(count)]
    epochs = [[tokens(share[e * size : (e + 1) * size], size) for share, size in zip(shares, sizes)] for e in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(n))
    if n > 15:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [list(range(i, n, count)) for i in range(count)]
    whole = mixture([numbers(n)], seed=seed, process_index=0, process_count=1)
    assert sorted(tokens(whole[:n], n)) == list(range(n)) and tokens(whole[:n], n)[::count] == epochs[0][0]


def test_mixtures_keep_their_weights():
    mixed = mixture([numbers(1000), numbers(70, 1000), numbers(50, 2000)], [6, 3, 1], seed=1, process_index=0, process_count=1)
    seen = np.array(tokens(mixed, 3000)) // 1000
    for start in range(0, 3000, 500):
        np.testing.assert_allclose(np.bincount(seen[start : start + 500]) / 500, [0.6, 0.3, 0.1], atol=0.005)
    for process in range(2):  # a share of each, not one of them for each process
        half = mixture([numbers(100), numbers(100, 1000)], process_index=process, process_count=2)
        assert np.bincount(np.array(tokens(half, 100)) // 1000).tolist() == [50, 50]


def test_mixture_refusals():
    with pytest.raises(ValueError, match=r"weights \[1\] must be 2 numbers above 0"):
        mixture([numbers(3), numbers(3)], [1])
    with pytest.raises(ValueError, match=r"weights \[1, 0\]"):
        mixture([numbers(3), numbers(3)], [1, 0])
    with pytest.raises(ValueError, match="dataset 1 has 1 examples for 2 processes"):
        mixture([numbers(3), numbers(1)], process_index=0, process_count=2)
    with pytest.raises(ValueError, match=r"process_index 2 must be in"):
        mixture([numbers(3)], process_index=2, process_count=2)


def documents(seed, n, longest):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 1000, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(n)]
    return [{"input_ids": row, "labels": np.where(row % 3, row, -100).astype(np.int32)} for row in ids]


def pieces(rows):
    """The documents of packed rows, as tuples of (ids, labels)."""
    found = []
    for ids, labels, segments in zip(rows["input_ids"], rows["labels"], rows["segment_ids"]):
        assert (labels[segments == 0] == -100).all()
        found += [(tuple(ids[segments == n]), tuple(labels[segments == n])) for n in range(1, segments.max() + 1)]
    return sorted(found)


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@given(seed=st.integers(0, 99), n=st.integers(1, 30), longest=st.integers(1, 30), window=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_packing_on_the_fly_keeps_every_token_once(seed, n, longest, window):
    docs, length = documents(seed, n, longest), 8
    found = list(packed_batches(mixture([docs], seed=seed, epochs=1), 1, length, window=window))
    cut = [(tuple(d["input_ids"][i : i + 8]), tuple(d["labels"][i : i + 8])) for d in docs for i in range(0, len(d["input_ids"]), 8)]
    assert pieces(joined(found)) == sorted(cut)
    assert all(value.shape == (1, length) and value.dtype == np.int32 for batch in found for value in batch.values())


def streams(tokenizer):
    """Pipelines that differ in all they may differ in."""
    texts = [{"text": text} for text in CORPUS]
    examples = [text_example(row, tokenizer=tokenizer) for row in texts]
    mix = partial(mixture, [examples, documents(0, 31, 40)], [2, 1], seed=3, process_count=2)
    plain = [{"input_ids": d["input_ids"]} for d in documents(1, 23, 9)]
    masking = collators.DataCollatorForLanguageModeling(tokenizer, seed=4)
    return {
        "packed": packed_batches(mix(process_index=0), 3, 24, window=7, seed=1),
        "masked": batches(mixture([plain], seed=2, process_index=1, process_count=2), 4, masking),
        "padded": batches(mixture([plain], epochs=3), 5, collators.DataCollatorWithPadding(tokenizer), drop_remainder=False),
        "in order": batches(mixture([numbers(7)], shuffle=False, epochs=2), 2, collators.default_data_collator),
    }


@pytest.mark.parametrize("kind", ["packed", "masked", "padded", "in order"])
def test_goes_on_exactly_where_it_stopped(directory, kind):
    """The state, through JSON, in an iterator that is new, one that is ahead and one that has ended."""
    tokenizer = AutoTokenizer.from_pretrained(directory, mask_token="<|mask|>")
    stream = streams(tokenizer)[kind]
    iterator, states, seen = iter(stream), [], []
    for _ in range(25):
        states.append(json.dumps(iterator.get_state()))
        batch = next(iterator, None)
        if batch is None:
            break
        seen.append(batch)
    assert len(seen) >= 6
    ahead = iter(streams(tokenizer)[kind])
    for stop in (len(seen) - 1, 0, 4, 1):
        for other in (iter(streams(tokenizer)[kind]), ahead, iterator):
            other.set_state(json.loads(states[stop]))
            assert json.dumps(other.get_state()) == states[stop]
            for batch in seen[stop:]:
                found = next(other)
                assert found.keys() == batch.keys() and all(np.array_equal(found[name], batch[name]) for name in batch)


def test_a_state_of_other_data_is_refused(tmp_path, tokenizer):
    """Files of another name or size, fewer of them, other rows: both sides are shown."""
    for name, count in (("a.jsonl", 9), ("b.jsonl", 8), ("more/a.jsonl", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": text} for text in CORPUS[:2] * count])
    make = partial(text_example, tokenizer=tokenizer)
    documents = lambda *names: [Examples(read_rows([tmp_path / name]), make) for name in names]
    packed = lambda *names, length=16, seed=0: iter(packed_batches(mixture(documents(*names)), 2, length, seed=seed))
    taken = packed("a.jsonl", "b.jsonl")
    next(taken)
    state = json.loads(json.dumps(taken.get_state()))
    packed("a.jsonl", "b.jsonl").set_state(state)
    sizes = {name: (tmp_path / name).stat().st_size for name in ("a.jsonl", "b.jsonl", "more/a.jsonl")}
    message = f"data: saved 'a.jsonl, {sizes['a.jsonl']} bytes', now 'a.jsonl, {sizes['more/a.jsonl']} bytes'$"
    with pytest.raises(ValueError, match=message):
        packed("more/a.jsonl", "b.jsonl").set_state(state)
    with pytest.raises(ValueError, match=f"saved 'b.jsonl, {sizes['b.jsonl']} bytes', now None"):
        packed("a.jsonl").set_state(state)
    with pytest.raises(ValueError, match="another stream: length: saved 16, now 32; seed: saved 0, now 1"):
        packed("a.jsonl", "b.jsonl", length=32, seed=1).set_state(state)
    plain = lambda n: iter(batches(mixture([numbers(n)]), 2, collators.default_data_collator))
    with pytest.raises(ValueError, match="saved '7 examples', now '8 examples'"):
        plain(8).set_state(plain(7).get_state())
    with pytest.raises(ValueError, match="another stream: batch_size: saved 2, now 3"):
        iter(batches(mixture([numbers(7)]), 3, collators.default_data_collator)).set_state(plain(7).get_state())
    with pytest.raises(ValueError, match="length: saved 16, now None"):
        plain(7).set_state({"of": packed("a.jsonl").about, "parent": None})
    mixed = lambda weights=(1, 1), index=0, **options: iter(
        packed_batches(mixture([numbers(7), numbers(9)], weights, process_index=index, process_count=2, **options), 2, 8)
    )
    mixed((2, 2)).set_state(mixed().get_state())
    for other, message in (
        (mixed((3, 1)), r"weights: saved 0.5, now 0.75"),
        (mixed(seed=1), r"order: saved 0, now 1"),
        (mixed(shuffle=False), r"order: saved 0, now 'as it stands'"),
        (mixed(index=1), r"share: saved '0 of 2', now '1 of 2'"),
    ):
        with pytest.raises(ValueError, match=f"in another stream: {message}$"):
            other.set_state(mixed().get_state())
    rows = lambda name: Dataset(documents(name)[0], 2, collator=None, labels=[])
    with pytest.raises(ValueError, match=r"stopped in: data: saved 'a.jsonl, .* now 'b.jsonl, "):
        rows("b.jsonl").set_position(rows("a.jsonl").position())


def test_masks_differ_from_batch_to_batch(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory, mask_token="<|mask|>")
    collator = collators.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    same = [{"input_ids": list(range(50, 90))}] * 8
    first, second = itertools.islice(batches(mixture([same]), 4, collator), 2)
    assert not np.array_equal(first["labels"], second["labels"])


def test_a_trainers_masks_are_of_the_batchs_number(directory):
    """Other in every batch and epoch, and the same where a run goes on."""
    tokenizer = AutoTokenizer.from_pretrained(directory, mask_token="<|mask|>")
    collator = collators.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    same = [{"input_ids": list(range(50, 90))}] * 10
    source = partial(Dataset, same, 4, collator=collator, labels=["labels"], strategy="random")
    read = lambda dataset, epoch: [batch.arrays["labels"] for batch in dataset.epoch(epoch)]
    seen = [labels for epoch in range(2) for labels in read(source(), epoch)]
    assert len(seen) == 6 and not any(np.array_equal(a, b) for a, b in itertools.combinations(seen, 2))
    resumed = source()
    resumed.set_position(source().position() | {"row": 4})
    assert all(np.array_equal(a, b) for a, b in zip(read(resumed, 1), seen[4:], strict=True))


def test_the_page_on_training(tmp_path, monkeypatch, tokenizer):
    """The code of docs/training.md runs as printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [{"text": text} for text in CORPUS])
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 9)
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    scope = {"tokenizer": tokenizer}
    exec(re.search(r"## Data.*?```python\n(.*?)```", page, re.DOTALL)[1], scope)
    assert {name: value.shape for name, value in scope["first"].items()} == dict.fromkeys(("input_ids", "labels", "segment_ids"), (2, 64))
    here, there = next(scope["batches"]), next(scope["again"])
    assert all(np.array_equal(here[name], there[name]) for name in here)
    assert len(read_rows("packed")) > 5


@pytest.mark.parametrize("format", ["npy", "array_record"])
def test_packed_ahead_of_time(tmp_path, format):
    docs = documents(5, 60, 20)
    count = write_packed(tmp_path / "packed", docs, 16, format=format, window=25, seed=2, rows_per_file=10, pad_token_id=7)
    rows = read_rows(tmp_path / "packed")
    on_the_fly = list(packed_batches(mixture([docs], shuffle=False, epochs=1), 1, 16, window=25, seed=2, pad_token_id=7))
    assert isinstance(rows, Rows) and len(rows) == len(on_the_fly) == count["rows"] and len(rows.files) == -(-len(rows) // 10) > 2
    for row, batch in zip(rows, on_the_fly):
        assert all(np.array_equal(row[name], batch[name][0]) and row[name].dtype == np.int32 for name in row | batch)
    assert count["documents"] == 60 and count["tokens"] == sum(len(d["input_ids"]) for d in docs)

    before = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    broken = [*docs, {"input_ids": np.int32([1, 2]), "labels": np.int32([1])}]
    with pytest.raises(ValueError, match="has 2 tokens and 1 labels"):
        write_packed(tmp_path / "packed", broken, 16, format=format)
    with pytest.raises(ValueError, match="there are no documents to pack"):
        write_packed(tmp_path / "packed", [], 16, format=format)
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == before
    write_packed(tmp_path / "packed", docs[:5], 16, format=format)
    assert len(read_rows(tmp_path / "packed").files) == 1


def test_grain_is_asked_for_only_by_data():
    """The package and the train step work without it; what needs it says how to get it."""
    code = "import sys; sys.modules['grain'] = None\nimport jaxmodels.training.step\nimport jaxmodels.training.data"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert out.stderr.strip().endswith("training data needs grain, which is not installed: pip install 'jaxmodels[train]'")
