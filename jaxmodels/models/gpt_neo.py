"""GPT-Neo (Black et al. 2021): GPT-2 whose every second layer sees the last `window_size` tokens, with attention that is not scaled.

Axis letters: B batch, T tokens, D hidden, N heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import KVSpec, SlidingKVSpec
from jaxmodels.config import Config
from jaxmodels.convert.rules import Ignore, Op
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import LayerNorm, Linear, Step, activation, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.gpt2 import GPT2Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoConfig(Config):
    """attention_types: pairs of a list of kinds, `global` or `local`, and how often it is repeated; together one kind per layer."""

    model_type: ClassVar[str] = "gpt_neo"
    has_learned_positions: ClassVar[bool] = True
    spelled: ClassVar[Mapping[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "embd_pdrop": "embed_dropout",
    }

    vocab_size: int = 50257
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int | None = None
    attention_types: tuple[tuple[tuple[str, ...], int], ...] = ((("global", "local"), 12),)
    window_size: int = 256
    activation_function: str = "gelu_new"
    max_position_embeddings: int = 2048
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0
    resid_dropout: float = 0.0
    classifier_dropout: float = 0.1
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    def __post_init__(self) -> None:
        kinds = self.layer_kinds
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {"global", "local"}:
            raise ValueError(f"attention_types give {kinds}; expected global or local for each of {self.num_hidden_layers} layers")

    @property
    def layer_kinds(self) -> tuple[Hashable, ...]:
        return tuple(kind for kinds, repeats in self.attention_types for kind in tuple(kinds) * repeats)

    def layer_spec(self, kind: Hashable) -> KVSpec | SlidingKVSpec:
        N, H = self.num_attention_heads, self.head_dim
        return SlidingKVSpec(N, H, self.window_size) if kind == "local" else KVSpec(N, H)


class GPTNeoSelfAttention(nn.Module):
    config: GPTNeoConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        window = c.window_size if self.kind == "local" else None
        options: dict[str, Any] = {"window": window, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, scale=1.0, **options)  # [B, T, N*H]
        out = dense(D, ("embed", "heads"), use_bias=True, name="out_proj")(out)
        return dropout(self, out, c.resid_dropout), state, weights


class GPTNeoAttention(nn.Module):
    """One level of names."""

    config: GPTNeoConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        return GPTNeoSelfAttention(self.config, self.kind, name="attention")(x, state, step)


class GPTNeoMLP(nn.Module):
    config: GPTNeoConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        h = dense(c.intermediate_size or 4 * c.hidden_size, ("mlp", "embed"), name="c_fc")(x)  # [B, T, F]
        h = step.constrain(activation(c.activation_function)(h), "batch", "seq", "act_mlp")
        return dropout(self, dense(c.hidden_size, ("embed", "mlp"), name="c_proj")(h), c.resid_dropout)


class GPTNeoBlock(nn.Module):
    config: GPTNeoConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(LayerNorm, self.config.layer_norm_epsilon)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = GPTNeoAttention(self.config, self.kind, name="attn")(norm(name="ln_1")(x), state, step)
        x = x + h
        x = x + GPTNeoMLP(self.config, name="mlp")(norm(name="ln_2")(x), step)
        return x, state, weights


class GPTNeoModel(GPT2Model):
    block = GPTNeoBlock


class GPTNeoForCausalLM(CausalLM):
    base = GPTNeoModel
    base_name = "transformer"


class GPTNeoForSequenceClassification(SequenceClassification):
    base = GPTNeoModel
    base_name = "transformer"


class GPTNeoForTokenClassification(TokenClassification):
    base = GPTNeoModel
    base_name = "transformer"
    head_name = "classifier"


class GPTNeoForQuestionAnswering(QuestionAnswering):
    base = GPTNeoModel
    base_name = "transformer"


def rules(config: GPTNeoConfig) -> tuple[Op, ...]:
    attention = "transformer.h.*.attn.attention"
    return (
        Ignore((f"{attention}.bias", f"{attention}.masked_bias")),
        *tied_head(config, embeddings="transformer.wte.weight"),
    )


FAMILY = Family(
    config=GPTNeoConfig,
    classes={
        "AutoModel": GPTNeoModel,
        "AutoModelForCausalLM": GPTNeoForCausalLM,
        "AutoModelForSequenceClassification": GPTNeoForSequenceClassification,
        "AutoModelForTokenClassification": GPTNeoForTokenClassification,
        "AutoModelForQuestionAnswering": GPTNeoForQuestionAnswering,
    },
    rules=rules,
)
