"""A Python function as the JSON schema that chat templates show to a model."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
CONTAINERS: dict[Any, str] = {list: "array", tuple: "array", dict: "object"}


class ToolSchemaError(ValueError):
    """A function that cannot be turned into a schema: an argument without hint or description, or a hint JSON cannot express."""


def _enum(values: list, what: str) -> dict[str, Any]:
    if not values or any(type(value) not in SCALARS for value in values):
        raise ToolSchemaError(f"{what}: found the values {values}; expected at least one, each an int, float, str, bool or None")
    kinds = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(args: tuple) -> dict[str, Any]:
    options = [_hint(arg) for arg in args if arg is not type(None)]
    if len(options) == 1:
        schema = options[0]
    elif all(option.keys() == {"type"} and isinstance(option["type"], str) for option in options):
        names = sorted({option["type"] for option in options})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": options}
    return {**schema, "nullable": True} if type(None) in args else schema


def _hint(hint: Any) -> dict[str, Any]:
    """The schema of a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if not args and (name := {**SCALARS, **CONTAINERS}.get(origin or hint)):  # list, and typing's List without a parameter
        return {"type": name}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum([member.value for member in hint], f"enum {hint.__name__}")
    if origin in (Union, types.UnionType):
        return _union(args)
    if origin is Literal:
        return _enum(list(args), str(hint))
    if origin is list:
        return {"type": "array", "items": _hint(args[0])}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_hint(arg) for arg in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _hint(args[1])}
    raise ToolSchemaError(
        f"type hint {hint!r} has no JSON schema; use int, float, str, bool, an Enum, Literal, list[...], tuple[a, b], dict[str, ...] or a "
        "union of these, or pass the tool's schema as a dictionary"
    )


def _parse_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """(description, argument descriptions, description of the result) of a docstring in Google's format."""
    description = re.split(r"Args:|Returns:|Raises:", doc, maxsplit=1)[0].strip()
    section = re.search(r"\n\s*Args:\n(.*?)\s*(?:Returns:|Raises:|\Z)", doc, re.DOTALL)
    result = re.search(r"\n\s*Returns:\n\s*(.*?)\s*(?:Raises:|\Z)", doc, re.DOTALL)
    found: dict[str, list[str]] = {}
    indent = name = None
    for line in section[1].split("\n") if section else []:
        start = re.match(r"([ \t]*)(\w+):(.*)", line)
        if start and not (indent is not None and line.startswith((indent + " ", indent + "\t"))):
            indent, name, line = start.groups()
            found[name] = []
        if name is not None and line.strip():
            found[name].append(line.strip())
    return description, {key: " ".join(lines) for key, lines in found.items()}, result[1].strip() if result else None


def _choices(text: str, what: str) -> list:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, (list, dict, str)):
        raise ToolSchemaError(f'{what} are {text}; expected a JSON list, as in (choices: ["tea", "coffee"])')
    return [value.strip() if isinstance(value, str) else value for value in values]


def get_json_schema(function: Callable) -> dict[str, Any]:
    """The schema of a function from its type hints and its docstring in Google's format, every argument described.

    A description may end in `(choices: ["tea", "coffee"])`, which becomes an `enum`. A first argument `self` or `cls`
    without a hint is left out. Raises ToolSchemaError."""
    name = getattr(function, "__name__", "operation")
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise ToolSchemaError(f"{name}: no docstring; the model reads the tool's description from it")
    description, described, result = _parse_docstring(doc)
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    if first in ("self", "cls") and parameters[first].annotation is inspect.Parameter.empty:
        del parameters[first]
    try:
        hints, properties = get_type_hints(function), {}
    except NameError as error:
        raise ToolSchemaError(f"{name}: a type hint names what is not defined where the function is: {error}") from error
    for argument, parameter in parameters.items():
        if parameter.annotation is inspect.Parameter.empty:
            raise ToolSchemaError(f"{name}: argument {argument!r} has no type hint")
        if argument not in described:
            raise ToolSchemaError(f"{name}: the docstring's Args section does not describe {argument!r}")
        text = described[argument]
        properties[argument] = _hint(hints[argument])
        if choices := re.search(r"\(choices:\s*(.*?)\)\s*$", text, re.IGNORECASE):
            properties[argument]["enum"] = _choices(choices[1], f"{name}: the choices of {argument!r}")
            text = text[: choices.start()].strip()
        properties[argument]["description"] = text
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [a for a, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]:
        schema["required"] = required
    tool = {"name": name, "description": description, "parameters": schema}
    if "return" in hints and (returned := _return(hints["return"])) is not None:
        tool["return"] = returned | ({"description": result} if result is not None else {})
    return {"type": "function", "function": tool}


def _return(hint: Any) -> dict[str, Any] | None:
    try:
        return _hint(hint)
    except ToolSchemaError:  # the model never writes the result, so a hint without a schema is no obstacle
        return None
