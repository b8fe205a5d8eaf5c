"""Jamba (arXiv:2403.19887): blocks of Mamba, every eighth of attention instead, and mixtures of experts in every other one. No positions.

Axis letters: B batch, T tokens, D hidden, N query heads (of Mamba: state size), K kv heads, H head dim, R time step rank, E experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.cache import KVSpec, RecurrentSpec
from jaxmodels.config import Config
from jaxmodels.convert.rules import Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, GatedMLP, Layers, Linear, RMSNorm, Step, attend, weight_dropout
from jaxmodels.model import SequenceClassification
from jaxmodels.models.mamba import MambaMixer, mixer_spec
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.moe import Experts, MoeCausalLM, RoutedExperts, stacked
from jaxmodels.ops.moe import softmax_top_k
from jaxmodels.outputs import MoeModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class JambaConfig(RoutedExperts, Config):
    model_type: ClassVar[str] = "jamba"

    vocab_size: int = 65536
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    num_experts: int = 16
    expert_layer_period: int = 2
    expert_layer_offset: int = 1
    attn_layer_period: int = 8
    attn_layer_offset: int = 4
    attention_dropout: float = 0.0
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int | str = "auto"  # hidden_size / 16, rounded up
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        for kind in ("attn", "expert"):
            offset, period = getattr(self, f"{kind}_layer_offset"), getattr(self, f"{kind}_layer_period")
            if offset >= period:
                raise ValueError(f"{kind}_layer_offset is {offset}; expected less than {kind}_layer_period, which is {period}")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.mamba_dt_rank == "auto":
            object.__setattr__(self, "mamba_dt_rank", math.ceil(self.hidden_size / 16))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads  # rounded down, as in HF

    @property
    def layer_kinds(self) -> tuple[Hashable, ...]:
        """(whether it attends, its number of experts) for every layer."""
        attends = lambda i: i % self.attn_layer_period == self.attn_layer_offset
        routes = lambda i: i % self.expert_layer_period == self.expert_layer_offset
        return tuple((attends(i), self.num_experts if routes(i) else 1) for i in range(self.num_hidden_layers))

    def layer_spec(self, kind: Any) -> KVSpec | RecurrentSpec:
        if kind[0]:
            return KVSpec(self.num_key_value_heads, self.head_dim)
        return mixer_spec(self.mamba_expand * self.hidden_size, self.mamba_d_state, self.mamba_d_conv)


class JambaMixer(MambaMixer):
    eps: float = 1e-6

    def normalize(self, dt: jax.Array, B: jax.Array, C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        norm = partial(RMSNorm, self.eps, None)
        return norm(name="dt_layernorm")(dt), norm(name="b_layernorm")(B), norm(name="c_layernorm")(C)


class JambaAttention(nn.Module):
    config: JambaConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class JambaMoE(nn.Module):
    """The chosen experts are weighted by their probabilities among all."""

    config: JambaConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        logits = Linear(c.num_experts, (None, "embed"), init_std=c.initializer_range, name="router")(x)
        weights, chosen = softmax_top_k(logits, c.num_experts_per_tok)
        experts = Experts(c.num_experts, c.intermediate_size, c.hidden_act, c.initializer_range, c.experts_implementation, name="experts")
        return experts(x, weights.astype(x.dtype), chosen, step), logits


class JambaBlock(nn.Module):
    config: JambaConfig
    kind: Any

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c, (attends, experts) = self.config, self.kind
        norm = partial(RMSNorm, c.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, weights, logits = norm(name="input_layernorm")(x), None, None
        if attends:
            h, state, weights = JambaAttention(c, name="self_attn")(h, state, step)
        else:
            sizes: Any = {"state_size": c.mamba_d_state, "rank": c.mamba_dt_rank, "kernel": c.mamba_d_conv, "eps": c.rms_norm_eps}
            sizes |= {"use_bias": c.mamba_proj_bias, "use_conv_bias": c.mamba_conv_bias, "hidden_act": c.hidden_act}
            sizes |= {"init_std": c.initializer_range, "residual_std": c.initializer_range}
            mixer = JambaMixer(c.mamba_expand * c.hidden_size, **sizes, name="mamba")
            h, state = mixer(h, state, step)
        x = x + h
        h = norm(name="pre_ff_layernorm")(x)
        if experts > 1:
            h, logits = JambaMoE(c, name="feed_forward")(h, step)
        else:
            h = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="feed_forward")(h, step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class JambaModel(MixtralModel):
    """attentions and router_logits: those of the layers that have them."""

    block = JambaBlock

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.layers = Layers(self.block, c, self.scan_layers, self.remat)
        self.final_layernorm = RMSNorm(c.rms_norm_eps)

    def norm(self, x: jax.Array) -> jax.Array:
        return self.final_layernorm(x)

    def rope(self, step: Step, position_ids: jax.Array | None) -> None:
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> MoeModelOutput:
        out = super().__call__(*args, **kwargs)
        return out.replace(attentions=out.attentions and tuple(w for w in out.attentions if w is not None))  # type: ignore[attr-defined]


class JambaForCausalLM(MoeCausalLM):
    base = JambaModel


class JambaForSequenceClassification(SequenceClassification):
    base = JambaModel


def rules(config: JambaConfig) -> tuple[Op, ...]:
    mixer = "model.layers.*.mamba"
    parts = (f"{mixer}.hidden_proj.*", f"{mixer}.gate_proj.*")
    return (
        Split(f"{mixer}.in_proj.*", parts, (config.mamba_expand * config.hidden_size,) * 2),
        *stacked("**.feed_forward.experts"),
        *tied_head(config),
    )


FAMILY = Family(
    config=JambaConfig,
    classes={
        "AutoModel": JambaModel,
        "AutoModelForCausalLM": JambaForCausalLM,
        "AutoModelForSequenceClassification": JambaForSequenceClassification,
    },
    rules=rules,
)
