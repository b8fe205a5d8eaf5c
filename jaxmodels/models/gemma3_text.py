"""Gemma 3's text decoder (arXiv:2503.19786): five layers over a window to one over everything, each kind with a rope of its own, and an
RMS norm on every query and key head.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, ClassVar, Self

import jax
from flax import linen as nn
from flax.core import FrozenDict

from jaxmodels.config import DecoderConfig, MixedLayers
from jaxmodels.convert.rules import Alias, Ignore, Op
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Linear, Rope, Step, attend, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification
from jaxmodels.models.gemma import GemmaModel, GemmaRMSNorm, causal_only
from jaxmodels.models.gemma2 import Gemma2Block, softcap
from jaxmodels.ops.rope import RopeParameters

ROPES: FrozenDict[str, RopeParameters] = FrozenDict(
    {"full_attention": RopeParameters(rope_theta=1e6), "sliding_attention": RopeParameters()}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3TextConfig(MixedLayers, DecoderConfig):
    model_type: ClassVar[str] = "gemma3_text"
    part_of: ClassVar[str] = "gemma3"

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, RopeParameters] = ROPES  # type: ignore[assignment]  # by the kind of a layer
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 6
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        causal_only(self)

    def slides(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_window_pattern != 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Also in the older spelling: rope_theta and rope_scaling of the full layers, rope_local_base_freq of the others."""
        values = dict(values)
        found = {**(values.pop("rope_parameters", None) or {})}
        found["full_attention"] = found.get("full_attention") or {}
        if scaling := values.pop("rope_scaling", None):
            found["full_attention"] = {**found["full_attention"], **scaling}
        for kind, key in (("full_attention", "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
            defaults = {"rope_theta": values.pop(key, ROPES[kind].rope_theta)}
            defaults["max_position_embeddings"] = values.get("max_position_embeddings", cls.max_position_embeddings)
            rope = found.get(kind) or {}
            found[kind] = rope if isinstance(rope, RopeParameters) else RopeParameters.from_dict(rope, **defaults)
        return super().from_dict({**values, "rope_parameters": found})

    def to_dict(self) -> dict[str, Any]:
        ropes = {kind: rope.to_dict() for kind, rope in self.rope_parameters.items()}
        full, sliding = ropes["full_attention"], ropes["sliding_attention"]
        scaling = None if full["rope_type"] == "default" else {k: v for k, v in full.items() if k != "rope_theta"}
        older = {"rope_theta": full["rope_theta"], "rope_local_base_freq": sliding["rope_theta"], "rope_scaling": scaling}
        return {**super().to_dict(), "rope_parameters": ropes, **older}


class Gemma3Attention(nn.Module):
    config: Gemma3TextConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        norm = partial(GemmaRMSNorm, c.rms_norm_eps, axis=None)
        q = norm(name="q_norm")(dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H))
        k = norm(name="k_norm")(dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H))
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"scale": c.query_pre_attn_scalar**-0.5, "window": c.window(self.kind)}
        options["dropout"] = weight_dropout(self, c.attention_dropout)
        out, state, weights = attend(q, k, v, state, step, step.rope[self.kind], **options)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class Gemma3Block(Gemma2Block):
    attention = Gemma3Attention


class Gemma3TextModel(GemmaModel):
    block = Gemma3Block

    def rope(self, step: Step, position_ids: jax.Array | None) -> dict[Hashable, Rope]:
        c = self.config
        return {kind: step.make_rope(c.rope_parameters[kind], c.head_dim, position_ids, self.dtype) for kind in set(c.layer_kinds)}


class Gemma3ForCausalLM(CausalLM):
    base = Gemma3TextModel

    def head(self, x: jax.Array) -> jax.Array:
        return softcap(super().head(x), self.config.final_logit_softcapping)


class Gemma3TextForSequenceClassification(SequenceClassification):
    base = Gemma3TextModel


def rules(config: Gemma3TextConfig) -> tuple[Op, ...]:
    """Files of the whole Gemma 3 also hold a vision model, and have the language model under the first of these names, or the second."""
    names = {"model.**": ("language_model.model.**", "model.language_model.**"), "lm_head.**": ("language_model.lm_head.**",)}
    vision = (f"{prefix}{part}.**" for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))
    return (Ignore(tuple(vision)), *(Alias(name, others) for name, others in names.items()), *tied_head(config))


FAMILY = Family(
    config=Gemma3TextConfig,
    classes={
        "AutoModel": Gemma3TextModel,
        "AutoModelForCausalLM": Gemma3ForCausalLM,
        "AutoModelForSequenceClassification": Gemma3TextForSequenceClassification,
    },
    rules=rules,
)
