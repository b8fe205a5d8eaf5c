"""BERT (arXiv:1810.04805): an encoder whose tokens see all others, with every head of its own; as a decoder (is_decoder) they see what
precedes them.

Axis letters: B batch, C choices, T tokens, D hidden, N heads, H head dim, F mlp, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import Cache
from jaxmodels.config import Config
from jaxmodels.convert.rules import Alias, Detachable, Ignore, Op
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import Embedding, LayerNorm, Layers, Linear, Step, activation, attend, dropout, parameter, weight_dropout
from jaxmodels.model import CausalLM, Head, Model, QuestionAnswering, TokenClassification, classifier_dropout
from jaxmodels.ops.linear import linear
from jaxmodels.ops.loss import classification_loss, cross_entropy
from jaxmodels.outputs import BaseModelOutputWithPooling, MaskedLMOutput, PreTrainingOutput, SequenceClassifierOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    model_type: ClassVar[str] = "bert"
    has_learned_positions: ClassVar[bool] = True

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    position_embedding_type: str = "absolute"
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    is_decoder: bool = False
    add_cross_attention: bool = False
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        if self.position_embedding_type != "absolute" or self.add_cross_attention:
            raise ValueError(
                f"position_embedding_type {self.position_embedding_type!r} and add_cross_attention {self.add_cross_attention}; "
                "this family has absolute positions and no cross-attention"
            )


class BertEmbeddings(nn.Module):
    config: BertConfig

    def setup(self) -> None:
        c = self.config
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size, c.initializer_range, axis=None)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size, c.initializer_range, axis=None)
        self.LayerNorm = LayerNorm(c.layer_norm_eps)

    def __call__(self, words: jax.Array, token_type_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """words: ids [B,T], or what stands for their embeddings [B,T,D], which also gives the dtype."""
        x = words + self.token_type_embeddings(token_type_ids, words.dtype)
        x = self.LayerNorm(x + self.position_embeddings(positions, words.dtype))
        return dropout(self, x, self.config.hidden_dropout_prob)


class BertSelfAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        c = self.config
        (B, T, D), N, H = x.shape, c.num_attention_heads, c.head_dim
        dense = partial(Linear, use_bias=True, init_std=c.initializer_range)
        q = dense(D, ("heads", "embed"), name="query")(x).reshape(B, T, N, H)
        k = dense(D, ("kv_heads", "embed"), name="key")(x).reshape(B, T, N, H)
        v = dense(D, ("kv_heads", "embed"), name="value")(x).reshape(B, T, N, H)
        q = step.constrain(q, "batch", "seq", "act_heads", None)
        return attend(q, k, v, state, step, causal=c.is_decoder, dropout=weight_dropout(self, c.attention_probs_dropout_prob))


class BertOutput(nn.Module):
    """The end of either half of a layer: back to [B,T,D], added and normed. `axis` names what comes in."""

    config: BertConfig
    axis: str

    @nn.compact
    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        c = self.config
        h = Linear(c.hidden_size, ("embed", self.axis), use_bias=True, init_std=c.initializer_range, name="dense")(h)
        return LayerNorm(c.layer_norm_eps, name="LayerNorm")(dropout(self, h, c.hidden_dropout_prob) + x)


class BertAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        h, state, weights = BertSelfAttention(self.config, name="self")(x, state, step)  # [B, T, N*H]
        return BertOutput(self.config, "heads", name="output")(h, x), state, weights


class BertIntermediate(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = Linear(c.intermediate_size, ("mlp", "embed"), use_bias=True, init_std=c.initializer_range, name="dense")
        return activation(c.hidden_act)(dense(x))  # [B, T, F]


class BertLayer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        x = step.constrain(x, "batch", "seq", "act_embed")
        x, state, weights = BertAttention(self.config, name="attention")(x, state, step)
        h = step.constrain(BertIntermediate(self.config, name="intermediate")(x), "batch", "seq", "act_mlp")
        return BertOutput(self.config, "mlp", name="output")(h, x), state, weights


class BertEncoder(nn.Module):
    config: BertConfig
    scan_layers: bool
    remat: str | None

    def setup(self) -> None:
        self.layer = Layers(BertLayer, self.config, self.scan_layers, self.remat)

    def __call__(self, x: jax.Array, states: tuple | None, step: Step) -> tuple:
        return self.layer(x, states, step)


class Transform(nn.Module):
    """A square dense layer and an activation, `normed` or not: the pooler, and what comes before the vocabulary."""

    config: BertConfig
    hidden_act: str
    normed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = Linear(c.hidden_size, (None, "embed"), use_bias=True, init_std=c.initializer_range, name="dense")
        x = activation(self.hidden_act)(dense(x))
        return LayerNorm(c.layer_norm_eps, name="LayerNorm")(x) if self.normed else x


class BertModel(Model):
    """Causal, and with a cache, where the config says is_decoder."""

    pooled: ClassVar[bool] = True

    def setup(self) -> None:
        c = self.config
        self.embeddings = BertEmbeddings(c)
        self.encoder = BertEncoder(c, self.scan_layers, self.remat)
        if self.pooled:
            self.pooler = Transform(c, "tanh")

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        token_type_ids: jax.Array | None = None,
    ) -> BaseModelOutputWithPooling:
        """token_type_ids [B,T]: which sentence a token belongs to, 0 by default. pooler_output: of each row's first real token."""
        if cache is not None and not self.config.is_decoder:
            raise ValueError("a cache was given, but every token sees those after it: only is_decoder=True in the config decodes")
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, output_attentions)
        words = self.embeddings.word_embeddings(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        types = jnp.zeros(words.shape[:2], jnp.int32) if token_type_ids is None else token_type_ids
        x = self.embeddings(words, types, step.lookup(position_ids, self.config.learned_positions))
        x, states, inputs, weights = self.encoder(x, None if cache is None else cache.layers, step)
        first = jnp.argmax(step.positions >= 0, 1)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.pooler(jnp.take_along_axis(x, first[:, None, None], 1)[:, 0]) if self.pooled else None,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )


class BertModelWithoutPooler(BertModel):
    pooled = False


class BertLMPredictionHead(nn.Module):
    """Logits [B,T,V]: against `words` [V,D], the embeddings, where the head is tied to them."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
        c = self.config
        x = Transform(c, c.hidden_act, normed=True, name="transform")(x)
        bias = parameter(self, "bias", nn.initializers.zeros, ("vocab",), (c.vocab_size,))
        if c.tie_word_embeddings:
            return linear(x, words, bias)
        decoder = Linear(c.vocab_size, ("vocab", "embed"), use_bias=True, init_std=c.initializer_range, name="decoder")
        return decoder(x)  # files of an untied head hold the other bias too, which nothing reads


class PretrainingHeads(nn.Module):
    """What checkpoints call `cls`: one of the heads of BERT's pretraining, or both."""

    config: BertConfig
    language: bool = True
    pairs: bool = False

    def setup(self) -> None:
        if self.language:
            self.predictions = BertLMPredictionHead(self.config)
        if self.pairs:
            self.seq_relationship = Linear(2, (None, "embed"), use_bias=True, init_std=self.config.initializer_range)


class BertLMHeadModel(CausalLM):
    base = BertModelWithoutPooler
    base_name = "bert"

    def setup(self) -> None:
        self.add_base()
        self.cls = PretrainingHeads(self.config)

    def head(self, x: jax.Array) -> jax.Array:
        return self.cls.predictions(x, self.bert.embeddings.word_embeddings.weight)


class BertHead(Head):
    """What the heads below share: the base, what is on top by `add_head`, and one answer from the base's output."""

    base = BertModel
    base_name = "bert"

    def setup(self) -> None:
        self.add_base()
        self.add_head()

    def add_head(self) -> None:
        self.classifier = Linear(self.config.num_labels, (None, "embed"), use_bias=True, init_std=self.config.initializer_range)

    def answer(self, out: BaseModelOutputWithPooling, labels: jax.Array | None = None) -> Any:
        """Each head's own: its output, and the loss where there are labels."""
        raise NotImplementedError

    def words(self, out: BaseModelOutputWithPooling) -> jax.Array:
        """Logits [B,T,V] of the language head."""
        logits = self.cls.predictions(out.last_hidden_state, self.bert.embeddings.word_embeddings.weight)
        return logits if self.rules is None else self.rules.constrain(logits, ("batch", "seq", "act_vocab"))

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        token_type_ids: jax.Array | None = None,
        **labels: Any,
    ) -> Any:
        inputs = (input_ids, attention_mask, position_ids, inputs_embeds, None, output_hidden_states, output_attentions)
        return self.answer(self.run_base(*inputs, token_type_ids=token_type_ids), **labels)  # type: ignore[arg-type]


class BertForMaskedLM(BertHead):
    """labels [B,T]: the ids that belong there, -100 left out."""

    base = BertModelWithoutPooler

    def add_head(self) -> None:
        self.cls = PretrainingHeads(self.config)

    def answer(self, out: BaseModelOutputWithPooling, labels: jax.Array | None = None) -> MaskedLMOutput:
        logits = self.words(out)
        loss = None if labels is None else cross_entropy(logits, labels)
        return MaskedLMOutput(loss, logits, out.hidden_states, out.attentions)


class BertForNextSentencePrediction(BertHead):
    """labels [B]: 0 where the second sentence follows the first, 1 where it does not."""

    def add_head(self) -> None:
        self.cls = PretrainingHeads(self.config, language=False, pairs=True)

    def answer(self, out: BaseModelOutputWithPooling, labels: jax.Array | None = None) -> SequenceClassifierOutput:
        logits = self.cls.seq_relationship(out.pooler_output)
        loss = None if labels is None else cross_entropy(logits, labels.reshape(-1))
        return SequenceClassifierOutput(loss, logits, None, out.hidden_states, out.attentions)


class BertForPreTraining(BertHead):
    """Both heads. The loss is the sum of both, given labels as of BertForMaskedLM and next_sentence_label as of the other."""

    def add_head(self) -> None:
        self.cls = PretrainingHeads(self.config, pairs=True)

    def answer(
        self, out: BaseModelOutputWithPooling, labels: jax.Array | None = None, next_sentence_label: jax.Array | None = None
    ) -> PreTrainingOutput:
        logits = self.words(out)
        pairs = self.cls.seq_relationship(out.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = cross_entropy(logits, labels) + cross_entropy(pairs, next_sentence_label.reshape(-1))
        return PreTrainingOutput(loss, logits, pairs, out.hidden_states, out.attentions)


class BertForSequenceClassification(BertHead):
    """labels [B], or [B,num_labels] for several at once."""

    def answer(self, out: BaseModelOutputWithPooling, labels: jax.Array | None = None) -> SequenceClassifierOutput:
        logits = self.classifier(dropout(self, out.pooler_output, classifier_dropout(self.config)))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss, logits, None, out.hidden_states, out.attentions)


class BertForMultipleChoice(BertHead):
    """Of several texts for each row, ids [B,C,T] and everything else likewise, which one: logits [B,C], labels [B]."""

    def example_inputs(self) -> dict[str, jax.Array]:
        return {"input_ids": jnp.zeros((1, 1, 1), jnp.int32)}

    def add_head(self) -> None:
        self.classifier = Linear(1, (None, "embed"), use_bias=True, init_std=self.config.initializer_range)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        token_type_ids: jax.Array | None = None,
        **labels: Any,
    ) -> SequenceClassifierOutput:
        if input_ids is not None and input_ids.ndim != 3:
            raise ValueError(f"input_ids has shape {input_ids.shape}; multiple choice expects [batch, choices, tokens]")
        flat = lambda x, rank=1: None if x is None else jnp.asarray(x).reshape(-1, *x.shape[-rank:])
        inputs = (flat(input_ids), flat(attention_mask), flat(position_ids), flat(inputs_embeds, 2))
        given = input_ids if inputs_embeds is None else inputs_embeds
        labels["choices"] = 1 if given is None else given.shape[1]
        return super().__call__(*inputs, output_hidden_states, output_attentions, flat(token_type_ids), **labels)

    def answer(  # type: ignore[override]
        self, out: BaseModelOutputWithPooling, choices: int, labels: jax.Array | None = None
    ) -> SequenceClassifierOutput:
        pooled = dropout(self, out.pooler_output, classifier_dropout(self.config))
        logits = self.classifier(pooled).reshape(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits, None, out.hidden_states, out.attentions)


class BertForTokenClassification(TokenClassification):
    base = BertModelWithoutPooler
    base_name = "bert"
    head_name = "classifier"


class BertForQuestionAnswering(QuestionAnswering):
    base = BertModelWithoutPooler
    base_name = "bert"


def rules(config: BertConfig) -> Sequence[Op]:
    """Files from TensorFlow's days call the norms' parameters gamma and beta; some of a tied head hold its weight and bias twice."""
    head = "cls.predictions"
    return (
        Alias("**LayerNorm.weight", ("**LayerNorm.gamma",)),
        Alias("**LayerNorm.bias", ("**LayerNorm.beta",)),
        Ignore(("**embeddings.position_ids", "**embeddings.token_type_ids")),
        Detachable(("bert.pooler.**",)),
        *tied_head(config, f"{head}.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        *tied_head(config, f"{head}.decoder.bias", f"{head}.bias"),
    )


FAMILY = Family(
    config=BertConfig,
    classes={
        "AutoModel": BertModel,
        "AutoModelForCausalLM": BertLMHeadModel,
        "AutoModelForTextEncoding": BertModel,
        "AutoModelForMaskedLM": BertForMaskedLM,
        "AutoModelForPreTraining": BertForPreTraining,
        "AutoModelForNextSentencePrediction": BertForNextSentencePrediction,
        "AutoModelForSequenceClassification": BertForSequenceClassification,
        "AutoModelForTokenClassification": BertForTokenClassification,
        "AutoModelForQuestionAnswering": BertForQuestionAnswering,
        "AutoModelForMultipleChoice": BertForMultipleChoice,
    },
    rules=rules,
)
