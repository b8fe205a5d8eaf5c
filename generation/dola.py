"""DoLa: the last layer's distribution against that of an early layer (arXiv:2309.03883), as transformers 4.45 has it.

Axis letters: B rows, L early layers, D hidden, V vocabulary."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.generation.processors import kind
from jaxmodels.generation.sampling import Sampling, State, last_logits

RELATIVE_TOP = 0.1  # tokens less probable than this share of the likeliest one are out


@struct.dataclass
class Early:
    """Logits after the last layer [B,V] and after the early ones [B,L,V], float32."""

    logits: jax.Array
    early: jax.Array


@struct.dataclass
class DoLa(Sampling):
    """Sampling or greedy decoding of log p - log q: p after the last layer, q after that of `layers` (0 the embeddings) whose
    distribution is farthest from p by the Jensen-Shannon divergence, as transformers estimates it. transformers looks for one layer for
    the whole batch; here each row has its own, so that it is that of the row alone."""

    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())
    kind: str = kind("DoLa")
    hidden_states: ClassVar[bool] = True

    def look(self, model: Any, params: Any, out: Any) -> Early:
        early = jnp.stack([out.hidden_states[i][:, -1] for i in self.layers], 1)  # [B, L, D]
        return Early(last_logits(out), model.apply({"params": params}, early, method="head").astype(jnp.float32))

    def start(self, state: State, seen: Early) -> State:
        return self.choose(state, contrast(seen.logits, seen.early), seen.logits)


def contrast(logits: jax.Array, early: jax.Array) -> jax.Array:
    """log p - log q [B,V] of logits [B,V] and the most distant of early [B,L,V]; -inf where p is small."""
    p, log_p = jax.nn.softmax(logits)[:, None], jax.nn.log_softmax(logits)[:, None]
    q, log_q = jax.nn.softmax(early), jax.nn.log_softmax(early)
    mean = (p + q) / 2
    log_mean = jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))
    distance = (mean * (2 * log_mean - log_p - log_q)).mean(-1)  # [B, L]
    farthest = jnp.take_along_axis(log_q, distance.argmax(1)[:, None, None], 1)[:, 0]
    log_p = log_p[:, 0]
    kept = log_p >= log_p.max(-1, keepdims=True) + np.float32(np.log(RELATIVE_TOP))
    return jnp.where(kept, log_p - farthest, -jnp.inf)


def early_layers(dola_layers: Any, layers: int, tied: bool) -> tuple[int, ...]:
    """The layers that `dola_layers` names in a model of `layers` layers: `low` or `high` for every second one of the lower or upper half
    (of the 20 first or last in a deep model), or the layers themselves. With tied embeddings the first ones say nothing."""
    start = (2 if layers > 2 else layers - 1) if tied else 0
    if dola_layers == "low":
        found = (start,) if start == layers // 2 else tuple(range(start, layers // 2 if layers <= 40 else 20, 2))
    elif dola_layers == "high":
        found = tuple(range(layers // 2 if layers <= 40 else layers - 20, layers, 2))
    else:
        found = tuple(i for i in dola_layers if i < layers)
    if not found or min(found) < 0:
        raise ValueError(f"dola_layers={dola_layers!r} names no layer below the last of {layers}; use 'low', 'high' or layers from 0 on")
    return found
