"""OLMo (arXiv:2402.00838): Llama with layer norms that have no parameters and, where asked for, queries, keys and values clipped.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.config import DecoderConfig
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, Linear, Rope, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.norm import layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoConfig(DecoderConfig):
    model_type: ClassVar[str] = "olmo"

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    attention_bias: bool = False
    clip_qkv: float | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 50279


def norm(x: jax.Array) -> jax.Array:
    return layer_norm(x, None, None, 1e-5)


class OlmoAttention(nn.Module):
    config: OlmoConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        clip = lambda x: x if c.clip_qkv is None else jnp.clip(x, -c.clip_qkv, c.clip_qkv)
        q = clip(dense(N * H, ("heads", "embed"), name="q_proj")(x)).reshape(B, T, N, H)
        k = clip(dense(K * H, ("kv_heads", "embed"), name="k_proj")(x)).reshape(B, T, K, H)
        v = clip(dense(K * H, ("kv_heads", "embed"), name="v_proj")(x)).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class OlmoBlock(nn.Module):
    config: OlmoConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = OlmoAttention(c, name="self_attn")(norm(x), state, step)
        x = x + h
        return x + mlp(norm(x), step), state, weights


class OlmoModel(LlamaModel):
    block = OlmoBlock

    def final_norm(self) -> Callable[[jax.Array], jax.Array]:
        return norm

    def rope(self, step: Step, position_ids: jax.Array | None) -> Rope:
        return step.make_rope(self.config.rope_parameters, self.config.head_dim, position_ids, jnp.float32)


class OlmoForCausalLM(CausalLM):
    base = OlmoModel


class OlmoForSequenceClassification(SequenceClassification):
    base = OlmoModel


FAMILY = Family(
    config=OlmoConfig,
    classes={
        "AutoModel": OlmoModel,
        "AutoModelForCausalLM": OlmoForCausalLM,
        "AutoModelForSequenceClassification": OlmoForSequenceClassification,
    },
    rules=tied_head,
)
