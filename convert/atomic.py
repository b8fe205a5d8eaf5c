"""A directory, or a file, that is replaced in one step, or not at all.

    with replacing(directory) as temporary: ...          what was written to `temporary` becomes `directory`
    replace_text(path, text)

A kill at any moment leaves the old one or the new one, and a directory beside it that the next call removes."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.hub import local_directory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextmanager
def replacing(directory: str | os.PathLike[str], *, drop: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yields a new directory beside `directory`; on a normal exit it takes its place in one step, on an error nothing has changed.

    Entries of the old directory that the new one lacks are carried over (hard links where possible), unless `drop(name)`. Whatever a killed
    process has left behind is removed by the next call for the same directory."""
    target = local_directory(directory).resolve()
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
        shutil.rmtree(temporary, ignore_errors=True)  # what was there before
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError):
            _name(error, target)
        raise
    finally:
        os.close(lock)


def remove(directory: Path) -> None:
    """Remove it, and again what threads still put there that nobody waits for: after an error Orbax has some."""
    quiet = 0
    for _ in range(200):
        quiet = 0 if directory.exists() else quiet + 1
        if quiet > 5:
            return
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.01)


def replace_text(path: Path, text: str) -> None:
    """Write a file of UTF-8, line ends as they are; on an error the old one has not changed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(path)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        part.unlink(missing_ok=True)


def _name(error: OSError, path: Path) -> None:
    """A full disk does not say what was being written."""
    if error.errno in FULL and error.filename is None:
        error.filename = str(path)


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
