"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): Qwen2 whose MLPs are mixtures of experts with one more expert that every token sees, or
plain in some layers.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, E experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import MixedLayers
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.model import QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.moe import MoeCausalLM, RoutedExperts, softmax_mixture, stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseLayers(RoutedExperts, MixedLayers):
    """Fields of a config some of whose layers have experts. The kind of a layer is a pair: how it attends, whether it has experts."""

    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = ()
    moe_intermediate_size: int
    num_experts: int
    norm_topk_prob: bool = False

    def has_experts(self, layer: int) -> bool:
        return layer not in (self.mlp_only_layers or ()) and self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def layer_kinds(self) -> tuple[Hashable, ...]:
        return tuple((kind, self.has_experts(i)) for i, kind in enumerate(super().layer_kinds))

    def window(self, kind: Hashable) -> int | None:
        return super().window(kind[0])  # type: ignore[index]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2MoeConfig(SparseLayers, LlamaConfig):
    model_type: ClassVar[str] = "qwen2_moe"

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    max_position_embeddings: int = 32768
    qkv_bias: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts: int = 60
    num_experts_per_tok: int = 4
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def slides(self, layer: int) -> bool:
        return self.use_sliding_window and layer % 2 == 0 and layer < self.max_window_layers


class Qwen2MoeAttention(nn.Module):
    config: Qwen2MoeConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), use_bias=c.qkv_bias, name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), use_bias=c.qkv_bias, name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), use_bias=c.qkv_bias, name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.window(self.kind), "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Qwen2MoeMLP(nn.Module):
    config: Qwen2MoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        h, logits = softmax_mixture(x, step, c, c.num_experts, c.moe_intermediate_size, c.norm_topk_prob)
        shared = GatedMLP(c.shared_expert_intermediate_size, c.hidden_act, c.initializer_range, name="shared_expert")(x, step)
        gate = Linear(1, (None, "embed"), init_std=c.initializer_range, name="shared_expert_gate")(x)  # [B, T, 1]
        return h + jax.nn.sigmoid(gate) * shared, logits


class Qwen2MoeBlock(nn.Module):
    config: Any
    kind: Hashable

    attention: ClassVar[type[nn.Module]] = Qwen2MoeAttention
    mixture: ClassVar[type[nn.Module]] = Qwen2MoeMLP

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        norm = partial(RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        attention: Any = self.attention(c, self.kind, name="self_attn")
        h, state, weights = attention(norm(name="input_layernorm")(x), state, step)
        x = x + h
        h, logits = norm(name="post_attention_layernorm")(x), None
        if self.kind[1]:  # type: ignore[index]
            mixture: Any = self.mixture(c, name="mlp")
            h, logits = mixture(h, step)
        else:
            h = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")(h, step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class Qwen2MoeModel(MixtralModel):
    block = Qwen2MoeBlock


class Qwen2MoeForCausalLM(MoeCausalLM):
    base = Qwen2MoeModel


class Qwen2MoeForSequenceClassification(SequenceClassification):
    base = Qwen2MoeModel


class Qwen2MoeForTokenClassification(TokenClassification):
    base = Qwen2MoeModel


class Qwen2MoeForQuestionAnswering(QuestionAnswering):
    base = Qwen2MoeModel


FAMILY = Family(
    config=Qwen2MoeConfig,
    classes={
        "AutoModel": Qwen2MoeModel,
        "AutoModelForCausalLM": Qwen2MoeForCausalLM,
        "AutoModelForSequenceClassification": Qwen2MoeForSequenceClassification,
        "AutoModelForTokenClassification": Qwen2MoeForTokenClassification,
        "AutoModelForQuestionAnswering": Qwen2MoeForQuestionAnswering,
    },
    rules=lambda config: (*stacked("**.mlp.experts"), *tied_head(config)),
)
