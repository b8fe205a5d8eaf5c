"""Text piece by piece equals text at once."""

from __future__ import annotations

import processing_fixtures as fixtures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_fixtures import MAKERS, TEXTS
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxmodels.processing import AutoTokenizer, IncrementalDecoder, Tokenizer, train_bpe


def word_level(decoder):
    pieces = ["▁", "a", "▁a", "▁▁", "b</w>", "</w>", "<0xE4>", "<0xBD>", "<0xA0>", "##c", ".", "'", "n't", "#", "|", "x", "<pad>", "Ġ", "é"]
    backend = Backend(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="x"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, eos_token="<eos>", clean_up_tokenization_spaces=True)


DECODERS = {
    "none": None,
    "metaspace": decoders.Metaspace("▁", prepend_scheme="always"),
    "wordpiece": decoders.WordPiece(),
    "wordpiece_plain": decoders.WordPiece(cleanup=False),
    "bpe": decoders.BPEDecoder(suffix="</w>"),
    "strip_two": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "byte_level": decoders.ByteLevel(),
    "ctc": decoders.CTC(pad_token="<pad>", word_delimiter_token="|"),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    loaded = {name: AutoTokenizer.from_pretrained(make(root / name)) for name, make in MAKERS.items()}
    loaded["bert_clean"] = AutoTokenizer.from_pretrained(root / "bert", clean_up_tokenization_spaces=True)
    loaded["trained"] = train_bpe(fixtures.CORPUS, 300)
    return loaded | {name: word_level(decoder) for name, decoder in DECODERS.items()}


NAMES = [*MAKERS, "bert_clean", "trained", *DECODERS]


def pieces_of(tokenizer, ids, skip=True):
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    return [*(decoder.add(number) for number in ids), decoder.flush()]


@settings(max_examples=500, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES), skip=st.booleans())
def test_any_ids(tokenizers, data, name, skip):
    tokenizer = tokenizers[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=40))
    assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", [*MAKERS, "bert_clean", "trained"])
def test_texts(tokenizers, name):
    tokenizer = tokenizers[name]
    for text in [*TEXTS, *fixtures.CORPUS[:7]]:
        ids = tokenizer.encode(text) + tokenizer.all_special_ids + tokenizer.encode(text)
        for skip in (False, True):
            assert "".join(pieces_of(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_text_comes_as_soon_as_it_is_complete(tokenizers):
    tokenizer = tokenizers["trained"]
    ids = tokenizer.encode("Hi 🙂 日")
    pieces = pieces_of(tokenizer, ids)
    assert pieces[-1] == ""  # nothing was left for the end
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if "🙂" in piece]) == 1
    words = tokenizers["llama_sentencepiece"]
    ids = words.encode("she sells sea shells", add_special_tokens=False)
    assert all(pieces_of(words, ids)[: len(ids)])


def test_unfinished_character(tokenizers):
    for name in ("trained", "llama_sentencepiece"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("a\U0001f9ff")[:-1]
        pieces = pieces_of(tokenizer, ids)
        assert pieces[-1].startswith("\ufffd")
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_decoder_can_be_used_again(tokenizers):
    for name in ("llama2", "trained", "bert_clean"):
        tokenizer = tokenizers[name]
        decoder = IncrementalDecoder(tokenizer)
        for text in (" isn't it ?", " isn't it ?"):
            ids = tokenizer.encode(text)
            assert "".join(decoder.add(number) for number in ids) + decoder.flush() == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("name", "pieces_per_token"), [("llama_sentencepiece", 4), ("bert_clean", 4), ("trained", 0)])
def test_the_work_per_token_stays_the_same(tokenizers, monkeypatch, name, pieces_per_token):
    tokenizer, decoded = tokenizers[name], []
    real = Tokenizer.convert_tokens_to_string
    monkeypatch.setattr(Tokenizer, "convert_tokens_to_string", lambda self, pieces: decoded.append(len(pieces)) or real(self, pieces))
    ids = tokenizer.encode("she sells 日本語 🙂 shells . " * 100, add_special_tokens=False)
    pieces_of(tokenizer, ids)
    assert sum(decoded) <= pieces_per_token * (len(ids) + 1)
    decoded.clear()
    pieces_of(tokenizer, tokenizer.encode("a" + " " * 500, add_special_tokens=False))
    assert sum(decoded) <= 500 * 8
