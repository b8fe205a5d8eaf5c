"""Gemma 2 (arXiv:2408.00118): Gemma with norms before and after each half of a block, every other layer over a window, and soft caps on
the logits of attention and of the head.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.config import DecoderConfig, MixedLayers
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, Linear, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.gemma import GemmaModel, GemmaRMSNorm, causal_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(MixedLayers, DecoderConfig):
    model_type: ClassVar[str] = "gemma2"

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    use_bidirectional_attention: bool | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        causal_only(self)

    def slides(self, layer: int) -> bool:
        return layer % 2 == 0


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """x kept within ±cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap


class Gemma2Attention(nn.Module):
    config: Gemma2Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"scale": c.query_pre_attn_scalar**-0.5, "window": c.window(self.kind)}
        options |= {"softcap": c.attn_logit_softcapping, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Gemma2Block(nn.Module):
    config: Any
    kind: Hashable
    attention: ClassVar[type[nn.Module]] = Gemma2Attention

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_activation, c.initializer_range, name="mlp")
        norm = partial(GemmaRMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = self.attention(c, self.kind, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + norm(name="post_attention_layernorm")(h)
        h = mlp(norm(name="pre_feedforward_layernorm")(x), step)
        return x + norm(name="post_feedforward_layernorm")(h), state, weights


class Gemma2Model(GemmaModel):
    block = Gemma2Block


class Gemma2ForCausalLM(CausalLM):
    base = Gemma2Model

    def head(self, x: jax.Array) -> jax.Array:
        return softcap(super().head(x), self.config.final_logit_softcapping)


class Gemma2ForSequenceClassification(SequenceClassification):
    base = Gemma2Model


class Gemma2ForTokenClassification(TokenClassification):
    base = Gemma2Model


FAMILY = Family(
    config=Gemma2Config,
    classes={
        "AutoModel": Gemma2Model,
        "AutoModelForCausalLM": Gemma2ForCausalLM,
        "AutoModelForSequenceClassification": Gemma2ForSequenceClassification,
        "AutoModelForTokenClassification": Gemma2ForTokenClassification,
    },
    rules=tied_head,
)
