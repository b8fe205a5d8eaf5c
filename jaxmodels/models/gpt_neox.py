"""GPT-NeoX (arXiv:2204.06745) and Pythia: attention and mlp side by side, part of each head rotated.

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
from jaxmodels.convert.rules import Ignore, Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.ops.rope import RopeParameters
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(Config):
    model_type: ClassVar[str] = "gpt_neox"
    spelled: ClassVar[Mapping[str, str]] = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}

    vocab_size: int = 50432
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.25)
    attention_bias: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    classifier_dropout: float = 0.1
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2


class GPTNeoXAttention(nn.Module):
    config: GPTNeoXConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dropout(self, dense(D, ("embed", "heads"), name="dense")(out), c.hidden_dropout), state, weights


class GPTNeoXMLP(nn.Module):
    config: GPTNeoXConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        h = activation(c.hidden_act)(dense(c.intermediate_size, ("mlp", "embed"), name="dense_h_to_4h")(x))  # [B, T, F]
        h = step.constrain(h, "batch", "seq", "act_mlp")
        return dropout(self, dense(c.hidden_size, ("embed", "mlp"), name="dense_4h_to_h")(h), c.hidden_dropout)


class GPTNeoXLayer(nn.Module):
    config: GPTNeoXConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        norm, mlp = partial(LayerNorm, c.layer_norm_eps), GPTNeoXMLP(c, name="mlp")
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = GPTNeoXAttention(c, name="attention")(norm(name="input_layernorm")(x), state, step)
        norm_2 = norm(name="post_attention_layernorm")
        if c.use_parallel_residual:
            return mlp(norm_2(x), step) + h + x, state, weights
        h = h + x
        return mlp(norm_2(h), step) + h, state, weights


class GPTNeoXModel(Model):
    def setup(self) -> None:
        c = self.config
        self.embed_in = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.layers = Layers(GPTNeoXLayer, c, self.scan_layers, self.remat)
        self.final_layer_norm = LayerNorm(c.layer_norm_eps)

    def embeddings(self) -> Embedding:
        return self.embed_in

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
        step = step.replace(rope=step.make_rope(c.rope_parameters, c.head_dim, position_ids, self.dtype))
        x = self.embed_in(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x = dropout(self, x, c.hidden_dropout)
        x, states, inputs, weights = self.layers(x, None if cache is None else cache.layers, step)
        x = self.final_layer_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class GPTNeoXForCausalLM(CausalLM):
    base = GPTNeoXModel
    base_name = "gpt_neox"
    head_name = "embed_out"


class GPTNeoXForSequenceClassification(SequenceClassification):
    base = GPTNeoXModel
    base_name = "gpt_neox"


class GPTNeoXForTokenClassification(TokenClassification):
    base = GPTNeoXModel
    base_name = "gpt_neox"
    head_name = "classifier"


class GPTNeoXForQuestionAnswering(QuestionAnswering):
    base = GPTNeoXModel
    base_name = "gpt_neox"


def rules(config: GPTNeoXConfig) -> tuple[Op, ...]:
    """The file holds query, key and value of one head after another."""
    attention, H = "gpt_neox.layers.*.attention", config.head_dim
    targets = tuple(f"{attention}.{n}_proj.*" for n in "qkv")
    return (
        Ignore((f"{attention}.bias", f"{attention}.masked_bias", f"{attention}.rotary_emb.**")),
        Split(f"{attention}.query_key_value.*", targets, (H, H, H), groups=config.num_attention_heads),
        *tied_head(config, "embed_out.weight", "gpt_neox.embed_in.weight"),
    )


FAMILY = Family(
    config=GPTNeoXConfig,
    classes={
        "AutoModel": GPTNeoXModel,
        "AutoModelForCausalLM": GPTNeoXForCausalLM,
        "AutoModelForSequenceClassification": GPTNeoXForSequenceClassification,
        "AutoModelForTokenClassification": GPTNeoXForTokenClassification,
        "AutoModelForQuestionAnswering": GPTNeoXForQuestionAnswering,
    },
    rules=rules,
)
