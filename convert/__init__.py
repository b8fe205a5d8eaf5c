"""Checkpoints in and out: rules between file and parameter tree, safetensors directories, the hub, Orbax.

    source = read_checkpoint(directory)                          # {file key: Tensor}, lazy
    arrays, report = load(source, expected, rules=rules)         # {tree path: jax.Array}, slice by slice into its sharding
    write_checkpoint(directory, unload(arrays, rules=rules))     # atomically, byte for byte

Names are imported on first use: `jaxmodels.convert.hub` needs no jax. `load` is in `jaxmodels.convert.load`, whose name it has."""

from __future__ import annotations

import importlib
from typing import Any

_RULES = "Alias Detachable Ignore Op Rename Split Stack StackExperts Tie Transpose forward inverse members stack stacks unstack"
_PUBLIC = {
    "dequantize": ("BlockScales", "Mxfp4", "dequantization", "dequantized"),
    "errors": ("CheckpointError",),
    "atomic": ("replacing",),
    "files": ("read_checkpoint", "read_file", "write_checkpoint", "write_file"),
    "hub": ("resolve",),
    "load": ("LoadReport", "unload"),
    "orbax": ("is_orbax", "orbax_specs", "restore_orbax", "save_orbax"),
    "sharded": ("consolidate",),
    "rules": tuple(_RULES.split()),
    "tensors": ("Tensor", "as_tensor"),
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"jaxmodels.convert has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"jaxmodels.convert.{_WHERE[name]}"), name)
