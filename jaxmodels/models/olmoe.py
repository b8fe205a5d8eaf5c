"""OLMoE (arXiv:2409.02060): Mixtral with many small experts, RMS norms over all queries and all keys, and perhaps clipped projections.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, E experts."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.moe import MoeCausalLM, RoutedExperts, softmax_mixture, stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoeConfig(RoutedExperts, LlamaConfig):
    model_type: ClassVar[str] = "olmoe"

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    clip_qkv: float | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    pad_token_id: int | None = 1
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 50279


class OlmoeAttention(nn.Module):
    config: OlmoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        norm = partial(RMSNorm, c.rms_norm_eps)
        q = norm("heads", name="q_norm")(dense(N * H, ("heads", "embed"), name="q_proj")(x))
        k = norm("kv_heads", name="k_norm")(dense(K * H, ("kv_heads", "embed"), name="k_proj")(x))
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x)
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (q, k, v))
        q, k, v = q.reshape(B, T, N, H), k.reshape(B, T, K, H), v.reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class OlmoeMLP(nn.Module):
    config: OlmoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        return softmax_mixture(x, step, c, c.num_experts, c.intermediate_size, c.norm_topk_prob)


class OlmoeBlock(nn.Module):
    config: OlmoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = OlmoeAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        h, logits = OlmoeMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class OlmoeModel(MixtralModel):
    block = OlmoeBlock


class OlmoeForCausalLM(MoeCausalLM):
    base = OlmoeModel


FAMILY = Family(
    config=OlmoeConfig,
    classes={"AutoModel": OlmoeModel, "AutoModelForCausalLM": OlmoeForCausalLM},
    rules=lambda config: (*stacked("**.mlp.experts"), *tied_head(config)),
)
