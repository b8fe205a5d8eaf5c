"""Floating-point operations of a program, counted from its trace: matrix products alone, loops as often as they run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Of the products of the flash kernel's two backward passes, by their names: those that are not computed again.
FLASH_BACKWARD = {"splash_mha_dq_": 2 / 3, "splash_mha_dkv_": 2 / 4}


def count_flops(function: Callable[..., Any], *arguments: Any, ragged_share: float = 1.0, recomputed: bool = True) -> float:
    """Of function(*arguments) over all devices, two for a multiplication and its addition; arguments may be jax.ShapeDtypeStruct.
    What XLA drops or repeats is not seen; a while loop counts once, of a condition the dearer branch, of a Pallas kernel every block
    of its grid, and of a ragged product's rows `ragged_share`, those that belong to a group. recomputed: whether what flash attention's
    backward pass computes again counts."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, ragged_share, recomputed)


def _count(jaxpr: Jaxpr, *how: Any) -> float:
    return sum(_equation(e, *how) for e in jaxpr.eqns)


def _equation(e: Any, ragged_share: float, recomputed: bool) -> float:
    name, params = e.primitive.name, e.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        return 2.0 * e.outvars[0].aval.size * math.prod(e.invars[0].aval.shape[i] for i in contract)
    if name in ("ragged_dot", "ragged_dot_general"):
        x, w = (operand.aval.shape for operand in e.invars[:2])
        rows = x[0] * ragged_share  # contracted over its features, or over the rows of each group
        return 2.0 * rows * (w[-2] * w[-1] if len(w) == 3 else x[-1] * w[-1])
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kernel = e.invars[1].aval.shape
        return 2.0 * e.outvars[0].aval.size * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    times = 1.0
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])  # its trace is of one shard
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
        if not recomputed:
            times *= next((share for name, share in FLASH_BACKWARD.items() if str(params["name"]).startswith(name)), 1.0)
    inner = [_count(j, ragged_share, recomputed) for j in _jaxprs(params)]
    return times * (max(inner, default=0.0) if name == "cond" else sum(inner))


def _jaxprs(params: dict[str, Any]) -> list[Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
