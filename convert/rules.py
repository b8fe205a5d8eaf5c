"""Conversion rules: how a family's parameter tree differs from the keys of its checkpoint file, as data.

A rule's `forward` takes {file key: Tensor} to {tree key: Tensor}, its `inverse` takes the tree back to the file. Both are lazy: the results
are views, so a slice of a leaf is read as slices of the file and nothing is read before it is asked for. No rule changes a value, and
inverse(forward(x)) has the keys, shapes, dtypes and bytes of x (for `Alias`, `Tie` and `Ignore`: of x in canonical form).

    Rename(source, target)                               a key's name
    Transpose(keys, axes=(1, 0))                         a weight stored the other way round (GPT-2's Conv1D)
    Split(source, targets, sizes, axis=0, groups=1)      one fused projection -> several
    StackExperts(source, target)                         one tensor per expert -> one leaf [experts, ...]
    Stack(targets)                                       scanned layers: one tensor per layer -> one leaf [layers, ...]
    Alias(canonical, others)                             other names that files use; written back under the canonical one
    Tie(key, canonical)                                  a second copy of a tied weight: accepted, not written
    Ignore(patterns)                                     buffers and the like: reported, not written
    Detachable(patterns, required=False)                 a part of the base model that some classes lack: as a head to the loader

Keys are patterns over the whole dotted key: `*` is one or more characters other than a dot, `**` any characters, `#` (StackExperts) the
expert's number. A rule that has several patterns uses the same wildcards in the same order in each; the text that a wildcard matched is
carried over. Keys that no pattern matches pass through. `*` in the last place covers `weight` and `bias` alike:

    Split("transformer.h.*.attn.c_attn.*", ("transformer.h.*.attn.q.*", ...k.*, ...v.*), sizes=(768, 768, 768), axis=-1)

A fused axis is seen as [groups, sum(sizes)] and every part keeps [groups * size] rows, in order: `groups` is 1 for plain qkv and gate_up,
the heads for GPT-NeoX and BLOOM, the key-value heads for Falcon, and all pairs with sizes (1, 1) for gpt_oss's even/odd gate_up.

In a scanned tree a component such as `0:30:1` is Python's slice of layers: `model.layers.0:30:1.mlp.up_proj.weight` is the stack of that
weight over layers 0 to 29. The name is the whole table: `members(name)` lists what it stacks and `stack` / `unstack` work on any arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.tensors import Item, Joined, Part, Span, Stacked, Tensor, Transposed

Tensors = dict[str, Tensor]
_WILDCARDS = {"**": "(.*)", "*": "([^.]+)", "#": r"(?P<number>0|[1-9]\d*)"}
_SLICE = re.compile(r"(0|[1-9]\d*):(\d+):([1-9]\d*)")


@lru_cache(maxsize=4096)
def _tokens(pattern: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\*\*|\*|#|[^*#]+", pattern))


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(_WILDCARDS.get(t) or re.escape(t) for t in _tokens(pattern)))


def wildcards(pattern: str) -> tuple[str, ...]:
    """The wildcards of a pattern in order, without `#`."""
    return tuple(t for t in _tokens(pattern) if t in ("*", "**"))


def match(pattern: str, key: str) -> tuple[str, ...] | None:
    """What the wildcards of `pattern` stand for in `key` (`#` not among them), or None."""
    found = _regex(pattern).fullmatch(key)
    if found is None:
        return None
    return tuple(text for i, text in enumerate(found.groups(), 1) if i != found.re.groupindex.get("number"))


def fill(pattern: str, texts: Sequence[str], number: int | None = None) -> str:
    """The key that `pattern` stands for with its wildcards replaced by `texts`."""
    rest = iter(texts)
    return "".join(next(rest) if t in ("*", "**") else str(number) if t == "#" else t for t in _tokens(pattern))


class Op:
    """One rule, on {key: Tensor}, in order, without reading. A subclass has both directions."""

    def forward(self, tensors: Tensors) -> Tensors:
        """File -> tree."""
        raise NotImplementedError

    def inverse(self, tensors: Tensors) -> Tensors:
        """Tree -> file."""
        raise NotImplementedError

    def _same_wildcards(self, *patterns: str) -> None:
        if len({wildcards(p) for p in patterns}) > 1:
            raise ValueError(f"{self}: its patterns must have the same wildcards in the same order")


def forward(rules: Iterable[Op], tensors: Mapping[str, Tensor]) -> Tensors:
    """File -> tree through all rules."""
    result = dict(tensors)
    for rule in rules:
        result = rule.forward(result)
    return result


def inverse(rules: Sequence[Op], tensors: Mapping[str, Tensor]) -> Tensors:
    """Tree -> file through all rules, last rule first."""
    result = dict(tensors)
    for rule in reversed(rules):
        result = rule.inverse(result)
    return result


def _unique(op: Op, pairs: Iterable[tuple[str, Tensor]]) -> Tensors:
    result: Tensors = {}
    for key, tensor in pairs:
        if key in result:
            raise CheckpointError(f"two tensors would be called {key!r} after {op}")
        result[key] = tensor
    return result


def _rename(op: Op, source: str, target: str, tensors: Tensors) -> Tensors:
    def pairs() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in tensors.items():
            texts = match(source, key)
            new = key if texts is None else fill(target, texts)
            if match(target, new) != texts:
                raise CheckpointError(f"{key!r} has no way back after {op}: {target!r} also matches {new!r} with other texts")
            yield new, tensor

    return _unique(op, pairs())


@dataclass(frozen=True)
class Rename(Op):
    """File key `source` is called `target` in the tree. One to one: a key that could not be named back is an error."""

    source: str
    target: str

    def __post_init__(self) -> None:
        self._same_wildcards(self.source, self.target)

    def forward(self, tensors: Tensors) -> Tensors:
        return _rename(self, self.source, self.target, tensors)

    def inverse(self, tensors: Tensors) -> Tensors:
        return _rename(self, self.target, self.source, tensors)


@dataclass(frozen=True)
class Transpose(Op):
    """The tensors that `keys` matches have permuted axes: tree[key] = file[key].transpose(axes)."""

    keys: str
    axes: tuple[int, ...] = (1, 0)

    def _apply(self, tensors: Tensors, axes: tuple[int, ...]) -> Tensors:
        def one(key: str, tensor: Tensor) -> Tensor:
            if match(self.keys, key) is None:
                return tensor
            if len(tensor.shape) != len(axes):
                raise CheckpointError(f"{key}: shape {list(tensor.shape)} cannot be transposed by {axes}, expected {len(axes)} axes")
            return Transposed(tensor, axes)

        return {key: one(key, tensor) for key, tensor in tensors.items()}

    def forward(self, tensors: Tensors) -> Tensors:
        return self._apply(tensors, self.axes)

    def inverse(self, tensors: Tensors) -> Tensors:
        return self._apply(tensors, tuple(int(i) for i in np.argsort(self.axes)))


@dataclass(frozen=True)
class Split(Op):
    """File tensor `source` is `targets` in the tree: its `axis` is [groups, sum(sizes)] and part i has sizes[i] rows of every group."""

    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...]
    axis: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        self._same_wildcards(self.source, *self.targets)
        if len(self.targets) != len(self.sizes) or min(self.sizes) < 1 or self.groups < 1:
            raise ValueError(f"{self}: expected one positive size per target and at least one group")

    def _spans(self, rank: int) -> list[Span]:
        total, starts = sum(self.sizes), np.cumsum([0, *self.sizes])
        return [Span(self.axis % rank, int(start), size, total, self.groups) for start, size in zip(starts, self.sizes)]

    def _check(self, key: str, tensor: Tensor, rows: int) -> None:
        rank = len(tensor.shape)
        if not -rank <= self.axis < rank or tensor.shape[self.axis] != rows:
            raise CheckpointError(f"{key}: shape {list(tensor.shape)}, expected {rows} rows on axis {self.axis} for {self}")

    def forward(self, tensors: Tensors) -> Tensors:
        def pairs() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors.items():
                texts = match(self.source, key)
                if texts is None:
                    yield key, tensor
                    continue
                self._check(key, tensor, self.groups * sum(self.sizes))
                for target, span in zip(self.targets, self._spans(len(tensor.shape))):
                    yield fill(target, texts), Part(tensor, span)

        return _unique(self, pairs())

    def inverse(self, tensors: Tensors) -> Tensors:
        found = {key: (i, texts) for key in tensors for i, t in enumerate(self.targets) if (texts := match(t, key)) is not None}

        def pairs() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors.items():
                if key not in found:
                    yield key, tensor
                elif found[key][0] == 0:
                    names = [fill(target, found[key][1]) for target in self.targets]
                    missing = [name for name in names if name not in tensors]
                    if missing:
                        raise CheckpointError(f"{key}: cannot be fused into {self.source!r} without {missing}")
                    parts = [tensors[name] for name in names]
                    for name, part, size in zip(names, parts, self.sizes):
                        self._check(name, part, self.groups * size)
                    yield fill(self.source, found[key][1]), Joined(parts, self._spans(len(tensor.shape)))
                elif fill(self.targets[0], found[key][1]) not in tensors:
                    raise CheckpointError(f"{key}: cannot be fused into {self.source!r} without {fill(self.targets[0], found[key][1])!r}")

        return _unique(self, pairs())


@dataclass(frozen=True)
class StackExperts(Op):
    """File tensors `source`, one per expert `#`, are one leaf `target` [experts, ...] in the tree."""

    source: str
    target: str

    def __post_init__(self) -> None:
        self._same_wildcards(self.source, self.target)
        if self.source.count("#") != 1 or "#" in self.target:
            raise ValueError(f"{self}: expected one `#` in the source and none in the target")

    def forward(self, tensors: Tensors) -> Tensors:
        experts: dict[str, dict[int, str]] = {}
        for key in tensors:
            found = _regex(self.source).fullmatch(key)
            if found:
                experts.setdefault(fill(self.target, match(self.source, key) or ()), {})[int(found["number"])] = key

        def pairs() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors.items():
                texts = match(self.source, key)
                if texts is None:
                    yield key, tensor
                    continue
                target = fill(self.target, texts)
                keys = experts.pop(target, None)  # the leaf stands where its first expert stood
                if keys:
                    absent = sorted(set(range(max(keys) + 1)) - set(keys))
                    if absent:
                        raise CheckpointError(f"missing: {[fill(self.source, texts, number) for number in absent]}")
                    yield target, _stacked(target, [(keys[number], tensors[keys[number]]) for number in range(len(keys))])

        return _unique(self, pairs())

    def inverse(self, tensors: Tensors) -> Tensors:
        def pairs() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors.items():
                texts = match(self.target, key)
                if texts is None:
                    yield key, tensor
                else:
                    yield from ((fill(self.source, texts, number), Item(tensor, number)) for number in range(tensor.shape[0]))

        return _unique(self, pairs())


@dataclass(frozen=True)
class Alias(Op):
    """Files also call `canonical` one of `others`. Written back as `canonical`; both at once is an error."""

    canonical: str
    others: tuple[str, ...]

    def __post_init__(self) -> None:
        self._same_wildcards(self.canonical, *self.others)

    def name(self, key: str) -> str:
        """The canonical name of `key`."""
        return next((fill(self.canonical, texts) for other in self.others if (texts := match(other, key)) is not None), key)

    def forward(self, tensors: Tensors) -> Tensors:
        return _unique(self, ((self.name(key), tensor) for key, tensor in tensors.items()))

    def inverse(self, tensors: Tensors) -> Tensors:
        return tensors


@dataclass(frozen=True)
class Tie(Op):
    """`key` is the same weight as `canonical` (plain keys). A file may hold either or both; only `canonical` is written."""

    key: str
    canonical: str

    def forward(self, tensors: Tensors) -> Tensors:
        if self.key not in tensors:
            return tensors
        if self.canonical not in tensors:
            return {self.canonical if key == self.key else key: tensor for key, tensor in tensors.items()}
        tied, kept = tensors[self.key].shape, tensors[self.canonical].shape
        if tied != kept:
            raise CheckpointError(f"{self.key} has shape {list(tied)}, but it is tied to {self.canonical} of shape {list(kept)}")
        return {key: tensor for key, tensor in tensors.items() if key != self.key}

    def inverse(self, tensors: Tensors) -> Tensors:
        return tensors


@dataclass(frozen=True)
class Ignore(Op):
    """Keys that match one of `patterns` are left out of the tree and of what is written."""

    patterns: tuple[str, ...]

    def forward(self, tensors: Tensors) -> Tensors:
        return {key: tensor for key, tensor in tensors.items() if all(match(pattern, key) is None for pattern in self.patterns)}

    def inverse(self, tensors: Tensors) -> Tensors:
        return tensors


@dataclass(frozen=True)
class Detachable(Op):
    """Keys of the base model that some classes and files lack, BERT's pooler: initialised where the file has none (with `required` that is
    an error), left out where the class has none, as a head's are."""

    patterns: tuple[str, ...]
    required: bool = False

    def forward(self, tensors: Tensors) -> Tensors:
        return tensors

    def inverse(self, tensors: Tensors) -> Tensors:
        return tensors


# ---- scanned layers --------------------------------------------------------------------------------------------------


def members(name: str) -> list[str] | None:
    """The unrolled names that a scanned tree's `name` stacks, in order; None for a plain name."""
    parts = name.split(".")
    at = [i for i, part in enumerate(parts) if ":" in part]
    if not at:
        return None
    bounds = _SLICE.fullmatch(parts[at[0]])
    layers = range(*map(int, bounds.groups())) if bounds else range(0)
    if len(at) > 1 or not layers:
        raise ValueError(f"{name!r}: expected one component `start:stop:step` that holds at least one layer")
    return [".".join([*parts[: at[0]], str(layer), *parts[at[0] + 1 :]]) for layer in layers]


def _stacked(target: str, named: Sequence[tuple[str, Tensor]]) -> Stacked:
    first = named[0][1]
    for key, tensor in named:
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise CheckpointError(f"{key}: {tensor!r} cannot be stacked into {target!r} with {named[0][0]}: {first!r}")
    return Stacked([tensor for _, tensor in named])


@dataclass(frozen=True)
class Stack(Op):
    """Scanned layers: `members(target)` are one leaf `target` [layers, ...] in the tree. `stacks(names)` makes it from a tree's names."""

    targets: tuple[str, ...]

    def forward(self, tensors: Tensors) -> Tensors:
        result = dict(tensors)
        for target in self.targets:
            names = members(target) or []
            missing = [name for name in names if name not in result]
            if missing:
                raise CheckpointError(f"{target!r} cannot be stacked without {missing}")
            result[target] = _stacked(target, [(name, result.pop(name)) for name in names])
        return result

    def inverse(self, tensors: Tensors) -> Tensors:
        def pairs() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors.items():
                names = members(key) if key in self.targets else None
                if names is None:
                    yield key, tensor
                    continue
                if tensor.shape[:1] != (len(names),):
                    raise CheckpointError(f"{key}: shape {list(tensor.shape)}, expected {len(names)} layers on the first axis")
                yield from ((name, Item(tensor, i)) for i, name in enumerate(names))

        return _unique(self, pairs())


def stacks(names: Iterable[str]) -> Stack:
    """The rule that the names of a tree (scanned, unrolled or mixed) ask for."""
    return Stack(tuple(name for name in names if members(name)))


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """A scanned {name: array} dict unrolled: `layers.0:30:1.w` [30, ...] becomes `layers.0.w` to `layers.29.w`. Numpy, jax, traced."""
    result = {}
    for name, array in params.items():
        names = members(name)
        if names is not None and array.shape[:1] != (len(names),):
            raise ValueError(f"{name}: shape {list(array.shape)}, expected {len(names)} layers on the first axis")
        result.update({name: array} if names is None else {n: array[i] for i, n in enumerate(names)})
    return result


def stack(params: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inverse of `unstack`: unrolled `params` under the `names` of a scanned tree. Every parameter must be used exactly once."""
    table = {name: members(name) or [name] for name in names}
    used = [member for group in table.values() for member in group]
    if sorted(used) != sorted(params):
        wrong = sorted(set(used) ^ set(params)) or sorted({name for name in used if used.count(name) > 1})
        raise ValueError(f"the names do not take every parameter exactly once: {wrong}")

    def join(arrays: list[Any]) -> Any:
        return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)

    return {name: join([params[n] for n in group]) if members(name) else params[name] for name, group in table.items()}
