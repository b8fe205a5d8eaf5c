"""GPTBigCode (SantaCoder, arXiv:2301.03988, and StarCoder, 2305.06161): GPT-2 with one key head for all queries (1911.02150).

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.convert.rules import Ignore, Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import LayerNorm, Linear, Step, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.gpt2 import GPT2MLP, GPT2Config, GPT2Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTBigCodeConfig(GPT2Config):
    model_type: ClassVar[str] = "gpt_bigcode"

    activation_function: str = "gelu_pytorch_tanh"
    multi_query: bool = True

    @property
    def num_key_value_heads(self) -> int:
        return 1 if self.multi_query else self.num_attention_heads


class GPTBigCodeAttention(nn.Module):
    config: GPTBigCodeConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"scale": None if c.scale_attn_weights else 1.0, "dropout": weight_dropout(self, c.attn_pdrop)}
        out, state, weights = attend(q, k, v, state, step, **options)  # [B, T, N*H]
        out = dense(D, ("embed", "heads"), init_std=c.residual_std, name="c_proj")(out)
        return dropout(self, out, c.resid_pdrop), state, weights


class GPTBigCodeBlock(nn.Module):
    config: GPTBigCodeConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(LayerNorm, self.config.layer_norm_epsilon)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = GPTBigCodeAttention(self.config, name="attn")(norm(name="ln_1")(x), state, step)
        x = x + h
        x = x + GPT2MLP(self.config, name="mlp")(norm(name="ln_2")(x), step)
        return x, state, weights


class GPTBigCodeModel(GPT2Model):
    block = GPTBigCodeBlock


class GPTBigCodeForCausalLM(CausalLM):
    base = GPTBigCodeModel
    base_name = "transformer"


class GPTBigCodeForSequenceClassification(SequenceClassification):
    base = GPTBigCodeModel
    base_name = "transformer"


class GPTBigCodeForTokenClassification(TokenClassification):
    base = GPTBigCodeModel
    base_name = "transformer"
    head_name = "classifier"


def rules(config: GPTBigCodeConfig) -> tuple[Op, ...]:
    """The file holds all queries, the key and the value; with as many key heads as queries, the three of one head after another."""
    attention, K, H = "transformer.h.*.attn", config.num_key_value_heads, config.head_dim
    targets = tuple(f"{attention}.{n}_proj.*" for n in "qkv")
    return (
        Ignore(("transformer.bias", f"{attention}.bias", f"{attention}.masked_bias")),
        Split(f"{attention}.c_attn.*", targets, (config.num_attention_heads // K * H, H, H), groups=K),
        *tied_head(config, embeddings="transformer.wte.weight"),
    )


FAMILY = Family(
    config=GPTBigCodeConfig,
    classes={
        "AutoModel": GPTBigCodeModel,
        "AutoModelForCausalLM": GPTBigCodeForCausalLM,
        "AutoModelForSequenceClassification": GPTBigCodeForSequenceClassification,
        "AutoModelForTokenClassification": GPTBigCodeForTokenClassification,
    },
    rules=rules,
)
