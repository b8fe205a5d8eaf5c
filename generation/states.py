"""Hidden states and attention weights of a generation, in HF's structure.

They are read off by one more pass over the finished sequences: causal models see the same at every position then as they did step by
step. The loop need not carry them, and any cache will do.

Axis letters: R rows of the result, T prompt columns, N new tokens, D hidden, H heads; of what an encoder reads
B rows, S columns, in a bucket of E."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.sharding.processes import to_host


def read_states(
    model: Any, params: Any, sequences: Any, real: Any, new: int, size: int, hidden_states: bool, attentions: bool, source: Any
) -> dict[str, Any]:
    """HF's hidden_states and attentions of sequences [R,T+N], of which `real` [R,T+N] is no padding, the last `new` columns generated.

    Each is a tuple over the N steps of tuples over layers (of hidden states one more, the embeddings first): [R,T,D] and [R,H,T,T] at
    the first step, which read the prompt, then [R,1,D] and [R,H,1,T+n]. `size`: the bucket that the pass is padded to.

    `source`: None, or what an encoder reads, ids and reality [B,E] in a bucket, and the columns S that are the caller's. HF's five fields
    are then those of the decoder, cross_attentions [R,H,T,S] among them, and of the encoder, tuples over layers: [B,S,D] and [B,H,S,S]."""
    width = sequences.shape[1] - 1  # nothing has read the last token
    xp: Any = jnp if isinstance(sequences, jax.core.Tracer) or isinstance(real, jax.core.Tracer) else np
    room = ((0, 0), (size - width, 0))
    texts = (xp.pad(sequences[:, :-1], room), xp.pad(real[:, :-1], room))
    copies = 1 if source is None else len(sequences) // len(source[0])
    sources = None if source is None else tuple(xp.repeat(xp.asarray(x), copies, 0) for x in source[:2])
    out = _read(model, params, texts, sources, hidden_states, attentions)
    T, first = width - new + 1, size - width
    spans = [(0, T), *((T + n, T + n + 1) for n in range(new - 1))]
    kept: dict[str, Any] = {}
    for name, layers in (out if xp is jnp else to_host(out)).items():
        if name.startswith("encoder"):
            S, own = source[2], [x[::copies] for x in layers]
            kept[name] = tuple(x[:, -S:] if x.ndim == 3 else x[:, :, -S:, -S:] for x in own)
        elif name.endswith("hidden_states"):
            kept[name] = tuple(tuple(h[:, first + a : first + b] for h in layers) for a, b in spans)
        else:
            start = -source[2] if name.startswith("cross") else first
            ends = [None if name.startswith("cross") else first + b for _, b in spans]
            kept[name] = tuple(tuple(w[:, :, first + a : first + b, start:end] for w in layers) for (a, b), end in zip(spans, ends))
    return kept


def check_states(cache: Any) -> None:
    """ValueError where the pass over the finished sequences would not be what the loop saw."""
    if cache is not None:
        raise ValueError("output_hidden_states and output_attentions need the whole conversation as input_ids, not a cache of it")


@partial(jax.jit, static_argnames=("model", "hidden_states", "attentions"))
def _read(model: Any, params: Any, texts: tuple, sources: tuple | None, hidden_states: bool, attentions: bool) -> dict[str, Any]:
    named = lambda prefix, x: {f"{prefix}input_ids": jnp.where(x[1], x[0], 0), f"{prefix}attention_mask": x[1]}
    inputs = named("", texts) if sources is None else named("", sources) | named("decoder_", texts)
    options = {"output_hidden_states": hidden_states, "output_attentions": attentions}
    out = model.apply({"params": params}, **inputs, logits_to_keep=1, **options)
    return {name: x for name, x in vars(out).items() if name.endswith(("hidden_states", "attentions")) and x is not None}
