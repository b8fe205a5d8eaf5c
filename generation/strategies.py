"""Which strategy a configuration asks for, by HF's rules, and what contradicts itself in it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxmodels.generation.processors import LogitsProcessor
from jaxmodels.generation.sampling import Sampling, Strategy


def build_strategy(
    config: Any, processors: tuple[LogitsProcessor, ...], eos_token_id: np.ndarray, pad_token_id: int, key: jax.Array | None, limit: int
) -> Strategy:
    """The strategy of a filled GenerationConfig for at most `limit` new tokens. `eos_token_id` [E], -1 for none."""
    return Sampling(processors, eos_token_id, np.int32(pad_token_id), key if config.do_sample else None, copies=config.num_return_sequences)
