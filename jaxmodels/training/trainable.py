"""Which parameters are trained: a tree of parameters in two parts, by name, and where the parts live."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.params import Tree, abstract_params, flatten, unflatten

Frozen = Sequence[str] | Callable[[str], bool]


def split(params: Mapping[str, Any], frozen: Frozen) -> tuple[Tree, Tree]:
    """The trained and the frozen parameters, each a tree of its own.

    frozen: regular expressions that match a whole dotted name, or a function of the name. ValueError when an expression matches nothing
    (in a scanned model `layers.0:24:1` is the name of 24 layers) or when nothing is left to train."""
    flat = flatten(params)
    if callable(frozen):
        fixed = {name for name in flat if frozen(name)}
    else:
        for pattern in frozen:
            if not any(re.fullmatch(pattern, name) for name in flat):
                some = ", ".join(list(flat)[:3])
                raise ValueError(f"frozen pattern {pattern!r} matches no parameter; names are like {some} (matched whole)")
        fixed = {name for name in flat if any(re.fullmatch(pattern, name) for pattern in frozen)}
    if len(fixed) == len(flat):
        raise ValueError(f"all {len(flat)} parameters are frozen: nothing is left to train")
    return unflatten({n: x for n, x in flat.items() if n not in fixed}), unflatten({n: flat[n] for n in flat if n in fixed})


def merge(trained: Mapping[str, Any], fixed: Mapping[str, Any]) -> Tree:
    """The tree that `split` took apart."""
    return unflatten(flatten(trained) | flatten(fixed))


def placement(model: Any, tree: Any, role: str = "params") -> Any:
    """A sharding for every leaf of a tree when the model has rules: what belongs to a parameter (its moments, by the end of its path) lives
    as the rules say of such a `role`, params, gradients or optimizer; the rest is everywhere."""
    table = flatten(abstract_params(dataclasses.replace(model, rules=model.rules.of(role))))
    everywhere = NamedSharding(model.rules.mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> NamedSharding:
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        for i in range(len(keys)):
            owner = table.get(".".join(keys[i:]))
            if owner is not None and owner.shape == leaf.shape:
                return owner.sharding
        return everywhere

    return jax.tree_util.tree_map_with_path(place, tree)
