"""Parameter trees: plain nested dicts of arrays whose flattened keys are the checkpoint's keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: leaf}."""
    return flatten_dict(params, sep=".")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The nested tree of {dotted key: leaf}, flatten's inverse."""
    return unflatten_dict(dict(flat), sep=".")


def _boxed(model: nn.Module, key: jax.Array) -> Tree:
    return model.init(key, **model.example_inputs())["params"]


def param_dtype(model: Any, key: str, dtype: Any) -> Any:
    """The dtype of one parameter in a tree of `dtype`: float32 where the family declares so."""
    patterns = model.float32_params + (model.float16_unsafe if dtype == jnp.float16 else ())
    return jnp.float32 if any(re.fullmatch(pattern, key) for pattern in patterns) else dtype


@lru_cache(maxsize=8)  # loading, saving and the axes of one model ask for it in turn
def _abstract(model: Any) -> Tree:
    return jax.eval_shape(lambda: _boxed(model, jax.random.key(0)))


def _axes(boxed: Tree) -> Tree:
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree.map(lambda box: tuple(box.names) if is_box(box) else (None,) * box.ndim, boxed, is_leaf=is_box)


def param_axes(model: Any) -> Tree:
    """The logical axis names of every parameter, a tuple per leaf, in the tree's structure."""
    return _axes(_abstract(model))


def abstract_params(model: Any, dtype: Any = jnp.float32) -> Tree:
    """Shapes and dtypes of every parameter as jax.ShapeDtypeStruct, with shardings when the model has rules. Allocates nothing."""
    boxed = _abstract(model)
    shapes, axes = flatten(nn.unbox(boxed)), flatten(_axes(boxed))
    if model.rules is not None:
        model.rules.check_axes({axis for names in axes.values() for axis in names})

    def leaf(key: str) -> jax.ShapeDtypeStruct:
        shape = shapes[key].shape
        sharding = None if model.rules is None else model.rules.sharding(axes[key], shape, model.axis_units)
        return jax.ShapeDtypeStruct(shape, param_dtype(model, key, dtype), sharding=sharding)

    return unflatten({key: leaf(key) for key in shapes})


def init_params(model: Any, key: jax.Array, dtype: Any = jnp.float32, *, only: Sequence[str] | None = None) -> Tree:
    """Freshly initialised parameters of `dtype`, created in place in their shardings when the model has rules.

    `only`: dotted names; then a flat dict of those alone is made and returned."""
    abstract = flatten(abstract_params(model, dtype))
    names = list(abstract if only is None else only)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        tree = flatten(nn.unbox(_boxed(model, key)))
        return {name: tree[name].astype(abstract[name].dtype) for name in names}

    flat = jax.jit(make, out_shardings=None if model.rules is None else {name: abstract[name].sharding for name in names})(key)
    return flat if only is not None else unflatten(flat)


def count_params(params: Any) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
