"""Rows of training files by number: text, JSON lines, Parquet, ArrayRecord, packed .npy. Nothing is read before it is asked for, but that
.gz files of lines are unpacked into temporary ones.

Rows are dicts. An error about one names its file and its place: lines count from 1, rows of the other formats from 0."""

from __future__ import annotations

import bisect
import codecs
import contextlib
import glob
import gzip
import itertools
import json
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
BLOCK = 1 << 26  # bytes that are searched for line ends at one time


def _mapped(path: Path) -> np.ndarray:
    """A file's bytes; of a .gz what it unpacks to."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source, contextlib.ExitStack() as stack:
        file: Any = source
        if path.suffix == ".gz":
            file = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(source, file)
        return np.memmap(file, np.uint8, "r") if file.seek(0, os.SEEK_END) else np.zeros(0, np.uint8)


class _Lines:
    """A file's lines that are not empty, without the byte order mark."""

    unit = "line"

    def __init__(self, path: Path):
        self.path, self.data = path, _mapped(path)
        first = 3 if self.data[:3].tobytes() == codecs.BOM_UTF8 else 0
        blocks = range(0, len(self.data), BLOCK)
        ends = np.concatenate([np.zeros(0, np.int64), *(np.flatnonzero(self.data[at : at + BLOCK] == ord("\n")) + at for at in blocks)])
        if len(self.data) and (not len(ends) or ends[-1] != len(self.data) - 1):
            ends = np.append(ends, len(self.data))
        starts = np.concatenate([[first], ends[:-1] + 1])[: len(ends)]
        blank = (ends == starts) | ((ends == starts + 1) & (self.data[np.minimum(starts, len(self.data) - 1)] == ord("\r")))
        self.numbers = np.flatnonzero(~blank)
        self.starts, self.ends = starts[self.numbers], ends[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, i: int) -> int:
        return int(self.numbers[i]) + 1

    def read(self, i: int) -> Row:
        return {"text": self.line(i)}

    def line(self, i: int) -> str:
        return self.data[self.starts[i] : self.ends[i]].tobytes().decode().removesuffix("\r")


class _JsonLines(_Lines):
    def read(self, i: int) -> Row:
        row = json.loads(self.line(i))
        if not isinstance(row, dict):
            raise TypeError(f"expected a JSON object, found {type(row).__name__}")
        return row


class _Numbered:
    unit = "row"
    path: Path

    def place(self, i: int) -> int:
        return i


class _Document(_Numbered):
    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def read(self, i: int) -> Row:
        return {"text": self.path.read_text(encoding="utf-8-sig")}


class _Parquet(_Numbered):
    """Row groups are read whole, and the last few are kept: files in random order are better converted to ArrayRecord."""

    KEPT = 4

    def __init__(self, path: Path):
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"{path}: Parquet files are read by pyarrow, which is not installed: pip install pyarrow") from error
        self.path, self.file, self.lock = path, parquet.ParquetFile(path), threading.Lock()
        groups = self.file.metadata
        self.starts = [0, *itertools.accumulate(groups.row_group(i).num_rows for i in range(groups.num_row_groups))]
        self.group = lru_cache(self.KEPT)(lambda number: self.file.read_row_group(number).to_pylist())

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, i: int) -> Row:
        number = bisect.bisect_right(self.starts, i) - 1
        try:
            with self.lock:
                return self.group(number)[i - self.starts[number]]
        except OSError as error:  # of a damaged page, in several lines
            raise ValueError(f"row group {number} cannot be read: {' '.join(str(error).split())}") from error


class _Records(_Numbered):
    """ArrayRecord, whose records are JSON objects or, as `write_packed` writes them, safetensors."""

    def __init__(self, path: Path):
        from grain.sources import ArrayRecordDataSource

        self.path, self.source = path, ArrayRecordDataSource([str(path)])
        self.length = len(self.source)

    def __len__(self) -> int:
        return self.length

    def read(self, i: int) -> Row:
        from safetensors.numpy import load

        record = self.source[i]
        if record[:1] == b"{":
            return json.loads(record)
        try:
            return load(record)
        except Exception as error:  # the library's own class is not a ValueError
            raise ValueError(f"a record of {len(record)} bytes is neither a JSON object nor safetensors ({error})") from error


class _Packed(_Numbered):
    """Packed rows as `write_packed` writes them: an array with named fields."""

    def __init__(self, path: Path):
        self.path, self.rows = path, np.load(path, mmap_mode="r", allow_pickle=False)
        if self.rows.dtype.names is None:
            raise ValueError(f"holds plain {self.rows.dtype}; expected the named fields that write_packed writes")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> Row:
        row = self.rows[i]
        return {name: np.array(row[name]) for name in row.dtype.names}


FORMATS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "text": (_Lines, (".txt",)),
    "document": (_Document, ()),
    "jsonl": (_JsonLines, (".jsonl", ".ndjson")),
    "parquet": (_Parquet, (".parquet",)),
    "array_record": (_Records, (".array_record", ".arrayrecord")),
    "npy": (_Packed, (".npy",)),
}
SUFFIXES = {suffix: name for name, (_, suffixes) in FORMATS.items() for suffix in suffixes}


class Rows:
    """The rows of several files, one after the other."""

    def __init__(self, files: Sequence[Any]):
        self.files = files
        self.starts = [0, *itertools.accumulate(map(len, files))]
        self.sizes = [f"{file.path.name}, {file.path.stat().st_size} bytes" for file in files]

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, i: int) -> tuple[Any, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        number = bisect.bisect_right(self.starts, i) - 1
        return self.files[number], i - self.starts[number]

    def where(self, i: int) -> str:
        """The file and the place of row i."""
        file, row = self._find(i)
        return f"{file.path}, {file.unit} {file.place(row)}"

    def __getitem__(self, i: int) -> Row:
        """ValueError names the file and the place of a row that cannot be read."""
        file, row = self._find(i)
        try:
            return file.read(row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.where(i)}: {error}") from error


def read_rows(paths: Paths, format: str | None = None) -> Rows:
    """The rows of files, in the order of `paths`: files, directories, or patterns with *; the files of a pattern or directory by name.

    format: `text` ({"text": a line}), `document` ({"text": a whole file}), `jsonl`, `parquet`, `array_record`, `npy`; by default by the
    files' suffix, before .gz if there is one (of text and jsonl). FileNotFoundError when a path names nothing, ValueError for a file that
    is not of its format."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is not known; known are {', '.join(FORMATS)}")
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    return Rows([_open(file, format) for path in several for file in _files(os.path.expanduser(path), format)])


def _files(path: str, format: str | None) -> list[Path]:
    if Path(path).is_dir():
        suffixes = FORMATS[format][1] if format else tuple(SUFFIXES)
        files = [file for file in sorted(Path(path).iterdir()) if file.is_file() and (not suffixes or _suffix(file) in suffixes)]
    else:
        files = [Path(path)] if Path(path).exists() else [Path(name) for name in sorted(glob.glob(path, recursive=True))]
    if not files:
        raise FileNotFoundError(f"{path}: no such file, or a directory or pattern without files of {format or 'a known format'}")
    return files


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _open(path: Path, format: str | None) -> Any:
    name = format or SUFFIXES.get(_suffix(path))
    if name is None:
        raise ValueError(f"{path}: the suffix names no format; give one of {', '.join(FORMATS)}")
    try:
        return FORMATS[name][0](path)
    except (ValueError, RuntimeError, EOFError, gzip.BadGzipFile, zlib.error) as error:  # RuntimeError: of ArrayRecord
        raise ValueError(f"{path}: is not a file of format {name} ({str(error) or 'damaged or cut off'})") from error
