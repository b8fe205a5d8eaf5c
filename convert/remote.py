"""Files at a URL that fsspec knows (s3://, gs://, hf://, https://, memory://, …), read by byte ranges.

    path = RemotePath("s3://bucket/model") / "model.safetensors"      # of pathlib's methods those that reading a checkpoint needs
    tensor = RangeTensor(path, begin, shape, dtype)                   # a tensor whose bytes start at `begin` of a file
    directory = fetch("s3://bucket/model")                            # configs and tokenizer files, in a temporary directory

A slice of a tensor is stretches of its file. Those that lie closer together than another request is worth are one request; long ones are
cut, so that many are under way together and what is on its way takes little memory."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.tensors import Index, Tensor, lengths

GAP = 256 << 10  # bytes that are read sooner than another request is answered
REQUEST = 4 << 20  # bytes that are asked for at one time
_REQUESTS = 16  # under way together
_ATTEMPTS = 5
SILENCE = 60  # seconds without a byte after which an HTTP request has failed


class RemotePath:
    """A file or a directory at a URL; one that ends in .safetensors is a file. Errors are CheckpointErrors that name it."""

    def __init__(self, url: str, fs: Any = None) -> None:
        self.url, self.fs = url.rstrip("/"), _file_system(url) if fs is None else fs
        self.name = self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.fs) if name else self

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0], self.fs)

    @property
    def inner(self) -> str:
        return self.fs._strip_protocol(self.url)

    def is_file(self) -> bool:
        return self.name.endswith(".safetensors")

    def is_dir(self) -> bool:
        return not self.is_file()

    def exists(self) -> bool:
        with self.errors():
            try:
                self.fs.info(self.inner)
            except Exception as error:
                if not _absent(error):
                    raise
                return False
        return True

    def iterdir(self) -> Iterator[RemotePath]:
        """What the directory holds; nothing where the server does not list it."""
        try:
            found = self.fs.ls(self.inner, detail=False)
        except Exception:
            found = []
        return (self / str(name).rstrip("/").rpartition("/")[2] for name in found)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """A file object: `seek`, `read`. What it reads past the beginning is read by range, or an error."""
        with self.errors(), self.fs.open(self.inner, "rb", cache_type="none") as file:
            yield file

    def read_bytes(self) -> bytes:
        return self._read()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop)."""
        data = self._read(start, stop)
        if len(data) != stop - start:
            raise CheckpointError(f"{self}: truncated: {stop - start:,} bytes from {start:,} on were asked for, {len(data):,} came")
        return data

    def _read(self, *bounds: int) -> bytes:
        with self.errors():
            for attempt in itertools.count(1):
                try:
                    return self.fs.cat_file(self.inner, *bounds)
                except Exception as error:  # every file system has its own
                    if attempt == _ATTEMPTS or not _passing(error):
                        raise
                    time.sleep(0.2 * 2**attempt)
        raise AssertionError

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever a file system raises, as one error that names the file."""
        try:
            yield
        except CheckpointError:
            raise
        except ValueError as error:  # so fsspec says that an answer was the whole file, or that it cannot seek
            raise CheckpointError(
                f"{self}: its server does not answer range requests, which reading parts of a file takes ({error}): "
                "copy the checkpoint to a directory and pass that"
            ) from error
        except Exception as error:
            missing = isinstance(error, FileNotFoundError) and _absent(error)
            raise CheckpointError(f"{self}: " + ("no such file" if missing else f"cannot be read: {_cause(error)}")) from error


def _cause(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        error = error.__cause__ or error
    return f"{type(error).__name__}: {error}"


def _passing(error: BaseException) -> bool:
    """Whether the same request may be answered later: not where a server has refused it."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 425, 429)
    return not isinstance(error, FileNotFoundError | PermissionError)


def _absent(error: BaseException) -> bool:
    """Whether an error says that there is no such file, or none for this user: S3 forbids absent files to those who may not list."""
    cause = (
        error.__cause__ or error
    )  # fsspec's HTTP calls every failure a missing file: whether a server answered, and what, is in the cause
    if hasattr(cause, "status"):
        return cause.status < 500
    silent = cause is not error and (isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp"))
    return isinstance(error, FileNotFoundError | PermissionError) and not silent


def _file_system(url: str) -> Any:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise CheckpointError(f"{url}: reading from a URL needs fsspec: pip install fsspec") from None
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        with suppress(ImportError):  # else fsspec says what it needs
            from aiohttp import ClientTimeout

            options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}
    try:
        return url_to_fs(url, **options)[0]
    except (ImportError, ValueError) as error:  # a protocol whose package is not installed, or an unknown one
        raise CheckpointError(f"{url}: cannot be opened: {error}") from None


# ---- configs and tokenizers ------------------------------------------------------------------------------------------

_fetched: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


def fetch(url: str, names: Sequence[str]) -> Path:
    """A local directory with those of `names` that `url` has. Patterns among them find what the server lists."""
    where = RemotePath(url)
    if "file" in where.fs.protocol:
        return Path(where.inner)
    plain = [name for name in names if "*" not in name]
    for folder, _, pattern in (name.rpartition("/") for name in names if "*" in name):
        found = sorted(entry.name for entry in (where / folder).iterdir())
        plain += [f"{folder}/{name}".lstrip("/") for name in found if fnmatch(name, pattern)]
    plain = list(dict.fromkeys(plain))
    _fetched.append(tempfile.TemporaryDirectory(prefix="jaxmodels-"))
    directory = Path(_fetched[-1].name)
    found = where.fs.cat_ranges([(where / name).inner for name in plain], None, None, on_error="return")
    nothing = all(isinstance(data, Exception) for data in found)
    for name, data in zip(plain, found):
        if not isinstance(data, Exception):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
        elif nothing or not _absent(data):
            with (where / name).errors():
                raise data
    return directory


# ---- tensors -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, "jaxmodels-range")


class RangeTensor(Tensor):
    """A tensor in a remote file, from byte `begin` on."""

    remote = True

    def __init__(self, path: RemotePath, begin: int, shape: Sequence[int], dtype: np.dtype) -> None:
        super().__init__(shape, dtype)
        self.path, self.begin = path, begin
        self.strides = tuple(math.prod(self.shape[i + 1 :]) * self.dtype.itemsize for i in range(len(self.shape)))

    def _fill(self, out: np.ndarray, index: Index) -> None:
        def one(block: Index) -> None:
            start, stop = self._bytes(block)
            data = self.path.read(self.begin + start, self.begin + stop)
            here: Any = (*(slice(b.start - i.start, b.stop - i.start) for b, i in zip(block, index)), ...)
            np.copyto(out[here], np.ndarray(lengths(block), self.dtype, data, 0, self.strides), casting="unsafe")

        for _ in _pool().map(one, self._blocks(index)):
            pass

    def _bytes(self, index: Index) -> tuple[int, int]:
        """From the first byte of a slice to behind its last, within the tensor."""
        start = sum(s.start * stride for s, stride in zip(index, self.strides))
        return start, sum((s.stop - 1) * stride for s, stride in zip(index, self.strides)) + self.dtype.itemsize

    def _blocks(self, index: Index) -> Iterator[Index]:
        """The slice in parts that are read by one request each."""
        start, stop = self._bytes(index)
        axis = next((i for i, s in enumerate(index) if s.stop - s.start > 1), None)
        if axis is None:
            yield index
            return
        rows, stride = index[axis], self.strides[axis]
        part = lambda a, b: (*index[:axis], slice(a, b), *index[axis + 1 :])
        one = (stop - start) - (rows.stop - rows.start - 1) * stride  # bytes from the first to the last of a row
        if stride - one <= GAP and stop - start <= REQUEST:
            yield index
        elif stride - one > GAP or one > REQUEST:
            for row in range(rows.start, rows.stop):
                yield from self._blocks(part(row, row + 1))
        else:
            count = max(1, (REQUEST - one) // stride + 1)
            for row in range(rows.start, rows.stop, count):
                yield part(row, min(row + count, rows.stop))
