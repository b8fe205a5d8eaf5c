"""Chats in which special tokens typed by a user stay ordinary text.

Before rendering, every special token in the user's strings is put between two private-use characters; after rendering,
what stands between them is encoded without matching added tokens."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

START, END = "\U000f0000", "\U000f0001"


@lru_cache(maxsize=64)
def patterns(tokens: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(any of the tokens, the longest first; a marked token or a single mark)."""
    tokens_re = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    return tokens_re, re.compile(f"{START}({tokens_re.pattern}){END}|[{START}{END}]")


def mark(value: Any, tokens: re.Pattern[str]) -> Any:
    """The value with every token in its strings between marks. Marks that the user typed are dropped first."""
    if isinstance(value, str):
        return tokens.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
    if isinstance(value, dict):
        return {key: mark(item, tokens) for key, item in value.items()}
    return [mark(item, tokens) for item in value] if isinstance(value, (list, tuple)) else value


def _as_text(backend: Any, text: str) -> list[int]:
    """Ids of the text through the whole pipeline, except that no added token is matched."""
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    cuts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer is not None else [text]
    return [token.id for part in cuts for token in backend.model.tokenize(part)]


def _encode(tokenizer: Any, chat: str) -> list[int]:
    def plainly(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    newline = plainly("\n")

    def inside(piece: str, encode: Any) -> list[int]:
        # After a newline, so that no space is put before the piece as before a text's first word; then without the newline.
        ids = encode("\n" + piece)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)

    first, *rest = patterns(tuple(tokenizer.added_tokens_encoder))[1].split(chat)  # text, marked token or None, text, ...
    ids = plainly(first)
    for i, piece in enumerate(rest):
        if not piece:
            continue
        marked = i % 2 == 0
        new = inside(piece, (lambda text: _as_text(tokenizer.backend_tokenizer, text)) if marked else plainly)
        if marked and tokenizer.convert_tokens_to_ids(piece) in new:
            raise ValueError(f"sanitize_control_tokens: plain text gives the token {piece!r} too, so it cannot be made harmless")
        ids += new
    return ids


OPTIONS = {"padding_side", "pad_to_multiple_of", "return_attention_mask", "return_tensors"}


def encode_marked(tokenizer: Any, texts: str | list[str], *, padding: Any, truncation: Any, max_length: int | None, **options: Any) -> Any:
    """The BatchEncoding of rendered chats with marks."""
    frame = tokenizer.backend_tokenizer.post_processor
    if options.pop("add_special_tokens") and frame is not None and frame.num_special_tokens_to_add(False):
        raise ValueError("sanitize_control_tokens needs a template that writes the special tokens itself (add_special_tokens=False)")
    if strange := sorted(options.keys() - OPTIONS):
        raise ValueError(
            f"sanitize_control_tokens goes with the tokenizer's options {', '.join(sorted(OPTIONS))}; found {', '.join(strange)}"
        )
    rows = [_encode(tokenizer, text) for text in ([texts] if isinstance(texts, str) else texts)]
    strategy, cut, limit = tokenizer._strategies(padding, truncation, max_length, options.get("pad_to_multiple_of"))
    if cut:
        rows = [row[:limit] if tokenizer.truncation_side == "right" else row[max(0, len(row) - limit) :] for row in rows]
    single = isinstance(texts, str) and options["return_tensors"] is None
    options |= {"padding": strategy or False, "max_length": limit if strategy == "max_length" else None}
    return tokenizer.pad({"input_ids": rows[0] if single else rows}, **options)
