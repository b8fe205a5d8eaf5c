"""GPT-J (Wang and Komatsuzaki 2021): attention and mlp side by side after one norm, neighbouring dimensions rotated.

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
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification
from jaxmodels.ops.rope import RopeParameters
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTJConfig(Config):
    model_type: ClassVar[str] = "gptj"
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 50400
    hidden_size: int = 4096
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    rotary_dim: int | None = 64  # of each head; None is all of it
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    max_position_embeddings: int = 2048
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256


class GPTJAttention(nn.Module):
    config: GPTJConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attn_pdrop))  # [B, T, N*H]
        return dropout(self, dense(D, ("embed", "heads"), name="out_proj")(out), c.resid_pdrop), state, weights


class GPTJMLP(nn.Module):
    config: GPTJConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        h = dense(c.n_inner or 4 * c.hidden_size, ("mlp", "embed"), name="fc_in")(x)  # [B, T, F]
        h = step.constrain(activation(c.activation_function)(h), "batch", "seq", "act_mlp")
        return dropout(self, dense(c.hidden_size, ("embed", "mlp"), name="fc_out")(h), c.resid_pdrop)


class GPTJBlock(nn.Module):
    config: GPTJConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        x = step.constrain(x, "batch", "seq", "act_embed")
        y = LayerNorm(c.layer_norm_epsilon, name="ln_1")(x)
        h, state, weights = GPTJAttention(c, name="attn")(y, state, step)
        return h + GPTJMLP(c, name="mlp")(y, step) + x, state, weights


class GPTJModel(Model):
    def setup(self) -> None:
        c = self.config
        self.wte = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.h = Layers(GPTJBlock, c, self.scan_layers, self.remat)
        self.ln_f = LayerNorm(c.layer_norm_epsilon)

    def embeddings(self) -> Embedding:
        return self.wte

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
        rope = step.make_rope(RopeParameters(), c.rotary_dim or c.head_dim, position_ids, self.dtype, interleaved=True)
        x = self.wte(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x = dropout(self, x, c.embd_pdrop)
        x, states, inputs, weights = self.h(x, None if cache is None else cache.layers, step.replace(rope=rope))
        x = self.ln_f(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class GPTJForCausalLM(CausalLM):
    base = GPTJModel
    base_name = "transformer"
    head_bias = True


class GPTJForSequenceClassification(SequenceClassification):
    base = GPTJModel
    base_name = "transformer"


class GPTJForQuestionAnswering(QuestionAnswering):
    base = GPTJModel
    base_name = "transformer"


def rules(config: GPTJConfig) -> tuple[Op, ...]:
    attention = "transformer.h.*.attn"
    buffers = ("bias", "masked_bias", "embed_positions")
    return (Ignore(tuple(f"{attention}.{name}" for name in buffers)), *tied_head(config, embeddings="transformer.wte.weight"))


FAMILY = Family(
    config=GPTJConfig,
    classes={
        "AutoModel": GPTJModel,
        "AutoModelForCausalLM": GPTJForCausalLM,
        "AutoModelForSequenceClassification": GPTJForSequenceClassification,
        "AutoModelForQuestionAnswering": GPTJForQuestionAnswering,
    },
    rules=rules,
)
