"""SmolLM3 (Bakouch et al. 2025): Llama whose every fourth layer has no rope (arXiv:2501.18795) and, where asked for, a window.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import KVSpec, SlidingKVSpec
from jaxmodels.config import MixedLayers
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaConfig, LlamaMLP, LlamaModel
from jaxmodels.ops.rope import RopeParameters

Kind = tuple[Hashable, bool]  # full_attention or sliding_attention, and whether it has rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(MixedLayers, LlamaConfig):
    model_type: ClassVar[str] = "smollm3"

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4  # type: ignore[assignment]  # null: as many as query heads
    max_position_embeddings: int = 32768
    rope_parameters: RopeParameters = RopeParameters(rope_theta=2e6)
    no_rope_layers: tuple[int, ...] | None = None  # 1 for layers that have it
    no_rope_layer_interval: int = 4
    use_sliding_window: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 128004
    bos_token_id: int | None = 128000
    eos_token_id: int | tuple[int, ...] | None = 128001

    def has_rope(self, layer: int) -> bool:
        return bool(self.no_rope_layers[layer] if self.no_rope_layers else (layer + 1) % self.no_rope_layer_interval)

    def slides(self, layer: int) -> bool:
        return self.use_sliding_window and self.sliding_window is not None and not self.has_rope(layer)

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        if self.no_rope_layers and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers has {len(self.no_rope_layers)} entries, expected num_hidden_layers = {self.num_hidden_layers} (or null)"
            )
        return tuple((kind, self.has_rope(i)) for i, kind in enumerate(super().layer_kinds))

    def layer_spec(self, kind: Kind) -> KVSpec | SlidingKVSpec:  # type: ignore[override]
        return super().layer_spec(kind[0])


class SmolLM3Attention(nn.Module):
    config: SmolLM3Config
    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        K: int = c.num_key_value_heads  # type: ignore[assignment]
        attention, has_rope = self.kind
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.window(attention), "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope if has_rope else None, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class SmolLM3Block(nn.Module):
    config: SmolLM3Config
    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = SmolLM3Attention(self.config, self.kind, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        x = x + LlamaMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x, state, weights


class SmolLM3Model(LlamaModel):
    block = SmolLM3Block


class SmolLM3ForCausalLM(CausalLM):
    base = SmolLM3Model


class SmolLM3ForSequenceClassification(SequenceClassification):
    base = SmolLM3Model


class SmolLM3ForTokenClassification(TokenClassification):
    base = SmolLM3Model


class SmolLM3ForQuestionAnswering(QuestionAnswering):
    base = SmolLM3Model
    base_name = "transformer"


FAMILY = Family(
    config=SmolLM3Config,
    classes={
        "AutoModel": SmolLM3Model,
        "AutoModelForCausalLM": SmolLM3ForCausalLM,
        "AutoModelForSequenceClassification": SmolLM3ForSequenceClassification,
        "AutoModelForTokenClassification": SmolLM3ForTokenClassification,
        "AutoModelForQuestionAnswering": SmolLM3ForQuestionAnswering,
    },
    rules=tied_head,
)
