"""Attention over positions, chosen by name.

Masks compare positions, never columns: a query at position p sees the keys at positions 0..p, or all of them where attention is not
causal, and -1 marks a slot that holds no token. So left padding, buckets and ragged second turns cannot change a number.

Axis letters: B batch, T queries, S keys, N query heads, K kv heads, G = N/K, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.ops import attention_cpu
from jaxmodels.ops.dropout import dropout as drop
from jaxmodels.ops.linear import einsum

Weights = jax.Array | None


def visible(q_positions: jax.Array, k_positions: jax.Array, window: int | None = None, causal: bool = True) -> jax.Array:
    """bool [B,1,T,S]: which of the keys at [B,S] the queries at [B,T] see; with a window, of the last `window` tokens, its own included.
    Not causal: the keys after a query too, with a window the next `window` tokens as well."""
    queries, keys = q_positions[:, None, :, None], k_positions[:, None, None, :]
    mask = (keys >= 0) & (keys <= queries) if causal else jnp.broadcast_to(keys >= 0, (*keys.shape[:2], queries.shape[2], keys.shape[3]))
    if window is not None:
        mask &= keys > queries - window
        mask &= True if causal else keys < queries + window
    return mask


def alibi_slopes(heads: int) -> np.ndarray:
    """float32 [heads] (arXiv:2108.12409): powers of 2**(-8/heads), or where heads is no power of two, of the next one's sequence
    every second and then the first of those between."""
    n = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** (-8 / n * np.arange(1, n + 1))
    return (slopes if n == heads else np.concatenate([slopes[1::2], slopes[::2]])[:heads]).astype(np.float32)


def alibi(slopes: np.ndarray, k_positions: jax.Array) -> jax.Array:
    """The bias [B,N,1,S] of keys at [B,S] for slopes [N]. A softmax does not see what all keys share, so the newest has none."""
    distance = k_positions - k_positions.max(1, keepdims=True)
    return jnp.asarray(slopes)[:, None, None] * distance[:, None, None, :].astype(jnp.float32)


def eager(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    causal: bool = True,
    dropout: tuple[jax.Array, float] | None = None,
) -> tuple[jax.Array, Weights]:
    """Written out, as torch's eager attention rounds: also returns the weights [B,N,T,S]."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    logits = einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k).reshape(B, N, T, S) * scale
    if softcap is not None:
        logits = jnp.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    logits = jnp.where(visible(q_positions, k_positions, window, causal), logits, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, None], (B, N, T, 1))
        logits = jnp.concatenate([logits, column], -1)
    weights = jax.nn.softmax(logits, -1)[..., :S].astype(q.dtype)
    if dropout is not None:
        weights = drop(dropout[0], weights, dropout[1])
    out = einsum("bkgts,bskh->btkgh", weights.reshape(B, K, N // K, T, S), v).astype(q.dtype)
    return out.reshape(B, T, N, -1), weights


def xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    scale: float,
    window: int | None = None,
    bias: jax.Array | None = None,
    causal: bool = True,
    dropout: tuple[jax.Array, float] | None = None,
    rules: Any = None,
) -> tuple[jax.Array, Weights]:
    """jax.nn.dot_product_attention, compiled by XLA; on one CPU our own, in blocks where texts are long; written out where weights drop."""
    if dropout is not None:
        return eager(q, k, v, q_positions, k_positions, scale, window, bias=bias, causal=causal, dropout=dropout)
    mask = visible(q_positions, k_positions, window, causal)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - v.shape[-1])))  # it wants values as long as keys
        out = jax.nn.dot_product_attention(q, k, wide, bias, mask=mask, scale=scale, implementation="xla")
        return out[..., : v.shape[-1]]

    def on_cpu(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if rules is None:
            return attention_cpu.attend(mask, bias, scale, q, k, v)
        # XLA:CPU lacks some of the batched bfloat16 products in it
        return attend(*(x.astype(jnp.float32) for x in (q, k, v))).astype(q.dtype)

    return lax.platform_dependent(q, k, v, cpu=on_cpu, default=attend), None


def splash(*args: Any, **kwargs: Any) -> tuple[jax.Array, Weights]:
    """The kernel for TPU, jaxmodels.ops.splash; nobody else waits for Pallas to be imported."""
    from jaxmodels.ops.splash import splash

    return splash(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What `attention` may call by a name."""

    function: Callable[..., tuple[jax.Array, Weights]]
    options: tuple[str, ...] = ()  # the keywords it takes beside the six arguments: window, softcap, bias, sinks, causal, dropout, rules


IMPLEMENTATIONS = {
    "eager": Implementation(eager, ("window", "softcap", "bias", "sinks", "causal", "dropout")),
    "xla": Implementation(xla, ("window", "bias", "causal", "dropout", "rules")),
    "splash": Implementation(splash, ("window", "softcap", "rules")),
}
HF_NAMES = {"sdpa": "xla"}  # what HF configs call the compiler's own attention
UNPROVEN = {"cudnn": "its numbers can be shown on an NVIDIA GPU alone, and have not been; xla runs there"}


def register_attention(name: str, function: Callable[..., tuple[jax.Array, Weights]], options: tuple[str, ...] = ()) -> None:
    """Make `function(q [B,T,N,H], k [B,S,K,H], v, q_positions [B,T], k_positions [B,S], scale)` available by name; it returns the
    output [B,T,N,H] and the weights [B,N,T,S] or None.

    options: the keywords of `attention` that it also takes. `rules` are the model's sharding rules or None, for a kernel that the
    compiler cannot split over devices; asked for another that it does not take, `attention` refuses."""
    IMPLEMENTATIONS[name] = Implementation(function, options)


def resolve_attention(name: str | None) -> str | None:
    """The registered name for a config's or a caller's choice, None where neither chose. ValueError lists what is possible."""
    name = HF_NAMES.get(name or "", name)
    if name is not None and name not in IMPLEMENTATIONS:
        why = f" ({UNPROVEN[name]})" if name in UNPROVEN else ""
        raise ValueError(f"attn_implementation {name!r} is not registered{why}; possible are {', '.join(sorted(IMPLEMENTATIONS))}")
    return name


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    causal: bool = True,
    dropout: tuple[jax.Array, float] | None = None,
    implementation: str | None = None,
    rules: Any = None,
) -> tuple[jax.Array, Weights]:
    """Attention of q [B,T,N,H] over k, v [B,S,K,H], positions [B,T] and [B,S]; scale defaults to H**-0.5.

    causal: a query sees no later position; else the window reaches both ways. window: tokens seen, the query's own included. softcap:
    logits are softcap·tanh(logits/softcap). bias: added to the logits, broadcast to [B,N,T,S]. sinks [N]: a logit
    that takes its share of every softmax. dropout: a key and the share of the weights to drop. implementation: None is `xla`, or
    `eager` where that lacks an option. Returns [B,T,N,H] in q.dtype and, from `eager` alone, the weights [B,N,T,S].
    ValueError where K does not divide N, or the implementation lacks an option that is asked for."""
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly: the config needs a multiple")
    asked = {"window": window, "softcap": softcap, "bias": bias, "sinks": sinks, "dropout": dropout, "causal": None if causal else False}
    options = {name: value for name, value in asked.items() if value is not None}
    if implementation is None:
        implementation = "xla" if set(options) <= set(IMPLEMENTATIONS["xla"].options) else "eager"
    chosen = IMPLEMENTATIONS[implementation]
    lacking = [name for name in options if name not in chosen.options]
    if lacking:
        able = [name for name, other in IMPLEMENTATIONS.items() if set(options) <= set(other.options)]
        names = ", ".join("bidirectional form" if name == "causal" else name for name in lacking)
        raise ValueError(f"attention {implementation!r} has no {names}, which the model needs; possible are {', '.join(able)}")
    if "rules" in chosen.options:
        options["rules"] = rules
    return chosen.function(q, k, v, q_positions, k_positions, q.shape[-1] ** -0.5 if scale is None else scale, **options)
