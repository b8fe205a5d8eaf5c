"""T5's relative positions (arXiv:1910.10683): a bias of the logits, looked up by how far a key is from its query, in buckets.

Axis letters: B batch, T queries, S keys, N heads."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def distance_buckets(num: int, max_distance: int, causal: bool) -> np.ndarray:
    """int [2 max_distance + 1]: the bucket, of `num`, of a key d tokens after its query, for d from -max_distance to max_distance.

    Half of the buckets are one distance each, the others ever wider up to max_distance; not causal, half of all look ahead."""
    distance = np.arange(-max_distance, max_distance + 1)
    first = np.zeros_like(distance)
    if causal:
        distance = np.maximum(-distance, 0)
    else:
        num //= 2
        first, distance = np.where(distance > 0, num, 0), np.abs(distance)
    exact = num // 2
    # In float32 and in this order: the product decides on which side of an edge a distance falls.
    scale = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = exact + (scale * (num - exact)).astype(int)
    return first + np.where(distance < exact, distance, np.minimum(far, num - 1))


def relative_bias(weight: jax.Array, q_positions: jax.Array, k_positions: jax.Array, max_distance: int, causal: bool) -> jax.Array:
    """float32 [B,N,T,S] for queries at [B,T] and keys at [B,S], from weight [buckets, N]; keys further away count as at max_distance."""
    by_distance = jnp.asarray(weight, jnp.float32)[distance_buckets(weight.shape[0], max_distance, causal)]
    distance = k_positions[:, None, :] - q_positions[:, :, None]
    return by_distance[jnp.clip(distance, -max_distance, max_distance) + max_distance].transpose(0, 3, 1, 2)
