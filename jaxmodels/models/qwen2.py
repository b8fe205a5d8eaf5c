"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115): Llama with biases on queries, keys and values, whose later layers may attend to
a window.

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
class Qwen2Config(MixedLayers, LlamaConfig):
    model_type: ClassVar[str] = "qwen2"

    vocab_size: int = 151936
    intermediate_size: int = 22016
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def slides(self, layer: int) -> bool:
        return self.use_sliding_window and self.sliding_window is not None and layer >= self.max_window_layers


class Qwen2Attention(nn.Module):
    config: Qwen2Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), use_bias=True, name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), use_bias=True, name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), use_bias=True, name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.window(self.kind), "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Qwen2Block(nn.Module):
    config: Qwen2Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Qwen2Attention(self.config, self.kind, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        x = x + LlamaMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x, state, weights


class Qwen2Model(LlamaModel):
    block = Qwen2Block


class Qwen2ForCausalLM(CausalLM):
    base = Qwen2Model


class Qwen2ForSequenceClassification(SequenceClassification):
    base = Qwen2Model


class Qwen2ForTokenClassification(TokenClassification):
    base = Qwen2Model


class Qwen2ForQuestionAnswering(QuestionAnswering):
    base = Qwen2Model
    base_name = "transformer"


FAMILY = Family(
    config=Qwen2Config,
    classes={
        "AutoModel": Qwen2Model,
        "AutoModelForCausalLM": Qwen2ForCausalLM,
        "AutoModelForSequenceClassification": Qwen2ForSequenceClassification,
        "AutoModelForTokenClassification": Qwen2ForTokenClassification,
        "AutoModelForQuestionAnswering": Qwen2ForQuestionAnswering,
    },
    rules=tied_head,
)
