"""safetensors checkpoints on disk: reading a directory lazily, writing one the way `save_pretrained` of torch transformers does.

    read_checkpoint(path, variant=None) -> {key: Tensor}        model.safetensors, or model.safetensors.index.json and its shards
    write_checkpoint(path, {key: Tensor}, max_shard_size="50GB", variant=None, files={"config.json": text}, progress=None)
    read_file(path) -> {key: Tensor}      write_file(path, {key: Tensor})      one safetensors file
    with replacing(directory) as temporary: ...                 what was written to `temporary` becomes `directory`, all or nothing

The safetensors library checks a file; its bytes are then read through a memory map, since the library's numpy reader copies twice, holds
the GIL for as long as a read takes and has no float8. Every error is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.tensors import NumpyTensor, Tensor

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
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


# ---- reading -------------------------------------------------------------------------------------------------------


def _unique_keys(path: Path) -> Any:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(f"{path}: doubled key {next(name for name in names if names.count(name) > 1)!r}")
        return result

    return hook


def _json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        result = json.loads(data, object_pairs_hook=_unique_keys(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); fetch or write the file again") from None
    if not isinstance(result, dict):
        raise CheckpointError(f"{path}: a JSON {type(result).__name__}, expected an object")
    return result


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The checked header of a safetensors file and the offset at which its data begin."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` in its repository")
            found = os.fstat(file.fileno()).st_size
            if len(start) == 8 and length > _MAX_HEADER:
                raise CheckpointError(f"{path}: not a safetensors file: its header would be {length:,} bytes long")
            if 8 + length > found or len(start) < 8:
                raise CheckpointError(f"{path}: truncated: {found:,} bytes, expected at least {max(8, 8 + length):,}; fetch the file again")
            header = _json(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    offsets = [entry.get("data_offsets") for entry in header.values() if isinstance(entry, dict)]
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int)]
    expected = 8 + length + max(ends, default=0)
    if found < expected:
        raise CheckpointError(f"{path}: truncated: {found:,} bytes, its header says {expected:,}; fetch the file again")
    try:
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: bad safetensors header: {error}; fetch or write the file again") from None
    return header, 8 + length


def read_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of one safetensors file, lazily, in the file's order."""
    path = Path(path)
    header, begin = _header(path)
    data = np.memmap(path, np.uint8, "r")
    tensors: dict[str, Tensor] = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {key}: dtype {entry['dtype']} is not supported, expected one of {', '.join(DTYPES)}")
        start, stop = (begin + offset for offset in entry["data_offsets"])
        # a plain ndarray over the map: the subclass would cost a Python call in every view
        array = np.asarray(data[start:stop]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[key] = NumpyTensor(array, str(path))
    return tensors


def _weights(variant: str | None) -> str:
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def _index(variant: str | None) -> str:
    return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"


def read_checkpoint(path: str | os.PathLike[str], *, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, lazily: `path` is a directory, or one safetensors file.

    A directory holds model.safetensors, or model.safetensors.index.json with its shards; `variant="fp16"` means model.fp16.safetensors.
    Raises CheckpointError for a truncated file, a bad header or index, a missing shard, a key that is doubled or that its shard lacks, a
    directory without safetensors (pickles are never loaded)."""
    path = Path(path)
    if path.is_file():
        return read_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    single, index = path / _weights(variant), path / _index(variant)
    if single.exists():
        return read_file(single)
    if index.exists():
        return _read_shards(index)
    raise CheckpointError(_why_not(path, variant))


def _read_shards(index: Path) -> dict[str, Tensor]:
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
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise CheckpointError(f"{index.parent}: missing shards {missing} of {len(names)}; fetch them again")
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for name in names:
        for key, tensor in read_file(index.parent / name).items():
            if key in tensors:
                raise CheckpointError(f"{index.parent}: doubled key {key!r}: in {where[key]} and in {name}")
            tensors[key], where[key] = tensor, name
    lacking = [f"{key!r} (not in {name})" for key, name in table.items() if where.get(key) != name]
    if lacking:
        raise CheckpointError(f"{index}: names keys that their shards lack: {', '.join(lacking[:10])}")
    return tensors


def _why_not(path: Path, variant: str | None) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    expected = f"{path}: no {_weights(variant)} or {_index(variant)}"
    if not names:
        return f"{expected}: the directory is empty"
    weights = [name for name in names if name.endswith(".safetensors")]
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


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, written: Callable[[int], object] | None = None) -> None:
    """Write one safetensors file, byte for byte as the library does, holding one tensor at a time. `written(bytes)` is told of each."""
    unknown = [f"{key}: {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in _NAMES]
    if unknown:
        raise CheckpointError(f"{path}: no safetensors dtype for {unknown}, expected one of {', '.join(DTYPES)}")
    order = sorted(tensors, key=lambda key: (_NAMES[tensors[key].dtype][0], key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    files: Mapping[str, str | bytes] | None = None,
    progress: bool | None = None,
) -> None:
    """Write `tensors` (split in the order given) and `files` (name -> content) as the checkpoint `directory`, all or nothing.

    Until the last step the old directory is whole and in place, after it the new one. Other files of the old one (a tokenizer, a README)
    are kept, its weights of the same variant are not. `max_shard_size` is in bytes, or "5GB". `progress`: None shows a bar on a terminal
    once the work takes over two seconds, True shows it anywhere, False never."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from tqdm import tqdm

    if not tensors:
        raise CheckpointError(f"{directory}: no tensors to write")
    base = _weights(variant)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=base.removesuffix(".safetensors") + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    stem, tail = ("model" + (f".{variant}" if variant else "")), (f".{variant}" if variant else "")
    stale = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors|model-\d{{5}}-of-\d{{5}}{re.escape(tail)}\.safetensors")
    bar = tqdm(total=sum(t.nbytes for t in tensors.values()), desc="Saving", unit="B", unit_scale=True, delay=2, disable=quiet(progress))
    with bar, replacing(directory, drop=lambda name: name == _index(variant) or stale.fullmatch(name) is not None) as temporary:
        for name, keys in split.filename_to_tensors.items():
            write_file(temporary / name, {key: tensors[key] for key in keys}, written=bar.update)
        if split.is_sharded:
            metadata = {"total_parameters": sum(t.size for t in tensors.values()), **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            (temporary / _index(variant)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)


def quiet(progress: bool | None) -> bool | None:
    """tqdm's `disable` for our `progress`: None leaves it to whether there is a terminal."""
    return None if progress is None else not progress


@contextmanager
def replacing(directory: str | os.PathLike[str], *, drop: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yields a new directory beside `directory`; on a normal exit it takes its place in one step, on an error nothing has changed.

    Entries of the old directory that the new one lacks are carried over (hard links where possible), unless `drop(name)`. Whatever a killed
    process has left behind is removed by the next call for the same directory."""
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file, expected a directory or nothing")
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(f"{target}: is the working directory, and would be replaced as a whole: save to another one, or from outside")
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary, lock = _claim(target)
    try:
        yield temporary
        _sync(temporary)
        if target.exists():
            for entry in os.scandir(target):
                if not os.path.lexists(temporary / entry.name) and not drop(entry.name):
                    _carry(Path(entry.path), temporary / entry.name)
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        _sync_path(temporary)
        _swap(temporary, target)
        _sync_path(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the swap: what was there before
        os.close(lock)


def _carry(old: Path, new: Path) -> None:
    def link(source: str, destination: str) -> None:
        try:
            os.link(source, destination, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, destination, follow_symlinks=False)

    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=link)
    else:
        link(str(old), str(new))


def _claim(target: Path) -> tuple[Path, int]:
    """A new temporary directory and its lock, which lasts as long as this process: a directory whose lock is free is abandoned."""
    while True:
        temporary = target.with_name(f".{target.name}.saving-{secrets.token_hex(6)}")
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        _lock(lock)
        with suppress(FileNotFoundError):  # another process may have swept it between the two steps
            if os.path.samestat(temporary.stat(), os.fstat(lock)):
                return temporary, lock
        os.close(lock)


def _lock(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(target: Path) -> None:
    for entry in list(os.scandir(target.parent)):
        if entry.name.startswith(f".{target.name}.saving-"):
            with suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY)
                if _lock(descriptor):
                    shutil.rmtree(entry.path, ignore_errors=True)
                os.close(descriptor)
        elif entry.name.startswith(f".{target.name}.old-"):  # only `_swap` without an atomic exchange leaves these
            if target.exists():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.rename(entry.path, target)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _swap(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)  # nothing there, or an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not _exchange(temporary, target):
        aside = target.with_name(temporary.name.replace(".saving-", ".old-"))
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _sync_path(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for path in [*(os.path.join(parent, name) for name in names), parent]:
            _sync_path(path)
