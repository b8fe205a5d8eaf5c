"""torch's CPU generator: the Mersenne twister's numbers, and which ids a torch.randperm puts first, without running through it.

torch swaps place i with place i + number[i] % (V - i), for i from 0. So place i, once passed, keeps what was at its target, and the
places before g hold the chosen ids after g swaps: all others still lie behind them. Where they lie is found by following the swaps.

Axis letters: B seeds, V ids, g of them chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

N, M = 624, 397


def numbers(seeds: jax.Array, count: int) -> jax.Array:
    """The first `count` 32-bit numbers [B,count] of torch.Generator().manual_seed(seed); uint32 seeds [B], as only these bits count."""

    def spread(i: jax.Array, state: jax.Array) -> jax.Array:
        before = lax.dynamic_index_in_dim(state, i - 1, 0, keepdims=False)
        new = jnp.uint32(1812433253) * (before ^ (before >> 30)) + i.astype(jnp.uint32)
        return lax.dynamic_update_index_in_dim(state, new, i, 0)

    seeds = seeds.astype(jnp.uint32)
    state = lax.fori_loop(1, N, spread, jnp.zeros((N, len(seeds)), jnp.uint32).at[0].set(seeds)).T
    _, blocks = lax.scan(lambda state, _: (twisted := _twist(state), _temper(twisted)), state, None, length=-(-count // N))
    return jnp.moveaxis(blocks, 0, 1).reshape(len(seeds), -1)[:, :count]


def _twist(state: jax.Array) -> jax.Array:
    """The next 624 words of state [B,624]; the later parts stand on the first."""

    def mix(here: jax.Array, after: jax.Array, far: jax.Array) -> jax.Array:
        y = (here & jnp.uint32(0x80000000)) | (after & jnp.uint32(0x7FFFFFFF))
        return far ^ (y >> 1) ^ jnp.where(after & 1 == 1, jnp.uint32(0x9908B0DF), jnp.uint32(0))

    part = N - M
    first = mix(state[:, :part], state[:, 1 : part + 1], state[:, M:])
    second = mix(state[:, part : 2 * part], state[:, part + 1 : 2 * part + 1], first)
    third = mix(state[:, 2 * part : N - 1], state[:, 2 * part + 1 :], second[:, : N - 1 - 2 * part])
    last = mix(state[:, N - 1 :], first[:, :1], second[:, M - 1 - part : M - part])
    return jnp.concatenate([first, second, third, last], 1)


def _temper(y: jax.Array) -> jax.Array:
    y = y ^ (y >> 11)
    y = y ^ ((y << 7) & jnp.uint32(0x9D2C5680))
    y = y ^ ((y << 15) & jnp.uint32(0xEFC60000))
    return y ^ (y >> 18)


def _targets(seeds: jax.Array, V: int, g: int) -> jax.Array:
    """int32 [B,g]: the place that place i is swapped with."""
    places = jnp.arange(g, dtype=jnp.uint32)
    return (places + numbers(seeds, g) % (jnp.uint32(V) - places)).astype(jnp.int32)


def chosen(seeds: jax.Array, V: int, g: int) -> jax.Array:
    """bool [B,V]: the ids torch.randperm(V)[:g] after manual_seed(seed), for each uint32 seed [B]. 0 < g < V."""
    targets = _targets(seeds, V, g)
    rows, places = jnp.arange(len(seeds))[:, None], jnp.arange(g)
    moved = jnp.where(targets == places, V, targets)  # a place swapped with itself moves nothing
    last = jnp.full((len(seeds), V), -1, jnp.int32).at[rows, moved].max(places, mode="drop")
    # last [B,V]: whose swap put something at a place. What place i held when it was passed came from place last[i], and so on.
    source = jnp.where(last[:, :g] < 0, places, last[:, :g])
    source = lax.while_loop(
        lambda found: (found[0] != found[1]).any(),
        lambda found: (found[1], jnp.take_along_axis(found[1], found[1], 1)),
        (jnp.full_like(source, -1), source),
    )[1]
    behind = last[:, g:]
    left = jnp.where(behind < 0, jnp.arange(g, V), jnp.take_along_axis(source, jnp.maximum(behind, 0), 1))
    return jnp.ones((len(seeds), V), bool).at[rows, left].set(False)


def is_chosen(seeds: jax.Array, ids: jax.Array, V: int, g: int) -> jax.Array:
    """bool [B]: whether ids [B] are among torch.randperm(V)[:g] after manual_seed(seed), for each uint32 seed [B]."""
    targets, places = _targets(seeds, V, g), jnp.arange(g)

    def follow(at: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        place, since, done, found = at
        hit = ((targets == place[:, None]) & (places >= since[:, None]) & (places < place[:, None])).any(1)
        passed = place < g
        to = jnp.take_along_axis(targets, jnp.minimum(place, g - 1)[:, None], 1)[:, 0]
        stays = passed & (to == place)
        found = jnp.where(done, found, hit | stays)
        done |= hit | stays | ~passed
        return jnp.where(done, place, to), jnp.where(done, since, place + 1), done, found

    no = jnp.zeros(len(seeds), bool)
    start = (ids.astype(jnp.int32), jnp.zeros(len(seeds), jnp.int32), no, no)
    return lax.while_loop(lambda at: ~at[2].all(), follow, start)[3]


def permutation(n: int, seed: int) -> np.ndarray:
    """torch.randperm(n) after manual_seed(seed), int64 [n]; on the host."""
    places = np.arange(n)
    words = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator.random_raw(n)
    targets = places + (words[:n] % (n - places)).astype(np.int64)
    targets[-1] = n - 1
    order = np.lexsort((places, targets))  # by target, then by time
    same = np.zeros(n, bool)
    same[1:] = targets[order[1:]] == targets[order[:-1]]
    earlier = np.full(n, -1)  # the swap before that had the same target
    earlier[order[1:]] = np.where(same[1:], order[:-1], -1)
    moves = targets != places
    last = np.full(n, -1)
    np.maximum.at(last, targets[moves], places[moves])
    source = np.where(last < 0, places, last)
    while (source != (further := source[source])).any():
        source = further
    return np.where(moves, np.where(earlier < 0, targets, source[np.maximum(earlier, 0)]), source)


def bits(n: int, seed: int) -> np.ndarray:
    """torch.randint(0, 2, (n,)) after manual_seed(seed), uint8 [n]; on the host."""
    return (np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator.random_raw(n) & 1).astype(np.uint8)
