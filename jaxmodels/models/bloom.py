"""BLOOM (arXiv:2211.05100): ALiBi in place of positions, and a norm after the embedding.

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
from jaxmodels.convert.rules import Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.ops.attention import alibi, alibi_slopes
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class BloomConfig(Config):
    model_type: ClassVar[str] = "bloom"
    spelled: ClassVar[Mapping[str, str]] = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    old_names: ClassVar[Mapping[str, str]] = {"n_embed": "hidden_size"}

    vocab_size: int = 250880
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


class BloomAttention(nn.Module):
    config: BloomConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, bias=step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dropout(self, dense(D, ("embed", "heads"), name="dense")(out), c.hidden_dropout), state, weights


class BloomMLP(nn.Module):
    config: BloomConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        h = dense(4 * c.hidden_size, ("mlp", "embed"), name="dense_h_to_4h")(x)  # [B, T, F]
        h = step.constrain(jax.nn.gelu(h, approximate=True), "batch", "seq", "act_mlp")
        return dropout(self, dense(c.hidden_size, ("embed", "mlp"), name="dense_4h_to_h")(h), c.hidden_dropout)


class BloomBlock(nn.Module):
    config: BloomConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        norm = partial(LayerNorm, c.layer_norm_epsilon)
        x = step.constrain(x, "batch", "seq", "act_embed")
        y = norm(name="input_layernorm")(x)
        h, state, weights = BloomAttention(c, name="self_attention")(y, state, step)
        x = h + (y if c.apply_residual_connection_post_layernorm else x)
        y = norm(name="post_attention_layernorm")(x)
        x = BloomMLP(c, name="mlp")(y, step) + (y if c.apply_residual_connection_post_layernorm else x)
        return x, state, weights


class BloomModel(Model):
    def setup(self) -> None:
        c = self.config
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.word_embeddings_layernorm = LayerNorm(c.layer_norm_epsilon)
        self.h = Layers(BloomBlock, c, self.scan_layers, self.remat)
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
        """position_ids are taken and not used, as in HF: ALiBi sees how far tokens are apart."""
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        step = step.replace(rope=alibi(alibi_slopes(self.config.num_attention_heads), step.key_positions))
        x = self.word_embeddings(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x = self.word_embeddings_layernorm(x)
        x, states, inputs, weights = self.h(x, None if cache is None else cache.layers, step)
        x = self.ln_f(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class BloomForCausalLM(CausalLM):
    base = BloomModel
    base_name = "transformer"


class BloomForSequenceClassification(SequenceClassification):
    base = BloomModel
    base_name = "transformer"


class BloomForTokenClassification(TokenClassification):
    base = BloomModel
    base_name = "transformer"
    head_name = "classifier"


class BloomForQuestionAnswering(QuestionAnswering):
    base = BloomModel
    base_name = "transformer"


def rules(config: BloomConfig) -> tuple[Op, ...]:
    """The file holds query, key and value of one head after another."""
    attention, H = "transformer.h.*.self_attention", config.head_dim
    targets = tuple(f"{attention}.{n}_proj.*" for n in "qkv")
    return (
        Split(f"{attention}.query_key_value.*", targets, (H, H, H), groups=config.num_attention_heads),
        *tied_head(config, embeddings="transformer.word_embeddings.weight"),
    )


FAMILY = Family(
    config=BloomConfig,
    classes={
        "AutoModel": BloomModel,
        "AutoModelForCausalLM": BloomForCausalLM,
        "AutoModelForSequenceClassification": BloomForSequenceClassification,
        "AutoModelForTokenClassification": BloomForTokenClassification,
        "AutoModelForQuestionAnswering": BloomForQuestionAnswering,
    },
    rules=rules,
)
