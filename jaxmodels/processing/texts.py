"""What goes into a tokenizer call: texts, pairs and options, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
    return value


def at_least_0(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 0:
            raise ValueError(f"{name}={value}: expected at least 0")


def _strings(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    else:
        for part in item:
            yield from _strings(part)


def refused(inputs: list, error: Exception) -> ValueError:
    """What the backend did not take, with the text in question."""
    for i, item in enumerate(inputs):
        for text in _strings(item):
            if found := SURROGATE.search(text):
                where = f"text {i}: character {found.start()} is the lone surrogate {found[0]!a}"
                return ValueError(f"{where}, which stands for bytes that are no text; decode them with errors='replace' first")
    return ValueError(str(error))


def read_texts(text: Any, pair: Any, batched: bool, words: bool) -> list:
    """The backend's inputs: for each text a string (or list of words), or a tuple of two."""
    texts = list(text) if batched else [text]
    if pair is None or (not batched and pair in ("", [], ())):
        inputs = texts
    else:
        pairs = list(pair) if batched and not isinstance(pair, str) else [pair]
        if len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} pairs: every text needs its own pair")
        inputs = list(zip(texts, pairs, strict=True))

    def is_text(item: Any) -> bool:
        if words:
            return isinstance(item, (list, tuple)) and all(isinstance(word, str) for word in item)
        return isinstance(item, str)

    for i, item in enumerate(inputs):
        if not is_text(item) and not (isinstance(item, (list, tuple)) and len(item) == 2 and all(map(is_text, item))):
            what = "a list of words" if words else "a string"
            raise TypeError(f"text {i}: expected {what} or a pair of them, found {str(item)[:80]!r} ({type(item).__name__})")
    return inputs
