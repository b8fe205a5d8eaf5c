"""A parameter tree as an Orbax checkpoint: DIRECTORY/params (nested as in `model.params`, scanned or not) beside DIRECTORY/config.json.

    save_orbax(directory, {tree path: array}, config)
    specs = orbax_specs(directory)                            # {tree path: ShapeDtypeStruct}: the names tell whether it is scanned
    params, config = restore_orbax(directory, expected)       # into the shardings and dtypes of `expected`

Like safetensors directories these are replaced as a whole or not at all. Arrays over several processes are saved by all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
    with replacing_together(directory, together=together) as temporary:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "params", unflatten_dict(dict(params), sep="."))
        if not together or jax.process_index() == 0:
            write_files(temporary, {**files, "config.json": text})


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
