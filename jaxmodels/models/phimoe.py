"""Phi-3.5-MoE (arXiv:2404.14219): Mixtral with layer norms, SparseMixer's routing and longrope.

Beyond the original length rows turn by longrope's long factors, as in Microsoft's code; transformers 5 keeps the short ones there and
changes only the factor on cos and sin. Routing is that of inference: no noise, and gradients are those of the weights it computes.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, E experts."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.family import Family, tied_head
from jaxmodels.layers import LayerNorm, Linear, Rope, Step, attend, weight_dropout
from jaxmodels.model import SequenceClassification
from jaxmodels.models.mixtral import MixtralConfig, MixtralModel
from jaxmodels.moe import Experts, MoeCausalLM, stacked
from jaxmodels.ops.moe import sparse_mixer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhimoeConfig(MixtralConfig):
    model_type: ClassVar[str] = "phimoe"

    vocab_size: int = 32064
    intermediate_size: int = 6400
    num_local_experts: int = 16
    router_jitter_noise: float = 0.01
    input_jitter_noise: float = 0.0
    lm_head_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok != 2:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}; SparseMixer sends every token to 2 experts")


class PhimoeAttention(nn.Module):
    config: PhimoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        rope, magnitude = step.rope
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        if magnitude is not None:
            q = (q * magnitude**2).astype(q.dtype)  # its own and the keys', which one number per row allows
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.sliding_window, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class PhimoeMLP(nn.Module):
    config: PhimoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        E, F, std = c.num_local_experts, c.intermediate_size, c.initializer_range
        logits = Linear(E, (None, "embed"), init_std=std, name="gate")(x)
        weights, chosen = sparse_mixer(logits, c.num_experts_per_tok, c.router_jitter_noise)
        return Experts(E, F, c.hidden_act, std, c.experts_implementation, name="experts")(x, weights, chosen, step), logits


class PhimoeBlock(nn.Module):
    config: PhimoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(LayerNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = PhimoeAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        h, logits = PhimoeMLP(self.config, name="block_sparse_moe")(norm(name="post_attention_layernorm")(x), step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class PhimoeModel(MixtralModel):
    block = PhimoeBlock

    def final_norm(self) -> LayerNorm:
        return LayerNorm(self.config.rms_norm_eps)

    def rope(self, step: Step, position_ids: jax.Array | None) -> tuple[Rope, jax.Array | None]:
        """The rotation, and what cos and sin are multiplied by in each row [B,1,1,1] where the config says so."""
        rope, head_dim = self.config.rope_parameters, self.config.head_dim
        short, long, original = rope.short_mscale, rope.long_mscale, rope.original_max_position_embeddings
        if short is None or long is None or original is None:
            return step.make_rope(rope, head_dim, position_ids, self.dtype), None
        turned = step.key_positions if position_ids is None else position_ids
        magnitude = jnp.where(turned.max(1) + 1 > original, long, short)[:, None, None, None]
        return step.make_rope(dataclasses.replace(rope, attention_factor=1.0), head_dim, position_ids, self.dtype), magnitude


class PhimoeForCausalLM(MoeCausalLM):
    base = PhimoeModel

    @property
    def head_bias(self) -> bool:  # type: ignore[override]
        return self.config.lm_head_bias


class PhimoeForSequenceClassification(SequenceClassification):
    base = PhimoeModel


FAMILY = Family(
    config=PhimoeConfig,
    classes={
        "AutoModel": PhimoeModel,
        "AutoModelForCausalLM": PhimoeForCausalLM,
        "AutoModelForSequenceClassification": PhimoeForSequenceClassification,
    },
    rules=lambda config: (*stacked("**.block_sparse_moe.experts", "w1", "w3", "w2"), *tied_head(config)),
)
