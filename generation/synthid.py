"""Who wrote it: the Bayesian detector of SynthID's watermark (doi:10.1038/s41586-024-08025-4), as transformers has it.

Axis letters: B rows, T n-grams, D layers of the tournament."""

from __future__ import annotations

import os
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmodels.config import read_json
from jaxmodels.generation.watermark import SynthIDTextWatermarkingConfig, SynthIDWatermark, as_watermarking_config

TINY, EDGE = 1e-30, 1e-5
NAMES = {"beta": "likelihood_model_watermarked.beta", "delta": "likelihood_model_watermarked.delta", "prior": "prior"}


@struct.dataclass
class BayesianDetector:
    """HF's BayesianDetectorModel: `detector(g_values [B,T,D], mask [B,T]) -> [B] float32`, the probability that the text is marked, of the
    n-grams whose mask is 1.

    beta [1,1,D], delta [1,1,D,D], prior [1] float32, as the file stores them. `watermarking_config`: that of the text it was trained
    for, where its config.json says."""

    beta: Any
    delta: Any
    prior: Any
    watermarking_config: SynthIDTextWatermarkingConfig | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str | os.PathLike, **hub: Any) -> Self:
        """From a checkpoint directory or a hub id; `hub`: revision, token, cache_dir, subfolder, local_files_only. ValueError where the
        tensors are not those of a detector."""
        from jaxmodels.convert.files import read_checkpoint
        from jaxmodels.convert.hub import resolve

        folder = resolve(pretrained_model_name, **hub)
        found, config = read_checkpoint(folder), read_json(folder / "config.json")
        D = config.get("watermarking_depth")
        shapes = {NAMES["beta"]: (1, 1, D), NAMES["delta"]: (1, 1, D, D), NAMES["prior"]: (1,)}
        there = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if there != shapes:
            raise ValueError(f"{folder} holds {there}; a detector of watermarking_depth={D} has {shapes}")
        known = SynthIDTextWatermarkingConfig.__dataclass_fields__
        marks = {k: v for k, v in (config.get("watermarking_config") or {}).items() if k in known}  # a device may be beside them
        arrays = {field: jnp.asarray(found[name].read(), jnp.float32) for field, name in NAMES.items()}
        return cls(**arrays, watermarking_config=as_watermarking_config(marks or None))

    def __call__(self, g_values: Any, mask: Any) -> jax.Array:
        g = jnp.asarray(g_values, jnp.float32)
        features = jnp.tril(jnp.broadcast_to(g[..., None, :], (*g.shape, g.shape[-1])), -1)  # [B,T,D,D], of earlier layers alone
        two = jax.nn.sigmoid((self.delta * features).sum(-1) + self.beta)  # that two different tokens met
        marked = 0.5 * ((g + 0.5) * two + (1 - two))
        surprise = jnp.log(jnp.maximum(marked, TINY)) - np.log(np.float32(0.5))
        prior = jnp.clip(self.prior, EDGE, 1 - EDGE)
        odds = jnp.log(prior) - jnp.log(1 - prior) + (surprise * jnp.asarray(mask, jnp.float32)[..., None]).sum((1, 2))
        return jax.nn.sigmoid(odds)

    def loss(self, g_values: Any, mask: Any, labels: Any, batch_weight: float = 1.0) -> jax.Array:
        """[]: the mean cross-entropy of labels [B], 1 for marked, and batch_weight times the sum of the squares of delta. To train a
        detector, follow its gradient from `initial`."""
        p = jnp.clip(self(g_values, mask), EDGE, 1 - EDGE)
        labels = jnp.asarray(labels, jnp.float32)
        return -(labels * jnp.log(p) + (1 - labels) * jnp.log(1 - p)).mean() + batch_weight * (self.delta**2).sum()

    @classmethod
    def initial(cls, key: jax.Array, config: SynthIDTextWatermarkingConfig, base_rate: float = 0.5) -> Self:
        """Not trained yet, of a prior probability base_rate."""
        D, (one, other) = len(config.keys), jax.random.split(key)
        beta, delta = -2.5 + 0.001 * jax.random.normal(one, (1, 1, D)), 0.001 * jax.random.normal(other, (1, 1, D, D))
        return cls(beta, delta, jnp.full(1, base_rate, jnp.float32), config)


class SynthIDTextWatermarkDetector:
    """`detector(input_ids [B,T]) -> float32 [B]`, the probability that each row is marked: of its n-grams before eos_token_id whose context
    is new. HF's, whose logits_processor is here the watermarking configuration, by default the detector's own."""

    def __init__(self, detector: BayesianDetector, watermarking_config: Any = None, eos_token_id: int | None = None) -> None:
        config = as_watermarking_config(watermarking_config) or detector.watermarking_config
        if not isinstance(config, SynthIDTextWatermarkingConfig):
            raise ValueError(f"watermarking_config is {config}; expected the SynthIDTextWatermarkingConfig that the text was made with")
        if len(config.keys) != detector.beta.shape[-1]:
            raise ValueError(f"watermarking_config has {len(config.keys)} keys; this detector was trained for {detector.beta.shape[-1]}")
        self.detector, self.eos_token_id = detector, -1 if eos_token_id is None else eos_token_id
        self.processor: SynthIDWatermark = config.construct_processor(0)

    def __call__(self, input_ids: Any) -> np.ndarray:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.shape[1] < self.processor.ngram_len:
            raise ValueError(f"input_ids have shape {ids.shape}; expected [B,T] with at least ngram_len={self.processor.ngram_len} tokens")
        return np.asarray(_score(self.detector, self.processor, ids, np.int32(self.eos_token_id)))


@jax.jit
def _score(detector: BayesianDetector, processor: SynthIDWatermark, ids: jax.Array, eos: jax.Array) -> jax.Array:
    alive = jnp.cumsum(ids == eos, 1)[:, processor.ngram_len - 1 :] == 0
    return detector(processor.compute_g_values(ids), processor.compute_context_repetition_mask(ids) & alive)
