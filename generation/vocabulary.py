"""What the tokens of a tokenizer are, in bytes: for stop strings and grammars.

Axis letters: A states of an automaton, V vocabulary."""

from __future__ import annotations

import json
import re
import weakref
from typing import Any

import numpy as np

from jaxmodels.processing.stream import byte_table

ANCHOR = "abcdef"  # text before a token, so that the decoder takes it for the middle of a sentence
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_known: weakref.WeakKeyDictionary[Any, tuple[bytes, ...]] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Any) -> tuple[bytes, ...]:
    """The UTF-8 bytes that each token id adds in the middle of a text, parts of characters included; b"" for ids that have none.

    Kept for as long as the tokenizer lives and its vocabulary keeps its size."""
    known = _known.get(tokenizer)
    if known is not None and len(known) > max(tokenizer.get_vocab().values()):
        return known
    vocabulary = tokenizer.get_vocab()
    decoder = tokenizer.backend_tokenizer.decoder
    spec = "" if decoder is None else json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    falls_back = '"ByteFallback"' in spec
    table = byte_table() if not falls_back and '"ByteLevel"' in spec else {}
    before = tokenizer.tokenize(ANCHOR)

    def read(token: str) -> bytes:
        if table and all(char in table for char in token):
            return bytes(table[char] for char in token)
        if falls_back and BYTE_PIECE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        text = tokenizer.convert_tokens_to_string([*before, token])
        return text[text.index(ANCHOR) + len(ANCHOR) :].encode()

    found = [b""] * (max(vocabulary.values()) + 1)
    for token, n in vocabulary.items():
        found[n] = read(token)
    _known[tokenizer] = tuple(found)
    return _known[tokenizer]


def walk(goto: np.ndarray, start: np.ndarray, tokens: tuple[bytes, ...], accept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The states [A,V] that an automaton goto [A,256] reaches from `start` [A] by each token's bytes, and whether it passed one of the
    states `accept` [A] on the way. A state below 0 stays what it is."""
    lengths = np.array([len(token) for token in tokens])
    states = np.repeat(start[:, None].astype(np.int32), len(tokens), 1)
    passed = np.zeros(states.shape, bool)
    if accept is None:
        accept = np.zeros(len(goto), bool)
    for n in range(lengths.max(initial=0)):
        ids = np.flatnonzero(lengths > n)
        byte = np.array([tokens[i][n] for i in ids])
        now = states[:, ids]
        now = np.where(now >= 0, goto[np.maximum(now, 0), byte], now)
        states[:, ids] = now
        passed[:, ids] |= (now >= 0) & accept[np.maximum(now, 0)]
    return states, passed
