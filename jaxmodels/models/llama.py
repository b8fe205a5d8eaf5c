"""Llama (arXiv:2302.13971; grouped queries 2307.09288; the llama3 rope scaling of Llama 3.1).

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.config import DecoderConfig
from jaxmodels.convert.rules import Ignore
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, Layers, Linear, RMSNorm, Step, activation, attend, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2


class LlamaAttention(nn.Module):
    config: LlamaConfig

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


class LlamaMLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=c.mlp_bias, init_std=c.initializer_range)
        gate = dense(c.intermediate_size, ("mlp", "embed"), name="gate_proj")(x)  # [B, T, F]
        up = dense(c.intermediate_size, ("mlp", "embed"), name="up_proj")(x)
        h = step.constrain(activation(c.hidden_act)(gate) * up, "batch", "seq", "act_mlp")
        return dense(c.hidden_size, ("embed", "mlp"), name="down_proj")(h)


class LlamaBlock(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = LlamaAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        x = x + LlamaMLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x), step)
        return x, state, weights


class LlamaModel(Model):
    block: ClassVar[type[nn.Module]] = LlamaBlock

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.layers = Layers(self.block, c, self.scan_layers, self.remat)
        self.norm = self.final_norm()

    def final_norm(self) -> Callable[[jax.Array], jax.Array]:
        return RMSNorm(self.config.rms_norm_eps)

    def embeddings(self) -> Embedding:
        return self.embed_tokens

    def embed(self, input_ids: jax.Array | None, inputs_embeds: jax.Array | None) -> jax.Array:
        return self.embed_tokens(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)

    def rope(self, step: Step, position_ids: jax.Array | None) -> Any:
        """What the layers find in step.rope."""
        return step.make_rope(self.config.rope_parameters, self.config.head_dim, position_ids, self.dtype)

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
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        step = step.replace(rope=self.rope(step, position_ids))
        x = self.embed(input_ids, inputs_embeds)
        x, states, inputs, weights = self.layers(x, None if cache is None else cache.layers, step)
        x = self.norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class LlamaForCausalLM(CausalLM):
    base = LlamaModel


class LlamaForSequenceClassification(SequenceClassification):
    base = LlamaModel


class LlamaForTokenClassification(TokenClassification):
    base = LlamaModel


class LlamaForQuestionAnswering(QuestionAnswering):
    base = LlamaModel
    base_name = "transformer"


FAMILY = Family(
    config=LlamaConfig,
    classes={
        "AutoModel": LlamaModel,
        "AutoModelForCausalLM": LlamaForCausalLM,
        "AutoModelForSequenceClassification": LlamaForSequenceClassification,
        "AutoModelForTokenClassification": LlamaForTokenClassification,
        "AutoModelForQuestionAnswering": LlamaForQuestionAnswering,
    },
    rules=lambda config: (Ignore(("**rotary_emb.inv_freq",)), *tied_head(config)),
)
