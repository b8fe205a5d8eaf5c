"""Granite 3.0 MoE (IBM 2024): Granite whose MLPs are mixtures of experts, weighted by the softmax over the chosen ones' logits.

Axis letters: B batch, T tokens, D hidden, E experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.convert.rules import Op, Rename, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, RMSNorm, Step
from jaxmodels.models.granite import GraniteAttention, GraniteConfig
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.moe import Experts, MoeCausalLM, RoutedExperts
from jaxmodels.ops.moe import top_k_softmax


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteMoeConfig(RoutedExperts, GraniteConfig):
    model_type: ClassVar[str] = "granitemoe"

    num_local_experts: int = 8


class GraniteMoeMLP(nn.Module):
    config: GraniteMoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E], in float32."""
        c = self.config
        E, F, std = c.num_local_experts, c.intermediate_size, c.initializer_range
        logits = Linear(E, (None, "embed"), init_std=std, name="router")(x).astype(jnp.float32)
        weights, chosen = top_k_softmax(logits, c.num_experts_per_tok)
        experts = Experts(E, F, c.hidden_act, std, c.experts_implementation, name="experts")
        return experts(x, weights.astype(x.dtype), chosen, step), logits


class GraniteMoeBlock(nn.Module):
    config: GraniteMoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        norm = partial(RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = GraniteAttention(c, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h * c.residual_multiplier
        h, logits = GraniteMoeMLP(c, name="block_sparse_moe")(norm(name="post_attention_layernorm")(x), step)
        return x + h * c.residual_multiplier, state, (weights, logits if step.output_router_logits else None)


class GraniteMoeModel(MixtralModel):
    block = GraniteMoeBlock

    def embed(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        return super().embed(input_ids, inputs_embeds) * self.config.embedding_multiplier


class GraniteMoeForCausalLM(MoeCausalLM):
    base = GraniteMoeModel

    def head(self, x: jax.Array) -> jax.Array:
        return super().head(x) / self.config.logits_scaling


def rules(config: GraniteMoeConfig) -> Sequence[Op]:
    moe = "**.block_sparse_moe"
    gate_up = (f"{moe}.experts.gate_proj", f"{moe}.experts.up_proj")
    return (
        Split(f"{moe}.input_linear.weight", gate_up, (config.intermediate_size,) * 2, axis=1),
        Rename(f"{moe}.output_linear.weight", f"{moe}.experts.down_proj"),
        Rename(f"{moe}.router.layer.weight", f"{moe}.router.weight"),
        *tied_head(config),
    )


FAMILY = Family(
    config=GraniteMoeConfig,
    classes={"AutoModel": GraniteMoeModel, "AutoModelForCausalLM": GraniteMoeForCausalLM},
    rules=rules,
)
