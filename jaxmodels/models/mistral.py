"""Mistral (arXiv:2310.06825): Llama whose layers attend to the last `sliding_window` tokens.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import KVSpec, SlidingKVSpec
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaConfig, LlamaMLP, LlamaModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    model_type: ClassVar[str] = "mistral"

    intermediate_size: int = 14336
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    def layer_spec(self, kind: Hashable) -> Any:
        if self.sliding_window is None:
            return KVSpec(self.num_key_value_heads, self.head_dim)
        return SlidingKVSpec(self.num_key_value_heads, self.head_dim, self.sliding_window)


class MistralAttention(nn.Module):
    config: MistralConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.sliding_window, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class MistralBlock(nn.Module):
    config: MistralConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = MistralAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        x = x + LlamaMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x, state, weights


class MistralModel(LlamaModel):
    block = MistralBlock


class MistralForCausalLM(CausalLM):
    base = MistralModel


class MistralForSequenceClassification(SequenceClassification):
    base = MistralModel


class MistralForTokenClassification(TokenClassification):
    base = MistralModel


class MistralForQuestionAnswering(QuestionAnswering):
    base = MistralModel


FAMILY = Family(
    config=MistralConfig,
    classes={
        "AutoModel": MistralModel,
        "AutoModelForCausalLM": MistralForCausalLM,
        "AutoModelForSequenceClassification": MistralForSequenceClassification,
        "AutoModelForTokenClassification": MistralForTokenClassification,
        "AutoModelForQuestionAnswering": MistralForQuestionAnswering,
    },
    rules=tied_head,
)
