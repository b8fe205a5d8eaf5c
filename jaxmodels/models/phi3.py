"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219, 2412.08905): Mistral whose checkpoints hold queries, keys and values in one matrix, gate and
up in another, with longrope (arXiv:2402.13753) for long contexts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import jax
from flax import linen as nn

from jaxmodels.convert.rules import Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import RMSNorm, Step, dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaMLP, LlamaModel
from jaxmodels.models.mistral import MistralAttention, MistralConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(MistralConfig):
    model_type: ClassVar[str] = "phi3"

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_key_value_heads: int = None  # type: ignore[assignment]  # as many as query heads
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    resid_pdrop: float = 0.0
    pad_token_id: int | None = 32000
    eos_token_id: int | tuple[int, ...] | None = 32000

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Longrope is also called su, or yarn in the first releases."""
        values = {"original_max_position_embeddings": cls.original_max_position_embeddings, **values}
        for name in ("rope_scaling", "rope_parameters"):
            rope = values.get(name)
            if isinstance(rope, Mapping) and (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):
                values[name] = {**{k: v for k, v in rope.items() if k != "type"}, "rope_type": "longrope"}
        return super().from_dict(values)


class Phi3Block(nn.Module):
    config: Phi3Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        norm, drop = partial(RMSNorm, c.rms_norm_eps), partial(dropout, self, rate=c.resid_pdrop)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = MistralAttention(c, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + drop(h)
        x = x + drop(LlamaMLP(c, name="mlp")(norm(name="post_attention_layernorm")(x), step))
        return x, state, weights


class Phi3Model(LlamaModel):
    block = Phi3Block


def rules(config: Phi3Config) -> Sequence[Op]:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    attention, mlp = "model.layers.*.self_attn", "model.layers.*.mlp"
    qkv = tuple(f"{attention}.{name}_proj.*" for name in "qkv")
    return (
        Split(f"{attention}.qkv_proj.*", qkv, tuple(n * config.head_dim for n in heads)),
        Split(f"{mlp}.gate_up_proj.*", (f"{mlp}.gate_proj.*", f"{mlp}.up_proj.*"), (config.intermediate_size,) * 2),
        *tied_head(config),
    )


class Phi3ForCausalLM(CausalLM):
    base = Phi3Model


class Phi3ForSequenceClassification(SequenceClassification):
    base = Phi3Model


class Phi3ForTokenClassification(TokenClassification):
    base = Phi3Model


FAMILY = Family(
    config=Phi3Config,
    classes={
        "AutoModel": Phi3Model,
        "AutoModelForCausalLM": Phi3ForCausalLM,
        "AutoModelForSequenceClassification": Phi3ForSequenceClassification,
        "AutoModelForTokenClassification": Phi3ForTokenClassification,
    },
    rules=rules,
)
