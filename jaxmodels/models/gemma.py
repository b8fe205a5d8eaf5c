"""Gemma (arXiv:2403.08295): Llama with scaled embeddings, norms whose weights are offsets from 1, and a tanh GELU in the MLP.

Axis letters: B batch, T tokens, D hidden."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Step, parameter
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaAttention, LlamaConfig, LlamaMLP, LlamaModel
from jaxmodels.ops.norm import rms_norm_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaConfig):
    model_type: ClassVar[str] = "gemma"

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    use_bidirectional_attention: bool | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        causal_only(self)
        if self.hidden_act == "gelu":  # what the first releases say; they were trained with the tanh form
            object.__setattr__(self, "hidden_act", "gelu_pytorch_tanh")


def causal_only(config: Any) -> None:
    if config.use_bidirectional_attention:
        raise ValueError(f"use_bidirectional_attention is true; {config.model_type} is here as a causal decoder, with false or null")


class GemmaRMSNorm(nn.Module):
    """`weight` [D] is what the factor exceeds 1 by."""

    eps: float
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.zeros, (self.axis,), x.shape[-1:])
        return rms_norm_once(x, 1 + weight.astype(jnp.float32), self.eps)


class GemmaBlock(nn.Module):
    config: GemmaConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(GemmaRMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = LlamaAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        x = x + LlamaMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x, state, weights


class GemmaModel(LlamaModel):
    block: ClassVar[type[nn.Module]] = GemmaBlock

    def final_norm(self) -> GemmaRMSNorm:
        return GemmaRMSNorm(self.config.rms_norm_eps)

    def embed(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        if inputs_embeds is not None:
            return inputs_embeds.astype(self.dtype)
        return self.embed_tokens(input_ids, self.dtype) * jnp.asarray(self.config.hidden_size**0.5, self.dtype)  # rounded as torch does


class GemmaForCausalLM(CausalLM):
    base = GemmaModel


class GemmaForSequenceClassification(SequenceClassification):
    base = GemmaModel


class GemmaForTokenClassification(TokenClassification):
    base = GemmaModel


FAMILY = Family(
    config=GemmaConfig,
    classes={
        "AutoModel": GemmaModel,
        "AutoModelForCausalLM": GemmaForCausalLM,
        "AutoModelForSequenceClassification": GemmaForSequenceClassification,
        "AutoModelForTokenClassification": GemmaForTokenClassification,
    },
    rules=tied_head,
)
