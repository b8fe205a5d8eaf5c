"""What a mesh does to a model's parameters, in words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmodels.sharding.rules import Rules, resolve_rules


def explain(model: Any, mesh: Mesh | None = None, rules: Rules | str | None = None, dtype: Any = jnp.float32) -> str:
    """A table of every parameter: its shape and logical axes, where each axis lives, bytes on one device, and for an axis that the rules
    name but the mesh does not split, why. Without mesh and rules, the model's own."""
    from jaxmodels.params import abstract_params, flatten, param_axes  # flax, which reading a checkpoint does without

    found = resolve_rules(rules, mesh) or model.rules
    if found is None:
        raise ValueError("explain needs rules: explain(model, make_mesh(fsdp=4, tensor=2), 'fsdp+tensor')")
    model = dataclasses.replace(model, rules=found)
    axes = flatten(param_axes(model))
    lines, held, whole = [], 0, 0
    for name, leaf in flatten(abstract_params(model, dtype)).items():
        spec = leaf.sharding.spec
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        held, whole = held + size, whole + leaf.size * leaf.dtype.itemsize
        parts = [f"{axis or '-'} {n}" + (f" / {_names(place)}" if place else "") for axis, n, place in zip(axes[name], leaf.shape, spec)]
        whole_axes = [(axis, n) for axis, n, place in zip(axes[name], leaf.shape, spec) if place is None]
        why = [reason for axis, n in whole_axes if (reason := _why(found, axis, n, model.axis_units))]
        lines.append(f"{name:<56} [{', '.join(parts)}]  {size:,} B" + (f"  ({'; '.join(why)})" if why else ""))
    sizes = ", ".join(f"{axis}={n}" for axis, n in found.mesh.shape.items())
    return "\n".join([*lines, f"in all {held:,} of {whole:,} B on each of {found.mesh.size} devices ({sizes})"])


def _names(place: Any) -> str:
    return place if isinstance(place, str) else "+".join(place)


def _why(rules: Rules, axis: str | None, size: int, units: Any) -> str:
    """Why an axis that is whole is not split, or nothing where the rules do not ask for it."""
    wanted = rules.mesh_axes(axis)
    pieces = rules.pieces(wanted)
    unit = units.get(axis or "", 1)
    if pieces == 1:
        return ""
    if size // unit % pieces or size % pieces:
        count = f"{size // unit} heads of {unit}" if unit > 1 else str(size)
        return f"{axis}: {count} over {'+'.join(wanted)} = {pieces} does not divide"
    return f"{axis}: {'+'.join(wanted)} serves another axis"
