"""GLM-4 (arXiv:2406.12793): GLM-4-0414 without its norms after each half of a block.

Axis letters: B batch, T tokens, D hidden."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.family import Family
from jaxmodels.layers import GatedMLP, RMSNorm, Step
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.glm4 import Glm4Attention, Glm4Config, Glm4Model, rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlmConfig(Glm4Config):
    model_type: ClassVar[str] = "glm"


class GlmBlock(nn.Module):
    config: GlmConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        norm = partial(RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Glm4Attention(c, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        return x + mlp(norm(name="post_attention_layernorm")(x), step), state, weights


class GlmModel(Glm4Model):
    block = GlmBlock


class GlmForCausalLM(CausalLM):
    base = GlmModel


class GlmForSequenceClassification(SequenceClassification):
    base = GlmModel


class GlmForTokenClassification(TokenClassification):
    base = GlmModel


FAMILY = Family(
    config=GlmConfig,
    classes={
        "AutoModel": GlmModel,
        "AutoModelForCausalLM": GlmForCausalLM,
        "AutoModelForSequenceClassification": GlmForSequenceClassification,
        "AutoModelForTokenClassification": GlmForTokenClassification,
    },
    rules=rules,
)
