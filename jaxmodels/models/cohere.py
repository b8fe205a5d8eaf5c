"""Command R (Cohere 2024): attention and MLP side by side after one layer norm without bias, rope on neighbouring pairs, scaled logits.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.config import DecoderConfig
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, HeadNorm, LayerNorm, Linear, Rope, Step, attend, weight_dropout
from jaxmodels.model import CausalLM
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.rope import RopeParameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohereConfig(DecoderConfig):
    model_type: ClassVar[str] = "cohere"

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(rope_theta=5e5)
    attention_bias: bool = False
    use_qk_norm: bool = False
    logit_scale: float = 0.0625
    pad_token_id: int | None = 0
    bos_token_id: int | None = 5
    eos_token_id: int | tuple[int, ...] | None = 255001


class CohereAttention(nn.Module):
    config: CohereConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        if c.use_qk_norm:
            q = HeadNorm(c.layer_norm_eps, name="q_norm")(q)
            k = HeadNorm(c.layer_norm_eps, name="k_norm")(k)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class CohereBlock(nn.Module):
    config: CohereConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        x = step.constrain(x, "batch", "seq", "act_embed")
        h = LayerNorm(c.layer_norm_eps, use_bias=False, name="input_layernorm")(x)
        attended, state, weights = CohereAttention(c, name="self_attn")(h, state, step)
        return x + attended + mlp(h, step), state, weights


class CohereModel(LlamaModel):
    block: ClassVar[type[nn.Module]] = CohereBlock

    def final_norm(self) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, use_bias=False)

    def rope(self, step: Step, position_ids: jax.Array | None) -> Rope:
        c = self.config
        return step.make_rope(c.rope_parameters, c.head_dim, position_ids, jnp.float32, interleaved=True)


class CohereForCausalLM(CausalLM):
    base = CohereModel

    def head(self, x: jax.Array) -> jax.Array:
        return super().head(x) * self.config.logit_scale


FAMILY = Family(
    config=CohereConfig,
    classes={
        "AutoModel": CohereModel,
        "AutoModelForCausalLM": CohereForCausalLM,
    },
    rules=tied_head,
)
