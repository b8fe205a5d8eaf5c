"""Checkpoints that several processes write together, each the parts of tensors that lie on its devices.

    with replacing_together(directory) as temporary: ...     as `replacing`, for all processes at one time
    write_parts(folder, tensors, numbers)                    shard-P-model-I-of-N.safetensors: this process' parts
    consolidate(directory)                                   parts become the files that one process would have written

Names and metadata of the parts are those of torch.distributed.checkpoint's HuggingFaceStorageWriter, so its reader takes them, and
`read_checkpoint` takes its. A file has room for one part of a tensor; a process that holds several which are no box writes several files.

A region is a slice of a tensor and the processes that hold it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache, singledispatch
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxmodels.convert.atomic import replacing
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import PART, SHARDING_INFO, read_checkpoint, read_file, write_checkpoint, write_file
from jaxmodels.convert.tensors import Cut, Index, Item, JaxTensor, Joined, Span, Tensor, Transposed, full_index, lengths
from jaxmodels.sharding.processes import from_first, lockstep

Region: TypeAlias = tuple[Index, frozenset[int]]


@contextmanager
def replacing_together(
    directory: str | os.PathLike[str], *, drop: Callable[[str], bool] = lambda name: False, together: bool = True
) -> Iterator[Path]:
    """Every process writes to the same new directory, which process 0 puts in the old one's place once all have; on an error of any process
    nothing has changed. `together`: False for one process alone."""
    doing, first = f"saving {directory}", not together or jax.process_index() == 0
    with lockstep(doing, together), ExitStack() as stack:
        with lockstep(doing, together):
            temporary = stack.enter_context(replacing(directory, drop=drop)) if first else Path()
        if together:
            temporary = Path(directory).resolve().with_name(from_first(doing, temporary.name))
        with lockstep(doing, together):
            if not temporary.is_dir():
                raise CheckpointError(f"{temporary}: made by process 0 and not there for this one: a file system that all share is needed")
            yield temporary


def write_parts(folder: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], written: Callable[[int], object]) -> None:
    """This process' parts of `tensors`, in files by `numbers`: {key: number of the final file, from 1}."""
    mine = parts(tensors)
    for number in sorted(set(numbers.values())):
        keys = [key for key in mine if numbers[key] == number]
        for turn in range(max((len(mine[key]) for key in keys), default=0)):
            cut = {key: mine[key][turn] for key in keys if turn < len(mine[key])}
            starts = {key: {"saved_offsets": [s.start for s in index]} for key, index in cut.items()}
            metadata = {SHARDING_INFO: json.dumps(starts), "DCP_VERSION": "1.0"}
            shard = jax.process_index() + 1 + turn * jax.process_count()
            name = f"shard-{shard:05}-model-{number:05}-of-{max(numbers.values()):05}.safetensors"
            write_file(folder / name, {key: Cut(tensors[key], index) for key, index in cut.items()}, metadata=metadata, written=written)


def consolidate(source: str | os.PathLike[str], directory: str | os.PathLike[str] | None = None) -> None:
    """Turn a directory of parts into the files that they are numbered for, in place or as another directory; other files come along."""
    found = {name: re.split("[-.]", name)[3] for name in os.listdir(source) if PART.fullmatch(name)}
    if not found:
        raise CheckpointError(f"{source}: no files of parts (shard-….safetensors) here")
    numbers = {key: int(number) for name, number in found.items() for key in read_file(Path(source) / name)}
    others = {entry.name: entry.read_bytes() for entry in Path(source).iterdir() if entry.is_file() and entry.name not in found}
    write_checkpoint(source if directory is None else directory, read_checkpoint(source), fqn_to_index_mapping=numbers, files=others)


# ---- who writes what ---------------------------------------------------------------------------------------------------


def digest(tensors: Mapping[str, Tensor]) -> str:
    """What processes compare before they write: names, shapes, dtypes and who holds what."""
    found = [(key, tensor.shape, str(tensor.dtype), [(str(i), sorted(p)) for i, p in regions(tensor)]) for key, tensor in tensors.items()]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def parts(tensors: Mapping[str, Tensor]) -> dict[str, list[Index]]:
    """What this process writes of every tensor. All together write every element once; what several hold, they share."""
    load = [0] * jax.process_count()
    mine = {}
    for key, tensor in tensors.items():
        owned: dict[int, list[Index]] = {}
        groups: dict[frozenset[int], list[Index]] = {}
        for index, holders in regions(tensor):
            groups.setdefault(holders, []).append(index)
        for holders, indices in groups.items():
            order = sorted(holders, key=lambda process: (load[process], process))
            share = -(-len(indices) // len(order))
            for number, index in enumerate(indices):
                owned.setdefault(order[number // share], []).append(index)
                load[order[number // share]] += int(np.prod(lengths(index))) * tensor.dtype.itemsize
        mine[key] = _merged(owned.get(jax.process_index(), []))
    return mine


def _merged(indices: list[Index]) -> list[Index]:
    """Disjoint slices, neighbours joined into larger boxes."""
    bounds = lambda index: [(s.start, s.stop) for s in index]
    for axis in reversed(range(len(indices[0]) if indices else 0)):
        joined: list[Index] = []
        for index in sorted(indices, key=lambda index: (bounds(index)[:axis], bounds(index)[axis + 1 :], index[axis].start)):
            last = joined[-1] if joined else index
            both = (*last[:axis], slice(last[axis].start, index[axis].stop), *last[axis + 1 :])
            if last[axis].stop == index[axis].start and both == (*index[:axis], both[axis], *index[axis + 1 :]):
                joined[-1] = both
            else:
                joined.append(index)
        indices = joined
    return indices


@singledispatch
def regions(tensor: Tensor) -> list[Region]:
    """Slices that make up the tensor and lie whole on the processes named; anything on the host is on every process."""
    return [(full_index((), tensor.shape), frozenset(range(jax.process_count())))]


@regions.register
def _(tensor: JaxTensor) -> list[Region]:
    return _shards(tensor.array.sharding, tensor.shape)


@lru_cache(maxsize=1024)
def _shards(sharding: Any, shape: tuple[int, ...]) -> list[Region]:
    found: dict[tuple[tuple[int, int], ...], tuple[Index, set[int]]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        index = full_index(index, shape)
        found.setdefault(tuple((s.start, s.stop) for s in index), (index, set()))[1].add(device.process_index)
    return [(index, frozenset(processes)) for _, (index, processes) in sorted(found.items(), key=lambda item: item[0])]


@regions.register
def _(tensor: Transposed) -> list[Region]:
    axes = np.argsort(tensor.back)
    return [(tuple(index[axis] for axis in axes), holders) for index, holders in regions(tensor.base)]


@regions.register
def _(tensor: Item) -> list[Region]:
    return [(index[1:], holders) for index, holders in regions(tensor.base) if index[0].start <= tensor.number < index[0].stop]


@regions.register
def _(tensor: Joined) -> list[Region]:
    axis = tensor.spans[0].axis
    whole = [_groups(part, span) for part, span in zip(tensor.parts, tensor.spans)]
    if all(blocks is not None and blocks.keys() == (whole[0] or {}).keys() for blocks in whole):
        shared = {key: (index, frozenset.intersection(*(blocks[key][1] for blocks in whole))) for key, (index, _) in whole[0].items()}  # type: ignore[union-attr,index]
        if all(holders for _, holders in shared.values()):
            return list(shared.values())
    return [
        ((*index[:axis], there, *index[axis + 1 :]), holders)
        for part, span in zip(tensor.parts, tensor.spans)
        for index, holders in regions(part)
        for _, there in span.runs(index[axis])
    ]


def _groups(part: Tensor, span: Span) -> dict[Any, Region] | None:
    """The part's regions as slices of the fused tensor where each holds whole groups of rows, else None."""
    blocks: dict[Any, Region] = {}
    for index, holders in regions(part):
        rows = index[span.axis]
        if rows.start % span.size or rows.stop % span.size:
            return None
        fused = slice(rows.start // span.size * span.total, rows.stop // span.size * span.total)
        there = (*index[: span.axis], fused, *index[span.axis + 1 :])
        blocks[tuple((s.start, s.stop) for s in there)] = there, holders
    return blocks
