"""Our tokenizers beside those of transformers, on the same directories: the same ids, text, attributes and files."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import processing_fixtures as fixtures
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processing_fixtures import MAKERS, TEXTS
from tokenizers import AddedToken
from transformers import AutoTokenizer as Reference

from jaxmodels.processing import AutoTokenizer, PreTrainedTokenizerFast, Tokenizer, train_bpe
from jaxmodels.processing.tokenizer import NO_LIMIT

LISTS = {"return_tensors": None}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def pairs(directories):
    """name -> (ours, theirs), padding on the same side."""
    loaded = {name: (AutoTokenizer.from_pretrained(path), Reference.from_pretrained(path)) for name, path in directories.items()}
    for ours, theirs in loaded.values():
        theirs.padding_side = ours.padding_side
    return loaded


def same_tokenizer(ours, theirs, texts=TEXTS):
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.tokenize(text) == theirs.tokenize(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)


@pytest.mark.parametrize("name", MAKERS)
def test_same_as_reference(pairs, name):
    ours, theirs = pairs[name]
    same_tokenizer(ours, theirs)
    for attribute in ("special_tokens_map", "all_special_tokens", "all_special_ids", "extra_special_tokens", "model_max_length"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.added_tokens_encoder == theirs.added_tokens_encoder
    assert {k: v.__getstate__() for k, v in ours.added_tokens_decoder.items()} == {
        k: v.__getstate__() for k, v in theirs.added_tokens_decoder.items()
    }
    assert ours.model_input_names == theirs.model_input_names
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
    assert ours.num_special_tokens_to_add(pair=True) == theirs.num_special_tokens_to_add(pair=True)
    theirs.backend_tokenizer.no_truncation()
    theirs.backend_tokenizer.no_padding()
    spec = json.loads(ours.to_json()) | {"truncation": None, "padding": None}
    assert spec == json.loads(theirs.backend_tokenizer.to_str())


@pytest.mark.parametrize("name", MAKERS)
def test_saved_directory_loads_in_both(pairs, name, tmp_path):
    ours, theirs = pairs[name]
    files = ours.save_pretrained(tmp_path / "ours")
    assert all(Path(file).is_file() for file in files)
    again, reference = AutoTokenizer.from_pretrained(tmp_path / "ours"), Reference.from_pretrained(tmp_path / "ours")
    same_tokenizer(again, theirs)
    same_tokenizer(again, reference)
    assert reference.padding_side == again.padding_side == ours.padding_side
    assert again.special_tokens_map == ours.special_tokens_map == reference.special_tokens_map
    assert again.model_max_length == reference.model_max_length == ours.model_max_length
    theirs.save_pretrained(tmp_path / "theirs")
    same_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "theirs"), theirs)
    again.save_pretrained(tmp_path / "again")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_saved_json_is_the_reference_s_byte_for_byte(pairs, tmp_path):
    ours, theirs = pairs["llama3"]
    ours.save_pretrained(tmp_path / "ours")
    theirs.backend_tokenizer.no_padding()
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()


texts = st.lists(st.text(max_size=40) | st.sampled_from(TEXTS), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    name=st.sampled_from(["llama3", "llama2", "bert", "t5", "qwen2"]),
    batch=texts,
    with_pair=st.booleans(),
    add_special_tokens=st.booleans(),
    padding=st.sampled_from([False, True, "longest", "max_length", "do_not_pad"]),
    truncation=st.sampled_from([None, False, True, "longest_first"]),
    max_length=st.sampled_from([None, 8, 16, 24]),
    multiple=st.sampled_from([None, 8]),
    side=st.sampled_from([None, "left", "right"]),
    cut_side=st.sampled_from(["left", "right"]),
)
def test_call_options(pairs, data, name, batch, with_pair, add_special_tokens, padding, truncation, max_length, multiple, side, cut_side):
    ours, theirs = pairs[name]
    if ours.pad_token is None:
        ours.pad_token = theirs.pad_token = "</s>"
    if padding in (True, "longest") and not truncation:
        max_length = None  # both warn
    ours.truncation_side = theirs.truncation_side = cut_side
    second = data.draw(st.lists(st.text(max_size=20), min_size=len(batch), max_size=len(batch))) if with_pair else None
    options = {"add_special_tokens": add_special_tokens, "padding": padding, "truncation": truncation, "max_length": max_length}
    options |= {"pad_to_multiple_of": multiple, "padding_side": side, "return_special_tokens_mask": True, "return_length": True}
    options |= {"return_offsets_mapping": True, "return_token_type_ids": data.draw(st.sampled_from([None, True, False]))}
    mine, reference = ours(batch, second, **options, **LISTS), theirs(batch, second, **options)
    assert mine.data == reference.data
    single, other = ours(batch[0], second and second[0], **options, **LISTS), theirs(batch[0], second and second[0], **options)
    assert single.data == other.data
    if len({len(row) for row in reference["input_ids"]}) == 1:
        arrays = ours(batch, second, **options)
        for key, value in theirs(batch, second, return_tensors="np", **options).items():
            assert arrays[key].dtype == np.int32
            assert arrays[key].shape == value.shape or value.size == 0
            assert np.array_equal(arrays[key], value.reshape(arrays[key].shape))


def test_words_pairs_and_overflow(pairs):
    ours, theirs = pairs["bert"]
    words = [["Hello", "fibonacci", "shells"], ["sea"]]
    for batch in (words[0], words, (words[1], words[0])):
        options = {"is_split_into_words": True}
        mine, reference = ours(batch, **options, **LISTS), theirs(batch, **options)
        assert mine.data == reference.data
        assert [mine.word_ids(i) for i in range(len(mine.encodings))] == [reference.word_ids(i) for i in range(len(mine.encodings))]
    batch = [("she sells", "sea shells"), ("a", "b")]
    assert ours(batch, **LISTS).data == theirs(batch).data
    long = "she sells sea shells by the sea shore " * 6
    for strategy in ("only_second", "longest_first"):
        options = {"truncation": strategy, "max_length": 20, "stride": 4, "return_overflowing_tokens": True, "padding": True}
        mine, reference = ours(["who?", "a"], [long, "b"], **options), theirs(["who?", "a"], [long, "b"], **options)
        assert mine["input_ids"].tolist() == reference["input_ids"]
        assert mine["overflow_to_sample_mapping"].tolist() == reference["overflow_to_sample_mapping"]


def test_targets(pairs):
    for ours, theirs in pairs.values():
        for sources in (["a b c", "d"], None):
            options = {"text_target": ["e f", "g h i j"], "truncation": True, "max_length": 3}
            assert dict(ours(sources, **options, **LISTS)) == dict(theirs(sources, **options))


def test_from_tokens_to_characters_and_words(pairs):
    ours, theirs = pairs["bert"]
    text, pair = "She sells naïve 日本語 sea-shells", "by the sea"
    mine, reference = ours(text, pair), theirs(text, pair)
    assert mine.tokens() == reference.tokens()
    assert mine.sequence_ids() == reference.sequence_ids()
    assert mine.n_sequences == 2
    for char in range(len(text)):
        assert mine.char_to_token(char) == reference.char_to_token(char)
        assert mine.char_to_word(0, char) == reference.char_to_word(0, char)
    for token in range(len(mine.tokens())):
        assert mine.token_to_chars(token) == reference.token_to_chars(token)
        assert mine.token_to_word(0, token) == reference.token_to_word(0, token)
        assert mine.token_to_sequence(token) == reference.token_to_sequence(token)
    for word in range(4):
        assert mine.word_to_tokens(word) == reference.word_to_tokens(word)
        assert mine.word_to_chars(word) == reference.word_to_chars(word)
    assert mine.char_to_token(0, 4, sequence_index=1) == reference.char_to_token(0, 4, sequence_index=1)
    assert mine[0].ids == mine.input_ids[0].tolist()
    assert mine[:1]["input_ids"].shape == (1, len(mine.tokens()))
    assert set(dict(**mine)) == {"input_ids", "token_type_ids", "attention_mask"}
    assert pickle.loads(pickle.dumps(mine)).input_ids.tolist() == mine.input_ids.tolist()
    with pytest.raises(AttributeError, match="it holds input_ids"):
        _ = mine.labels
    with pytest.raises(ValueError, match="does not remember"):
        ours.pad(mine).word_ids()


def test_arrays(pairs):
    import jax

    ours, _ = pairs["llama3"]
    one = ours("Hello world")
    assert one.input_ids.shape == (1, len(one.tokens()))
    assert one.input_ids.dtype == one.attention_mask.dtype == np.int32
    assert isinstance(ours("Hello", return_tensors="jax").input_ids, jax.Array)
    assert ours("Hello", **LISTS).input_ids == ours.encode("Hello")
    assert ours([]).input_ids.size == 0
    batch = ours(["a", "Hello world"], padding=True)
    assert batch.attention_mask[0].tolist() == [0] * (batch.input_ids.shape[1] - 2) + [1, 1]
    assert ours.batch_decode(batch.input_ids, skip_special_tokens=True) == ["a", "Hello world"]
    assert ours.decode(jax.numpy.asarray(batch.input_ids), skip_special_tokens=True) == ["a", "Hello world"]
    assert ours.decode(batch.input_ids[1], skip_special_tokens=True) == "Hello world"
    assert ours.decode(np.int32(5)) == ours.decode(5) == ours.convert_ids_to_tokens(5)
    assert ours.decode([]) == ""
    with pytest.raises(ValueError, match=r"input_ids: rows of 2 different lengths \(2 to \d+\).*padding=True"):
        ours(["a", "Hello world"])
    with pytest.raises(ValueError, match="return_tensors='pt'"):
        ours("a", return_tensors="pt")
    with pytest.raises(ValueError, match="found id -100"):
        ours.decode([1, -100])


def test_pad(pairs):
    ours, theirs = pairs["bert"]
    for side in ("left", "right"):
        rows = [ours(text, return_special_tokens_mask=True, **LISTS).data for text in ("a", "sea shells", "she sells")]
        for options in ({}, {"padding": "max_length", "max_length": 12}, {"pad_to_multiple_of": 8}):
            mine = ours.pad([dict(row) for row in rows], padding_side=side, **options)
            reference = theirs.pad([dict(row) for row in rows], padding_side=side, return_tensors="np", **options)
            assert {k: v.tolist() for k, v in mine.items()} == {k: v.tolist() for k, v in reference.items()}
    one = ours.pad({"input_ids": [5, 6, 7]}, padding="max_length", max_length=5, padding_side="left", **LISTS)
    assert one.data == {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}
    assert ours.pad({"input_ids": np.array([[5, 6], [7, 8]])}, pad_to_multiple_of=4).input_ids.shape == (2, 4)
    with pytest.raises(ValueError, match="pad needs 'input_ids', found 'labels'"):
        ours.pad({"labels": [1]})


def test_padding_needs_a_token(directories):
    ours = AutoTokenizer.from_pretrained(directories["gpt2"])
    with pytest.raises(ValueError, match=r"padding needs a padding token.*tokenizer.pad_token = tokenizer.eos_token"):
        ours(["a", "b c"], padding=True)
    ours.pad_token = ours.eos_token
    assert ours(["a", "b c"], padding=True).input_ids.shape[0] == 2


def test_bad_calls(pairs):
    ours, _ = pairs["llama3"]
    with pytest.raises(TypeError, match=r"text 1: expected a string.*found '5'"):
        ours(["a", 5])
    with pytest.raises(TypeError, match="text 0: expected a list of words"):
        ours("a", is_split_into_words=True)
    with pytest.raises(ValueError, match="2 texts and 1 pairs"):
        ours(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="padding='longer': expected one of 'longest'"):
        ours("a", padding="longer")
    with pytest.raises(ValueError, match="no multiple of pad_to_multiple_of=8"):
        ours("a", padding="max_length", truncation=True, max_length=12, pad_to_multiple_of=8)
    with pytest.warns(UserWarning, match="max_length=5 has no effect"):
        ours("a", padding=True, max_length=5)
    with pytest.raises(ValueError, match="tokenizer_object or tokenizer_file"):
        Tokenizer()


@pytest.mark.parametrize("flags", [{"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("name", ["llama2", "llama3", "llama_sentencepiece", "gpt2", "gemma_sentencepiece"])
def test_first_and_last_token_by_argument(directories, name, flags):
    ours, theirs = AutoTokenizer.from_pretrained(directories[name], **flags), Reference.from_pretrained(directories[name], **flags)
    assert ours.encode("Hello") == theirs.encode("Hello")
    assert ours.encode("Hello", "you") == theirs.encode("Hello", "you")
    ours.add_eos_token = theirs.add_eos_token = True
    assert ours.encode("Hello") == theirs.encode("Hello")
    assert (ours.add_bos_token, ours.add_eos_token) == (theirs.add_bos_token, theirs.add_eos_token)


@pytest.mark.parametrize("name", ["llama3", "llama2", "qwen2", "bert"])
def test_special_and_added_tokens(directories, name, tmp_path):
    ours, theirs = AutoTokenizer.from_pretrained(directories[name]), Reference.from_pretrained(directories[name])
    for tokenizer in (ours, theirs):
        assert tokenizer.add_tokens(["fibonacci", AddedToken("shell", single_word=True)]) == 2
        assert tokenizer.add_tokens("fibonacci") == 0
        assert tokenizer.add_special_tokens({"pad_token": "<pad!>", "extra_special_tokens": ["<x>", "<y>"]}) == 3
        assert tokenizer.add_special_tokens({"extra_special_tokens": ["<z>"]}, replace_extra_special_tokens=False) == 1
        tokenizer.eos_token_id = tokenizer.convert_tokens_to_ids("<x>")
        tokenizer.mask_token = None
    same_tokenizer(ours, theirs, ["fibonacci shells shell <x><y> <z> <pad!>"])
    assert ours.eos_token == theirs.eos_token == "<x>"
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.mask_token is None
    assert ours.mask_token_id is None
    assert ours.all_special_tokens == theirs.all_special_tokens
    ours.save_pretrained(tmp_path)
    same_tokenizer(
        AutoTokenizer.from_pretrained(tmp_path), Reference.from_pretrained(tmp_path), ["fibonacci shells shell <x><y> <z> <pad!>"]
    )
    with pytest.raises(ValueError, match="'bosh' is no special token"):
        ours.add_special_tokens({"bosh": "<s>"})
    with pytest.raises(TypeError, match="pad_token: expected a string"):
        ours.pad_token = 3
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token")
    assert ours.convert_ids_to_tokens([5, 10**6]) == theirs.convert_ids_to_tokens([5, 10**6])
    assert ours.convert_tokens_to_string(["a", "b"]) == theirs.convert_tokens_to_string(["a", "b"])


def test_tokens_with_names_of_their_own(directories, tmp_path):
    path = fixtures.save(tmp_path / "a", None, {"tokenizer_class": "PreTrainedTokenizerFast", "image_token": "<image>"})
    (path / "tokenizer.json").write_bytes((directories["llama3"] / "tokenizer.json").read_bytes())
    for options in ({}, {"extra_special_tokens": {"video_token": "<video>"}}):
        ours, theirs = AutoTokenizer.from_pretrained(path, **options), Reference.from_pretrained(path, **options)
        assert (ours.image_token, ours.image_token_id) == (theirs.image_token, theirs.image_token_id)
        assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.video_token_id == theirs.video_token_id
    with pytest.raises(AttributeError, match="no attribute 'audio_token'"):
        _ = ours.audio_token


def test_older_special_token_files(directories, tmp_path):
    path = fixtures.save(tmp_path / "a", None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "eos_token": "</s>"}, "llama")
    (path / "tokenizer.model").write_bytes((directories["llama_sentencepiece"] / "tokenizer.model").read_bytes())
    bos = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False}
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": bos, "eos_token": "</s>", "pad_token": "<pad>"}))
    (path / "added_tokens.json").write_text(json.dumps({"<pad>": 600, "plain new": 601}))
    ours, theirs = AutoTokenizer.from_pretrained(path), Reference.from_pretrained(path)
    same_tokenizer(ours, theirs, [*TEXTS, "<s>  a plain new <pad> b"])
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_options_win_over_the_file(directories):
    ours = AutoTokenizer.from_pretrained(directories["bert"], padding_side="left", pad_token="[UNK]", model_max_length=4)
    assert ours(["a", "sea shells"], padding=True).input_ids[0, 0] == ours.unk_token_id
    assert ours("she sells sea shells", truncation=True).input_ids.shape == (1, 4)
    assert Tokenizer(tokenizer_file=directories["llama3"] / "tokenizer.json").model_max_length == NO_LIMIT
    wrapped = PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer, unk_token="[UNK]")
    wrapped.add_tokens("<new>")
    assert len(wrapped) == len(ours) + 1


def test_split_special_tokens(pairs):
    ours, theirs = pairs["llama3"]
    text = "a<|eot_id|>b"
    assert ours.encode(text, split_special_tokens=True) == theirs.encode(text, split_special_tokens=True)
    assert ours.encode(text) == theirs.encode(text)


def test_a_long_text_is_reported_once(directories, caplog):
    ours = AutoTokenizer.from_pretrained(directories["bert"], model_max_length=4)
    for _ in range(2):
        ours("she sells sea shells by the sea")
    assert caplog.text.count("truncation=True cuts them") == 1


def test_threads_share_a_tokenizer(pairs):
    ours, _ = pairs["llama3"]
    ours = pickle.loads(pickle.dumps(ours))
    long = "she sells sea shells " * 20

    def work(i):
        return ours(long, truncation=True, max_length=5 + i % 7).input_ids.shape[1] if i % 2 else ours(long).input_ids.shape[1]

    with ThreadPoolExecutor(8) as pool:
        lengths = list(pool.map(work, range(200)))
    full = ours(long).input_ids.shape[1]
    assert lengths == [5 + i % 7 if i % 2 else full for i in range(200)]


def test_train_from_text(tmp_path):
    ours = train_bpe(fixtures.CORPUS, 320, special_tokens=("<|end|>", "<|user|>"), model_max_length=77)
    assert len(ours) <= 320
    assert (ours.eos_token, ours.pad_token_id, ours.convert_tokens_to_ids("<|user|>")) == ("<|end|>", 0, 1)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("she sells sea shells")) < 8
    ours.save_pretrained(tmp_path)
    same_tokenizer(AutoTokenizer.from_pretrained(tmp_path), Reference.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="vocab_size=200"):
        train_bpe(fixtures.CORPUS, 200)


@pytest.mark.parametrize("name", ["llama3", "bert", "t5", "qwen2", "llama2"])
def test_train_again(pairs, name):
    ours, theirs = pairs[name]
    options = {"new_special_tokens": ["<new>"], "show_progress": False}
    corpus = [line.lower() for line in fixtures.CORPUS[:20]]
    mine, reference = ours.train_new_from_iterator(corpus, 300, **options), theirs.train_new_from_iterator(corpus, 300, **options)
    if name in ("bert", "t5"):  # these trainers are not deterministic
        assert mine.added_tokens_encoder == reference.added_tokens_encoder
        assert mine.encode("", "") == reference.encode("", "")
        assert mine.decode(mine.encode("she sells sea shells", add_special_tokens=False)) == "she sells sea shells"
    else:
        same_tokenizer(mine, reference, [*TEXTS, "<new>"])
    assert mine.special_tokens_map == reference.special_tokens_map
    assert mine.extra_special_tokens == reference.extra_special_tokens


def test_train_again_under_new_names(pairs):
    ours, theirs = pairs["llama3"]
    options = {"special_tokens_map": {"<|begin_of_text|>": "<start>"}, "show_progress": False}
    mine, reference = (tokenizer.train_new_from_iterator(fixtures.CORPUS, 320, **options) for tokenizer in (ours, theirs))
    assert mine.bos_token == "<start>"
    assert mine.encode("Hello<|eot_id|>", "you") == reference.encode("Hello<|eot_id|>", "you")
    assert "<|begin_of_text|>" not in mine.get_vocab()


# ---- bad files ---------------------------------------------------------------------------------------------------------


def test_bad_directories(directories, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer here; looked for tokenizer.json.*found config.json"):
        AutoTokenizer.from_pretrained(fixtures.save(tmp_path / "empty", None))
    broken = fixtures.save(tmp_path / "broken", None, {})
    text = (directories["llama3"] / "tokenizer.json").read_text()
    (broken / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        AutoTokenizer.from_pretrained(broken)
    (broken / "tokenizer_config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: expected a JSON object, found list"):
        AutoTokenizer.from_pretrained(broken)
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not readable as JSON"):
        AutoTokenizer.from_pretrained(broken)
    old = fixtures.gpt2(tmp_path / "old")
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer"}))
    with pytest.raises(ValueError, match="WhisperTokenizer cannot be built from its older files"):
        AutoTokenizer.from_pretrained(old)
    (old / "tokenizer_config.json").write_text("{}")
    (old / "merges.txt").write_text("#version: 0.2\na b\nabc\n")
    with pytest.raises(ValueError, match=r"merges.txt, line 3: expected two tokens"):
        AutoTokenizer.from_pretrained(old)
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        Tokenizer(tokenizer_file=tmp_path / "none.json")


def test_a_config_cannot_point_elsewhere(directories, tmp_path):
    config = {"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd", "copy": False, "name_or_path": "other"}
    path = fixtures.save(tmp_path / "a", None, config)
    (path / "tokenizer.json").write_bytes((directories["llama3"] / "tokenizer.json").read_bytes())
    ours = AutoTokenizer.from_pretrained(path)
    assert ours.name_or_path == str(path)
    ours.save_pretrained(tmp_path / "b")
    assert "passwd" not in (tmp_path / "b" / "tokenizer_config.json").read_text()


def test_saving_leaves_no_halves(pairs, tmp_path):
    ours, _ = pairs["llama3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a file; save_pretrained needs a directory"):
        ours.save_pretrained(tmp_path / "file")
    unsavable = Tokenizer(ours.backend_tokenizer, an_option=object())
    with pytest.raises(TypeError):
        unsavable.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    ours.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.part"))


def test_hub_ids_and_subfolders(monkeypatch, directories):
    from jaxmodels.convert import hub

    asked = {}
    monkeypatch.setattr(hub, "resolve", lambda name, **options: asked.update(options, name=name) or directories["llama3"])
    ours = AutoTokenizer.from_pretrained("org/model", revision="v1", local_files_only=True, subfolder="sub")
    assert ours.name_or_path == asked["name"] == "org/model"
    assert (asked["revision"], asked["local_files_only"], asked["subfolder"]) == ("v1", True, "sub")
    monkeypatch.undo()
    ours = AutoTokenizer.from_pretrained(directories["llama3"].parent, subfolder="llama3", variant="bf16", use_fast=True)
    assert ours.bos_token == "<|begin_of_text|>"
    assert not {"variant", "use_fast"} & set(ours.options_to_save())


@pytest.mark.parametrize("options", [{}, {"is_split_into_words": True}])
def test_bytes_that_are_no_text(tmp_path, options):
    tokenizer = AutoTokenizer.from_pretrained(fixtures.llama3(tmp_path))
    bad = b"caf\xe9".decode("utf-8", errors="surrogateescape")  # what arguments and file names hold in place of bytes that are no text
    texts = [["fine"], ["so", bad]] if options else ["fine", bad]
    for call in (lambda: tokenizer(texts, **options), lambda: tokenizer(texts[:1], texts[1:], **options)):
        with pytest.raises(ValueError, match=r"text [01]: character 3 is the lone surrogate '\\udce9', which stands for bytes"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": True, "max_length": -1}, "max_length=-1: expected at least 0"),
        ({"padding": "max_length", "max_length": -1}, "max_length=-1: expected at least 0"),
        ({"padding": True, "pad_to_multiple_of": -8}, "pad_to_multiple_of=-8: expected at least 0"),
        ({"truncation": True, "max_length": 3, "stride": -1}, "stride=-1: expected at least 0"),
        ({"truncation": "only_second", "max_length": 2}, "Second sequence not provided"),
    ],
)
def test_numbers_below_zero(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AutoTokenizer.from_pretrained(fixtures.llama3(tmp_path))("some text here", **options)
