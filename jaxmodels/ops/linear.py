"""Matrix products that accumulate in float32 and round once, on every backend; where a mesh splits the sum, once on every device.

Axis letters: `...` any leading axes, I in, O out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

FEW_ROWS = 256


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] times weight [O, I] transposed, plus bias [O]: torch.nn.functional.linear. Output [..., O] in x.dtype."""
    weight = weight.astype(x.dtype)
    rows: Any = math.prod(x.shape[:-1])
    if not isinstance(rows, int):
        rows = FEW_ROWS + 1  # a symbolic size of jax.export's
    if rows == 1 and x.dtype == jnp.bfloat16:
        # XLA:CPU computes one bfloat16 row at a fourteenth of the speed of two.
        y = _by_platform(x, weight, _one_row, _product)
    elif 1 < rows <= FEW_ROWS and x.dtype == jnp.float32:
        # XLA:CPU packs the right operand anew in every product: better the few rows than the weight.
        y = _by_platform(x, weight, _weight_first, _product)
    elif bias is None and x.dtype != jnp.float32:
        # Rounded by the product itself, which XLA:CPU is slow at: of gradients over several devices, XLA adds up such products before it
        # reduces them, those that a pass of its own rounds one by one.
        return _by_platform(x, weight, lambda x, weight: _flat(x, weight).astype(x.dtype), _rounded)
    else:
        y = _by_platform(x, weight, _flat, _product)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def _by_platform(x: jax.Array, weight: jax.Array, cpu: Callable[..., jax.Array], default: Callable[..., jax.Array]) -> jax.Array:
    # A branch to JAX, which would keep for the gradient what each side wants, x and weight in other forms. Nothing is computed again.
    choose = jax.checkpoint(lambda x, weight: lax.platform_dependent(x, weight, cpu=cpu, default=default), prevent_cse=False)
    return choose(x, weight)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _flat(x: jax.Array, weight: jax.Array) -> jax.Array:
    # The weight's gradient sums over one axis then: over two, XLA:CPU turns a whole operand around for it, in a slow pass.
    return _product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])


def _rounded(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _one_row(x: jax.Array, weight: jax.Array) -> jax.Array:
    rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
    return _product(rows, weight)[:1].reshape(*x.shape[:-1], weight.shape[0])


def _weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
    # Without the barrier XLA turns a transposed product back into the other one.
    return jnp.moveaxis(lax.optimization_barrier(lax.dot_general(weight, x, (((1,), (x.ndim - 1,)), ((), ())))), 0, -1)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum of two operands with a float32 result. XLA:CPU lacks some batched bfloat16 products, so there the operands go up first."""
    wide = lambda a, b: jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))
    if a.dtype == b.dtype == jnp.float32:
        return wide(a, b)
    return lax.platform_dependent(a, b, cpu=wide, default=lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32))
