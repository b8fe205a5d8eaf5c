"""Qwen3 (arXiv:2505.09388): Llama with an RMS norm on every query and key head, whose later layers may attend to a window.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import MixedLayers
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaConfig, LlamaMLP, LlamaModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(MixedLayers, LlamaConfig):
    model_type: ClassVar[str] = "qwen3"

    vocab_size: int = 151936
    intermediate_size: int = 22016
    head_dim: int = 128
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def slides(self, layer: int) -> bool:
        return self.use_sliding_window and self.sliding_window is not None and layer >= self.max_window_layers


class Qwen3Attention(nn.Module):
    config: Qwen3Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        norm = partial(RMSNorm, c.rms_norm_eps, axis=None)
        q = norm(name="q_norm")(dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H))
        k = norm(name="k_norm")(dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H))
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.window(self.kind), "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Qwen3Block(nn.Module):
    config: Qwen3Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Qwen3Attention(self.config, self.kind, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        x = x + LlamaMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x, state, weights


class Qwen3Model(LlamaModel):
    block = Qwen3Block


class Qwen3ForCausalLM(CausalLM):
    base = Qwen3Model


class Qwen3ForSequenceClassification(SequenceClassification):
    base = Qwen3Model


class Qwen3ForTokenClassification(TokenClassification):
    base = Qwen3Model


class Qwen3ForQuestionAnswering(QuestionAnswering):
    base = Qwen3Model
    base_name = "transformer"


FAMILY = Family(
    config=Qwen3Config,
    classes={
        "AutoModel": Qwen3Model,
        "AutoModelForCausalLM": Qwen3ForCausalLM,
        "AutoModelForSequenceClassification": Qwen3ForSequenceClassification,
        "AutoModelForTokenClassification": Qwen3ForTokenClassification,
        "AutoModelForQuestionAnswering": Qwen3ForQuestionAnswering,
    },
    rules=tied_head,
)
