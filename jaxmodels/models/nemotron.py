"""Nemotron-4 and Minitron (arXiv:2402.16819, 2407.14679): layer norms that store their weight less one, a squared ReLU without a gate, rope
on half of every head.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import DecoderConfig
from jaxmodels.convert.rules import Ignore
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, Step, activation, attend, parameter, weight_dropout
from jaxmodels.model import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.norm import layer_norm
from jaxmodels.ops.rope import RopeParameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class NemotronConfig(DecoderConfig):
    model_type: ClassVar[str] = "nemotron"

    vocab_size: int = 256000
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 32
    num_attention_heads: int = 48
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.0134
    norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 3


class NemotronLayerNorm1P(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.zeros, ("embed",), x.shape[-1:])
        bias = parameter(self, "bias", nn.initializers.zeros, ("embed",), x.shape[-1:])
        return layer_norm(x, weight + 1, bias, self.eps)


class NemotronAttention(nn.Module):
    config: NemotronConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class NemotronMLP(nn.Module):
    config: NemotronConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=c.mlp_bias, init_std=c.initializer_range)
        h = activation(c.hidden_act)(dense(c.intermediate_size, ("mlp", "embed"), name="up_proj")(x))  # [B, T, F]
        return dense(c.hidden_size, ("embed", "mlp"), name="down_proj")(step.constrain(h, "batch", "seq", "act_mlp"))


class NemotronBlock(nn.Module):
    config: NemotronConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(NemotronLayerNorm1P, self.config.norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = NemotronAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        return x + NemotronMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step), state, weights


class NemotronModel(LlamaModel):
    block = NemotronBlock

    def final_norm(self) -> NemotronLayerNorm1P:
        return NemotronLayerNorm1P(self.config.norm_eps)


class NemotronForCausalLM(CausalLM):
    base = NemotronModel


class NemotronForSequenceClassification(SequenceClassification):
    base = NemotronModel


class NemotronForTokenClassification(TokenClassification):
    base = NemotronModel


class NemotronForQuestionAnswering(QuestionAnswering):
    base = NemotronModel
    base_name = "transformer"


FAMILY = Family(
    config=NemotronConfig,
    classes={
        "AutoModel": NemotronModel,
        "AutoModelForCausalLM": NemotronForCausalLM,
        "AutoModelForSequenceClassification": NemotronForSequenceClassification,
        "AutoModelForTokenClassification": NemotronForTokenClassification,
        "AutoModelForQuestionAnswering": NemotronForQuestionAnswering,
    },
    rules=lambda config: (Ignore(("**rotary_emb.inv_freq",)), *tied_head(config)),
)
