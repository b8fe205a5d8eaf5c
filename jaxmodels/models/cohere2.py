"""Command R7B and Command A (arXiv:2504.00698): Command R whose layers attend to a window with rope, every fourth to everything without.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import DecoderConfig, MixedLayers
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, LayerNorm, Linear, Step, attend, weight_dropout
from jaxmodels.models.cohere import CohereForCausalLM, CohereModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohere2Config(MixedLayers, DecoderConfig):
    model_type: ClassVar[str] = "cohere2"

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    attention_bias: bool = False
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 4
    logit_scale: float = 0.0625
    pad_token_id: int | None = 0
    bos_token_id: int | None = 5
    eos_token_id: int | tuple[int, ...] | None = 255001

    def slides(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_window_pattern != 0


class Cohere2Attention(nn.Module):
    config: Cohere2Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        window = c.window(self.kind)
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": window, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, None if window is None else step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Cohere2Block(nn.Module):
    config: Cohere2Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        x = step.constrain(x, "batch", "seq", "act_embed")
        h = LayerNorm(c.layer_norm_eps, use_bias=False, name="input_layernorm")(x)
        attended, state, weights = Cohere2Attention(c, self.kind, name="self_attn")(h, state, step)
        return x + attended + mlp(h, step), state, weights


class Cohere2Model(CohereModel):
    block = Cohere2Block


class Cohere2ForCausalLM(CohereForCausalLM):
    base = Cohere2Model


FAMILY = Family(
    config=Cohere2Config,
    classes={"AutoModel": Cohere2Model, "AutoModelForCausalLM": Cohere2ForCausalLM},
    rules=tied_head,
)
