"""Qwen3-MoE (arXiv:2505.09388): Qwen3 whose MLPs are mixtures of experts, or plain in some layers.

Axis letters: B batch, T tokens, D hidden, E experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from flax import linen as nn

from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Step
from jaxmodels.model import QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.models.qwen2_moe import Qwen2MoeBlock, SparseLayers
from jaxmodels.models.qwen3 import Qwen3Attention
from jaxmodels.moe import MoeCausalLM, softmax_mixture, stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(SparseLayers, LlamaConfig):
    model_type: ClassVar[str] = "qwen3_moe"
    old_names: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def slides(self, layer: int) -> bool:
        return self.use_sliding_window and self.sliding_window is not None


class Qwen3MoeMLP(nn.Module):
    config: Qwen3MoeConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        return softmax_mixture(x, step, c, c.num_experts, c.moe_intermediate_size, c.norm_topk_prob)


class Qwen3MoeBlock(Qwen2MoeBlock):
    attention = Qwen3Attention
    mixture = Qwen3MoeMLP


class Qwen3MoeModel(MixtralModel):
    block = Qwen3MoeBlock


class Qwen3MoeForCausalLM(MoeCausalLM):
    base = Qwen3MoeModel


class Qwen3MoeForSequenceClassification(SequenceClassification):
    base = Qwen3MoeModel


class Qwen3MoeForTokenClassification(TokenClassification):
    base = Qwen3MoeModel


class Qwen3MoeForQuestionAnswering(QuestionAnswering):
    base = Qwen3MoeModel
    base_name = "transformer"


FAMILY = Family(
    config=Qwen3MoeConfig,
    classes={
        "AutoModel": Qwen3MoeModel,
        "AutoModelForCausalLM": Qwen3MoeForCausalLM,
        "AutoModelForSequenceClassification": Qwen3MoeForSequenceClassification,
        "AutoModelForTokenClassification": Qwen3MoeForTokenClassification,
        "AutoModelForQuestionAnswering": Qwen3MoeForQuestionAnswering,
    },
    rules=lambda config: (*stacked("**.mlp.experts"), *tied_head(config)),
)
