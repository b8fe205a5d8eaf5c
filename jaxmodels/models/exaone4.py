"""EXAONE 4.0 (arXiv:2507.11407): norms after each half of a block and on every query and key head; where there is a window, most layers
attend to it with rope and the others to everything without.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import DecoderConfig, MixedLayers
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exaone4Config(MixedLayers, DecoderConfig):
    model_type: ClassVar[str] = "exaone4"

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = 4096
    sliding_window_pattern: int | str | None = 4  # every so many layers attend to everything; or one of L and G for each, repeated
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2

    def slides(self, layer: int) -> bool:
        pattern = self.sliding_window_pattern
        if self.sliding_window is None or not pattern:
            return False
        if isinstance(pattern, str):
            return pattern[layer % len(pattern)] == "L" and layer < self.num_hidden_layers - 1
        return (layer + 1) % pattern != 0


class Exaone4Attention(nn.Module):
    config: Exaone4Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        window = c.window(self.kind)
        dense = partial(Linear, init_std=c.initializer_range)
        norm = partial(RMSNorm, c.rms_norm_eps, axis=None)
        q = norm(name="q_norm")(dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H))
        k = norm(name="k_norm")(dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H))
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        rope = step.rope if c.sliding_window is None or window is not None else None
        options: dict[str, Any] = {"window": window, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, rope, **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Exaone4Block(nn.Module):
    config: Exaone4Config
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        norm = partial(RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Exaone4Attention(c, self.kind, name="self_attn")(x, state, step)
        x = x + norm(name="post_attention_layernorm")(h)
        return x + norm(name="post_feedforward_layernorm")(mlp(x, step)), state, weights


class Exaone4Model(LlamaModel):
    block = Exaone4Block


class Exaone4ForCausalLM(CausalLM):
    base = Exaone4Model


class Exaone4ForSequenceClassification(SequenceClassification):
    base = Exaone4Model


class Exaone4ForTokenClassification(TokenClassification):
    base = Exaone4Model


class Exaone4ForQuestionAnswering(QuestionAnswering):
    base = Exaone4Model
    base_name = "transformer"


FAMILY = Family(
    config=Exaone4Config,
    classes={
        "AutoModel": Exaone4Model,
        "AutoModelForCausalLM": Exaone4ForCausalLM,
        "AutoModelForSequenceClassification": Exaone4ForSequenceClassification,
        "AutoModelForTokenClassification": Exaone4ForTokenClassification,
        "AutoModelForQuestionAnswering": Exaone4ForQuestionAnswering,
    },
    rules=tied_head,
)
