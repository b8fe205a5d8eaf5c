"""Which class a checkpoint gets, and sentencepiece models read without the sentencepiece package."""

from __future__ import annotations

import processing_fixtures as fixtures
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_fixtures import TEXTS
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer as Reference
from transformers.models.auto import tokenization_auto

from jaxmodels.processing import AutoTokenizer
from jaxmodels.processing.families import ALIASES, FAMILIES, REGISTERED, WRONG_CLASS, choose_family
from jaxmodels.processing.sentencepiece import merges_of, read_sentencepiece


def test_registered_classes_are_the_reference_s():
    known = {**dict.fromkeys(FAMILIES), "TokenizersBackend": ""}
    for model_type, name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items():
        name = ALIASES.get((name or "").removesuffix("Fast"), (name or "").removesuffix("Fast"))
        if name in known:
            assert REGISTERED.get(model_type) == ("" if name == "TokenizersBackend" else name), model_type
    assert set(REGISTERED) <= set(tokenization_auto.TOKENIZER_MAPPING_NAMES)
    assert WRONG_CLASS == tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


@pytest.mark.parametrize(
    ("declared", "model_type", "byte_level", "family"),
    [
        ("LlamaTokenizerFast", "llama", False, "LlamaTokenizer"),
        ("LlamaTokenizer", "llama", True, None),  # Llama 3 and its like under the wrong name
        ("LlamaTokenizer", "mistral", False, None),
        ("LlamaTokenizerFast", "qwen2", True, "Qwen2Tokenizer"),
        ("PreTrainedTokenizerFast", "gemma2", False, None),
        ("GPT2Tokenizer", "gpt_bigcode", True, None),
        ("BartTokenizer", "florence2", True, "RobertaTokenizer"),
        (None, "gpt2", True, "GPT2Tokenizer"),
        (None, None, False, None),
    ],
)
def test_choice_of_class(declared, model_type, byte_level, family):
    assert choose_family(declared, model_type, byte_level) == family


FAMILY_CASES = ["RobertaTokenizer", "GPTNeoXTokenizer", "CohereTokenizer", "Qwen3_5Tokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"]
PLAIN_CASES = ["GPT2Tokenizer", "AlbertTokenizer", "DistilBertTokenizer", "XLMRobertaTokenizer", "CodeGenTokenizer", "XGLMTokenizer"]


@pytest.mark.parametrize("name", [*FAMILY_CASES, *PLAIN_CASES])
def test_class_around_a_tokenizer_json(name, tmp_path):
    """The class's rules hold, whatever the file says: the file here has GPT-2's, WordPiece's or plain Unigram's."""
    tokens = [token for token in dict.fromkeys(FAMILIES[name].defaults.values()) if isinstance(token, str)]
    if name == "DistilBertTokenizer":
        path = fixtures.bert(tmp_path / "a")
    elif FAMILIES[name].model == "Unigram":
        path = fixtures.t5(tmp_path / "a")
        AutoTokenizer.from_pretrained(path, unk_token="<unk>").save_pretrained(path)
        ours = AutoTokenizer.from_pretrained(path)
        ours.add_tokens(tokens, special_tokens=True)
        spec = fixtures.json.loads(ours.to_json())
        spec["model"]["vocab"] += [[token, 0.0] for token in tokens if token not in dict(spec["model"]["vocab"])]
        spec |= {"added_tokens": [], "post_processor": None}
        path = fixtures.save(tmp_path / "b", None)
        (path / "tokenizer.json").write_text(fixtures.json.dumps(spec))
    else:
        path = fixtures.save(tmp_path / "a", fixtures.byte_level_bpe(tokens, 400))
    for options in ({}, {"add_prefix_space": True}, {"add_prefix_space": False}):
        (path / "tokenizer_config.json").write_text(fixtures.json.dumps({"tokenizer_class": name, **options}))
        ours, theirs = AutoTokenizer.from_pretrained(path), Reference.from_pretrained(path)
        assert ours.tokenizer_class == type(theirs).__name__
        for text in TEXTS:
            assert ours.encode(text, text) == theirs.encode(text, text)
            assert ours(text, text)["attention_mask"].tolist() == theirs(text, text, return_tensors="np")["attention_mask"].tolist()
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert set(ours("a").data) == set(theirs("a").data)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentencepiece")
    options = {
        "bpe_bytes": ("bpe", {"byte_fallback": True}),
        "bpe_identity": ("bpe", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
        "unigram": ("unigram", {}),
        "unigram_bytes": ("unigram", {"byte_fallback": True, "add_dummy_prefix": False, "hard_vocab_limit": False}),
    }
    made = {}
    for name, (kind, extra) in options.items():
        path = fixtures.save(root / name, None, None)
        (path / "some.model").write_bytes(fixtures.sentencepiece_model(kind, **extra))
        made[name] = (AutoTokenizer.from_pretrained(path), sentencepiece.SentencePieceProcessor(model_file=str(path / "some.model")), path)
    return made


def test_reader(models):
    for ours, _, path in models.values():
        data = (path / "some.model").read_bytes()
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
        model = read_sentencepiece(path / "some.model")
        assert model.pieces == tuple((p.piece, p.score, p.type) for p in proto.pieces)
        for name in (
            "model_type",
            "byte_fallback",
            "unk_id",
            "bos_id",
            "eos_id",
            "pad_id",
            "unk_piece",
            "bos_piece",
            "eos_piece",
            "pad_piece",
        ):
            assert getattr(model, name) == getattr(proto.trainer_spec, name), name
        assert model.charsmap == proto.normalizer_spec.precompiled_charsmap
        assert model.add_dummy_prefix == proto.normalizer_spec.add_dummy_prefix
        assert model.remove_extra_whitespaces == proto.normalizer_spec.remove_extra_whitespaces
        assert (ours.bos_token, ours.eos_token, ours.unk_token, ours.pad_token) == ("<s>", "</s>", "<unk>", None)


# Control pieces typed as text are special tokens here and plain text there; "▁" typed as text is the one for a space.
plain = st.text(max_size=60).filter(lambda text: not any(c in text for c in "<▁\x00"))


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["bpe_bytes", "bpe_identity", "unigram", "unigram_bytes"]), text=plain | st.sampled_from(fixtures.CORPUS[:7]))
def test_same_ids_as_sentencepiece(models, name, text):
    ours, theirs, _ = models[name]
    text = text.replace("<", "")
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    if theirs.unk_id() not in ids:
        assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=plain | st.sampled_from(fixtures.CORPUS[:7]))
def test_xglm_numbers_pieces_as_fairseq_did(models, text):
    """One further than sentencepiece, whose first three are others, after the token that ends a text; transformers 5 reads no such file."""
    _, theirs, path = models["unigram"]
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "XGLMTokenizer"}')
    ours = AutoTokenizer.from_pretrained(path)
    (path / "tokenizer_config.json").unlink()
    text = theirs.normalize(text.replace("<", "")).replace("▁", " ").strip()  # the class keeps a space at the end
    assert ours.encode(text) == [2] + [3 if i == theirs.unk_id() else i + 1 for i in theirs.encode(text)]
    assert len(ours) == theirs.get_piece_size() + 1 + 7
    assert ours.convert_tokens_to_ids("<madeupword6>") == len(ours) - 1


def test_merges_are_ordered_by_the_whole():
    vocab = {"<s>": 0, "ab": 1, "abc": 2, "a": 3, "b": 4, "c": 5, "bc": 6}
    assert merges_of(vocab) == [("a", "b"), ("a", "bc"), ("ab", "c"), ("b", "c")]


def test_bad_models(tmp_path, models):
    data = (models["unigram"][2] / "some.model").read_bytes()
    for name, content in {"cut": data[:-3], "text": b"hello world, no model", "empty": b"", "zip": b"PK\x03\x04" + bytes(40)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a sentencepiece model"):
            read_sentencepiece(tmp_path / name)
    path = fixtures.save(tmp_path / "a", None, {"tokenizer_class": "LlamaTokenizer"}, "llama")
    (path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="a unigram model, where LlamaTokenizer is a BPE tokenizer"):
        AutoTokenizer.from_pretrained(path)
