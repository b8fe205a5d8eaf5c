"""Falcon (arXiv:2311.16867): 7B has one key head and attention beside the mlp, 40B groups of heads and a norm for each of the two; the
RefinedWeb models have ALiBi and attention before the mlp.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, F mlp, S keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.config import Config
from jaxmodels.convert.rules import Ignore, Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.ops.attention import alibi_slopes
from jaxmodels.ops.rope import RopeParameters
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconConfig(Config):
    model_type: ClassVar[str] = "falcon"
    old_names: ClassVar[Mapping[str, str]] = {"n_embed": "hidden_size"}

    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_kv_heads: int | None = None  # read by new_decoder_architecture alone
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    alibi: bool = False
    new_decoder_architecture: bool = False
    num_ln_in_parallel_attn: int | None = None
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    hidden_dropout: float | None = 0.0
    attention_dropout: float | None = 0.0
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters = RopeParameters()
    layer_norm_epsilon: float = 1e-5
    bos_token_id: int | None = 11
    eos_token_id: int | tuple[int, ...] | None = 11

    @property
    def num_key_value_heads(self) -> int:
        if self.new_decoder_architecture:
            return self.num_kv_heads or self.num_attention_heads
        return 1 if self.multi_query else self.num_attention_heads


def rounded_alibi(heads: int, k_positions: jax.Array) -> jax.Array:
    """The bias [B,N,1,S] of keys at [B,S]: positions, slopes and products rounded to bfloat16, as these models were trained, whatever the
    dtype. Rounding depends on where a row begins, so positions count from there."""
    rounded = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    positions = rounded(jnp.maximum(k_positions, 0).astype(jnp.float32))
    return rounded(rounded(jnp.asarray(alibi_slopes(heads)))[:, None, None] * positions[:, None, None, :])


class FalconAttention(nn.Module):
    config: FalconConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        places: dict[str, Any] = {"rope": step.rope}
        if c.alibi:  # HF drops no weights beside rope
            places = {"bias": step.rope, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, **places)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="dense")(out), state, weights


class FalconMLP(nn.Module):
    config: FalconConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=c.bias, init_std=c.initializer_range)
        h = dense(c.ffn_hidden_size or 4 * c.hidden_size, ("mlp", "embed"), name="dense_h_to_4h")(x)  # [B, T, F]
        h = step.constrain(activation(c.activation)(h), "batch", "seq", "act_mlp")
        return dense(c.hidden_size, ("embed", "mlp"), name="dense_4h_to_h")(h)


class FalconDecoderLayer(nn.Module):
    config: FalconConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        attention, mlp = FalconAttention(c, name="self_attention"), FalconMLP(c, name="mlp")
        norm = partial(LayerNorm, c.layer_norm_epsilon)
        x = step.constrain(x, "batch", "seq", "act_embed")
        if c.new_decoder_architecture and c.num_ln_in_parallel_attn != 1:
            h, state, weights = attention(norm(name="ln_attn")(x), state, step)
            return dropout(self, mlp(norm(name="ln_mlp")(x), step) + h, c.hidden_dropout) + x, state, weights
        y = norm(name="input_layernorm")(x)
        h, state, weights = attention(y, state, step)
        if c.new_decoder_architecture or c.parallel_attn:
            return dropout(self, mlp(y, step) + h, c.hidden_dropout) + x, state, weights
        x = x + dropout(self, h, c.attention_dropout)
        return dropout(self, mlp(norm(name="post_attention_layernorm")(x), step), c.hidden_dropout) + x, state, weights


class FalconModel(Model):
    def setup(self) -> None:
        c = self.config
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.h = Layers(FalconDecoderLayer, c, self.scan_layers, self.remat)
        self.ln_f = LayerNorm(c.layer_norm_epsilon)

    def embeddings(self) -> Embedding:
        return self.word_embeddings

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """With ALiBi position_ids are not used, as in HF."""
        c = self.config
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        if c.alibi:
            places = rounded_alibi(c.num_attention_heads, step.key_positions) * c.head_dim**-0.5
        else:
            places = step.make_rope(c.rope_parameters, c.head_dim, position_ids, self.dtype)
        x = self.word_embeddings(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x, states, inputs, weights = self.h(x, None if cache is None else cache.layers, step.replace(rope=places))
        x = self.ln_f(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class FalconForCausalLM(CausalLM):
    base = FalconModel
    base_name = "transformer"


class FalconForSequenceClassification(SequenceClassification):
    base = FalconModel
    base_name = "transformer"


class FalconForTokenClassification(TokenClassification):
    base = FalconModel
    base_name = "transformer"
    head_name = "classifier"


class FalconForQuestionAnswering(QuestionAnswering):
    base = FalconModel
    base_name = "transformer"


def rules(config: FalconConfig) -> tuple[Op, ...]:
    """The file holds, for each key head, its queries, its key and its value."""
    attention, K, H = "transformer.h.*.self_attention", config.num_key_value_heads, config.head_dim
    targets = tuple(f"{attention}.{n}_proj.*" for n in "qkv")
    return (
        Ignore((f"{attention}.rotary_emb.**", f"{attention}.maybe_rotary.**")),
        Split(f"{attention}.query_key_value.*", targets, (config.num_attention_heads // K * H, H, H), groups=K),
        *tied_head(config, embeddings="transformer.word_embeddings.weight"),
    )


FAMILY = Family(
    config=FalconConfig,
    classes={
        "AutoModel": FalconModel,
        "AutoModelForCausalLM": FalconForCausalLM,
        "AutoModelForSequenceClassification": FalconForSequenceClassification,
        "AutoModelForTokenClassification": FalconForTokenClassification,
        "AutoModelForQuestionAnswering": FalconForQuestionAnswering,
    },
    rules=rules,
)
