"""Granite (IBM 2024, Granite 3.0 Language Models): Llama with multipliers on embeddings, attention, residual branches and logits.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.model import CausalLM
from jaxmodels.models.llama import LlamaConfig, LlamaMLP, LlamaModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    model_type: ClassVar[str] = "granite"

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # in place of head_dim**-0.5
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0


class GraniteAttention(nn.Module):
    config: GraniteConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"scale": c.attention_multiplier, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class GraniteBlock(nn.Module):
    config: GraniteConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        norm = partial(RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = GraniteAttention(c, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h * c.residual_multiplier
        x = x + LlamaMLP(c, name="mlp")(norm(name="post_attention_layernorm")(x), step) * c.residual_multiplier
        return x, state, weights


class GraniteModel(LlamaModel):
    block = GraniteBlock

    def embed(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        return super().embed(input_ids, inputs_embeds) * self.config.embedding_multiplier


class GraniteForCausalLM(CausalLM):
    base = GraniteModel

    def head(self, x: jax.Array) -> jax.Array:
        return super().head(x) / self.config.logits_scaling


FAMILY = Family(
    config=GraniteConfig,
    classes={
        "AutoModel": GraniteModel,
        "AutoModelForCausalLM": GraniteForCausalLM,
    },
    rules=tied_head,
)
