"""Reading a sentencepiece `.model` file without the sentencepiece package.

The file is one protobuf message (`ModelProto` of sentencepiece_model.proto, Apache-2.0); only the wire format is needed:
a sequence of (field number, wire type, value), and the numbers of the dozen fields that decide how text is cut."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
CONTROL, USER_DEFINED = 3, 4  # SentencePiece.Type
SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a `.model` file that matter for encoding; the defaults are those of the proto."""

    pieces: tuple[tuple[str, float, int], ...]  # text, score, type; the position is the id
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    unk_piece: str = "<unk>"
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    pad_piece: str = "<pad>"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @property
    def scored(self) -> list[tuple[str, float]]:
        return [(text, score) for text, score, _ in self.pieces]

    @property
    def added_tokens(self) -> list[AddedToken]:
        """Control pieces (special) and user-defined pieces, in id order."""
        return [
            AddedToken(text, normalized=False, special=kind == CONTROL) for text, _, kind in self.pieces if kind in (CONTROL, USER_DEFINED)
        ]

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, unk_token, pad_token, as far as the model has them."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        return {f"{name}_token": getattr(self, f"{name}_piece") for name, number in ids.items() if number >= 0}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number longer than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value): int for varints, bytes for fixed and length-delimited values."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError(f"a value of {size} bytes where {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


_TRAINER = {3: "model_type", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
_TRAINER |= {45: "unk_piece", 46: "bos_piece", 47: "eos_piece", 48: "pad_piece"}
_NORMALIZER = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces"}


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            text = value.decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = value
    return text, score, kind


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """Parse a `.model` file. Raises ValueError naming the file if it is not one."""
    pieces: list[tuple[str, float, int]] = []
    spec: dict[str, Any] = {}
    try:
        for number, value in _fields(Path(path).read_bytes()):
            if number == 1:
                pieces.append(_piece(value))
            elif number in (2, 3):
                names = _TRAINER if number == 2 else _NORMALIZER
                spec |= {names[n]: v for n, v in _fields(value) if n in names}
        types = {f.name: f.type for f in dataclasses.fields(SentencePieceModel)}
        spec = {k: v.decode("utf-8") if types[k] == "str" else bool(v) if types[k] == "bool" else v for k, v in spec.items()}
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: not a sentencepiece model ({error}); a tokenizer.json beside it would be used instead") from error
    if not pieces:
        raise ValueError(f"{path}: not a sentencepiece model (it lists no pieces); a tokenizer.json beside it would be used instead")
    model = SentencePieceModel(pieces=tuple(pieces), **spec)
    if model.model_type not in (UNIGRAM, BPE):
        raise ValueError(f"{path}: sentencepiece model_type {model.model_type}; unigram (1) and bpe (2) can be converted")
    return model


def merges_of(vocab: dict[str, int], skip: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    """BPE merges of a sentencepiece vocabulary, which stores none: every split of a piece into two pieces, ordered by the id of the whole.

    Ids follow the order in which pieces were learnt, so the id of the whole is the rank of its merges; among them the
    shortest left part comes first."""
    found = []
    for whole, rank in vocab.items():
        if whole in skip:
            continue
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in vocab and right in vocab and left not in skip and right not in skip:
                found.append((rank, cut, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def to_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """A `tokenizers` object with sentencepiece's own ids, for a model whose tokenizer class is not known."""
    if model.model_type == BPE:
        vocab = {text: i for i, (text, _) in enumerate(model.scored)}
        core: Any = models.BPE(vocab, merges_of(vocab), unk_token=model.unk_piece, fuse_unk=True, byte_fallback=model.byte_fallback)
    else:
        core = models.Unigram(model.scored, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    tokenizer = Tokenizer(core)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        # With a dummy prefix a space at the start stays and becomes the prefix: Metaspace writes none before another.
        ends = r" +\z" if model.add_dummy_prefix else r"\A +| +\z"
        steps += [normalizers.Replace(Regex(ends), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    elif model.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(r"\A "), f"{SPACE} "))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "first" if model.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = spaces_decoder(strip=model.add_dummy_prefix)
    tokenizer.add_tokens(model.added_tokens)
    return tokenizer


def spaces_decoder(strip: bool) -> Any:
    """▁ to spaces, <0xHH> pieces to bytes, and without the first space if `strip`."""
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * strip)
