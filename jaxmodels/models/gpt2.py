"""GPT-2 (Radford et al. 2019, Language Models are Unsupervised Multitask Learners): learned positions, norms before each half.

Axis letters: B batch, C choices, T tokens, D hidden, N heads, H head dim, F mlp, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.config import Config
from jaxmodels.convert.rules import Ignore, Op, Split, Transpose
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, dropout, weight_dropout
from jaxmodels.model import CausalLM, Model, QuestionAnswering, SequenceClassification, TokenClassification
from jaxmodels.ops.loss import causal_lm_loss, cross_entropy
from jaxmodels.outputs import BaseModelOutput, DoubleHeadsOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    model_type: ClassVar[str] = "gpt2"
    has_learned_positions: ClassVar[bool] = True
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_proj_to_labels: bool = True
    summary_activation: str | None = None
    summary_first_dropout: float = 0.1
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256

    @property
    def residual_std(self) -> float:
        """Of the initial weights that end in the residual stream: smaller the deeper the model."""
        return self.initializer_range / (2 * self.num_hidden_layers) ** 0.5


class GPT2Attention(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="q_proj")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="k_proj")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="v_proj")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        if c.scale_attn_by_inverse_layer_idx:
            q = q / (step.number + 1)
        options: dict[str, Any] = {"scale": None if c.scale_attn_weights else 1.0, "dropout": weight_dropout(self, c.attn_pdrop)}
        out, state, weights = attend(q, k, v, state, step, **options)  # [B, T, N*H]
        out = dense(D, ("embed", "heads"), init_std=c.residual_std, name="c_proj")(out)
        return dropout(self, out, c.resid_pdrop), state, weights


class GPT2MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c = self.config
        dense = partial(Linear, use_bias=True)
        h = dense(c.n_inner or 4 * c.hidden_size, ("mlp", "embed"), init_std=c.initializer_range, name="c_fc")(x)  # [B, T, F]
        h = step.constrain(activation(c.activation_function)(h), "batch", "seq", "act_mlp")
        return dropout(self, dense(c.hidden_size, ("embed", "mlp"), init_std=c.residual_std, name="c_proj")(h), c.resid_pdrop)


class GPT2Block(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        norm = partial(LayerNorm, self.config.layer_norm_epsilon)
        x = step.constrain(x, "batch", "seq", "act_embed")
        h, state, weights = GPT2Attention(self.config, name="attn")(norm(name="ln_1")(x), state, step)
        x = x + h
        x = x + GPT2MLP(self.config, name="mlp")(norm(name="ln_2")(x), step)
        return x, state, weights


class GPT2Model(Model):
    block: ClassVar[type[nn.Module]] = GPT2Block

    def setup(self) -> None:
        c = self.config
        self.wte = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.wpe = Embedding(c.max_position_embeddings, c.hidden_size, c.initializer_range, axis=None)
        self.h = Layers(self.block, c, self.scan_layers, self.remat)
        self.ln_f = LayerNorm(c.layer_norm_epsilon)

    def embeddings(self) -> Embedding:
        return self.wte

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
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        x = self.wte(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x = dropout(self, x + self.wpe(step.lookup(position_ids, self.config.learned_positions), self.dtype), self.config.embd_pdrop)
        x, states, inputs, weights = self.h(x, None if cache is None else cache.layers, step)
        x = self.ln_f(x)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class GPT2LMHeadModel(CausalLM):
    base = GPT2Model
    base_name = "transformer"


class SequenceSummary(nn.Module):
    """One number for each row of tokens."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [...,D], the hidden state of the token that stands for the row -> [...]."""
        c = self.config
        for name, value in {"summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True}.items():
            if getattr(c, name) != value:
                raise ValueError(f"{name} is {getattr(c, name)!r} in the config; a choice needs one number from one token, by {value!r}")
        x = dropout(self, x, c.summary_first_dropout)
        x = Linear(1, (None, "embed"), use_bias=True, init_std=c.initializer_range, name="summary")(x)[..., 0]
        return activation(c.summary_activation or "linear")(x)


class GPT2DoubleHeadsModel(CausalLM):
    """The language head and one that tells which of several continuations is right; no auto class has it, in HF neither:
    from_pretrained(path, GPT2DoubleHeadsModel)."""

    base = GPT2Model
    base_name = "transformer"

    def setup(self) -> None:
        super().setup()
        self.multiple_choice_head = SequenceSummary(self.config)

    def __call__(  # type: ignore[override]
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        mc_token_ids: jax.Array | None = None,
        labels: jax.Array | None = None,
        mc_labels: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> DoubleHeadsOutput:
        """input_ids and what is like them: [B,C,T]. mc_token_ids [B,C]: the column that stands for a choice, by default its last real
        token. labels [B,C,T]: ids, -100 left out; mc_labels [B]: the right choices."""
        flat: Any = lambda x, rank=1: None if x is None else jnp.asarray(x).reshape(-1, *x.shape[-rank:])
        inputs = (flat(input_ids), flat(attention_mask), flat(position_ids), flat(inputs_embeds, 2))  # [B*C, T]
        out = self.run_base(*inputs, None, output_hidden_states, output_attentions)
        x = out.last_hidden_state
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1]  # type: ignore[union-attr]
        if mc_token_ids is None:
            real = jnp.ones(x.shape[:2], bool) if attention_mask is None else inputs[1].astype(bool)
            mc_token_ids = jnp.max(jnp.where(real, jnp.arange(x.shape[1]), 0), 1)
        chosen = jnp.take_along_axis(x, jnp.asarray(mc_token_ids).reshape(-1, 1, 1), 1)[:, 0]  # [B*C, D]
        logits, mc_logits = self.head(x), self.multiple_choice_head(chosen).reshape(shape[:-1])
        loss = None if labels is None else causal_lm_loss(logits, flat(labels))
        mc_loss = None if mc_labels is None else cross_entropy(mc_logits, mc_labels)
        return DoubleHeadsOutput(loss, mc_loss, logits.reshape(*shape, -1), mc_logits, None, out.hidden_states, out.attentions)


class GPT2ForSequenceClassification(SequenceClassification):
    base = GPT2Model
    base_name = "transformer"


class GPT2ForTokenClassification(TokenClassification):
    base = GPT2Model
    base_name = "transformer"
    head_name = "classifier"


class GPT2ForQuestionAnswering(QuestionAnswering):
    base = GPT2Model
    base_name = "transformer"


def rules(config: GPT2Config) -> tuple[Op, ...]:
    """The file has Conv1D weights [in, out], queries, keys and values in one."""
    layer, D = "transformer.h.*", config.hidden_size
    return (
        Ignore((f"{layer}.attn.bias", f"{layer}.attn.masked_bias")),
        *(Transpose(f"{layer}.{name}.weight") for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        Split(f"{layer}.attn.c_attn.*", tuple(f"{layer}.attn.{n}_proj.*" for n in "qkv"), (D, D, D)),
        *tied_head(config, embeddings="transformer.wte.weight"),
    )


FAMILY = Family(
    config=GPT2Config,
    classes={
        "AutoModel": GPT2Model,
        "AutoModelForCausalLM": GPT2LMHeadModel,
        "AutoModelForSequenceClassification": GPT2ForSequenceClassification,
        "AutoModelForTokenClassification": GPT2ForTokenClassification,
        "AutoModelForQuestionAnswering": GPT2ForQuestionAnswering,
    },
    rules=rules,
)
