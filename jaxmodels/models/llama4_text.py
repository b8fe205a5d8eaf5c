"""Llama 4's text decoder (Meta 2025): most layers see a chunk of the text with rope, every fourth sees all of it without; experts whose
weights scale what they read, beside one that every token reaches, in all layers or every second.

Axis letters: B batch, T tokens, S keys, D hidden, N query heads, K kv heads, H head dim, E experts, k experts per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import KVSpec, SlidingKVSpec
from jaxmodels.config import DecoderConfig
from jaxmodels.convert.rules import Alias, Ignore, Op, Split, Transpose
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, Linear, RMSNorm, Rope, Step, look, remember, weight_dropout
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.moe import Experts, MoeCausalLM, RoutedExperts
from jaxmodels.ops.moe import pick
from jaxmodels.ops.norm import rms_norm
from jaxmodels.ops.rope import RopeParameters


class Kind(NamedTuple):
    attention: str  # chunked_attention or full_attention
    rope: bool
    experts: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4TextConfig(RoutedExperts, DecoderConfig):
    model_type: ClassVar[str] = "llama4_text"
    part_of: ClassVar[str] = "llama4"

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192  # of an expert
    intermediate_size_mlp: int = 16384  # of a layer without experts
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(rope_theta=5e5)
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    moe_layers: tuple[int, ...] | None = None
    interleave_moe_layer_step: int = 1  # without moe_layers: every so many layers one has experts
    no_rope_layers: tuple[int, ...] | None = None  # 1 for layers that have it
    no_rope_layer_interval: int = 4
    layer_types: tuple[str, ...] | None = None
    attention_chunk_size: int | None = 8192
    use_qk_norm: bool = True
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    eos_token_id: int | tuple[int, ...] | None = 2

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        layers = range(self.num_hidden_layers)
        rope = [bool(has) for has in self.no_rope_layers or ((i + 1) % self.no_rope_layer_interval for i in layers)]
        types = self.layer_types or tuple("chunked_attention" if has else "full_attention" for has in rope)
        step = self.interleave_moe_layer_step
        experts = range(step - 1, len(layers), step) if self.moe_layers is None else self.moe_layers
        for name, found in (("no_rope_layers", rope), ("layer_types", types)):
            if len(found) != len(layers):
                raise ValueError(f"{name} has {len(found)} entries, expected num_hidden_layers = {len(layers)} (or null)")
        unknown = sorted(set(types) - {"chunked_attention", "full_attention"})
        if unknown or ("chunked_attention" in types and self.attention_chunk_size is None):
            raise ValueError(
                f"layer_types are {', '.join(sorted(set(types)))} and attention_chunk_size is {self.attention_chunk_size}; known are "
                "full_attention and chunked_attention, which needs a size"
            )
        return tuple(Kind(types[i], rope[i], i in experts) for i in layers)

    def chunk(self, kind: Hashable) -> int | None:
        assert isinstance(kind, Kind)
        return self.attention_chunk_size if kind.attention == "chunked_attention" else None

    def layer_spec(self, kind: Hashable) -> KVSpec | SlidingKVSpec:
        heads, chunk = (self.num_key_value_heads, self.head_dim), self.chunk(kind)
        return KVSpec(*heads) if chunk is None else SlidingKVSpec(*heads, chunk)


def apart(positions: jax.Array, chunk: int) -> jax.Array:
    """Positions with so much room between chunks that a window of one chunk reaches into no other."""
    return jnp.where(positions < 0, -1, positions + positions // chunk * chunk)


class Llama4TextAttention(nn.Module):
    config: Llama4TextConfig
    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, use_bias=c.attention_bias, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        if c.use_qk_norm and self.kind.rope:  # HF's comes after rope, and a norm does not see what is turned
            q, k = (rms_norm(part, jnp.ones(H), c.rms_norm_eps) for part in (q, k))
        if c.attn_temperature_tuning and not self.kind.rope:  # arXiv:2501.19399
            tokens = jnp.floor((step.positions[..., None, None].astype(jnp.float32) + 1) / c.floor_scale)
            q = (q * (jnp.log1p(tokens) * c.attn_scale + 1)).astype(x.dtype)
        q, k, v, positions, state = remember(q, k, v, state, step, step.rope if self.kind.rope else None)
        chunk = c.chunk(self.kind)
        if chunk is not None and step.packed is not None:  # every chunk of a document as a document
            starts = (step.positions >= 0) & (step.positions % chunk == 0)
            step = step.replace(packed=jnp.where(step.positions < 0, -1, jnp.arange(T) + T * jnp.cumsum(starts, 1)))
        elif chunk is not None:
            step, positions = step.replace(positions=apart(step.positions, chunk)), apart(positions, chunk)
        out, weights = look(q, k, v, positions, step, window=chunk, dropout=weight_dropout(self, c.attention_dropout))
        return dense(D, ("embed", "heads"), name="o_proj")(out.reshape(B, T, N * H)), state, weights


class Llama4TextMoe(nn.Module):
    config: Llama4TextConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c = self.config
        sizes = (c.intermediate_size, c.hidden_act, c.initializer_range)
        logits = Linear(c.num_local_experts, (None, "embed"), init_std=c.initializer_range, name="router")(x)
        best, chosen = pick(logits, c.num_experts_per_tok)  # [B, T, k]
        weights = jax.nn.sigmoid(best.astype(jnp.float32)).astype(x.dtype)
        experts = Experts(c.num_local_experts, *sizes, c.experts_implementation, scale_input=True, name="experts")
        return GatedMLP(*sizes, name="shared_expert")(x, step) + experts(x, weights, chosen, step), logits


class Llama4TextBlock(nn.Module):
    config: Llama4TextConfig
    kind: Kind

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c, norm = self.config, partial(RMSNorm, self.config.rms_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = Llama4TextAttention(c, self.kind, name="self_attn")(norm(name="input_layernorm")(x), state, step)
        x = x + h
        h, logits = norm(name="post_attention_layernorm")(x), None
        if self.kind.experts:
            h, logits = Llama4TextMoe(c, name="feed_forward")(h, step)
        else:
            h = GatedMLP(c.intermediate_size_mlp, c.hidden_act, c.initializer_range, name="feed_forward")(h, step)
        return x + h, state, (weights, logits if step.output_router_logits else None)


class Llama4TextModel(MixtralModel):
    block = Llama4TextBlock

    def rope(self, step: Step, position_ids: jax.Array | None) -> Rope:
        c, rope = self.config, self.config.rope_parameters
        if c.use_qk_norm:  # which takes away what yarn and longrope multiply by
            rope = dataclasses.replace(rope, attention_factor=1.0)
        return step.make_rope(rope, c.head_dim, position_ids, jnp.float32, interleaved=True)


class Llama4ForCausalLM(MoeCausalLM):
    base = Llama4TextModel
    router_loss = False


def rules(config: Llama4TextConfig) -> Sequence[Op]:
    """Files hold experts as [in, out], gate and up in one; those of the whole Llama 4 also hold a vision model."""
    parts = ("**.experts.gate_proj", "**.experts.up_proj")
    return (
        Ignore(("vision_model.**", "multi_modal_projector.**")),
        Alias("model.**", ("language_model.model.**",)),
        Alias("lm_head.**", ("language_model.lm_head.**",)),
        Split("**.experts.gate_up_proj", parts, (config.intermediate_size,) * 2, axis=-1),
        Transpose("**.experts.*_proj", (0, 2, 1)),
        *tied_head(config),
    )


FAMILY = Family(
    config=Llama4TextConfig,
    classes={
        "AutoModel": Llama4TextModel,
        "AutoModelForCausalLM": Llama4ForCausalLM,
        "AutoModelForTextEncoding": Llama4TextModel,
    },
    rules=rules,
)
