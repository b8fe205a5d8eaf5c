"""Persimmon (Adept 2023): layer norms on every query and key head, a squared ReLU without a gate, rope on half of every head, query, key
and value in one matrix of the checkpoint.

Axis letters: B batch, T tokens, D hidden, N heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import Config
from jaxmodels.convert.rules import Ignore, Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.rope import RopeParameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersimmonConfig(Config):
    model_type: ClassVar[str] = "persimmon"

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    qk_layernorm: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


class PersimmonAttention(nn.Module):
    config: PersimmonConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        if c.qk_layernorm:
            q = LayerNorm(c.layer_norm_eps, axis=None, name="q_layernorm")(q)
            k = LayerNorm(c.layer_norm_eps, axis=None, name="k_layernorm")(k)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="dense")(out), state, weights


class PersimmonMLP(nn.Module):
    config: PersimmonConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        h = activation(c.hidden_act)(dense(c.intermediate_size, ("mlp", "embed"), name="dense_h_to_4h")(x))  # [B, T, F]
        h = step.constrain(h, "batch", "seq", "act_mlp")
        return dropout(self, dense(c.hidden_size, ("embed", "mlp"), name="dense_4h_to_h")(h), c.hidden_dropout)


class PersimmonBlock(nn.Module):
    config: PersimmonConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(LayerNorm, self.config.layer_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = PersimmonAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        return x + PersimmonMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step), state, weights


class PersimmonModel(LlamaModel):
    block = PersimmonBlock

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.layers = Layers(self.block, c, self.scan_layers, self.remat)
        self.final_layernorm = LayerNorm(c.layer_norm_eps)

    @property
    def norm(self) -> LayerNorm:  # type: ignore[override]
        return self.final_layernorm


class PersimmonForCausalLM(CausalLM):
    base = PersimmonModel


class PersimmonForSequenceClassification(SequenceClassification):
    base = PersimmonModel


class PersimmonForTokenClassification(TokenClassification):
    base = PersimmonModel


def rules(config: PersimmonConfig) -> Sequence[Op]:
    """The file holds query, key and value of one head after another."""
    attention, H = "model.layers.*.self_attn", config.head_dim
    targets = tuple(f"{attention}.{n}_proj.*" for n in "qkv")
    split = Split(f"{attention}.query_key_value.*", targets, (H, H, H), groups=config.num_attention_heads)
    return (Ignore(("**rotary_emb.inv_freq",)), split, *tied_head(config))


FAMILY = Family(
    config=PersimmonConfig,
    classes={
        "AutoModel": PersimmonModel,
        "AutoModelForCausalLM": PersimmonForCausalLM,
        "AutoModelForSequenceClassification": PersimmonForSequenceClassification,
        "AutoModelForTokenClassification": PersimmonForTokenClassification,
    },
    rules=rules,
)
