"""Text as it is generated: from token ids, one at a time, to pieces of text that never have to be taken back."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from jaxmodels.processing.tokenizer import CLEAN_UP, Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def byte_table() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level vocabularies (GPT-2's table)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_table()


class _Bytes:
    """Byte-level pieces to text; bytes of an unfinished character wait."""

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, piece: str) -> str:
        try:
            data = bytes(_BYTES[char] for char in piece)
        except KeyError:  # an added token, which stands for itself
            data = piece.encode("utf-8")
        return self.utf8.decode(data)

    def flush(self) -> str:
        text = self.utf8.decode(b"", final=True)
        self.utf8.reset()
        return text


class _Window:
    """Any other decoder: decode the newest pieces behind the piece before them, and take what that adds.

    The piece before settles what depends on the beginning (a stripped first space); of two settled pieces the older never
    changes the newer. A run of <0xHH> pieces waits for its end, since one bad byte changes the whole run."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        spec = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] if tokenizer.backend_tokenizer.decoder is not None else {}
        self.byte_pieces = "ByteFallback" in json.dumps(spec)
        self.flush()

    def flush(self) -> str:
        waiting = self._take() if getattr(self, "waiting", None) else ""
        self.settled: list[str] = []
        self.shown = ""  # the text of `settled`
        self.waiting: list[str] = []
        return waiting

    def add(self, piece: str) -> str:
        self.waiting.append(piece)
        if self.byte_pieces and _BYTE_PIECE.fullmatch(piece):
            return ""
        return self._take()

    def _take(self) -> str:
        pieces = self.settled + self.waiting
        text = self.tokenizer.convert_tokens_to_string(pieces)
        new = text[len(self.shown) :]
        # The next window begins with the fewest last pieces that have text, and so settle what a beginning strips.
        self.settled, self.shown, size = [], "", 1
        while not self.shown and len(self.settled) < len(pieces):
            self.settled, size = pieces[-size:], 2 * size
            self.shown = self.tokenizer.convert_tokens_to_string(self.settled)
        self.waiting = []
        return new


class _Replace:
    """`str.replace(spaced, joined)` on a text that arrives in parts."""

    def __init__(self, spaced: str):
        self.spaced, self.joined, self.rest = spaced, spaced.replace(" ", ""), ""

    def add(self, text: str) -> str:
        *done, rest = (self.rest + text).split(self.spaced)
        keep = next((n for n in range(min(len(self.spaced) - 1, len(rest)), 0, -1) if self.spaced.startswith(rest[-n:])), 0)
        self.rest = rest[len(rest) - keep :]
        return self.joined.join([*done, rest[: len(rest) - keep]])

    def flush(self) -> str:
        text, self.rest = self.rest, ""
        return text


class IncrementalDecoder:
    """Decodes a stream of ids: all pieces and `flush()` joined equal `tokenizer.decode(all ids)`.

        decoder = IncrementalDecoder(tokenizer)
        for id in ids:
            print(decoder.add(id), end="")
        print(decoder.flush())

    `add` returns text as soon as nothing later can change it: a character split over several tokens comes with its last
    byte. The work per token does not grow with the length of the stream. One decoder serves one row."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special} if skip_special_tokens else set()
        decoder: Any = tokenizer.backend_tokenizer.decoder
        self.stage: Any = _Bytes() if type(decoder).__name__ == "ByteLevel" else _Window(tokenizer)
        self.filters = [_Replace(spaced) for spaced in CLEAN_UP] if tokenizer.cleans_up() else []

    def _filter(self, text: str, flush: bool = False) -> str:
        for stage in self.filters:
            text = stage.add(text) + (stage.flush() if flush else "")
        return text

    def add(self, id: int) -> str:
        """Take the next id; returns the text that it completes, often "" or several characters."""
        piece = None if int(id) in self.skip else self.tokenizer.convert_ids_to_tokens(int(id))
        return "" if piece is None else self._filter(self.stage.add(piece))

    def flush(self) -> str:
        """The rest at the end of the stream (an unfinished character becomes U+FFFD); the decoder can be used again."""
        return self._filter(self.stage.flush(), flush=True)
