"""What `generate` is given, as arrays and numbers that its programs take; ValueError for what it cannot go by.

Axis letters: B rows, T prompt tokens, E ids."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.cache import Cache
from jaxmodels.caches import cache_implementation
from jaxmodels.generation.config import GenerationConfig
from jaxmodels.generation.strategies import contrastive
from jaxmodels.generation.turn_cache import TurnCache, columns
from jaxmodels.model import check_ids
from jaxmodels.sharding.processes import to_host

DEFAULT_NEW_TOKENS = 20


def bucket(n: int) -> int:
    """The padded size for n: multiples of 16, from 128 on of an eighth of the next power of two (at most a quarter more than n)."""
    step = max(16, (1 << (n - 1).bit_length()) // 8) if n > 1 else 16
    return -(-n // step) * step


def read_prompt(input_ids: Any, attention_mask: Any, config: GenerationConfig, vocab_size: int, cache: Cache | None) -> tuple[Any, Any]:
    """ids [B,T] int32 and real [B,T] bool, numpy arrays unless they are traced; ValueError for what cannot be continued."""
    traced = isinstance(input_ids, jax.core.Tracer) or isinstance(attention_mask, jax.core.Tracer)
    xp: Any = jnp if traced else np
    ids = xp.asarray(input_ids if traced else to_host(input_ids))
    if ids.size == 0:
        ids = ids.astype(np.int32)
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be integers [B,T]; found shape {ids.shape}")
    B, T = ids.shape
    if B == 0:
        raise ValueError(f"input_ids of shape {ids.shape} have no rows; there is nothing to continue")
    if attention_mask is not None:
        real = xp.asarray(attention_mask if traced else to_host(attention_mask)) != 0
        if real.ndim == 2 and cache is not None:
            real = real[:, -T:] if T else real[:, :0]  # HF's loops pass the whole conversation's mask
        if real.shape != (B, T):
            raise ValueError(f"attention_mask has shape {real.shape}; expected that of input_ids, [B,T] = [{B},{T}]")
    else:
        pad, ends = config.pad_token_id, config.eos_token_id
        padded = pad is not None and pad not in (ends if isinstance(ends, tuple) else (ends,))
        real = (ids != pad) | ~(ids == pad).any() if padded else xp.ones((B, T), bool)
    check_ids(xp.where(real, ids, 0) if ids.size else ids, vocab_size)
    if cache is not None and cache.positions.shape[0] != B:
        raise ValueError(f"the cache holds {cache.positions.shape[0]} rows and input_ids {B}; repeat rows of a cache with cache.take(rows)")
    if not traced and not (cache is not None and isinstance(cache.positions, jax.core.Tracer)):
        ready = real.any(1) | (to_host(columns(cache.unread)).any(1) if isinstance(cache, TurnCache) else False)
        if not ready.all():
            raise ValueError(f"rows {np.flatnonzero(~ready).tolist()} of input_ids hold no token: their attention_mask is 0 everywhere")
    return ids.astype(np.int32), real


def kept_as(config: GenerationConfig, cache: Cache | None) -> Any:
    """How a new cache is kept, as jaxmodels.caches says; False for no cache at all."""
    made = cache_implementation(config.cache_implementation, config.cache_config)
    if cache is not None and (made is not None or config.use_cache is False):
        found = f"use_cache={config.use_cache}, cache_implementation={config.cache_implementation!r}"
        raise ValueError(f"{found} beside a cache, which is kept as it was made: leave out the options or the cache")
    if config.use_cache is False and made is not None:
        warnings.warn(f"use_cache=False: cache_implementation={config.cache_implementation!r} is without effect", stacklevel=3)
    if config.use_cache is False and contrastive(config):
        raise ValueError("use_cache=False: contrastive search copies what it has read of a candidate; leave out use_cache or penalty_alpha")
    return False if config.use_cache is False else made


def new_tokens(config: GenerationConfig, T: int, model_config: Any) -> int:
    """How many tokens to generate after T columns of prompt, by HF's rules."""
    if config.max_new_tokens is not None:
        wanted: Any = config.max_new_tokens
    elif config.max_length is not None:
        wanted = config.max_length - T
    else:
        wanted = min(DEFAULT_NEW_TOKENS, (getattr(model_config, "max_position_embeddings", None) or T + DEFAULT_NEW_TOKENS) - T)
        warnings.warn(f"neither max_new_tokens nor max_length is set: generating {wanted} tokens at most", stacklevel=3)
    if isinstance(wanted, jax.core.Tracer):
        raise ValueError("max_new_tokens decides shapes: make it static in jax.jit, static_argnames=('max_new_tokens',)")
    if wanted <= 0:
        raise ValueError(f"input_ids have {T} columns and max_length leaves no room (max_length={config.max_length}); set max_new_tokens")
    return wanted


def within_positions(config: Any, limit: int, real: Any, cache: Cache | None, model_config: Any) -> int:
    """`limit`, or as many tokens as a model with learned positions has left after the longest row; ValueError where that row, prompt
    real [B,T] and cache, has more than all of them. Traced rows cannot be looked at."""
    size = model_config.learned_positions
    if size is None or any(isinstance(x, jax.core.Tracer) for x in (real, None if cache is None else cache.positions)):
        return limit
    read = real.sum(1)
    if cache is not None:
        read = read + to_host(cache.lengths) + (to_host(columns(cache.unread)).sum(1) if isinstance(cache, TurnCache) else 0)
    longest = int(read.max())
    if longest > size:
        raise ValueError(f"a row has {longest} tokens, and {model_config.model_type} has learned {size} positions: shorten the prompt")
    left = size - longest + (not contrastive(config))  # which alone reads the last token
    if left < limit:
        warnings.warn(f"{limit} tokens after {longest} exceed the {size} learned positions: generating {left} at most", stacklevel=3)
    return min(limit, left)


def eos_ids(eos: int | tuple[int, ...] | None) -> np.ndarray:
    """[E] int32, filled up with -1 so that another number of ids is the same program."""
    ids = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
    width = max(8, 1 << (len(ids) - 1).bit_length() if ids else 0)
    return np.array([*ids, *[-1] * (width - len(ids))], np.int32)


def concrete(ids: Any, what: str) -> np.ndarray:
    """ids as they are; ValueError names `what` needs them where they are traced."""
    if isinstance(ids, jax.core.Tracer):
        raise ValueError(f"{what} runs on the host: it cannot be used inside jax.jit")
    return ids


def digest(*arrays: np.ndarray) -> str:
    """A hash of shapes and bytes, to compare arguments between processes."""
    return hashlib.sha256(b"".join(str(x.shape).encode() + x.tobytes() for x in arrays)).hexdigest()
