"""What families with routed experts share: the options, the experts' parameters, and the head that adds the router's loss.

Axis letters: B batch, T tokens, D hidden, F mlp, E experts, k experts per token, V vocabulary."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.convert.rules import StackExperts
from jaxmodels.layers import Linear, Packed, Step, activation, parameter
from jaxmodels.model import CausalLM, pack
from jaxmodels.ops.loss import IGNORE, LossOptions, causal_lm_loss
from jaxmodels.ops.moe import gated_mlp, load_balancing_loss, mix_experts, softmax_top_k
from jaxmodels.outputs import MoeCausalLMOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedExperts:
    """Fields of a config whose layers have routed experts. experts_implementation: `ragged_dot` (default) or `dense`, not saved."""

    num_experts_per_tok: int = 2
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    experts_implementation: str | None = None


class Experts(nn.Module):
    """`num` gated MLPs, `features` wide inside, as gate_proj and up_proj [E,F,D] and down_proj [E,D,F]. scale_input: the router's weights
    multiply what they read, not what they give."""

    num: int
    features: int
    hidden_act: str
    init_std: float = 0.02
    implementation: str | None = None
    scale_input: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array, chosen: jax.Array, step: Step) -> jax.Array:
        """x [B,T,D], weights and chosen [B,T,k] -> [B,T,D]."""
        E, F, D = self.num, self.features, x.shape[-1]
        make = partial(parameter, self, init=nn.initializers.normal(self.init_std))
        wide: Any = {"axes": ("experts", "mlp", "embed"), "shape": (E, F, D)}
        params = {"gate_proj": make("gate_proj", **wide), "up_proj": make("up_proj", **wide)}
        params["down_proj"] = make("down_proj", axes=("experts", "embed", "mlp"), shape=(E, D, F))
        mlp = partial(gated_mlp, activation(self.hidden_act))
        return mix_experts(mlp, params, x, weights, chosen, self.implementation, step.rules, self.scale_input)


def softmax_mixture(x: jax.Array, step: Step, config: Any, num: int, features: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """Inside a module: its parts `gate`, a linear router whose probabilities over all `num` experts choose and weight, and `experts`,
    `features` wide. Returns the mixture [B,T,D] and the router's logits [B,T,E]."""
    c = config
    logits = Linear(num, (None, "embed"), init_std=c.initializer_range, name="gate")(x)
    weights, chosen = softmax_top_k(logits, c.num_experts_per_tok, normalize)
    experts = Experts(num, features, c.hidden_act, c.initializer_range, c.experts_implementation, name="experts")
    return experts(x, weights, chosen, step), logits


def stacked(experts: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[StackExperts, ...]:
    """The rules for files that keep one linear per expert under `experts`, a pattern such as `**.mlp.experts`."""
    names = ((gate, "gate_proj"), (up, "up_proj"), (down, "down_proj"))
    return tuple(StackExperts(f"{experts}.#.{file}.weight", f"{experts}.{tree}") for file, tree in names)


class MoeCausalLM(CausalLM):
    """A CausalLM whose base model gives router logits: with output_router_logits the loss includes the router's."""

    router_loss: ClassVar[bool] = True  # where False, HF's loss has none

    def __call__(  # type: ignore[override]
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        labels: jax.Array | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_router_logits: bool | None = None,
        segment_ids: jax.Array | None = None,
        loss_options: LossOptions | None = None,
        num_items_in_batch: jax.Array | None = None,
    ) -> MoeCausalLMOutput:
        """output_router_logits: None for the config's; the other arguments as of CausalLM. Of a batch cut into parts, the router's loss of
        each part counts as its labels do; a loss by row is without it."""
        c = self.config
        if segment_ids is not None:
            attention_mask, labels = pack(segment_ids, attention_mask, labels)  # type: ignore[assignment]
        out: Any = self.run_base(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            cache,
            output_hidden_states,
            output_attentions,
            output_router_logits=output_router_logits,
        )
        x = out.last_hidden_state
        logits = loss = aux_loss = None
        if labels is not None and loss_options is not None:
            loss = self._training_loss(x, labels, loss_options, num_items_in_batch)
        else:
            logits = self.head(x[:, -logits_to_keep:])
            if self.rules is not None:
                logits = self.rules.constrain(logits, ("batch", "seq", "act_vocab"))
            loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        if out.router_logits and self.router_loss:
            packed = isinstance(attention_mask, Packed)
            mask = attention_mask.segment_ids > 0 if packed else attention_mask  # type: ignore[union-attr]
            real = None if mask is None else mask[:, -x.shape[1] :]
            aux_loss = load_balancing_loss(out.router_logits, c.num_experts_per_tok, real)
            if loss is not None and loss.ndim == 0:
                share = 1 if num_items_in_batch is None else jnp.sum(labels[:, 1:] != IGNORE) / num_items_in_batch  # type: ignore[index]
                loss = loss + c.router_aux_loss_coef * share * aux_loss
        return MoeCausalLMOutput(loss, aux_loss, logits, out.cache, out.hidden_states, out.attentions, out.router_logits)
