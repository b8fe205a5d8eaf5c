"""GLM-4-0414 (arXiv:2406.12793): norms before and after each half of a block, rope on neighbouring pairs of half of every head, gate and up
in one matrix of the checkpoint.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import DecoderConfig
from jaxmodels.convert.rules import Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, Linear, RMSNorm, Rope, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.rope import RopeParameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4Config(DecoderConfig):
    model_type: ClassVar[str] = "glm4"

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1.5625e-7
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 151329
    eos_token_id: int | tuple[int, ...] | None = (151329, 151336, 151338)


class Glm4Attention(nn.Module):
    config: Glm4Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), use_bias=c.attention_bias, name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), use_bias=c.attention_bias, name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), use_bias=c.attention_bias, name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Glm4Block(nn.Module):
    config: Glm4Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        norm = partial(RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Glm4Attention(c, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + norm(name="post_self_attn_layernorm")(h)
        h = mlp(norm(name="post_attention_layernorm")(x), step)
        return x + norm(name="post_mlp_layernorm")(h), state, weights


class Glm4Model(LlamaModel):
    block: ClassVar[type[nn.Module]] = Glm4Block

    def rope(self, step: Step, position_ids: jax.Array | None) -> Rope:
        c = self.config
        return step.make_rope(c.rope_parameters, c.head_dim, position_ids, self.dtype, interleaved=True)


def rules(config: Glm4Config) -> Sequence[Op]:
    mlp = "model.layers.*.mlp"
    gate_up = (f"{mlp}.gate_proj.*", f"{mlp}.up_proj.*")
    return (Split(f"{mlp}.gate_up_proj.*", gate_up, (config.intermediate_size,) * 2), *tied_head(config))


class Glm4ForCausalLM(CausalLM):
    base = Glm4Model


class Glm4ForSequenceClassification(SequenceClassification):
    base = Glm4Model


class Glm4ForTokenClassification(TokenClassification):
    base = Glm4Model


FAMILY = Family(
    config=Glm4Config,
    classes={
        "AutoModel": Glm4Model,
        "AutoModelForCausalLM": Glm4ForCausalLM,
        "AutoModelForSequenceClassification": Glm4ForSequenceClassification,
        "AutoModelForTokenClassification": Glm4ForTokenClassification,
    },
    rules=rules,
)
