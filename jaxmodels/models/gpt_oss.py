"""gpt-oss (arXiv:2508.10925): a sink in every softmax of attention, every other layer over a window, and experts of a clamped swiglu with
biases. The released files hold the experts' weights in mxfp4 (convert/dequantize.py).

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, E experts, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.config import DecoderConfig, MixedLayers
from jaxmodels.convert.rules import Op, Split, Transpose
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, Step, attend, parameter, weight_dropout
from jaxmodels.model import SequenceClassification, TokenClassification
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.models.olmo2 import Olmo2RMSNorm
from jaxmodels.moe import MoeCausalLM, RoutedExperts
from jaxmodels.ops.moe import Dot, mix_experts, top_k_softmax
from jaxmodels.ops.rope import RopeParameters

YARN = RopeParameters(
    rope_type="yarn",
    rope_theta=150000.0,
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(RoutedExperts, MixedLayers, DecoderConfig):
    model_type: ClassVar[str] = "gpt_oss"

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    hidden_act: str = "silu"  # not read: the experts' is a clamped swiglu
    max_position_embeddings: int = 131072
    rope_parameters: RopeParameters = YARN
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True
    sliding_window: int | None = 128
    tie_word_embeddings: bool = False
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def slides(self, layer: int) -> bool:
        return layer % 2 == 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Without a word of rope, yarn."""
        if not (values.get("rope_parameters") or values.get("rope_scaling")):
            values = {**values, "rope_scaling": {k: v for k, v in YARN.to_dict().items() if k != "rope_theta"}}
        return super().from_dict(values)


class GptOssAttention(nn.Module):
    config: GptOssConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        sinks = parameter(self, "sinks", nn.initializers.normal(c.initializer_range), (None,), (N,))
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.window(self.kind), "sinks": sinks, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


def clamped_swiglu(alpha: float, limit: float, x: jax.Array, w: Any, dot: Dot) -> jax.Array:
    """One expert, an `mlp` of mix_experts: the gate's sigmoid is `alpha` times as steep, and up is one more than it says."""
    gate = jnp.minimum(dot(x, w["gate_proj"], w["gate_proj_bias"]), limit)
    up = jnp.clip(dot(x, w["up_proj"], w["up_proj_bias"]), -limit, limit)
    return dot((up + 1) * (gate * jax.nn.sigmoid(gate * alpha)), w["down_proj"], w["down_proj_bias"])


class GptOssExperts(nn.Module):
    config: GptOssConfig

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array, chosen: jax.Array, step: Step) -> jax.Array:
        c = self.config
        E, F, D = c.num_local_experts, c.intermediate_size, c.hidden_size
        normal, zeros, params = nn.initializers.normal(c.initializer_range), nn.initializers.zeros, {}
        wide, narrow = (("experts", "mlp", "embed"), (E, F, D)), (("experts", "embed", "mlp"), (E, D, F))
        for name, (axes, shape) in {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}.items():
            params[name] = parameter(self, name, normal, axes, shape)
            params[f"{name}_bias"] = parameter(self, f"{name}_bias", zeros, axes[:2], shape[:2])
        mlp = partial(clamped_swiglu, c.swiglu_alpha, c.swiglu_limit)
        return mix_experts(mlp, params, x, weights, chosen, c.experts_implementation, step.rules)


class GptOssMLP(nn.Module):
    config: GptOssConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        logits = Linear(c.num_local_experts, (None, "embed"), use_bias=True, init_std=c.initializer_range, name="router")(x)
        weights, chosen = top_k_softmax(logits, c.num_experts_per_tok)
        return GptOssExperts(c, name="experts")(x, weights, chosen, step), logits


class GptOssBlock(nn.Module):
    config: GptOssConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c, norm = self.config, partial(Olmo2RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = GptOssAttention(c, self.kind, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        h, logits = GptOssMLP(c, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class GptOssModel(MixtralModel):
    block = GptOssBlock
    float16_unsafe = (r".*norm\.weight",)

    def final_norm(self) -> Olmo2RMSNorm:
        return Olmo2RMSNorm(self.config.rms_norm_eps)


class GptOssForCausalLM(MoeCausalLM):
    base = GptOssModel
    float16_unsafe = GptOssModel.float16_unsafe


class GptOssForSequenceClassification(SequenceClassification):
    base = GptOssModel
    float16_unsafe = GptOssModel.float16_unsafe


class GptOssForTokenClassification(TokenClassification):
    base = GptOssModel
    float16_unsafe = GptOssModel.float16_unsafe


def rules(config: GptOssConfig) -> Sequence[Op]:
    """Files hold [in, out], and gate and up in one, every second column. Turned round first, mxfp4 is split as whole rows."""
    parts = ("**.experts.gate_proj", "**.experts.up_proj")
    pairs: Any = {"sizes": (1, 1), "axis": 1, "groups": config.intermediate_size}
    return (
        Transpose("**.experts.*_proj", (0, 2, 1)),
        Split("**.experts.gate_up_proj", parts, **pairs),
        Split("**.experts.gate_up_proj_bias", tuple(f"{part}_bias" for part in parts), **pairs),
        *tied_head(config),
    )


FAMILY = Family(
    config=GptOssConfig,
    classes={
        "AutoModel": GptOssModel,
        "AutoModelForCausalLM": GptOssForCausalLM,
        "AutoModelForSequenceClassification": GptOssForSequenceClassification,
        "AutoModelForTokenClassification": GptOssForTokenClassification,
    },
    rules=rules,
)
