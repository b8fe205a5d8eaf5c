"""`jaxmodels convert`, `jaxmodels info` and `jaxmodels parity`."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from typing import Any

from jax.sharding import AbstractMesh

from jaxmodels.auto import AutoConfig, AutoModelForCausalLM, find_family
from jaxmodels.cli.main import hub_options
from jaxmodels.convert.files import read_checkpoint
from jaxmodels.convert.hub import resolve
from jaxmodels.params import abstract_params, flatten
from jaxmodels.sharding import Rules


def human(size: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def model_class(config: Any, values: Any) -> Any:
    """The class that wrote a checkpoint, by its `architectures`; the causal model, or the first known, where that names none of ours."""
    classes = {cls.__name__: cls for cls in find_family(config.model_type).classes.values()}
    named = [classes[name] for name in values.get("architectures") or () if name in classes]
    return named[0] if named else AutoModelForCausalLM.class_for(config)


def info(args: argparse.Namespace) -> None:
    hub = hub_options(args)
    directory = resolve(args.path, **hub)
    config = AutoConfig.from_pretrained(directory)
    tensors = read_checkpoint(directory, variant=hub.get("variant"))
    sizes, numbers = Counter[str](), Counter[str]()
    for tensor in tensors.values():
        sizes[str(tensor.dtype)] += tensor.nbytes
        numbers[str(tensor.dtype)] += tensor.size
    cls = model_class(config, config.extra)
    print(f"{directory}: {config.model_type}, {cls.__name__}")
    print(f"parameters  {numbers.total():,} in {len(tensors)} tensors")
    for dtype in sizes:
        print(f"{dtype:<11} {numbers[dtype]:,} numbers, {human(sizes[dtype])}")
    print(f"total       {human(sizes.total())}")
    if args.mesh:
        _per_device(cls, config, max(sizes, key=lambda dtype: sizes[dtype]), args.mesh, args.rules)


def _per_device(cls: Any, config: Any, dtype: str, text: str, preset: str) -> None:
    try:
        mesh = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"--mesh {text!r}: expected sizes such as fsdp=4,tensor=2") from None
    rules = Rules.preset(preset, AbstractMesh(tuple(mesh.values()), tuple(mesh)))
    leaves = flatten(abstract_params(cls(config, rules=rules), dtype)).values()
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.sharding.is_fully_replicated)
    print(f"mesh        {text} ({math.prod(mesh.values())} devices), rules {preset}")
    print(f"per device  {human(sum(map(shard, leaves)))} of parameters, {human(whole)} of them replicated")


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
