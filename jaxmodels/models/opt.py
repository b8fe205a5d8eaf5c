"""OPT (arXiv:2205.01068): learned positions that begin at row 2; the 350m model normalises after each half and has narrower embeddings.

Axis letters: B batch, T tokens, D hidden, N heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.config import Config
from jaxmodels.convert.rules import Ignore, Op
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, drop_layer, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification
from jaxmodels.outputs import BaseModelOutput

FIRST_POSITION = 2  # the row of the first token; the two before it are never read


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
    model_type: ClassVar[str] = "opt"
    has_learned_positions: ClassVar[bool] = True
    spelled: ClassVar[Mapping[str, str]] = {"initializer_range": "init_std"}

    vocab_size: int = 50272
    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    activation_function: str = "relu"
    max_position_embeddings: int = 2048
    dropout: float = 0.1
    attention_dropout: float = 0.0
    layerdrop: float = 0.0
    word_embed_proj_dim: int = None  # type: ignore[assignment]  # hidden_size
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False  # models fine-tuned before a bug was found
    layer_norm_elementwise_affine: bool = True
    enable_bias: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)

    @property
    def has_final_norm(self) -> bool:
        return self.do_layer_norm_before and not self._remove_final_layer_norm


def layer_norm(config: OPTConfig, name: str | None = None) -> LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return LayerNorm(use_weight=affine, use_bias=affine, name=name)


class OPTAttention(nn.Module):
    config: OPTConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, use_bias=c.enable_bias, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dropout(self, dense(D, ("embed", "heads"), name="out_proj")(out), c.dropout), state, weights


class OPTDecoderLayer(nn.Module):
    config: OPTConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        dense = partial(Linear, use_bias=c.enable_bias, init_std=c.initializer_range)
        attention, fc1 = OPTAttention(c, name="self_attn"), dense(c.ffn_dim, ("mlp", "embed"), name="fc1")
        fc2 = dense(c.hidden_size, ("embed", "mlp"), name="fc2")
        norm_1, norm_2 = layer_norm(c, "self_attn_layer_norm"), layer_norm(c, "final_layer_norm")

        def mlp(x: jax.Array) -> jax.Array:
            h = step.constrain(activation(c.activation_function)(fc1(x)), "batch", "seq", "act_mlp")  # [B, T, F]
            return dropout(self, fc2(h), c.dropout)

        before = x = step.constrain(x, "batch", "seq", "act_embed")
        if c.do_layer_norm_before:
            h, state, weights = attention(norm_1(x), state, step)
            x = x + h
            x = x + mlp(norm_2(x))
        else:
            h, state, weights = attention(x, state, step)
            x = norm_1(x + h)
            x = norm_2(x + mlp(x))
        return drop_layer(self, before, x, c.layerdrop), state, weights


class OPTDecoder(Model):
    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.word_embed_proj_dim, c.initializer_range)
        self.embed_positions = Embedding(c.max_position_embeddings + FIRST_POSITION, c.hidden_size, c.initializer_range, axis=None)
        if c.word_embed_proj_dim != c.hidden_size:
            self.project_in = Linear(c.hidden_size, ("embed", None), init_std=c.initializer_range)
            self.project_out = Linear(c.word_embed_proj_dim, (None, "embed"), init_std=c.initializer_range)
        self.layers = Layers(OPTDecoderLayer, c, self.scan_layers, self.remat)
        if c.has_final_norm:
            self.final_layer_norm = layer_norm(c)

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
        c = self.config
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        x = self.embed_tokens(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        projected = c.word_embed_proj_dim != c.hidden_size
        x = self.project_in(x) if projected else x
        x = x + self.embed_positions(step.lookup(position_ids, c.learned_positions) + FIRST_POSITION, self.dtype)
        x, states, inputs, weights = self.layers(x, None if cache is None else cache.layers, step)
        x = self.final_layer_norm(x) if c.has_final_norm else x
        x = self.project_out(x) if projected else x
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class OPTModel(Model):
    def setup(self) -> None:
        self.decoder = OPTDecoder(**self.options())

    def embeddings(self) -> Embedding:
        return self.decoder.embed_tokens

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.decoder(*args, **kwargs)


class OPTForCausalLM(CausalLM):
    base = OPTModel


class OPTForSequenceClassification(SequenceClassification):
    base = OPTModel


class OPTForQuestionAnswering(QuestionAnswering):
    base = OPTModel


def rules(config: OPTConfig) -> tuple[Op, ...]:
    return (Ignore(("model.decoder.version",)), *tied_head(config, embeddings="model.decoder.embed_tokens.weight"))


FAMILY = Family(
    config=OPTConfig,
    classes={
        "AutoModel": OPTModel,
        "AutoModelForCausalLM": OPTForCausalLM,
        "AutoModelForSequenceClassification": OPTForSequenceClassification,
        "AutoModelForQuestionAnswering": OPTForQuestionAnswering,
    },
    rules=rules,
)
