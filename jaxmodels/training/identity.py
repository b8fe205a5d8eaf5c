"""What tells one source of training data from another, in any process and on any machine: lines for a checkpoint's JSON, which a run that
is resumed compares with its own."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jaxmodels.training.sources import Rows

OF_THE_FILE = ("version", "truncation", "padding")  # in a tokenizer.json; calls say themselves how to cut and fill up
OPTIONS = ("special_tokens_map", "padding_side", "truncation_side", "split_special_tokens")


def identity(dataset: Any) -> list[str]:
    """What tells a sequence of examples from another: the names and sizes of its files, else how many examples there are."""
    rows = getattr(dataset, "rows", dataset)
    return rows.sizes if isinstance(rows, Rows) else [f"{len(dataset)} examples"]


def recipe(dataset: Any) -> str:
    """How a sequence makes its examples of rows; see `described`."""
    make = getattr(dataset, "make", None)
    return "as they stand" if make is None else described(make)


def described(function: Callable[..., Any]) -> str:
    """A function by its name, the arguments that are bound to it (of `partial`, or the fields of a dataclass such as a collator), and the
    tokenizers that it finds around it or in its object. What its body does is not seen."""
    if isinstance(function, partial):
        bound = {str(i): value for i, value in enumerate(function.args)} | function.keywords
        inner, name = None, described(function.func)  # which looks around itself
    else:
        fields: tuple[Any, ...] = (
            dataclasses.fields(function) if dataclasses.is_dataclass(function) and not isinstance(function, type) else ()
        )
        bound = {field.name: getattr(function, field.name) for field in fields}
        inner, name = function, getattr(function, "__qualname__", type(function).__qualname__)
    bound |= {key: value for key, value in _around(inner).items() if key not in bound and _is_tokenizer(value)}
    return ", ".join([name, *(f"{key} {_value(bound[key])}" for key in sorted(bound))])


def _value(value: Any) -> str:
    if _is_tokenizer(value):
        return tokenizer_in_words(value)
    if callable(value) and not isinstance(value, type) and not dataclasses.is_dataclass(value):
        return described(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else type(value).__qualname__


def _around(function: Any) -> dict[str, Any]:
    if not inspect.isfunction(function):
        return getattr(getattr(function, "__self__", function), "__dict__", {})
    code, around = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or ())
    return {name: around[name] for name in code.co_names if name in around} | {name: cell.cell_contents for name, cell in cells}


def _is_tokenizer(value: Any) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "get_vocab", None))


def tokenizer_in_words(tokenizer: Any) -> str:
    """Its size and a hash of everything that decides its tokens, and a hash of its chat template; of ours, transformers' or
    the tokenizers library's."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(tokenizer, "to_json") or hasattr(backend, "to_str"):
        content = json.loads(tokenizer.to_json() if hasattr(tokenizer, "to_json") else backend.to_str())
        content = _said({key: value for key, value in content.items() if key not in OF_THE_FILE})
    else:
        content = {"vocab": tokenizer.get_vocab()}
    options = {name: getattr(tokenizer, name, None) for name in OPTIONS}
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size()
    template = getattr(tokenizer, "chat_template", None)
    return f"of {size} tokens ({_hash([content, _said(options)])}) with " + (
        "no chat template" if template is None else f"chat template {_hash(template)}"
    )


def _said(value: Any) -> Any:
    """Without what is left out, empty or off, as which fields that another version of a library adds begin."""
    if not isinstance(value, dict):
        return [_said(item) for item in value] if isinstance(value, list) else value
    kept = {key: item if key in ("vocab", "merges") else _said(item) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item is not None and item is not False and item not in ("", [], {})}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`name: saved …, now …` of what is not the same on both sides; of two lists the first items that differ. What was not saved, as by an
    earlier version, is not known and agrees with anything."""
    found = []
    for name in saved:
        before, after = saved[name], now.get(name)
        if before != after and isinstance(before, list) and isinstance(after, list):
            before, after = next(pair for pair in itertools.zip_longest(before, after) if pair[0] != pair[1])
        if before != after:
            found.append(f"{name}: saved {before!r}, now {after!r}")
    return "; ".join(found)
