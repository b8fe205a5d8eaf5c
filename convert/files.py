"""safetensors checkpoints on disk: reading a directory lazily, writing one the way `save_pretrained` of torch transformers does.

    read_checkpoint(path, variant=None) -> {key: Tensor}        model.safetensors, or model.safetensors.index.json and its shards
    write_checkpoint(path, {key: Tensor}, max_shard_size="50GB", variant=None, files={"config.json": text}, progress=None)
    read_file(path) -> {key: Tensor}      write_file(path, {key: Tensor})      one safetensors file

The safetensors library checks a file; its bytes are then read through a memory map, since the library's numpy reader copies twice, holds
the GIL for as long as a read takes and has no float8. Every error is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.hub import is_url, local_directory
from jaxmodels.convert.remote import RangeTensor, RemotePath
from jaxmodels.convert.tensors import Assembled, NumpyTensor, Tensor

# In the order in which a file holds them: widest type first, then by name.
DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: (rank, name) for rank, (name, dtype) in enumerate(DTYPES.items())}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_THREADS = 16
# Parts of tensors, as torch.distributed.checkpoint's HuggingFaceStorageWriter names and describes them
PART = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
SHARDING_INFO = "DCP_SHARDING_INFO"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Place: TypeAlias = Path | RemotePath


# ---- reading -------------------------------------------------------------------------------------------------------


def place(path: str | os.PathLike[str] | RemotePath) -> Place:
    """A local path, or one at a URL."""
    if isinstance(path, RemotePath) or not is_url(path):
        return path if isinstance(path, RemotePath) else Path(path)
    remote = RemotePath(os.fspath(path))
    return Path(remote.inner) if "file" in remote.fs.protocol else remote


def _unique_keys(path: Place) -> Any:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(f"{path}: doubled key {next(name for name in names if names.count(name) > 1)!r}")
        return result

    return hook


def _json(path: Place, data: bytes) -> dict[str, Any]:
    try:
        result = json.loads(data, object_pairs_hook=_unique_keys(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch or write the file again") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"{path}: a JSON {type(result).__name__}, expected an object")
    return result


def _header(path: Place) -> tuple[dict[str, Any], int]:
    """The checked header of a safetensors file and the offset at which its data begin."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open() if isinstance(path, RemotePath) else open(path, "rb") as file:
            found = file.seek(0, os.SEEK_END)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` in its repository")
            if len(start) == 8 and length > _MAX_HEADER:
                raise CheckpointError(f"{path}: not a safetensors file: its header would be {length:,} bytes long")
            if 8 + length > found or len(start) < 8:
                raise CheckpointError(f"{path}: truncated: {found:,} bytes, expected at least {max(8, 8 + length):,}; fetch the file again")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    header = _json(path, text)
    offsets = [entry.get("data_offsets") for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int)]
    expected = 8 + length + max(ends, default=0)
    if found < expected:
        raise CheckpointError(f"{path}: truncated: {found:,} bytes, its header says {expected:,}; fetch the file again")
    try:
        if isinstance(path, RemotePath):
            with tempfile.NamedTemporaryFile() as copy:  # the header and a hole: as much as the library looks at
                copy.write(start + text)
                copy.truncate(found)
                copy.flush()
                safe_open(copy.name, "numpy")
        else:
            safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: bad safetensors header: {error}; fetch or write the file again") from None
    return header, 8 + length


def read_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of one safetensors file, lazily, in the file's order."""
    return read_annotated(place(path))[0]


def read_annotated(path: Place) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_file`, and the file's metadata."""
    header, begin = _header(path)
    metadata = header.pop("__metadata__", {})
    data = None if isinstance(path, RemotePath) else np.memmap(path, np.uint8, "r")
    tensors: dict[str, Tensor] = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {key}: dtype {entry['dtype']} is not supported, expected one of {', '.join(DTYPES)}")
        dtype, (start, stop) = DTYPES[entry["dtype"]], (begin + offset for offset in entry["data_offsets"])
        if data is None:
            tensors[key] = RangeTensor(path, start, entry["shape"], dtype)  # type: ignore[arg-type]
        else:  # a plain ndarray over the map: the subclass would cost a Python call in every view
            tensors[key] = NumpyTensor(np.asarray(data[start:stop]).view(dtype).reshape(entry["shape"]), str(path))
    return tensors, metadata


def _weights(variant: str | None) -> str:
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def _index(variant: str | None) -> str:
    return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"


def read_checkpoint(path: str | os.PathLike[str], *, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, lazily: `path` is a directory or one safetensors file, also at a URL that fsspec knows.

    A directory holds model.safetensors, or model.safetensors.index.json with its shards; `variant="fp16"` means model.fp16.safetensors; or
    shard-….safetensors files with parts of tensors (see `sharded`).
    Raises CheckpointError for a truncated file, a bad header or index, a missing shard, a key that is doubled or that its shard lacks, a
    directory without safetensors (pickles are never loaded)."""
    where = place(path)
    if where.is_file():
        return read_annotated(where)[0]
    if not where.is_dir():
        raise CheckpointError(f"{where}: no such file or directory")
    single, index = where / _weights(variant), where / _index(variant)
    if single.exists():
        return read_annotated(single)[0]
    if index.exists():
        return _read_shards(index)
    parts = [entry for entry in where.iterdir() if PART.fullmatch(entry.name)]
    if parts and variant is None:
        return _read_parts(where, sorted(parts, key=str))
    raise CheckpointError(_why_not(where, variant))


def _read_shards(index: Place) -> dict[str, Tensor]:
    try:
        table = _json(index, index.read_bytes()).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: expected an object `weight_map` of key to file name")
    names = sorted(set(table.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: names files outside its directory: {outside}")
    files = [index.parent / name for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        missing = [name for name, exists in zip(names, pool.map(lambda file: file.exists(), files)) if not exists]
        if missing:
            raise CheckpointError(f"{index.parent}: missing shards {missing} of {len(names)}; fetch them again")
        contents = [tensors for tensors, _ in pool.map(read_annotated, files)]
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for name, content in zip(names, contents):
        for key, tensor in content.items():
            if key in tensors:
                raise CheckpointError(f"{index.parent}: doubled key {key!r}: in {where[key]} and in {name}")
            tensors[key], where[key] = tensor, name
    lacking = [f"{key!r} (not in {name})" for key, name in table.items() if where.get(key) != name]
    if lacking:
        raise CheckpointError(f"{index}: names keys that their shards lack: {', '.join(lacking[:10])}")
    return tensors


def _read_parts(directory: Place, files: Sequence[Place]) -> dict[str, Tensor]:
    """The tensors whose parts lie in `files`, each of which says where its parts begin."""
    with ThreadPoolExecutor(_THREADS) as pool:
        contents = list(pool.map(read_annotated, files))
    parts: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for file, (tensors, metadata) in zip(files, contents):
        try:
            starts = {key: tuple(value["saved_offsets"]) for key, value in json.loads(metadata[SHARDING_INFO]).items()}
            found = {key: (starts[key], tensor) for key, tensor in tensors.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: its metadata do not say where the parts in it begin ({SHARDING_INFO}): {error!r}") from None
        for key, (start, tensor) in found.items():
            parts.setdefault(key, {})[start] = tensor
    where = f"{len(files)} files of parts in {directory}"
    return {key: Assembled(key, tensors, where) for key, tensors in parts.items()}


def _why_not(path: Place, variant: str | None) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    expected = f"{path}: no {_weights(variant)} or {_index(variant)}"
    if not names:
        return f"{expected}: the directory is empty"
    weights = [name for name in names if name.endswith(".safetensors")]
    if (path / "params" / "_CHECKPOINT_METADATA").exists():
        return f"{expected}: this is an Orbax checkpoint; `jaxmodels convert {path} OUT` writes safetensors"
    if weights:
        return f"{expected}, but {weights}: pass the file itself, or `variant=` (model.VARIANT.safetensors)"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{expected}, only {pickles}: pickles can run code and are never loaded here. Write safetensors once where you trust the file, "
            f"with torch: python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{path}').save_pretrained('OUT')\" "
            "(with the class of your head instead of AutoModel)"
        )
    return f"{expected}; found {names[:10]}"


# ---- writing -------------------------------------------------------------------------------------------------------


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] = {},
    written: Callable[[int], object] | None = None,
) -> None:
    """Write one safetensors file, byte for byte as the library does, holding one tensor at a time. `written(bytes)` is told of each."""
    unknown = [f"{key}: {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in _NAMES]
    if unknown:
        raise CheckpointError(f"{path}: no safetensors dtype for {unknown}, expected one of {', '.join(DTYPES)}")
    order = sorted(tensors, key=lambda key: (_NAMES[tensors[key].dtype][0], key))
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    end = 0
    for key in order:
        start, end = end, end + tensors[key].nbytes
        header[key] = {"dtype": _NAMES[tensors[key].dtype][1], "shape": list(tensors[key].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(tensors[key].read().reshape(-1).view(np.uint8).data)
            if written is not None:
                written(tensors[key].nbytes)


def write_files(directory: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files by their names under `directory`."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    files: Mapping[str, str | bytes] | None = None,
    progress: bool | None = None,
    fqn_to_index_mapping: Mapping[str, int] | None = None,
    consolidate: bool = True,
    together: bool = False,
) -> None:
    """Write `tensors` (split in the order given) and `files` (name -> content) as the checkpoint `directory`, all or nothing.

    Until the last step the old directory is whole and in place, after it the new one. Other files of the old one (a tokenizer, a README)
    are kept, its weights of the same variant are not. `max_shard_size` is in bytes, or "5GB". `progress`: None shows a bar on a terminal
    once the work takes over two seconds, True shows it anywhere, False never.
    fqn_to_index_mapping: {key: number of its file, from 1} in place of `max_shard_size`. together: all processes make this call, and each
    writes what its devices hold, to a directory that they share. consolidate: False leaves these parts (see `sharded`) as they are."""
    from tqdm import tqdm

    from jaxmodels.convert.sharded import digest, replacing_together, write_parts
    from jaxmodels.sharding.processes import agree, lockstep, telling

    with telling(f"saving {directory}", together):
        if not tensors:
            raise CheckpointError(f"{directory}: no tensors to write")
        local_directory(directory)
        if variant and not consolidate:
            raise CheckpointError(f"{directory}: files of parts have no variant, found variant={variant!r}")
        keys_of, index = _split(directory, tensors, max_shard_size, variant, fqn_to_index_mapping)
        if together:
            agree("save", path=str(directory), consolidate=consolidate, files=dict(keys_of), **{"the tensors (hash)": digest(tensors)})
    numbers = {key: number for number, keys in enumerate(keys_of.values(), 1) for key in keys}
    process, count = (jax.process_index(), jax.process_count()) if together else (0, 1)
    hidden = True if progress is None and process else quiet(progress)  # one bar for all processes
    total = sum(tensor.nbytes for tensor in tensors.values()) // count
    bar = tqdm(total=total, desc="Saving", unit="B", unit_scale=True, delay=2, disable=hidden)
    with bar, replacing_together(directory, drop=_stale(variant), together=together) as temporary:
        source = tensors
        if together or not consolidate:
            folder = temporary / "sharded" if consolidate else temporary
            folder.mkdir(exist_ok=True)
            with lockstep(f"saving {directory}", together):
                write_parts(folder, tensors, numbers, bar.update)
            source = read_checkpoint(folder) if consolidate else {}
        for name, keys in [*keys_of.items()][process::count] if consolidate else ():
            write_file(temporary / name, {key: source[key] for key in keys}, written=None if together else bar.update)
        if process == 0:
            write_files(temporary, {**(files or {}), **(index if consolidate else {})})
        if together and consolidate:
            with lockstep(f"saving {directory}"):  # all have read
                source = {}
            if process == 0:
                shutil.rmtree(folder)


def _split(
    directory: Any, tensors: Mapping[str, Tensor], max_shard_size: int | str, variant: str | None, numbers: Mapping[str, int] | None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """{file name: keys}, and the index by its name where there are several files."""
    from huggingface_hub import split_state_dict_into_shards_factory

    pattern = _weights(variant).removesuffix(".safetensors") + "{suffix}.safetensors"
    if numbers is None:
        size = lambda tensor: tensor.nbytes
        split = split_state_dict_into_shards_factory
        max_shard_size = int(max_shard_size) if str(max_shard_size).isdecimal() else max_shard_size
        try:
            parts = split(dict(tensors), get_storage_size=size, filename_pattern=pattern, max_shard_size=max_shard_size)
        except ValueError as error:
            raise CheckpointError(f"max_shard_size {max_shard_size!r}: expected bytes, or a number with KB, MB, GB or TB") from error
        keys_of = parts.filename_to_tensors
    else:
        strange = sorted(numbers.keys() ^ tensors.keys())
        found = sorted(set(numbers.values()))
        if strange or found != list(range(1, len(found) + 1)):
            wrong = f"in one of the two only: {strange[:8]}" if strange else f"its numbers are {found[:8]}"
            raise CheckpointError(f"{directory}: fqn_to_index_mapping must number the files of all tensors from 1 on; {wrong}")
        suffix = "-{:05}-of-{:05}" if len(found) > 1 else ""
        names = {number: pattern.format(suffix=suffix.format(number, len(found))) for number in found}
        keys_of = {names[number]: [key for key in tensors if numbers[key] == number] for number in found}
    if len(keys_of) == 1:
        return keys_of, {}
    metadata = {"total_parameters": sum(t.size for t in tensors.values()), "total_size": sum(t.nbytes for t in tensors.values())}
    index = {"metadata": metadata, "weight_map": {key: name for name, keys in keys_of.items() for key in keys}}
    return keys_of, {_index(variant): json.dumps(index, indent=2, sort_keys=True) + "\n"}


def _stale(variant: str | None) -> Callable[[str], bool]:
    """Which files of a directory new weights take the place of."""
    stem, tail = ("model" + (f".{variant}" if variant else "")), (f".{variant}" if variant else "")
    pattern = rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors|model-\d{{5}}-of-\d{{5}}{re.escape(tail)}\.safetensors"
    return lambda name: bool(name == _index(variant) or re.fullmatch(pattern, name) or (variant is None and PART.fullmatch(name)))


def quiet(progress: bool | None) -> bool | None:
    """tqdm's `disable` for our `progress`: None leaves it to whether there is a terminal."""
    return None if progress is None else not progress
