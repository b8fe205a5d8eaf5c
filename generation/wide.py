"""64-bit unsigned integers as pairs of uint32 arrays (high, low), for hashes that JAX without x64 has no type for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Wide = tuple[Any, Any]


def wide(value: int) -> Wide:
    """Of a Python integer, modulo 2^64."""
    return np.uint32(value >> 32 & 0xFFFFFFFF), np.uint32(value & 0xFFFFFFFF)


def add(a: Wide, b: Wide) -> Wide:
    """Modulo 2^64."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def multiply(a: Wide, b: Wide) -> Wide:
    """Modulo 2^64."""
    a0, a1, b0, b1 = a[1] & 0xFFFF, a[1] >> 16, b[1] & 0xFFFF, b[1] >> 16
    middle = a1 * b0 + (a0 * b0 >> 16)
    crossed = a0 * b1 + (middle & 0xFFFF)
    high = a1 * b1 + (middle >> 16) + (crossed >> 16)
    return high + a[0] * b[1] + a[1] * b[0], a[1] * b[1]


def remainder(a: Wide, m: int) -> jax.Array:
    """Of the integer as a signed one, from 0 to m - 1, for 0 < m <= 2^24."""
    rest = jnp.zeros_like(a[1])
    for word in a:
        for shift in (24, 16, 8, 0):
            rest = ((rest << 8) | (word >> shift & 0xFF)) % m
    below = jnp.uint32((1 << 64) % m)
    return jnp.where(a[0] >> 31 == 1, (rest + m - below) % m, rest)


def least(a: Wide, axis: int) -> Wide:
    """The smallest along an axis, as signed integers."""
    signed = a[0] ^ jnp.uint32(1 << 31)
    high = signed.min(axis, keepdims=True)
    low = jnp.where(signed == high, a[1], jnp.uint32(0xFFFFFFFF)).min(axis)
    return high.squeeze(axis) ^ jnp.uint32(1 << 31), low
