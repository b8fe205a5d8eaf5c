"""A prompt read in chunks of columns (`prefill_chunk_size`): no more than one chunk's activations are in memory at a time.

Axis letters: B rows, P the prompt's bucket, C columns of a chunk, V vocabulary."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from jaxmodels.cache import Cache


def in_chunks(first: Any, later: Any, size: int | None) -> Any:
    """`first(ids [B,P], real [B,P], cache) -> (seen, cache)` in chunks of `size` columns, which divides P; all but the first chunk are read
    by `later`. What was seen is what the last one saw. Chunks of nothing but padding before the prompt are left out."""

    def read(ids: jax.Array, real: jax.Array, cache: Cache) -> tuple[Any, Cache]:
        if size is None:
            return first(ids, real, cache)
        cut = lambda x, i: lax.dynamic_slice_in_dim(x, i * size, size, 1)
        start = real.any(0).argmax() // size
        begun = first(cut(ids, start), cut(real, start), cache)
        return lax.fori_loop(start + 1, ids.shape[1] // size, lambda i, carry: later(cut(ids, i), cut(real, i), carry[1]), begun)

    return read
