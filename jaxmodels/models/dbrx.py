"""DBRX (Databricks 2024): a decoder of layer norms without biases, clipped projections and fine-grained experts.

Axis letters: B batch, T tokens, D hidden, N query heads, K kv heads, H head dim, E experts, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from jaxmodels.config import Config
from jaxmodels.convert.rules import Op, Rename, Split, StackExperts, Transpose
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, attend, dropout, weight_dropout
from jaxmodels.models.mixtral import MixtralModel
from jaxmodels.moe import Experts, MoeCausalLM
from jaxmodels.ops.moe import pick
from jaxmodels.ops.rope import RopeParameters

ATTENTION: FrozenDict[str, Any] = FrozenDict({"attn_pdrop": 0.0, "clip_qkv": None, "kv_n_heads": 1})
FFN: FrozenDict[str, Any] = FrozenDict(
    {
        "ffn_act_fn": FrozenDict({"name": "silu"}),
        "ffn_hidden_size": 3584,
        "moe_num_experts": 4,
        "moe_top_k": 1,
        "moe_jitter_eps": None,
        "moe_loss_weight": 0.01,
        "moe_normalize_expert_weights": 1.0,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DbrxConfig(Config):
    """What attn_config and ffn_config leave out is as in ATTENTION and FFN."""

    model_type: ClassVar[str] = "dbrx"
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_attention_heads: int = 16
    num_hidden_layers: int = 24
    max_position_embeddings: int = 2048
    resid_pdrop: float | None = 0.0
    emb_pdrop: float | None = 0.0  # not read: HF does not
    attn_config: Mapping[str, Any] = ATTENTION
    ffn_config: Mapping[str, Any] = FFN
    rope_parameters: RopeParameters = RopeParameters()
    output_router_logits: bool = False
    experts_implementation: str | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Files of transformers 4 hold rope_theta in attn_config."""
        attention, ffn = (values.get(name) or {} for name in ("attn_config", "ffn_config"))
        if not values.get("rope_parameters") and attention.get("rope_theta"):
            values = {"rope_theta": attention["rope_theta"], **values}
        return super().from_dict({**values, "attn_config": {**ATTENTION, **attention}, "ffn_config": {**FFN, **ffn}})

    @property
    def num_key_value_heads(self) -> int:
        return self.attn_config["kv_n_heads"]

    @property
    def num_experts_per_tok(self) -> int:
        return self.ffn_config["moe_top_k"]

    @property
    def router_aux_loss_coef(self) -> float:
        return self.ffn_config["moe_loss_weight"]


class DbrxAttention(nn.Module):
    config: DbrxConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, K, H = x.shape, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        dense = partial(Linear, init_std=c.initializer_range)
        q = dense(N * H, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(K * H, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, K, H)
        v = dense(K * H, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, K, H)
        if (limit := c.attn_config["clip_qkv"]) is not None:
            q, k, v = (jnp.clip(y, -limit, limit) for y in (q, k, v))
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        noise = weight_dropout(self, c.attn_config["attn_pdrop"])
        out, state, weights = attend(q, k, v, state, step, step.rope, dropout=noise)  # [B, T, N*H]
        return dense(D, ("embed", "heads"), name="out_proj")(out), state, weights


class DbrxNormAttentionNorm(nn.Module):
    config: DbrxConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        """x after attention, the same normalised, the state and the weights."""
        norm = partial(LayerNorm, use_bias=False)
        h, state, weights = DbrxAttention(self.config, name="attn")(norm(name="norm_1")(x), state, step)
        x = x + dropout(self, h, self.config.resid_pdrop)
        return x, norm(name="norm_2")(x), state, weights


class DbrxFFN(nn.Module):
    config: DbrxConfig

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> tuple[jax.Array, jax.Array]:
        """Also the router's logits [B,T,E]."""
        c, f = self.config, self.config.ffn_config
        E, std, p = f["moe_num_experts"], c.initializer_range, f["moe_normalize_expert_weights"]
        logits = Linear(E, (None, "embed"), init_std=std, name="router")(x)
        weights, chosen = pick(jax.nn.softmax(logits.astype(jnp.float32), -1), f["moe_top_k"])
        if p is not None:
            weights = weights / jnp.linalg.norm(weights, p, -1, keepdims=True)
        experts = Experts(E, f["ffn_hidden_size"], f["ffn_act_fn"].get("name", "silu"), std, c.experts_implementation, name="experts")
        return experts(x, weights, chosen, step), logits


class DbrxBlock(nn.Module):
    config: DbrxConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        x = step.constrain(x, "batch", "seq", "act_embed")
        x, h, state, weights = DbrxNormAttentionNorm(self.config, name="norm_attn_norm")(x, state, step)
        h, logits = DbrxFFN(self.config, name="ffn")(h, step)
        return x + dropout(self, h, self.config.resid_pdrop), state, (weights, logits if step.output_router_logits else None)


class DbrxModel(MixtralModel):
    def setup(self) -> None:
        c = self.config
        self.wte = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.blocks = Layers(DbrxBlock, c, self.scan_layers, self.remat)
        self.norm_f = LayerNorm(use_bias=False)

    @property
    def embed_tokens(self) -> Embedding:  # type: ignore[override]
        return self.wte

    @property
    def layers(self) -> Layers:  # type: ignore[override]
        return self.blocks

    @property
    def norm(self) -> LayerNorm:  # type: ignore[override]
        return self.norm_f


class DbrxForCausalLM(MoeCausalLM):
    base = DbrxModel
    base_name = "transformer"


def rules(config: DbrxConfig) -> Sequence[Op]:
    """A file holds the experts of a layer one below another, w1 (gate), v1 (up) and the transpose of w2 (down) [E*F, D]."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    E, F = config.ffn_config["moe_num_experts"], config.ffn_config["ffn_hidden_size"]
    attention, experts = "**.norm_attn_norm.attn", "**.ffn.experts"
    found: list[Op] = [
        Split(f"{attention}.Wqkv.weight", tuple(f"{attention}.{name}_proj.weight" for name in "qkv"), (N * H, K * H, K * H)),
    ]
    for file, tree in (("w1", "gate_proj"), ("v1", "up_proj"), ("w2", "down_proj")):
        each = tuple(f"{experts}.mlp.{file}.{expert}" for expert in range(E))
        found += [Split(f"{experts}.mlp.{file}", each, (F,) * E), StackExperts(f"{experts}.mlp.{file}.#", f"{experts}.{tree}")]
    found += [Rename("**.ffn.router.layer.weight", "**.ffn.router.weight")]
    return [*found, Transpose(f"{experts}.down_proj", (0, 2, 1)), *tied_head(config, embeddings="transformer.wte.weight")]


FAMILY = Family(
    config=DbrxConfig,
    classes={"AutoModel": DbrxModel, "AutoModelForCausalLM": DbrxForCausalLM},
    rules=rules,
)
