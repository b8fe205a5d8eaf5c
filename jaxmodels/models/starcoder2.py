"""StarCoder 2 (arXiv:2402.19173): layer norms, biases throughout, a plain GELU MLP and layers over a window.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import KVSpec, SlidingKVSpec
from jaxmodels.config import DecoderConfig
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import LayerNorm, Linear, Step, activation, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Starcoder2Config(DecoderConfig):
    model_type: ClassVar[str] = "starcoder2"

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int = 2
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    norm_epsilon: float = 1e-5
    sliding_window: int | None = None
    use_bias: bool = True
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.018042
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    def layer_spec(self, kind: Hashable) -> KVSpec | SlidingKVSpec:
        if self.sliding_window is None:
            return KVSpec(self.num_key_value_heads, self.head_dim)
        return SlidingKVSpec(self.num_key_value_heads, self.head_dim, self.sliding_window)


class Starcoder2Attention(nn.Module):
    config: Starcoder2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.use_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.sliding_window, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dropout(self, dense(D, ("embed", "heads"), name="o_proj")(out), c.residual_dropout), state, weights


class Starcoder2MLP(nn.Module):
    config: Starcoder2Config

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=c.use_bias, init_std=c.initializer_range)
        h = activation(c.hidden_act)(dense(c.intermediate_size, ("mlp", "embed"), name="c_fc")(x))  # [B, T, F]
        h = step.constrain(h, "batch", "seq", "act_mlp")
        return dropout(self, dense(c.hidden_size, ("embed", "mlp"), name="c_proj")(h), c.residual_dropout)


class Starcoder2Block(nn.Module):
    config: Starcoder2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(LayerNorm, self.config.norm_epsilon)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Starcoder2Attention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        x = x + Starcoder2MLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x, state, weights


class Starcoder2Model(LlamaModel):
    block = Starcoder2Block

    def embed(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        return dropout(self, super().embed(input_ids, inputs_embeds), self.config.embedding_dropout)

    def final_norm(self) -> LayerNorm:
        return LayerNorm(self.config.norm_epsilon)


class Starcoder2ForCausalLM(CausalLM):
    base = Starcoder2Model


class Starcoder2ForSequenceClassification(SequenceClassification):
    base = Starcoder2Model


class Starcoder2ForTokenClassification(TokenClassification):
    base = Starcoder2Model


FAMILY = Family(
    config=Starcoder2Config,
    classes={
        "AutoModel": Starcoder2Model,
        "AutoModelForCausalLM": Starcoder2ForCausalLM,
        "AutoModelForSequenceClassification": Starcoder2ForSequenceClassification,
        "AutoModelForTokenClassification": Starcoder2ForTokenClassification,
    },
    rules=tied_head,
)
