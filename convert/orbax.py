"""A parameter tree as an Orbax checkpoint: DIRECTORY/params (nested as in `model.params`, scanned or not) beside DIRECTORY/config.json.

    save_orbax(directory, {tree path: array}, config)
    specs = orbax_specs(directory)                            # {tree path: ShapeDtypeStruct}: the names tell whether it is scanned
    params, config = restore_orbax(directory, expected)       # into the shardings and dtypes of `expected`

Like safetensors directories these are replaced as a whole or not at all. Arrays over several processes are saved by all of them."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import write_files
from jaxmodels.convert.sharded import replacing_together
from jaxmodels.sharding.processes import spread


def is_orbax(directory: str | os.PathLike[str]) -> bool:
    """Whether `save_orbax` wrote this directory."""
    return (Path(directory) / "params" / "_CHECKPOINT_METADATA").is_file()


def save_orbax(
    directory: str | os.PathLike[str], params: Mapping[str, Any], config: Mapping[str, Any], files: Mapping[str, str | bytes] = {}
) -> None:
    """Write {dotted tree path: jax or numpy array}, the config and `files` (name -> content), atomically; other files are kept."""
    import orbax.checkpoint as ocp

    strange = [f"{name}: {type(array).__name__}" for name, array in params.items() if not isinstance(array, jax.Array | np.ndarray)]
    if strange:
        raise CheckpointError(f"{directory}: expected jax or numpy arrays, found {strange[:10]}")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    together = spread(dict(params))

    def save(path: Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, unflatten_dict(dict(params), sep="."))

    with unlogged(), replacing_together(directory, together=together) as temporary:
        why = why_not(lambda: save(temporary / "params"))
        if why is not None:
            raise CheckpointError(f"{directory} could not be written, and is as it was: {why}")
        if not together or jax.process_index() == 0:
            write_files(temporary, {**files, "config.json": text})


@contextmanager
def unlogged() -> Iterator[None]:
    """Without what Orbax has to say of an error beside raising it: its threads' traces, and writes that end after their loop or never."""
    log = logging.getLogger("absl")
    before = log.level, sys.unraisablehook
    log.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda it: None if re.search(r"loop is closed|never awaited", str(it.exc_value)) else before[1](it)
    try:
        yield
    finally:
        log.setLevel(before[0])
        sys.unraisablehook = before[1]


def why_not(write: Callable[[], Any]) -> str | None:
    """Call `write`, of Orbax; None, or what kept it from writing, of which its error has the system's number in pages of text."""
    try:
        write()
        return None
    except Exception as error:  # Orbax and tensorstore raise what they please
        code = re.search(r"os_error_code='(\d+)'", str(error))
        plain = getattr(error, "strerror", None) or str(error).split("[", 1)[0].strip().rstrip(".") or type(error).__name__
    gc.collect()  # what Orbax had begun to write would complain when the process ends
    return os.strerror(int(code[1])) if code else plain


def orbax_specs(directory: str | os.PathLike[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """{dotted tree path: shape and dtype} of what is stored; nothing else is read."""
    import orbax.checkpoint as ocp

    if not is_orbax(directory):
        raise CheckpointError(
            f"{directory}: no Orbax checkpoint here: expected the folders and files that save_orbax writes (params/, config.json)"
        )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(Path(directory).resolve() / "params").item_metadata.tree
    except Exception as error:  # Orbax and tensorstore raise what they please
        raise CheckpointError(f"{directory}/params: unreadable Orbax checkpoint: {error}") from error
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten_dict(tree, sep=".").items()}


def restore_orbax(
    directory: str | os.PathLike[str], expected: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The arrays as {dotted tree path: array}, and the config.

    expected: the tree's shapes, dtypes to cast to, and shardings, each read by the slices it covers; None for a sharding is the default
    device, None for all of it is what is stored. Raises CheckpointError where names or shapes differ, or files are missing or broken."""
    import orbax.checkpoint as ocp

    stored = orbax_specs(directory)
    expected = stored if expected is None else expected
    differing = sorted(name for name in {*stored, *expected} if name not in stored or name not in expected)
    differing += [name for name, spec in expected.items() if name in stored and spec.shape != stored[name].shape]
    if differing:
        lines = [f"  {name}: found {_shape(stored, name)}, expected {_shape(expected, name)}" for name in differing[:10]]
        raise CheckpointError("\n".join([f"{directory}/params does not fit the model, in {len(differing)} places:", *lines]))
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    default = jax.device_put(0).sharding
    target = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or default) for name, s in expected.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path.parent.resolve() / "params", unflatten_dict(target, sep="."))
    except Exception as error:
        raise CheckpointError(f"{directory}/params: unreadable Orbax checkpoint: {error}") from error
    return flatten_dict(tree, sep="."), config


def _shape(specs: Mapping[str, jax.ShapeDtypeStruct], name: str) -> str:
    return str(list(specs[name].shape)) if name in specs else "nothing"
