"""RecurrentGemma (Griffin, arXiv:2402.19427; 2404.07839): two blocks with a gated linear recurrence to one with attention over a window.

Axis letters: B batch, T tokens, D hidden, C channels of the recurrence, N query heads, K kv heads, H head dim, G gate blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import Cache, RecurrentSpec, SlidingKVSpec
from jaxmodels.config import DecoderConfig
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import CausalConv, Embedding, Layers, Linear, Step, activation, attend, parameter, weight_dropout
from jaxmodels.model import CausalLM, Model
from jaxmodels.models.gemma import GemmaRMSNorm
from jaxmodels.models.gemma2 import softcap
from jaxmodels.ops.linear import einsum
from jaxmodels.ops.rope import RopeParameters
from jaxmodels.ops.ssm import rg_lru
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentGemmaConfig(DecoderConfig):
    model_type: ClassVar[str] = "recurrent_gemma"

    vocab_size: int = 256000
    hidden_size: int = 2560
    intermediate_size: int = 7680  # of gate_proj and up_proj together
    num_hidden_layers: int = 26
    num_attention_heads: int = 10
    lru_width: int = None  # type: ignore[assignment]  # hidden_size
    attention_window_size: int = 2048
    conv1d_width: int = 4
    logits_soft_cap: float = 30.0
    rms_norm_eps: float = 1e-6
    hidden_activation: str = "gelu_pytorch_tanh"
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    block_types: tuple[str, ...] = ("recurrent", "recurrent", "attention")
    attention_bias: bool = False
    w_init_variance_scale: float = 0.01
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.block_types) - {"recurrent", "attention"})
        if unknown or not self.block_types:
            raise ValueError(f"block_types are {', '.join(unknown) or 'empty'}; expected recurrent and attention, repeated over the layers")
        if self.lru_width is None:
            object.__setattr__(self, "lru_width", self.hidden_size)
        if self.lru_width % self.num_attention_heads:
            raise ValueError(f"lru_width {self.lru_width} is no multiple of num_attention_heads {self.num_attention_heads}, its blocks")

    @property
    def layer_kinds(self) -> tuple[Hashable, ...]:
        return tuple(self.block_types[i % len(self.block_types)] for i in range(self.num_hidden_layers))

    def layer_spec(self, kind: Hashable) -> RecurrentSpec | SlidingKVSpec:
        if kind == "attention":
            return SlidingKVSpec(self.num_key_value_heads, self.head_dim, self.attention_window_size)
        return RecurrentSpec(windows=((self.conv1d_width - 1, self.lru_width, "act_mlp"),), state=((self.lru_width, "act_mlp"),))


class RecurrentGemmaAttention(nn.Module):
    config: RecurrentGemmaConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=D**-0.5)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        options: dict[str, Any] = {"window": c.attention_window_size, "dropout": weight_dropout(self, c.attention_dropout)}
        out, state, weights = attend(q, k, v, state, step, step.rope[0], **options)  # [B, T, N*H]
        return Linear(D, ("embed", "heads"), True, (2 / (c.num_hidden_layers * D)) ** 0.5, name="o_proj")(out), state, weights


class RGLRU(nn.Module):
    """The recurrence, with two gates that are linear in blocks [G, C/G, C/G] of the channels."""

    config: RecurrentGemmaConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: jax.Array | None, step: Step) -> tuple[jax.Array, jax.Array]:
        c = self.config
        (B, T, C), G = x.shape, c.num_attention_heads
        blocks = x.reshape(B, T, G, C // G)

        def gate(name: str) -> jax.Array:
            std = (c.w_init_variance_scale * G / C) ** 0.5
            weight = parameter(self, f"{name}_weight", nn.initializers.normal(std), ("mlp", None, None), (G, C // G, C // G))
            bias = parameter(self, f"{name}_bias", nn.initializers.zeros, ("mlp", None), (G, C // G))
            return jax.nn.sigmoid(einsum("btgi,gij->btgj", blocks, weight.astype(x.dtype)) + bias.astype(jnp.float32)).reshape(B, T, C)

        decay = parameter(self, "recurrent_param", decays, ("mlp",), (C,))
        return rg_lru(x, gate("input_gate"), gate("recurrent_gate"), decay, state, step.rope[1], step.positions >= 0)


def decays(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An initialiser: what gives an open gate a decay whose square lies evenly between 0.9² and 0.999²."""
    square = jax.random.uniform(key, shape, minval=0.9**2, maxval=0.999**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


class RecurrentGemmaRecurrent(nn.Module):
    config: RecurrentGemmaConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        D, C = x.shape[-1], c.lru_width
        (window,), h = ((None,), None) if state is None else state.read(step)
        dense = partial(Linear, use_bias=True, init_std=D**-0.5)
        gate = activation(c.hidden_activation)(dense(C, ("mlp", "embed"), name="linear_y")(x))
        hidden = step.constrain(dense(C, ("mlp", "embed"), name="linear_x")(x), "batch", "seq", "act_mlp")
        hidden, window = CausalConv(c.conv1d_width, name="conv_1d")(hidden, window, step)
        y, h = RGLRU(c, name="rg_lru")(hidden, h, step)
        y = y.astype(x.dtype) * gate
        out = dense(D, ("embed", "mlp"), init_std=(2 / (c.num_hidden_layers * C)) ** 0.5, name="linear_out")(y)
        return out, None if state is None else state.write((window,), h, step), None


class RecurrentGemmaMLP(nn.Module):
    config: RecurrentGemmaConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True, init_std=c.hidden_size**-0.5)
        gate = dense(c.intermediate_size // 2, ("mlp", "embed"), name="gate_proj")(x)
        up = dense(c.intermediate_size // 2, ("mlp", "embed"), name="up_proj")(x)
        h = step.constrain(activation(c.hidden_activation)(gate) * up, "batch", "seq", "act_mlp")
        return dense(c.hidden_size, ("embed", "mlp"), name="down_proj")(h)


class RecurrentGemmaBlock(nn.Module):
    config: RecurrentGemmaConfig
    kind: Hashable

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        mixer = {"attention": RecurrentGemmaAttention, "recurrent": RecurrentGemmaRecurrent}[self.kind]  # type: ignore[index]
        norm = partial(GemmaRMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = mixer(self.config, name="temporal_block")(norm(name="temporal_pre_norm")(x), state, step)
        x = x + h
        return x + RecurrentGemmaMLP(self.config, name="mlp_block")(norm(name="channel_pre_norm")(x), step), state, weights


class RecurrentGemmaModel(Model):
    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.hidden_size**-0.5)
        self.layers = Layers(RecurrentGemmaBlock, c, self.scan_layers, self.remat)
        self.final_norm = GemmaRMSNorm(c.rms_norm_eps)

    def embeddings(self) -> Embedding:
        return self.embed_tokens

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
        """A token at position 0 begins anew. attentions: those of the layers that attend."""
        c = self.config
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        rope = step.make_rope(c.rope_parameters, c.head_dim, position_ids, self.dtype)
        positions = step.positions if position_ids is None else jnp.broadcast_to(position_ids, step.positions.shape)
        step = step.replace(rope=(rope, positions == 0))
        x = self.embed_tokens(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x = x * jnp.asarray(c.hidden_size**0.5, jnp.bfloat16).astype(self.dtype)  # bfloat16 whatever the dtype, as it was trained
        x, states, inputs, weights = self.layers(x, None if cache is None else cache.layers, step)
        x = self.final_norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(w for w in weights if w is not None) if output_attentions else None,
        )


class RecurrentGemmaForCausalLM(CausalLM):
    base = RecurrentGemmaModel

    def head(self, x: jax.Array) -> jax.Array:
        return softcap(super().head(x), self.config.logits_soft_cap)


FAMILY = Family(
    config=RecurrentGemmaConfig,
    classes={"AutoModel": RecurrentGemmaModel, "AutoModelForCausalLM": RecurrentGemmaForCausalLM},
    rules=tied_head,
)
