"""XGLM (arXiv:2112.10668): sines and cosines as positions, scaled embeddings.

Axis letters: B batch, T tokens, D hidden, N heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.config import Config
from jaxmodels.convert.rules import Ignore, Op
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, drop_layer, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model
from jaxmodels.outputs import BaseModelOutput

FIRST_POSITION = 2  # what the first token is numbered


@dataclasses.dataclass(frozen=True, kw_only=True)
class XGLMConfig(Config):
    model_type: ClassVar[str] = "xglm"
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "attention_heads",
        "initializer_range": "init_std",
    }

    vocab_size: int = 256008
    hidden_size: int = 1024
    ffn_dim: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    activation_function: str = "gelu"
    max_position_embeddings: int = 2048
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layerdrop: float = 0.0
    scale_embedding: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2


def sinusoids(numbers: jax.Array, features: int, blank: int | None) -> jax.Array:
    """Rows [B,T,features] float32 of the numbers [B,T]: sines, then cosines, of wavelengths from 2π to 20000π; zeros for `blank`."""
    half = features // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-np.log(10000) / (half - 1))
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)  # rounded once: numpy's float32 exp is 2 ulp off
    angles = numbers[..., None].astype(jnp.float32) * frequencies
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles), jnp.zeros((*numbers.shape, features % 2))], -1)
    return table if blank is None else jnp.where(numbers[..., None] == blank, 0, table)


class XGLMAttention(nn.Module):
    config: XGLMConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dropout(self, dense(D, ("embed", "heads"), name="out_proj")(out), c.dropout), state, weights


class XGLMDecoderLayer(nn.Module):
    config: XGLMConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        before = x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = XGLMAttention(c, name="self_attn")(LayerNorm(name="self_attn_layer_norm")(x), state, step)
        x = x + h
        h = activation(c.activation_function)(dense(c.ffn_dim, ("mlp", "embed"), name="fc1")(LayerNorm(name="final_layer_norm")(x)))
        h = dropout(self, step.constrain(h, "batch", "seq", "act_mlp"), c.activation_dropout)  # [B, T, F]
        h = x + dropout(self, dense(c.hidden_size, ("embed", "mlp"), name="fc2")(h), c.dropout)
        return drop_layer(self, before, h, c.layerdrop), state, weights


class XGLMModel(Model):
    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.layers = Layers(XGLMDecoderLayer, c, self.scan_layers, self.remat)
        self.layer_norm = LayerNorm()

    def embeddings(self) -> Embedding:
        return self.embed_tokens

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """inputs_embeds [B,T,D] are scaled already."""
        c = self.config
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids, self.dtype) * (c.hidden_size**0.5 if c.scale_embedding else 1.0)
        x = inputs_embeds.astype(self.dtype)
        x = x + sinusoids(step.lookup(position_ids) + FIRST_POSITION, c.hidden_size, c.pad_token_id).astype(self.dtype)
        x = dropout(self, x, c.dropout)
        x, states, inputs, weights = self.layers(x, None if cache is None else cache.layers, step)
        x = self.layer_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class XGLMForCausalLM(CausalLM):
    base = XGLMModel


def rules(config: XGLMConfig) -> tuple[Op, ...]:
    return (Ignore(("model.embed_positions.weights",)), *tied_head(config))


FAMILY = Family(
    config=XGLMConfig,
    classes={
        "AutoModel": XGLMModel,
        "AutoModelForCausalLM": XGLMForCausalLM,
    },
    rules=rules,
)
