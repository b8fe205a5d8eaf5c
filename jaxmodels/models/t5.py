"""T5 (arXiv:1910.10683) and T5 1.1 (gated mlp, a head of its own): an encoder that sees both ways and a decoder that reads it. Positions
are relative, in buckets, and each stack adds the bias of its one table in all its layers.

Axis letters: B batch, T tokens, S keys or encoder tokens, D hidden, N heads, H head dim, F mlp."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from jaxmodels.cache import EncoderDecoderKV, EncoderDecoderSpec, KVSpec
from jaxmodels.config import Config
from jaxmodels.convert.rules import Detachable, Ignore, Op, Rename, Tie
from jaxmodels.family import Family
from jaxmodels.layers import (
    Embedding,
    Layers,
    Linear,
    Step,
    activation,
    attend,
    cross_attend,
    dropout,
    parameter,
    weight_dropout,
)
from jaxmodels.model import Head, Model, TokenClassification
from jaxmodels.ops.loss import classification_loss, cross_entropy, span_loss
from jaxmodels.ops.norm import rms_norm
from jaxmodels.ops.relative import relative_bias
from jaxmodels.outputs import (
    BaseModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqQuestionAnsweringOutput,
    Seq2SeqSequenceClassifierOutput,
)
from jaxmodels.seq2seq import EncoderDecoder, rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """tie_word_embeddings: whether the head is the embeddings. scale_decoder_outputs: whether it reads the decoder's output over
    sqrt(hidden_size); None: where it is tied, as in the published files."""

    model_type: ClassVar[str] = "t5"
    is_encoder_decoder: ClassVar[bool] = True
    spelled: ClassVar[Mapping[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    hidden_size: int = 512
    head_dim: int = 64
    d_ff: int = 2048
    num_hidden_layers: int = 6  # of the encoder
    num_decoder_layers: int | None = None  # as many
    num_attention_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dropout_rate: float = 0.1
    classifier_dropout: float = 0.0
    scale_decoder_outputs: bool | None = None
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        form = self.feed_forward_proj.rpartition("-")[0]
        if form not in ("", "gated"):
            raise ValueError(f"feed_forward_proj is {self.feed_forward_proj!r}; expected an activation such as relu, or gated-<activation>")
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_hidden_layers)
        if self.scale_decoder_outputs is None:
            object.__setattr__(self, "scale_decoder_outputs", self.tie_word_embeddings)

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def hidden_act(self) -> str:
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name

    @property
    def layer_kinds(self) -> tuple[None, ...]:
        """Of the decoder, whose layers remember."""
        return (None,) * self.num_decoder_layers  # type: ignore[operator]

    @property
    def encoder(self) -> Self:
        """The config of a stack of the encoder's depth."""
        return self.replace(num_decoder_layers=self.num_hidden_layers)

    def layer_spec(self, kind: Any) -> EncoderDecoderSpec:
        heads, head_dim = self.num_attention_heads, self.head_dim
        return EncoderDecoderSpec(KVSpec(heads, head_dim), heads, head_dim)

    def matched(self, tensors: Mapping[str, Any]) -> Self:
        """Files alone tell whether a head is tied: transformers 5 says so in every config.json, and ties unless there are two tensors."""
        head, names = tensors.get("lm_head.weight"), ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        shared = next((tensors[name] for name in names if name in tensors), None)
        tied = head is None or shared is None or np.array_equal(head.read(), shared.read())
        return self.replace(tie_word_embeddings=tied)


class T5Places(struct.PyTreeNode):
    """What every layer of a stack shares: the bias [B,N,T,S] of self-attention, the compute dtype and the residual stream's."""

    bias: jax.Array
    dtype: Any = struct.field(pytree_node=False)

    @property
    def stream(self) -> Any:
        return jnp.float32 if self.dtype == jnp.float16 else self.dtype  # whose range the sums leave


class T5RelativeBias(nn.Module):
    """The bias [B,N,T,S] for queries at positions [B,T] and keys at [B,S]."""

    config: T5Config
    causal: bool

    @nn.compact
    def __call__(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        c = self.config
        normal = nn.initializers.normal(c.initializer_factor * c.hidden_size**-0.5)
        weight = parameter(self, "weight", normal, (None, None), (c.relative_attention_num_buckets, c.num_attention_heads))
        return relative_bias(weight, q_positions, k_positions, c.relative_attention_max_distance, self.causal)


class T5LayerNorm(nn.Module):
    """An RMS norm, rounded to the compute dtype."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, ("embed",), x.shape[-1:])
        return rms_norm(x, weight, self.config.layer_norm_epsilon).astype(self.dtype)


class T5Attention(nn.Module):
    """Of a token over its stack's tokens, or with `cross` over the encoder's. Logits are not scaled."""

    config: T5Config
    causal: bool = False
    cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c, factor = self.config, self.config.initializer_factor
        D, N, H = x.shape[-1], c.num_attention_heads, c.head_dim
        dense = lambda name, axis, std: Linear(N * H, (axis, "embed"), init_std=factor * std, name=name)
        split = lambda y: y.reshape(*y.shape[:2], N, H)
        q = split(dense("q", "heads", (D * H) ** -0.5)(x))
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        keys, values = dense("k", "kv_heads", D**-0.5), dense("v", "kv_heads", D**-0.5)
        project = lambda y: (split(keys(y)), split(values(y)))
        options: dict[str, Any] = {"scale": 1.0, "dropout": weight_dropout(self, c.dropout_rate)}
        if self.cross:
            out, state, weights = cross_attend(q, project, state, step, **options)
        else:
            out, state, weights = attend(q, *project(x), state, step, bias=step.rope.bias, causal=self.causal, **options)
        return Linear(D, ("embed", "heads"), init_std=factor * (N * H) ** -0.5, name="o")(out), state, weights


class T5DenseReluDense(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        c, D, act = self.config, x.shape[-1], activation(self.config.hidden_act)
        dense = partial(Linear, c.d_ff, ("mlp", "embed"), init_std=c.initializer_factor * D**-0.5)
        h = act(dense(name="wi_0")(x)) * dense(name="wi_1")(x) if c.gated else act(dense(name="wi")(x))  # [B, T, F]
        h = dropout(self, step.constrain(h, "batch", "seq", "act_mlp"), c.dropout_rate).astype(step.rope.stream)
        return Linear(D, ("embed", "mlp"), init_std=c.initializer_factor * c.d_ff**-0.5, name="wo")(h)


class T5AttentionLayer(nn.Module):
    config: T5Config
    causal: bool = False
    cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        name = "EncDecAttention" if self.cross else "SelfAttention"
        h = T5LayerNorm(self.config, step.rope.dtype, name="layer_norm")(x)
        h, state, weights = T5Attention(self.config, self.causal, self.cross, name=name)(h, state, step)
        return x + dropout(self, h, self.config.dropout_rate), state, weights


class T5MLPLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        h = T5LayerNorm(self.config, step.rope.dtype, name="layer_norm")(x)
        return x + dropout(self, T5DenseReluDense(self.config, name="DenseReluDense")(h, step), self.config.dropout_rate)


class T5EncoderLayers(nn.Module):
    """The parts of a block, which the checkpoint numbers."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, state: None, step: Step) -> tuple:
        x, _, weights = T5AttentionLayer(self.config, name="0")(x, None, step)
        return T5MLPLayer(self.config, name="1")(x, step), None, weights


class T5DecoderLayers(nn.Module):
    """As T5EncoderLayers; its weights are two, over the decoder's tokens and over the encoder's."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array, state: EncoderDecoderKV | None, step: Step) -> tuple:
        own, cross = (None, None) if state is None else (state.own, state.cross)
        x, own, weights = T5AttentionLayer(self.config, causal=True, name="0")(x, own, step)
        x, cross, cross_weights = T5AttentionLayer(self.config, cross=True, name="1")(x, cross, step)
        x = T5MLPLayer(self.config, name="2")(x, step)
        return x, None if state is None else EncoderDecoderKV(own, cross), (weights, cross_weights)


class T5EncoderBlock(nn.Module):
    config: T5Config
    layers: ClassVar[type[nn.Module]] = T5EncoderLayers

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        x = step.constrain(x, "batch", "seq", "act_embed")
        return self.layers(self.config, name="layer")(x, state, step)


class T5DecoderBlock(T5EncoderBlock):
    layers = T5DecoderLayers


class T5Stack(Model):
    """The encoder, or the decoder. Returns the output of the last norm, the states, every layer's input and the output, the weights."""

    block_class: ClassVar[type[nn.Module]]
    causal: ClassVar[bool]

    def setup(self) -> None:
        self.relative_attention_bias = T5RelativeBias(self.config, self.causal)
        self.block = Layers(self.block_class, self.config, self.scan_layers, self.remat)
        self.final_layer_norm = T5LayerNorm(self.config, self.dtype)

    def __call__(self, x: jax.Array, states: tuple | None, step: Step) -> tuple:
        places = T5Places(self.relative_attention_bias(step.positions, step.key_positions), self.dtype)
        x = dropout(self, x.astype(places.stream), self.config.dropout_rate)
        x, states, inputs, weights = self.block(x, states, step.replace(rope=places))
        x = dropout(self, self.final_layer_norm(x), self.config.dropout_rate)
        return x, states, (*inputs, x) if step.output_hidden_states else None, weights


class T5Encoder(T5Stack):
    block_class = T5EncoderBlock
    causal = False


class T5Decoder(T5Stack):
    block_class = T5DecoderBlock
    causal = True


class T5EncoderModel(Model):
    float16_unsafe = (r".*\.wo\.weight",)

    def setup(self) -> None:
        c = self.config
        self.shared = Embedding(c.vocab_size, c.hidden_size, c.initializer_factor)
        self.encoder = T5Encoder(**{**self.options(), "config": c.encoder})

    def embeddings(self) -> Embedding:
        return self.shared

    def embed(self, ids: jax.Array | None, embeds: jax.Array | None) -> jax.Array:
        return self.shared(ids, self.dtype) if embeds is None else embeds.astype(self.dtype)

    def encode(
        self,
        input_ids: jax.Array | None,
        attention_mask: jax.Array | None,
        inputs_embeds: jax.Array | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[BaseModelOutput, jax.Array]:
        """The encoder's output and its tokens' positions [B,S]."""
        step, _ = self.start(input_ids, attention_mask, inputs_embeds, None, output_hidden_states, output_attentions)
        x, _, hidden, weights = self.encoder(self.embed(input_ids, inputs_embeds), None, step)
        return BaseModelOutput(x, None, hidden, tuple(weights) if output_attentions else None), step.positions

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """input_ids and attention_mask [B,S], padding on either side."""
        return self.encode(input_ids, attention_mask, inputs_embeds, output_hidden_states, output_attentions)[0]


class T5Model(EncoderDecoder, T5EncoderModel):  # type: ignore[misc]  # which take different inputs
    """Encoder and decoder without a head."""

    def setup(self) -> None:
        super().setup()
        self.decoder = T5Decoder(**self.options())


class T5ForConditionalGeneration(T5Model):
    def setup(self) -> None:
        super().setup()
        c = self.config
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.vocab_size, ("vocab", "embed"), init_std=c.initializer_factor)

    def __call__(  # type: ignore[override]
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        labels: jax.Array | None = None,
        logits_to_keep: int = 0,
        **inputs: Any,
    ) -> Seq2SeqLMOutput:
        """inputs: as T5Model's. labels [B,T]: the id that follows each of the decoder's inputs, -100 left out; where there are none,
        these inputs are the labels shifted right. logits_to_keep: only the last so many, 0 for all."""
        if labels is not None and decoder_input_ids is None and inputs.get("decoder_inputs_embeds") is None:
            decoder_input_ids = self.shift_right(labels, decoder_attention_mask)
        out = super().__call__(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, **inputs)
        x = out.last_hidden_state[:, -logits_to_keep:]
        if self.config.scale_decoder_outputs:
            x = x * self.config.hidden_size**-0.5
        logits = self.shared.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        if self.rules is not None:
            logits = self.rules.constrain(logits, ("batch", "seq", "act_vocab"))
        loss = None if labels is None else cross_entropy(logits, jnp.asarray(labels))
        return Seq2SeqLMOutput(loss=loss, logits=logits, cache=out.cache, **rest(out))


class T5ForQuestionAnswering(T5Model):
    def setup(self) -> None:
        super().setup()
        self.qa_outputs = Linear(2, (None, "embed"), True, self.config.initializer_factor * self.config.hidden_size**-0.5)

    def __call__(  # type: ignore[override]
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        start_positions: jax.Array | None = None,
        end_positions: jax.Array | None = None,
        **inputs: Any,
    ) -> Seq2SeqQuestionAnsweringOutput:
        """inputs: as T5Model's; without decoder_input_ids the decoder reads input_ids [B,T], shifted right. start_positions and
        end_positions [B]: columns of the answer."""
        inputs = self.decoder_inputs(input_ids, attention_mask, inputs)
        out = super().__call__(input_ids, attention_mask, **inputs)
        start, end = jnp.unstack(self.qa_outputs(out.last_hidden_state), axis=-1)
        wanted = start_positions is not None and end_positions is not None
        mask = inputs.get("decoder_attention_mask")
        loss = span_loss(start, end, start_positions, end_positions, mask) if wanted else None  # type: ignore[arg-type]
        return Seq2SeqQuestionAnsweringOutput(loss=loss, start_logits=start, end_logits=end, **rest(out))


class T5ClassificationHead(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, std = self.config, self.config.initializer_factor * self.config.hidden_size**-0.5
        x = activation("tanh")(Linear(c.hidden_size, (None, "embed"), True, std, name="dense")(dropout(self, x, c.classifier_dropout)))
        return Linear(c.num_labels, (None, "embed"), True, std, name="out_proj")(dropout(self, x, c.classifier_dropout))


class T5ForSequenceClassification(Head):
    """Logits of the decoder's output at each row's last end-of-sequence token."""

    base = T5Model
    base_name = "transformer"
    float16_unsafe = T5Model.float16_unsafe

    def setup(self) -> None:
        self.add_base()
        self.classification_head = T5ClassificationHead(self.config)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, labels: jax.Array | None = None, **inputs: Any
    ) -> Seq2SeqSequenceClassifierOutput:
        """inputs: as T5Model's; without decoder_input_ids the decoder reads input_ids [B,T], shifted right. ValueError where a row of
        concrete input_ids has no end-of-sequence token."""
        ends = self.ends(input_ids, attention_mask)
        inputs = self.transformer.decoder_inputs(input_ids, attention_mask, inputs)
        out = self.transformer(input_ids, attention_mask, **inputs)
        last = jnp.max(jnp.where(ends, jnp.arange(ends.shape[1]), 0), 1)
        logits = self.classification_head(jnp.take_along_axis(out.last_hidden_state, last[:, None, None], 1)[:, 0])
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return Seq2SeqSequenceClassifierOutput(loss=loss, logits=logits, **rest(out))

    def ends(self, input_ids: Any, attention_mask: Any) -> jax.Array:
        """bool [B,T]: the end-of-sequence tokens."""
        if self.config.eos_token_id is None:
            raise ValueError("the config has no eos_token_id, at which T5's sequence classification reads its logits")
        eos, traced = self.config.eos_token_id, any(isinstance(x, jax.core.Tracer) for x in (input_ids, attention_mask))
        xp: Any = jnp if traced else np
        found = xp.isin(input_ids, xp.asarray(eos)) & (True if attention_mask is None else xp.asarray(attention_mask).astype(bool))
        if not traced and not found.any(1).all():
            raise ValueError(
                f"rows {np.flatnonzero(~found.any(1)).tolist()} of input_ids have no eos_token_id ({eos}), where logits are read"
            )
        return jnp.asarray(found)


class T5ForTokenClassification(TokenClassification):
    """Of the encoder's tokens."""

    base = T5EncoderModel
    base_name = "transformer"
    head_name = "classifier"
    float16_unsafe = T5EncoderModel.float16_unsafe

    def run_base(self, input_ids: Any, attention_mask: Any, position_ids: Any, inputs_embeds: Any, cache: Any, *flags: bool) -> Any:
        return self.transformer(input_ids, attention_mask, inputs_embeds, *flags)  # T5 has no position_ids


def rules(config: T5Config) -> tuple[Op, ...]:
    """The first block's table is the stack's. Files hold the embeddings up to four times."""
    table, shared = "relative_attention_bias.weight", "transformer.shared.weight"
    copies = ("transformer.encoder.embed_tokens.weight", "transformer.decoder.embed_tokens.weight")
    return (
        Ignore((f"transformer.decoder.block.0.layer.1.EncDecAttention.{table}",)),
        *(
            Rename(f"transformer.{stack}.block.0.layer.0.SelfAttention.{table}", f"transformer.{stack}.{table}")
            for stack in ("encoder", "decoder")
        ),
        *(Tie(copy, shared) for copy in (*copies, *(("transformer.lm_head.weight",) if config.tie_word_embeddings else ()))),
        Detachable(("transformer.lm_head.*", "transformer.qa_outputs.*")),
        Detachable(("transformer.decoder.**",), required=True),
    )


FAMILY = Family(
    config=T5Config,
    classes={
        "AutoModel": T5Model,
        "AutoModelForSeq2SeqLM": T5ForConditionalGeneration,
        "AutoModelForTextEncoding": T5EncoderModel,
        "AutoModelForSequenceClassification": T5ForSequenceClassification,
        "AutoModelForTokenClassification": T5ForTokenClassification,
        "AutoModelForQuestionAnswering": T5ForQuestionAnswering,
    },
    rules=rules,
)
