"""DeepSeek-V2 (arXiv:2405.04434): keys and values made from one small latent vector per token, and many small experts beside shared ones.

The cache holds what all heads share, [rotated key | latent], R + C numbers per token and layer (576 in DeepSeek-V2, where keys and
values would be 40960). Where few queries meet many keys, as in decoding, nothing is expanded: kv_b_proj's key half is moved to the
queries, its value half to the result, and the latent is both key and value.

Axis letters: B batch, T tokens, S keys, D hidden, N heads, R turned and P plain part of a key, V value, C latent, E experts, k a token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import KVSpec
from jaxmodels.config import DecoderConfig
from jaxmodels.convert.rules import Op
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, RMSNorm, Rope, Step, look, parameter, remember, weight_dropout
from jaxmodels.model import SequenceClassification
from jaxmodels.models.llama import LlamaMLP
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.moe import Experts, MoeCausalLM, RoutedExperts, stacked
from jaxmodels.ops.linear import einsum, linear
from jaxmodels.ops.moe import keep_groups, pick
from jaxmodels.ops.rope import yarn_magnitude


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(RoutedExperts, DecoderConfig):
    model_type: ClassVar[str] = "deepseek_v2"

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    first_k_dense_replace: int = 0  # so many layers without experts come first
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int | None = None  # type: ignore[assignment]
    routed_scaling_factor: float = 1.0
    topk_method: str | None = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool | None = False  # not read: HF does not

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim", self.qk_rope_head_dim)
        super().__post_init__()

    @property
    def layer_kinds(self) -> tuple[Hashable, ...]:
        return tuple("dense" if i < self.first_k_dense_replace else "experts" for i in range(self.num_hidden_layers))

    def layer_spec(self, kind: Hashable) -> KVSpec:
        return KVSpec(1, self.qk_rope_head_dim + self.kv_lora_rank, values=False)

    @property
    def attention_scale(self) -> float:
        rope, scale = self.rope_parameters, (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if rope.rope_type == "default" or not rope.mscale_all_dim:
            return scale
        return scale * yarn_magnitude(rope.factor or 1.0, rope.mscale_all_dim) ** 2


class LatentUp(nn.Module):
    """kv_b_proj's weight, [N, features, C], for every head the rows of its keys and then of its values."""

    heads: int
    features: int
    init_std: float

    @nn.compact
    def __call__(self, latent: int) -> jax.Array:
        shape = (self.heads * self.features, latent)
        return parameter(self, "weight", nn.initializers.normal(self.init_std), ("heads", "embed"), shape).reshape(self.heads, -1, latent)


class DeepseekV2Attention(nn.Module):
    config: DeepseekV2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, P, R, V, C = x.shape, c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
        dense, norm = partial(Linear, init_std=c.initializer_range), partial(RMSNorm, 1e-6, axis=None)  # not the config's eps
        if c.q_lora_rank is None:
            q = dense(N * (P + R), ("heads", "embed"), name="q_proj")(x)
        else:
            q = dense(c.q_lora_rank, (None, "embed"), c.attention_bias, name="q_a_proj")(x)
            q = dense(N * (P + R), ("heads", "embed"), name="q_b_proj")(norm(name="q_a_layernorm")(q))
        q = step.constrain(q.reshape(B, T, N, P + R), "batch", "seq", "act_heads", None)
        q = jnp.concatenate([q[..., P:], q[..., :P]], -1)  # the turned part first, as in k
        kv = dense(C + R, (None, "embed"), c.attention_bias, name="kv_a_proj_with_mqa")(x)
        k = jnp.concatenate([kv[..., C:], norm(name="kv_a_layernorm")(kv[..., :C])], -1)[:, :, None]  # [B, T, 1, R+C]
        options: dict[str, Any] = {"scale": c.attention_scale, "dropout": weight_dropout(self, c.attention_dropout)}
        q, k, _, positions, state = remember(q, k, None, state, step, step.rope)
        up, S = LatentUp(N, P + V, c.initializer_range, name="kv_b_proj")(C).astype(x.dtype), k.shape[1]
        if T * (C * (P + V) + S * 2 * (R + C)) < S * (C * (P + V) + T * (P + R + V)):  # multiplications by head, latent and expanded
            q = jnp.concatenate([q[..., :R], einsum("btnp,npc->btnc", q[..., R:], up[:, :P]).astype(x.dtype)], -1)
            out, weights = look(q, k, k, positions, step, **options)  # [B, T, N, R+C]
            out = einsum("btnc,nvc->btnv", out[..., R:], up[:, P:]).astype(x.dtype)
        else:
            kv = linear(k[:, :, 0, R:], up.reshape(-1, C)).reshape(B, S, N, P + V)
            k = jnp.concatenate([jnp.broadcast_to(k[..., :R], (B, S, N, R)), kv[..., :P]], -1)  # [B, S, N, R+P]
            out, weights = look(q, k, kv[..., P:], positions, step, **options)  # [B, T, N, V]
        return dense(D, ("embed", "heads"), c.attention_bias, name="o_proj")(out.reshape(B, T, N * V)), state, weights


class DeepseekV2MoE(nn.Module):
    config: DeepseekV2Config

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B,T,D] -> the router's logits [B,T,E], weights and experts [B,T,k]."""
        c = self.config
        logits = Linear(c.n_routed_experts, (None, "embed"), init_std=c.initializer_range, name="gate")(x.astype(jnp.float32))
        scores = jax.nn.softmax(logits, -1)
        if c.topk_method == "group_limited_greedy":
            scores = keep_groups(scores, c.n_group, c.topk_group, fill=0.0)  # type: ignore[arg-type]
        elif c.topk_method != "greedy":
            raise ValueError(f"topk_method is {c.topk_method!r} in the config; known are greedy and group_limited_greedy")
        weights, chosen = pick(scores, c.num_experts_per_tok)  # type: ignore[arg-type]
        return logits, weights * c.routed_scaling_factor, chosen

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        logits, weights, chosen = self.route(x)
        sizes = (c.n_routed_experts, c.moe_intermediate_size)
        experts = Experts(*sizes, c.hidden_act, c.initializer_range, c.experts_implementation, name="experts")
        shared = LlamaMLP(c.replace(intermediate_size=c.n_shared_experts * c.moe_intermediate_size), name="shared_experts")  # type: ignore[arg-type]
        return experts(x, weights, chosen, step) + shared(x, step), logits


class DeepseekV2Block(nn.Module):
    config: DeepseekV2Config
    kind: Hashable

    moe: ClassVar[type[nn.Module]] = DeepseekV2MoE

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c, norm = self.config, partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = DeepseekV2Attention(c, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        h, logits = norm(name="post_attention_layernorm")(x), None
        if self.kind == "dense":
            h = LlamaMLP(c, name="mlp")(h, step)  # type: ignore[arg-type]
        else:
            h, logits = self.moe(c, name="mlp")(h, step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class DeepseekV2Model(MixtralModel):
    block = DeepseekV2Block

    @property
    def axis_units(self) -> Mapping[str, int]:
        c = self.config
        return {"heads": math.gcd(c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim, c.v_head_dim)}

    def rope(self, step: Step, position_ids: jax.Array | None) -> Rope:
        c = self.config
        return step.make_rope(c.rope_parameters, c.qk_rope_head_dim, position_ids, jnp.float32, interleaved=True)


class DeepseekV2ForCausalLM(MoeCausalLM):
    base = DeepseekV2Model
    router_loss = False


class DeepseekV2ForSequenceClassification(SequenceClassification):
    base = DeepseekV2Model


def rules(config: DeepseekV2Config) -> Sequence[Op]:
    return (*stacked("**.mlp.experts"), *tied_head(config))


FAMILY = Family(
    config=DeepseekV2Config,
    classes={
        "AutoModel": DeepseekV2Model,
        "AutoModelForCausalLM": DeepseekV2ForCausalLM,
        "AutoModelForSequenceClassification": DeepseekV2ForSequenceClassification,
    },
    rules=rules,
)
