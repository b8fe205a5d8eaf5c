"""DeepSeek-V3 and R1 (arXiv:2412.19437): DeepSeek-V2 whose router scores experts by sigmoids and chooses them with a bias that balances the
load, and only the choice.

Axis letters: B batch, T tokens, D hidden, E experts, k a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.convert.rules import Ignore, Op
from jaxmodels.family import Family
from jaxmodels.layers import Rope, Step, parameter
from jaxmodels.model import SequenceClassification, TokenClassification
from jaxmodels.models import deepseek_v2
from jaxmodels.models.deepseek_v2 import DeepseekV2Block, DeepseekV2Config, DeepseekV2Model, DeepseekV2MoE
from jaxmodels.moe import MoeCausalLM
from jaxmodels.ops.linear import linear
from jaxmodels.ops.moe import keep_groups, normalized, pick


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DeepseekV2Config):
    model_type: ClassVar[str] = "deepseek_v3"

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = 128  # type: ignore[assignment]  # null: as many as query heads
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    first_k_dense_replace: int = 3
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int | None = 8
    routed_scaling_factor: float = 2.5
    topk_method: str | None = "noaux_tc"
    n_group: int | None = 8
    topk_group: int | None = 4
    norm_topk_prob: bool | None = True
    rope_interleave: bool | None = True
    num_nextn_predict_layers: int = 1


class DeepseekV3Router(nn.Module):
    experts: int
    init_std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B,T,D] -> logits [B,T,E] and the bias [E] of the choice, in float32."""
        shape, x = (self.experts, x.shape[-1]), x.astype(jnp.float32)
        logits = linear(x, parameter(self, "weight", nn.initializers.normal(self.init_std), (None, "embed"), shape))
        bias = parameter(self, "e_score_correction_bias", nn.initializers.zeros, (None,), shape[:1])
        return logits, bias.astype(jnp.float32)


class DeepseekV3MoE(DeepseekV2MoE):
    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        c: Any = self.config
        logits, bias = DeepseekV3Router(c.n_routed_experts, c.initializer_range, name="gate")(x)
        scores = jax.nn.sigmoid(logits)
        weights, chosen = pick(scores, c.num_experts_per_tok, by=keep_groups(scores + bias, c.n_group, c.topk_group, best=2))
        weights = normalized(weights, 1e-20) if c.norm_topk_prob else weights
        return logits, weights * c.routed_scaling_factor, chosen


class DeepseekV3Block(DeepseekV2Block):
    moe = DeepseekV3MoE


class DeepseekV3Model(DeepseekV2Model):
    block = DeepseekV3Block
    float32_params = (".*e_score_correction_bias",)

    def rope(self, step: Step, position_ids: jax.Array | None) -> Rope:
        c = self.config
        return step.make_rope(c.rope_parameters, c.qk_rope_head_dim, position_ids, self.dtype, interleaved=c.rope_interleave)


class DeepseekV3ForCausalLM(MoeCausalLM):
    base = DeepseekV3Model
    router_loss = False
    float32_params = DeepseekV3Model.float32_params


class DeepseekV3ForSequenceClassification(SequenceClassification):
    base = DeepseekV3Model
    float32_params = DeepseekV3Model.float32_params


class DeepseekV3ForTokenClassification(TokenClassification):
    base = DeepseekV3Model
    float32_params = DeepseekV3Model.float32_params


def rules(config: DeepseekV3Config) -> Sequence[Op]:
    """Files also hold layers that predict further tokens, after the others."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return (Ignore(tuple(f"model.layers.{layer}.**" for layer in layers)), *deepseek_v2.rules(config))


FAMILY = Family(
    config=DeepseekV3Config,
    classes={
        "AutoModel": DeepseekV3Model,
        "AutoModelForCausalLM": DeepseekV3ForCausalLM,
        "AutoModelForSequenceClassification": DeepseekV3ForSequenceClassification,
        "AutoModelForTokenClassification": DeepseekV3ForTokenClassification,
    },
    rules=rules,
)
