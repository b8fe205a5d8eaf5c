"""Falcon Mamba (arXiv:2410.05355): Mamba whose time steps, B and C are normalised, without weights.

Axis letters: B batch, T tokens, N state size, R time step rank."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.family import Family
from jaxmodels.models.mamba import MambaBlock, MambaConfig, MambaForCausalLM, MambaMixer, MambaModel, rules
from jaxmodels.ops.norm import rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconMambaConfig(MambaConfig):
    model_type: ClassVar[str] = "falcon_mamba"

    mixer_rms_eps: float = 1e-6


class FalconMambaMixer(MambaMixer):
    eps: float = 1e-6

    def normalize(self, dt: jax.Array, B: jax.Array, C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        unit = lambda x: rms_norm(x, jnp.ones(x.shape[-1:]), self.eps)
        return unit(dt), unit(B), unit(C)


class FalconMambaBlock(MambaBlock):
    mixer = FalconMambaMixer

    def make_mixer(self, **more: Any) -> nn.Module:
        return super().make_mixer(eps=self.config.mixer_rms_eps, **more)


class FalconMambaModel(MambaModel):
    block = FalconMambaBlock


class FalconMambaForCausalLM(MambaForCausalLM):
    base = FalconMambaModel


FAMILY = Family(
    config=FalconMambaConfig,
    classes={"AutoModel": FalconMambaModel, "AutoModelForCausalLM": FalconMambaForCausalLM},
    rules=rules,
)
