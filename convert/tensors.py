"""Lazy tensors: a shape, a dtype and a way to read any slice.

`as_tensor(x)` wraps a numpy or jax array (also sharded) or anything that only has a shape and a dtype; `files.read_checkpoint` gives the
tensors of a directory. The views below (`Transposed`, `Part`, `Joined`, `Stacked`, `Item`, `Cast`) are what the conversion rules are made
of: each one turns a slice of itself into slices of what it is made of, so a rule never touches more bytes than are asked for.

    tensor.shape, tensor.dtype, tensor.size, tensor.nbytes
    tensor.read((slice(0, 4),))             # a new numpy array; axes that are left out are whole
    tensor.read_into(out, index)            # the same into memory that the caller owns, cast to its dtype
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxmodels.convert.errors import CheckpointError

Index: TypeAlias = tuple[slice, ...]
_PAGE = 4096  # a run shorter than this costs as much to skip as to read


def full_index(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """`index` with one slice per axis, every slice with plain integer bounds and step 1."""
    if len(index) > len(shape) or any(s.step not in (None, 1) for s in index):
        raise IndexError(f"index {tuple(index)} for shape {tuple(shape)}: expected at most one slice of step 1 per axis")
    bounds = [s.indices(n)[:2] for s, n in zip([*index, *[slice(None)] * (len(shape) - len(index))], shape)]
    return tuple(slice(a, max(a, b)) for a, b in bounds)


def lengths(index: Index) -> tuple[int, ...]:
    """The shape of what the index selects."""
    return tuple(s.stop - s.start for s in index)


def overlap(a: Index, b: Index) -> Index | None:
    """What two slices of one tensor have in common, None for nothing."""
    both = tuple(slice(max(s.start, t.start), min(s.stop, t.stop)) for s, t in zip(a, b))
    return None if any(s.start >= s.stop for s in both) else both


def _along(items: Sequence[Any], axis: int, item: Any) -> tuple[Any, ...]:
    return (*items[:axis], item, *items[axis + 1 :])


class Tensor:
    """Base class: a subclass adds `_fill(out, index)`, which writes the slice `index` (one slice per axis, step 1, not empty) to `out`."""

    remote = False  # whether every slice takes requests to another machine

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)

    def _fill(self, out: np.ndarray, index: Index) -> None:
        raise NotImplementedError

    def read_into(self, out: np.ndarray, index: Sequence[slice] = ()) -> None:
        """Write the slice `index` to `out`, whose shape must be the slice's; another dtype of `out` means a cast, to nearest even."""
        index = full_index(index, self.shape)
        if out.shape != lengths(index):
            raise ValueError(f"slice {index} has shape {lengths(index)}, the destination has {out.shape}")
        if out.size:
            self._fill(out, index)

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """The slice as a new, C-contiguous numpy array of this tensor's dtype."""
        index = full_index(index, self.shape)
        out = np.empty(lengths(index), self.dtype)
        self.read_into(out, index)
        return out

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype}{list(self.shape)})"


# ---- leaves ------------------------------------------------------------------------------------------------------


class Spec(Tensor):
    """A shape and a dtype without data: rules run on it as on any tensor, reading it is an error."""

    def _fill(self, out: np.ndarray, index: Index) -> None:
        raise ValueError(f"{self!r} has no data: it is a shape and a dtype only")


class NumpyTensor(Tensor):
    """A numpy array, or a memory map of the file `path`."""

    def __init__(self, array: np.ndarray, path: str = "") -> None:
        super().__init__(array.shape, array.dtype)
        self.array, self.path = array, path

    def _fill(self, out: np.ndarray, index: Index) -> None:
        np.copyto(out, self.array[index], casting="unsafe")


class JaxTensor(Tensor):
    """A jax array, on one device or sharded: reading moves only the shards that overlap the slice, cut on their device."""

    def __init__(self, array: jax.Array) -> None:
        super().__init__(array.shape, array.dtype)
        self.array = array

    def _fill(self, out: np.ndarray, index: Index) -> None:
        done, filled = set(), 0
        for shard in self.array.addressable_shards:
            region = full_index(shard.index, self.shape)
            key = tuple((s.start, s.stop) for s in region)
            both = overlap(region, index)
            if key in done or both is None:
                continue
            done.add(key)
            here: Any = (*(slice(s.start - i.start, s.stop - i.start) for s, i in zip(both, index)), ...)
            part = tuple(slice(s.start - r.start, s.stop - r.start) for s, r in zip(both, region))
            np.copyto(out[here], _fetch(shard.data, part), casting="unsafe")
            filled += math.prod(lengths(both))
        if filled < out.size:
            raise ValueError(
                f"slice {index} of an array {self.shape} is not held by this process: {filled} of {out.size} elements are here"
            )


def _fetch(data: jax.Array, part: Index) -> np.ndarray:
    on_host = next(iter(data.devices())).platform == "cpu"  # then its memory is read in place
    return np.asarray(data)[part] if on_host else _transfer(data, part)


def _transfer(data: jax.Array, part: Index) -> np.ndarray:
    """The slice of a single-device array, cut on the device and copied from there."""
    if lengths(part) != data.shape:  # traced starts: one small program per shape, not one per slice
        return np.asarray(jax.lax.dynamic_slice(data, [s.start for s in part], lengths(part)))
    # np.asarray keeps its host copy on the array it is asked of: ask it of a wrapper that dies here
    return np.asarray(jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data]))


def as_tensor(x: Any) -> Tensor:
    """A `Tensor` over a Tensor, a numpy array, a jax array or, without data, over anything else with `shape` and `dtype`."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return JaxTensor(x)
    if isinstance(x, np.ndarray | np.generic):
        return NumpyTensor(np.asarray(x))
    return Spec(x.shape, x.dtype)


# ---- views -------------------------------------------------------------------------------------------------------


class Cast(Tensor):
    """`base` in another dtype; values are rounded to nearest even where they do not fit."""

    def __init__(self, base: Tensor, dtype: Any) -> None:
        super().__init__(base.shape, dtype)
        self.base = base

    def _fill(self, out: np.ndarray, index: Index) -> None:
        if out.dtype == self.dtype:
            self.base.read_into(out, index)
        else:
            np.copyto(out, self.read(index), casting="unsafe")


class Transposed(Tensor):
    """`base` with its axes permuted as by numpy.transpose."""

    def __init__(self, base: Tensor, axes: Sequence[int]) -> None:
        super().__init__([base.shape[a] for a in axes], base.dtype)
        self.base, self.back = base, [int(i) for i in np.argsort(axes)]

    def _fill(self, out: np.ndarray, index: Index) -> None:
        self.base.read_into(out.transpose(self.back), [index[i] for i in self.back])


@dataclass(frozen=True)
class Span:
    """Where one part of a fused axis lies: the axis is [groups, total], the part is rows [offset, offset + size) of every group."""

    axis: int
    offset: int
    size: int
    total: int
    groups: int

    def runs(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """The part's `rows` as pairs of equally long slices: of the part, of the fused axis."""
        start = rows.start
        while start < rows.stop:
            group, within = divmod(start, self.size)
            length = min(self.size - within, rows.stop - start)
            there = group * self.total + self.offset + within
            yield slice(start, start + length), slice(there, there + length)
            start += length

    def positions(self, rows: slice) -> np.ndarray:
        """The fused axis' row of every row of the part in `rows`."""
        group, within = np.divmod(np.arange(rows.start, rows.stop), self.size)
        return group * self.total + self.offset + within

    def rows(self, fused: slice) -> slice:
        """The part's rows that lie within the rows `fused` of the fused axis: always one stretch."""

        def before(row: int) -> int:
            group, within = divmod(row, self.total)
            return group * self.size + min(max(within - self.offset, 0), self.size)

        return slice(before(fused.start), before(fused.stop))

    def short(self, tensor: Tensor) -> bool:
        return self.groups > 1 and self.size * math.prod(tensor.shape[self.axis + 1 :]) * tensor.dtype.itemsize < _PAGE


class Part(Tensor):
    """One part of a fused tensor: its rows of all groups, one group after the other."""

    def __init__(self, base: Tensor, span: Span) -> None:
        super().__init__(_along(base.shape, span.axis, span.groups * span.size), base.dtype)
        self.base, self.span = base, span

    def _fill(self, out: np.ndarray, index: Index) -> None:
        axis, rows = self.span.axis, index[self.span.axis]
        whole = [slice(None)] * out.ndim
        if self.span.short(self):
            wanted = self.span.positions(rows)
            cover = self.base.read(_along(index, axis, slice(int(wanted[0]), int(wanted[-1]) + 1)))
            np.copyto(out, cover[_along(whole, axis, wanted - wanted[0])], casting="unsafe")
            return
        for mine, theirs in self.span.runs(rows):
            here = slice(mine.start - rows.start, mine.stop - rows.start)
            self.base.read_into(out[_along(whole, axis, here)], _along(index, axis, theirs))


class Joined(Tensor):
    """The fused tensor of `parts`: the inverse of taking every `Part`."""

    def __init__(self, parts: Sequence[Tensor], spans: Sequence[Span]) -> None:
        super().__init__(_along(parts[0].shape, spans[0].axis, spans[0].groups * spans[0].total), parts[0].dtype)
        self.parts, self.spans = tuple(parts), tuple(spans)

    def _fill(self, out: np.ndarray, index: Index) -> None:
        axis, fused = self.spans[0].axis, index[self.spans[0].axis]
        whole = [slice(None)] * out.ndim
        for part, span in zip(self.parts, self.spans):
            rows = span.rows(fused)
            if span.short(part):
                out[_along(whole, axis, span.positions(rows) - fused.start)] = part.read(_along(index, axis, rows))
                continue
            for mine, theirs in span.runs(rows):
                here = slice(theirs.start - fused.start, theirs.stop - fused.start)
                part.read_into(out[_along(whole, axis, here)], _along(index, axis, mine))


class Stacked(Tensor):
    """`parts`, all of one shape and dtype, along a new leading axis."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        super().__init__((len(parts), *parts[0].shape), parts[0].dtype)
        self.parts = tuple(parts)

    def _fill(self, out: np.ndarray, index: Index) -> None:
        for i, part in enumerate(self.parts[index[0]]):
            part.read_into(out[i, ...], index[1:])


class Item(Tensor):
    """`base[number]`, without its leading axis."""

    def __init__(self, base: Tensor, number: int) -> None:
        super().__init__(base.shape[1:], base.dtype)
        self.base, self.number = base, number

    def _fill(self, out: np.ndarray, index: Index) -> None:
        self.base.read_into(out[None], (slice(self.number, self.number + 1), *index))


class Cut(Tensor):
    """The slice `index` of `base`."""

    def __init__(self, base: Tensor, index: Sequence[slice]) -> None:
        self.base, self.index = base, full_index(index, base.shape)
        super().__init__(lengths(self.index), base.dtype)

    def _fill(self, out: np.ndarray, index: Index) -> None:
        self.base.read_into(out, [slice(s.start + o.start, s.stop + o.start) for s, o in zip(index, self.index)])


class Assembled(Tensor):
    """A tensor of `parts`, each under the index of its first element; `path` says where from. CheckpointError where they do not fill it."""

    def __init__(self, key: str, parts: Mapping[tuple[int, ...], Tensor], path: str) -> None:
        self.parts, self.path = [(_region(start, part), part) for start, part in parts.items()], path
        regions, (first, *others) = [region for region, _ in self.parts], parts.values()
        self.remote = first.remote
        super().__init__([max(region[axis].stop for region in regions) for axis in range(len(first.shape))], first.dtype)
        if any((len(part.shape), part.dtype) != (len(first.shape), first.dtype) for part in others):
            raise CheckpointError(f"{key}: parts of different dtypes or ranks {list(parts.values())} in {path}")
        if sum(part.size for part in parts.values()) != self.size:
            found = sorted([[s.start, s.stop] for s in region] for region in regions)[:8]
            raise CheckpointError(f"{key}: the parts {found} are no whole tensor {list(self.shape)}: is a file missing? Found {path}")

    def _fill(self, out: np.ndarray, index: Index) -> None:
        for region, part in self.parts:
            both = overlap(region, index)
            if both is not None:
                here: Any = (*(slice(s.start - i.start, s.stop - i.start) for s, i in zip(both, index)), ...)
                part.read_into(out[here], [slice(s.start - r.start, s.stop - r.start) for s, r in zip(both, region)])


def _region(start: Sequence[int], part: Tensor) -> Index:
    return tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))
