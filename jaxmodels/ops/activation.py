"""The functions that configs name as `hidden_act`: HF's, but for those with parameters of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def mish(x: jax.Array) -> jax.Array:
    """x tanh(log(1 + e^x)), arXiv:1908.08681, by one exponential and a quotient, which is closer than the three functions."""
    e = jnp.exp(jnp.minimum(x, 20))  # beyond, the quotient is 1
    return x * (e * (e + 2) / (e * (e + 2) + 2))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),  # arXiv:2209.10655
    "mish": mish,
    "linear": lambda x: x,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function that a config's `hidden_act` names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return _rounded_once(ACTIVATIONS[name])


@cache
def _rounded_once(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """As in torch's kernels; a gradient keeps x alone, not the float32 numbers between."""
    return jax.checkpoint(lambda x: function(x.astype(jnp.float32)).astype(x.dtype), prevent_cse=False)
