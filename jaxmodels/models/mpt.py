"""MPT (MosaicML 2023): ALiBi, no bias anywhere, perhaps clipped queries, keys and values.

Axis letters: B batch, T tokens, D hidden, N heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from jaxmodels.cache import Cache
from jaxmodels.config import Config
from jaxmodels.convert.rules import Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.ops.attention import alibi, alibi_slopes
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class MptConfig(Config):
    """attn_config: the published dict; of it count clip_qkv, softmax_scale and attn_pdrop, and as in HF not alibi_bias_max."""

    model_type: ClassVar[str] = "mpt"
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    }

    vocab_size: int = 50368
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 2048
    layer_norm_epsilon: float = 1e-5
    attn_config: Mapping[str, Any] = FrozenDict()

    def __post_init__(self) -> None:
        if self.attn_config is None:
            object.__setattr__(self, "attn_config", FrozenDict())

    @property
    def attn_pdrop(self) -> float:
        """The one rate that HF applies, in the mlp too."""
        return self.attn_config.get("attn_pdrop", 0.0)


class MptAttention(nn.Module):
    config: MptConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H, clip = x.shape, c.num_attention_heads, c.head_dim, c.attn_config.get("clip_qkv")
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        if clip:
            q, k, v = (jnp.clip(y, -clip, clip) for y in (q, k, v))
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"scale": c.attn_config.get("softmax_scale"), "dropout": weight_dropout(self, c.attn_pdrop)}
        out, state, weights = attend(q, k, v, state, step, bias=step.rope, **options)  # [B, T, N*H]
        return dropout(self, dense(D, ("embed", "heads"), name="out_proj")(out), c.attn_pdrop), state, weights


class MptMLP(nn.Module):
    config: MptConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c, D = self.config, self.config.hidden_size
        dense = partial(Linear, init_std=c.initializer_range)
        h = jax.nn.gelu(dense(4 * D, ("mlp", "embed"), name="up_proj")(x), approximate=False)  # [B, T, F]
        h = step.constrain(h, "batch", "seq", "act_mlp")
        return dropout(self, dense(D, ("embed", "mlp"), name="down_proj")(h), c.attn_pdrop)


class MptBlock(nn.Module):
    config: MptConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(LayerNorm, self.config.layer_norm_epsilon, use_bias=False)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = MptAttention(self.config, name="attn")(norm(name="norm_1")(x), state, step)
        x = x + h
        x = x + MptMLP(self.config, name="ffn")(norm(name="norm_2")(x), step)
        return x, state, weights


class MptModel(Model):
    def setup(self) -> None:
        c = self.config
        self.wte = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.blocks = Layers(MptBlock, c, self.scan_layers, self.remat)
        self.norm_f = LayerNorm(c.layer_norm_epsilon, use_bias=False)

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
        """position_ids are taken and not used, as in HF: ALiBi sees how far tokens are apart."""
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        x = self.wte(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        step = step.replace(rope=alibi(alibi_slopes(self.config.num_attention_heads), step.key_positions))
        x, states, inputs, weights = self.blocks(x, None if cache is None else cache.layers, step)
        x = self.norm_f(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class MptForCausalLM(CausalLM):
    base = MptModel
    base_name = "transformer"


class MptForSequenceClassification(SequenceClassification):
    base = MptModel
    base_name = "transformer"


class MptForTokenClassification(TokenClassification):
    base = MptModel
    base_name = "transformer"
    head_name = "classifier"


class MptForQuestionAnswering(QuestionAnswering):
    base = MptModel
    base_name = "transformer"


def rules(config: MptConfig) -> tuple[Op, ...]:
    attention, D = "transformer.blocks.*.attn", config.hidden_size
    return (
        Split(f"{attention}.Wqkv.*", tuple(f"{attention}.{n}_proj.*" for n in "qkv"), (D, D, D)),
        *tied_head(config, embeddings="transformer.wte.weight"),
    )


FAMILY = Family(
    config=MptConfig,
    classes={
        "AutoModel": MptModel,
        "AutoModelForCausalLM": MptForCausalLM,
        "AutoModelForSequenceClassification": MptForSequenceClassification,
        "AutoModelForTokenClassification": MptForTokenClassification,
        "AutoModelForQuestionAnswering": MptForQuestionAnswering,
    },
    rules=rules,
)
