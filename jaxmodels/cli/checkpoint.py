"""`jaxmodels convert`, `jaxmodels info` and `jaxmodels parity`."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # makes np.dtype("bfloat16") a name
import numpy as np
from jax.sharding import AbstractMesh

from jaxmodels.auto import conversion_of, find_family, json_files, main_dtype, read_config, text_task
from jaxmodels.cli.main import hub_options, mesh_sizes
from jaxmodels.convert.dequantize import dequantized
from jaxmodels.convert.files import read_checkpoint, write_checkpoint
from jaxmodels.convert.hub import TEXT_FILES, local_directory, resolve, weights_at
from jaxmodels.convert.load import canonical, load, unload
from jaxmodels.convert.orbax import is_orbax, restore_orbax, save_orbax
from jaxmodels.convert.tensors import Cast
from jaxmodels.params import abstract_params, flatten, param_dtype
from jaxmodels.sharding import Rules


def human(size: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _class(config: Any) -> Any:
    """The class that wrote a checkpoint, by its `architectures`; the one that generates text where that names none of ours."""
    classes = {cls.__name__: cls for cls in find_family(config.model_type).classes.values()}
    named = [classes[name] for name in config.extra.get("architectures") or () if name in classes]
    return named[0] if named else text_task(config).class_for(config)


def convert(args: argparse.Namespace) -> None:
    """Safetensors to safetensors streams, one tensor in memory at a time; an Orbax checkpoint is in memory as a whole."""
    if args.scan and args.format != "orbax":
        raise ValueError("--scan stacks the layers of an Orbax checkpoint: add --format orbax; safetensors hold each layer by itself")
    hub = hub_options(args)
    destination = local_directory(args.destination)
    if is_orbax(destination) if args.format == "safetensors" else any(destination.glob("model*.safetensors")):
        other = "an Orbax" if args.format == "safetensors" else "a safetensors"
        raise ValueError(f"{destination}: holds {other} checkpoint, which would stay beside the new one: choose another directory")
    directory = Path(args.source) if is_orbax(args.source) else resolve(args.source, **hub)
    config = read_config(directory)
    if not is_orbax(directory):
        source = dequantized(read_checkpoint(weights_at(args.source, directory, hub.get("subfolder")), variant=hub.get("variant")), config)
        config = config.matched(source)
    model = _class(config)(config, scan_layers=args.scan)
    rules, prefix = conversion_of(model)
    if is_orbax(directory):
        source = unload(restore_orbax(directory)[0], rules=rules, base_prefix=prefix)
    expected = flatten(abstract_params(model, main_dtype(source) if args.dtype == "auto" else args.dtype))
    texts: dict[str, str | bytes] = {
        str(file.relative_to(directory)): file.read_bytes() for pattern in TEXT_FILES for file in directory.glob(pattern)
    }
    if args.format == "orbax":
        params, _ = load(source, expected, rules=rules, base_prefix=prefix, keep_dtypes=args.dtype == "auto", where=str(directory))
        files = {**texts, **json_files(model, params)}
        save_orbax(args.destination, params, json.loads(files.pop("config.json")), files)
    else:
        tensors = canonical(source, expected, rules=rules, base_prefix=prefix, where=str(directory))
        if args.dtype != "auto":
            tensors = {key: Cast(tensor, param_dtype(model, key, np.dtype(args.dtype))) for key, tensor in tensors.items()}
        write_checkpoint(args.destination, tensors, max_shard_size=args.max_shard_size, files={**texts, **json_files(model, tensors)})


def info(args: argparse.Namespace) -> None:
    hub = hub_options(args)
    directory = resolve(args.path, **hub)
    config = read_config(directory)
    rules = _rules(args.mesh, args.rules) if args.mesh else None
    tensors = read_checkpoint(weights_at(args.path, directory, hub.get("subfolder")), variant=hub.get("variant"))
    config = config.matched(tensors)
    sizes, numbers = Counter[str](), Counter[str]()
    for tensor in tensors.values():
        sizes[str(tensor.dtype)] += tensor.nbytes
        numbers[str(tensor.dtype)] += tensor.size
    cls = _class(config)
    print(f"{directory}: {config.model_type}, {cls.__name__}")
    print(f"parameters  {numbers.total():,} in {len(tensors)} tensors")
    for dtype in sizes:
        print(f"{dtype:<11} {numbers[dtype]:,} numbers, {human(sizes[dtype])}")
    print(f"total       {human(sizes.total())}")
    if rules is not None:
        leaves = flatten(abstract_params(cls(config, rules=rules), main_dtype(tensors))).values()
        held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.sharding.is_fully_replicated)
        print(f"mesh        {args.mesh}: {rules.mesh.size} devices, rules {args.rules}")
        print(f"per device  {human(held)} of parameters, {human(whole)} of them replicated")


def _rules(mesh: str, preset: str) -> Rules:
    """The preset over a mesh of the named sizes, whose devices need not exist."""
    sizes = mesh_sizes(mesh)
    if -1 in sizes.values():
        raise ValueError(f"--mesh {mesh!r}: -1 stands for the devices that are left, and here is no number of them; give every size")
    return Rules.preset(preset, AbstractMesh(tuple(sizes.values()), tuple(sizes)))


def parity(args: argparse.Namespace) -> int:
    from jaxmodels.convert import parity

    match args.arguments:
        case ["record", path, file]:
            parity.record(path, file)
            return 0
        case ["check", path, file]:
            report = parity.check(path, file)
        case [path]:
            report = parity.parity(path)
        case _:
            raise ValueError("expected `jaxmodels parity PATH`, `parity record PATH FILE` or `parity check PATH FILE`")
    print(report)
    return 0 if report.passed else 1
