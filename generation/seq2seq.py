"""What the decoder of an encoder-decoder model begins with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def decoder_prompt(config: Any, input_ids: Any, ids: Any, mask: Any, cache: Any) -> tuple[Any, Any]:
    """decoder_input_ids [B,T] and their mask as the loop reads them, from the caller's ids and mask, each [B,T] or None.

    As in HF they begin with decoder_start_token_id (one id, or one per row; bos_token_id where there is none), which is put before them
    unless some row has it already; of traced ids nobody knows, they are taken as they are. With a cache they follow what it holds, perhaps
    nothing. ValueError for a missing start, for input_ids beside a cache, for shapes that do not fit, and for guidance."""
    if config.guidance_scale not in (None, 1.0):
        raise ValueError("guidance_scale compares two prompts of a decoder: it is not supported for encoder-decoder models; set it to 1.0")
    if cache is not None:
        if input_ids is not None:
            raise ValueError(
                "the cache holds what the encoder read, so input_ids must be None; what the decoder reads next is decoder_input_ids"
            )
        ids = np.zeros((cache.positions.shape[0], 0), np.int32) if ids is None else ids
        return ids, np.ones(np.shape(ids), bool) if mask is None else mask
    B = np.shape(input_ids)[0]
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    if isinstance(ids, jax.core.Tracer):
        return ids, jnp.ones(ids.shape, bool) if mask is None else mask
    if start is None:
        raise ValueError(
            "the decoder begins with decoder_start_token_id (or bos_token_id): neither is set, in the checkpoint or in the call"
        )
    starts = np.asarray(start, np.int32).reshape(-1, 1)
    if len(starts) not in (1, B):
        raise ValueError(f"decoder_start_token_id has {len(starts)} ids for {B} rows of input_ids; expected one, or one per row")
    starts = np.broadcast_to(starts, (B, 1))
    ids = starts if ids is None else np.asarray(ids)
    if ids.ndim != 2 or len(ids) != B:
        raise ValueError(f"decoder_input_ids have shape {ids.shape}; expected [B,T] with the {B} rows of input_ids")
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
    if (ids[:, :1] != starts).all():
        ids, real = np.concatenate([starts, ids], 1), np.concatenate([np.ones((B, 1), bool), real], 1)
    return ids, real
