"""Hidden states and attention weights of a generation, in HF's structure.

They are read off by one more pass over the finished sequences: causal models see the same at every position then as they did step by
step. The loop need not carry them, and any cache will do.

Axis letters: R rows of the result, T prompt columns, N new tokens, D hidden, H heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Steps = tuple[tuple[Any, ...], ...]


def read_states(
    model: Any, params: Any, sequences: Any, real: Any, new: int, size: int, hidden_states: bool, attentions: bool
) -> tuple[Steps | None, Steps | None]:
    """HF's hidden_states and attentions of sequences [R,T+N], of which `real` [R,T+N] is no padding, the last `new` columns generated.

    Each is a tuple over the N steps of tuples over layers (of hidden states one more, the embeddings first): [R,T,D] and [R,H,T,T] at
    the first step, which read the prompt, then [R,1,D] and [R,H,1,T+n]. `size`: the bucket that the pass is padded to."""
    width = sequences.shape[1] - 1  # nothing has read the last token
    xp: Any = jnp if isinstance(sequences, jax.core.Tracer) or isinstance(real, jax.core.Tracer) else np
    room = ((0, 0), (size - width, 0))
    out = _read(model, params, xp.pad(sequences[:, :-1], room), xp.pad(real[:, :-1], room), hidden_states, attentions)
    T, first = width - new + 1, size - width
    spans = [(0, T), *((T + n, T + n + 1) for n in range(new - 1))]
    hidden, weights = out if xp is jnp else jax.device_get(out)
    hidden = hidden and tuple(tuple(h[:, first + a : first + b] for h in hidden) for a, b in spans)
    weights = weights and tuple(tuple(w[:, :, first + a : first + b, first : first + b] for w in weights) for a, b in spans)
    return hidden, weights


def check_states(config: Any, cache: Any) -> None:
    """ValueError where the pass over the finished sequences would not be what the loop saw."""
    if config.is_encoder_decoder:
        raise ValueError("output_hidden_states and output_attentions of generate are a decoder's; call the encoder-decoder on its result")
    if cache is not None:
        raise ValueError("output_hidden_states and output_attentions need the whole conversation as input_ids, not a cache of it")


@partial(jax.jit, static_argnames=("model", "hidden_states", "attentions"))
def _read(model: Any, params: Any, ids: jax.Array, real: jax.Array, hidden_states: bool, attentions: bool) -> Any:
    options = {"output_hidden_states": hidden_states, "output_attentions": attentions}
    out = model.apply({"params": params}, jnp.where(real, ids, 0), attention_mask=real, logits_to_keep=1, **options)
    return out.hidden_states, out.attentions
