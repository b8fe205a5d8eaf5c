"""StableLM (Stability AI 2023; arXiv:2402.17834): Llama with layer norms and rope on a part of every head; the 12B also norms every
query and key head by weights of its own and runs attention and MLP side by side.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxmodels.config import DecoderConfig
from jaxmodels.convert.rules import Ignore, Op, StackExperts
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import GatedMLP, HeadNorm, LayerNorm, Linear, Step, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, SequenceClassification, TokenClassification
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.rope import RopeParameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableLmConfig(DecoderConfig):
    model_type: ClassVar[str] = "stablelm"

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.25)
    use_qkv_bias: bool = False
    hidden_dropout: float = 0.0
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0


class StableLmAttention(nn.Module):
    config: StableLmConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), use_bias=c.use_qkv_bias, name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), use_bias=c.use_qkv_bias, name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), use_bias=c.use_qkv_bias, name="v_proj")(x).reshape(B, T, K, H)
        if c.qk_layernorm:
            q = HeadNorm(c.layer_norm_eps, name="q_layernorm")(q)
            k = HeadNorm(c.layer_norm_eps, name="k_layernorm")(k)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=weight_dropout(self, c.attention_dropout))  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="o_proj")(out), state, weights


class StableLmBlock(nn.Module):
    config: StableLmConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        mlp = GatedMLP(c.intermediate_size, c.hidden_act, c.initializer_range, name="mlp")
        norm = partial(LayerNorm, c.layer_norm_eps)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h = norm(name="input_layernorm")(x)
        attended, state, weights = StableLmAttention(c, name="self_attn")(h, state, step)
        if c.use_parallel_residual:
            return x + attended + dropout(self, mlp(h, step), c.hidden_dropout), state, weights
        x = x + attended
        return x + dropout(self, mlp(norm(name="post_attention_layernorm")(x), step), c.hidden_dropout), state, weights


class StableLmModel(LlamaModel):
    block = StableLmBlock

    def final_norm(self) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps)


def rules(config: StableLmConfig) -> Sequence[Op]:
    """The norm of every head is a tensor of its own in the file."""
    norms = tuple(f"model.layers.*.self_attn.{name}_layernorm" for name in "qk")
    stacks = tuple(StackExperts(f"{norm}.norms.#.weight", f"{norm}.weight") for norm in norms if config.qk_layernorm)
    return (Ignore(("**rotary_emb.inv_freq",)), *stacks, *tied_head(config))


class StableLmForCausalLM(CausalLM):
    base = StableLmModel


class StableLmForSequenceClassification(SequenceClassification):
    base = StableLmModel


class StableLmForTokenClassification(TokenClassification):
    base = StableLmModel


FAMILY = Family(
    config=StableLmConfig,
    classes={
        "AutoModel": StableLmModel,
        "AutoModelForCausalLM": StableLmForCausalLM,
        "AutoModelForSequenceClassification": StableLmForSequenceClassification,
        "AutoModelForTokenClassification": StableLmForTokenClassification,
    },
    rules=rules,
)
