"""OLMo 2 (arXiv:2501.00656): Llama with its norms after each half of a block, not before, and RMS norms over all queries and all keys.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.config import DecoderConfig
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, Linear, Rope, Step, attend, parameter, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.norm import rms_norm_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    model_type: ClassVar[str] = "olmo2"

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 50279


class Olmo2RMSNorm(nn.Module):
    eps: float
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm_once(x, parameter(self, "weight", nn.initializers.ones, (self.axis,), x.shape[-1:]), self.eps)


class Olmo2Attention(nn.Module):
    config: Olmo2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        norm = partial(Olmo2RMSNorm, c.rms_norm_eps)
        q = norm("heads", name="q_norm")(dense(N * H, ("heads", "embed"), name="q_proj")(x)).reshape(B, T, N, H)
        k = norm("kv_heads", name="k_norm")(dense(K * H, ("kv_heads", "embed"), name="k_proj")(x)).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Olmo2Block(nn.Module):
    config: Olmo2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        norm = partial(Olmo2RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Olmo2Attention(c, name="self_attn")(x, state, step)
        x = x + norm(name="post_attention_layernorm")(h)
        return x + norm(name="post_feedforward_layernorm")(mlp(x, step)), state, weights


class Olmo2Model(LlamaModel):
    block = Olmo2Block

    def final_norm(self) -> Olmo2RMSNorm:
        return Olmo2RMSNorm(self.config.rms_norm_eps)

    def rope(self, step: Step, position_ids: jax.Array | None) -> Rope:
        return step.make_rope(self.config.rope_parameters, self.config.head_dim, position_ids, jnp.float32)


class Olmo2ForCausalLM(CausalLM):
    base = Olmo2Model


class Olmo2ForSequenceClassification(SequenceClassification):
    base = Olmo2Model


FAMILY = Family(
    config=Olmo2Config,
    classes={
        "AutoModel": Olmo2Model,
        "AutoModelForCausalLM": Olmo2ForCausalLM,
        "AutoModelForSequenceClassification": Olmo2ForSequenceClassification,
    },
    rules=tied_head,
)
