"""Mixtral (arXiv:2401.04088): Mistral whose MLPs are mixtures of experts.

Axis letters: B batch, T tokens, D hidden, E experts, k experts per token."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import RMSNorm, Step
from jaxmodels.model import QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.models.mistral import MistralAttention, MistralConfig
from jaxmodels.moe import MoeCausalLM, RoutedExperts, softmax_mixture, stacked
from jaxmodels.ops.rope import RopeParameters
from jaxmodels.outputs import MoeModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(RoutedExperts, MistralConfig):
    model_type: ClassVar[str] = "mixtral"

    rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(rope_theta=1e6)
    sliding_window: int | None = None
    num_local_experts: int = 8


class MixtralMLP(nn.Module):
    config: MixtralConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        return softmax_mixture(x, step, c, c.num_local_experts, c.intermediate_size, normalize=True)


class MixtralBlock(nn.Module):
    config: MixtralConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = MistralAttention(self.config, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        h, logits = MixtralMLP(self.config, name="block_sparse_moe")(norm(name="post_attention_layernorm")(x), step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class MixtralModel(LlamaModel):
    """A decoder whose blocks return (attention weights, router logits or None) in the place of attention weights."""

    block: ClassVar[type[nn.Module]] = MixtralBlock

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_router_logits: bool | None = None,
    ) -> MoeModelOutput:
        """output_router_logits: None for the config's."""
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        step = step.replace(rope=self.rope(step, position_ids), output_router_logits=asked)
        x = self.embed(input_ids, inputs_embeds)
        x, states, inputs, reports = self.layers(x, None if cache is None else cache.layers, step)
        x = self.norm(x)
        return MoeModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights for weights, _ in reports) if output_attentions else None,
            router_logits=tuple(logits for _, logits in reports if logits is not None) if asked else None,
        )


class MixtralForCausalLM(MoeCausalLM):
    base = MixtralModel


class MixtralForSequenceClassification(SequenceClassification):
    base = MixtralModel


class MixtralForTokenClassification(TokenClassification):
    base = MixtralModel


class MixtralForQuestionAnswering(QuestionAnswering):
    base = MixtralModel


FAMILY = Family(
    config=MixtralConfig,
    classes={
        "AutoModel": MixtralModel,
        "AutoModelForCausalLM": MixtralForCausalLM,
        "AutoModelForSequenceClassification": MixtralForSequenceClassification,
        "AutoModelForTokenClassification": MixtralForTokenClassification,
        "AutoModelForQuestionAnswering": MixtralForQuestionAnswering,
    },
    rules=lambda config: (*stacked("**.block_sparse_moe.experts", "w1", "w3", "w2"), *tied_head(config)),
)
