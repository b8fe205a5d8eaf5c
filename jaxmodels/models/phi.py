"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644, 2309.05463): attention and a GELU MLP side by side after one layer norm, biases throughout,
rope on a part of every head.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, F mlp, V vocabulary."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.config import DecoderConfig
from jaxmodels.convert.rules import Ignore
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, dropout, parameter, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.rope import RopeParameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhiConfig(DecoderConfig):
    model_type: ClassVar[str] = "phi"

    vocab_size: int = 51200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    qk_layernorm: bool = False
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


class PhiAttention(nn.Module):
    config: PhiConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        if c.qk_layernorm:
            q = LayerNorm(c.layer_norm_eps, axis=None, name="q_layernorm")(q)
            k = LayerNorm(c.layer_norm_eps, axis=None, name="k_layernorm")(k)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="dense")(out), state, weights


class PhiMLP(nn.Module):
    config: PhiConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        h = activation(c.hidden_act)(dense(c.intermediate_size, ("mlp", "embed"), name="fc1")(x))  # [B, T, F]
        return dense(c.hidden_size, ("embed", "mlp"), name="fc2")(step.constrain(h, "batch", "seq", "act_mlp"))


class PhiBlock(nn.Module):
    config: PhiConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        x = step.constrain(x, "batch", "seq", "act_embed")
        h = LayerNorm(self.config.layer_norm_eps, name="input_layernorm")(x)
        attended, state, weights = PhiAttention(self.config, name="self_attn")(h, state, step)
        drop = partial(dropout, self, rate=self.config.resid_pdrop)
        return drop(attended) + drop(PhiMLP(self.config, name="mlp")(h, step)) + x, state, weights


class PhiModel(LlamaModel):
    block = PhiBlock

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.layers = Layers(self.block, c, self.scan_layers, self.remat)
        self.final_layernorm = LayerNorm(c.layer_norm_eps)

    def embed(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        return dropout(self, super().embed(input_ids, inputs_embeds), self.config.embd_pdrop)

    @property
    def norm(self) -> LayerNorm:  # type: ignore[override]
        return self.final_layernorm


class HeadBias(nn.Module):
    """What is left of a head whose weight is the embeddings': `bias` [V]."""

    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        bias = parameter(self, "bias", nn.initializers.zeros, ("vocab",), logits.shape[-1:])
        return (logits + bias.astype(jnp.float32)).astype(logits.dtype)


class PhiForCausalLM(CausalLM):
    base = PhiModel

    def setup(self) -> None:
        self.add_base()
        c = self.config
        tied = c.tie_word_embeddings
        self.lm_head = HeadBias() if tied else Linear(c.vocab_size, ("vocab", "embed"), use_bias=True, init_std=c.initializer_range)

    def head(self, x: jax.Array) -> jax.Array:
        return self.lm_head(self.model.embeddings().attend(x) if self.config.tie_word_embeddings else x)


class PhiForSequenceClassification(SequenceClassification):
    base = PhiModel


class PhiForTokenClassification(TokenClassification):
    base = PhiModel


FAMILY = Family(
    config=PhiConfig,
    classes={
        "AutoModel": PhiModel,
        "AutoModelForCausalLM": PhiForCausalLM,
        "AutoModelForSequenceClassification": PhiForSequenceClassification,
        "AutoModelForTokenClassification": PhiForTokenClassification,
    },
    rules=lambda config: (Ignore(("**rotary_emb.inv_freq",)), *tied_head(config)),
)
