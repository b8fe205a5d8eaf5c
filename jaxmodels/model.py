"""What the top modules of every family share, and the heads that are the same for all of them.

Axis letters: B batch, T tokens, D hidden, V vocabulary."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmodels.cache import Cache, KVSpec, SlidingKVSpec
from jaxmodels.layers import Linear, Packed, Step, begin, dropout
from jaxmodels.ops.attention import resolve_attention
from jaxmodels.ops.loss import IGNORE, LossOptions, causal_lm_loss, classification_loss, cross_entropy, row_losses, span_loss, summed_loss
from jaxmodels.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


class Model(nn.Module):
    """A family's module over `config`. Static and hashable, so it may be a static argument of jax.jit.

    dtype: the compute dtype (parameters have their own); scan_layers: the stacked form of the parameters; remat: a
    jax.checkpoint policy by name; attn_implementation: overrides the config's choice; rules: logical axes to mesh axes; early_exit:
    only the first so many layers run, with the parameters and the cache of all."""

    config: Any
    dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: str | None = None
    attn_implementation: str | None = None
    rules: Any = None
    early_exit: int | None = None

    base_name: ClassVar[str] = ""  # the attribute, and so the prefix in a checkpoint, that holds the base model; empty in a base model
    float32_params: ClassVar[tuple[str, ...]] = ()  # patterns of parameters that keep float32 whatever the dtype
    float16_unsafe: ClassVar[tuple[str, ...]] = ()  # and of those that keep it in a float16 model, as in HF

    def options(self) -> dict[str, Any]:
        """The fields that a part of this model is built with."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Model) if f.name not in ("parent", "name")}

    def example_inputs(self) -> dict[str, jax.Array]:
        """The smallest inputs: what initialisation is traced with."""
        return {"input_ids": jnp.zeros((1, 1), jnp.int32)}

    @property
    def axis_units(self) -> Mapping[str, int]:
        """Axes that hold whole units, and the unit's size: heads are never cut."""
        return {"heads": self.config.head_dim, "kv_heads": self.config.head_dim}

    def start(
        self,
        input_ids: jax.Array | None,
        attention_mask: jax.Array | Packed | None,
        inputs_embeds: jax.Array | None,
        cache: Cache | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[Step, Cache | None]:
        """Check the inputs and place the new tokens."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids [B,T] and inputs_embeds [B,T,D] is needed")
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size)
        B, T = (input_ids if input_ids is not None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        attention = resolve_attention(self.attn_implementation or self.config.attn_implementation)
        if output_attentions and attention != "eager":
            warnings.warn(
                f"attention {attention or 'xla'!r} returns no weights: this call runs 'eager' for output_attentions", stacklevel=3
            )
            attention = "eager"
        if isinstance(attention_mask, Packed):
            self._check_packing()
        elif attention_mask is not None:
            attention_mask = jnp.asarray(attention_mask)
        static = {"dtype": self.dtype, "rules": self.rules, "attention": attention, "early_exit": self.early_exit}
        static |= {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        return begin((B, T), attention_mask, cache, **static)

    def _check_packing(self) -> None:
        specs = {self.config.layer_spec(kind) for kind in self.config.layer_kinds}
        other = sorted({type(spec).__name__ for spec in specs if not isinstance(spec, KVSpec | SlidingKVSpec)})
        if other:
            raise ValueError(
                f"{type(self).__name__} has layers that carry more than keys and values from token to token ({', '.join(other)}): packed "
                "documents would leak into each other; give every document its own row"
            )


def check_ids(input_ids: Any, vocab_size: int) -> None:
    """Raise ValueError when concrete token ids [B,T] are not integers in 0..vocab_size-1; traced ids cannot be looked at."""
    if getattr(input_ids, "ndim", None) != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(f"input_ids must be an integer array [B,T]; found {type(input_ids).__name__} of shape {np.shape(input_ids)}")
    if isinstance(input_ids, jax.core.Tracer) or input_ids.size == 0 or not getattr(input_ids, "is_fully_addressable", True):
        return
    ids = np.asarray(input_ids)  # by numpy: an array that a traced function closed over is concrete, what jax computes of it is not
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token ids run from {low} to {high}; the model's vocabulary has {vocab_size} (0..{vocab_size - 1})")


class Head(Model):
    """A base model under `base_name` and something on top. Subclasses of a family set `base`."""

    base: ClassVar[type[Model]]
    base_name: ClassVar[str] = "model"

    def add_base(self) -> None:
        setattr(self, self.base_name, self.base(**self.options()))

    def run_base(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return getattr(self, self.base_name)(*args, **kwargs)


class CausalLM(Head):
    """Next-token logits; the head is tied to the embeddings where the config says so."""

    head_name: ClassVar[str] = "lm_head"  # of the attribute and in the checkpoint
    head_bias: ClassVar[bool] = False

    def setup(self) -> None:
        self.add_base()
        if self.head_bias or not self.config.tie_word_embeddings:
            c = self.config
            setattr(self, self.head_name, Linear(c.vocab_size, ("vocab", "embed"), self.head_bias, c.initializer_range))

    def head(self, x: jax.Array) -> jax.Array:
        if not self.config.tie_word_embeddings:
            return getattr(self, self.head_name)(x)
        embeddings = getattr(self, self.base_name).embeddings()
        return getattr(self, self.head_name)(x, embeddings.weight) if self.head_bias else embeddings.attend(x)

    def __call__(
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
        segment_ids: jax.Array | None = None,
        loss_options: LossOptions | None = None,
        num_items_in_batch: jax.Array | None = None,
        **inputs: Any,
    ) -> CausalLMOutput:
        """labels [B,T]: ids, -100 left out; the loss is that of the following token. logits_to_keep: only the last so many, 0 for all.
        inputs: what else the base model takes, such as token_type_ids.

        segment_ids [B,T], instead of attention_mask: several documents in a row, 0 for padding and a number for each document; the first
        token of a document is nobody's label. The loss is the sum over labels divided by num_items_in_batch [], by default how many labels
        count here. loss_options: smoothing, z-loss, and a loss in chunks, which leaves no logits to return, or with by_row a sum for
        every row, [B]."""
        if segment_ids is not None:
            attention_mask, labels = pack(segment_ids, attention_mask, labels)  # type: ignore[assignment]
        out = self.run_base(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states, output_attentions, **inputs
        )
        x = out.last_hidden_state
        if labels is not None and loss_options is not None:
            total = self._training_loss(x, labels, loss_options, num_items_in_batch)
            return CausalLMOutput(total, None, out.cache, out.hidden_states, out.attentions)
        logits = self.head(x[:, -logits_to_keep:])
        if self.rules is not None:
            logits = self.rules.constrain(logits, ("batch", "seq", "act_vocab"))
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        return CausalLMOutput(loss, logits, out.cache, out.hidden_states, out.attentions)

    def _training_loss(self, x: jax.Array, labels: jax.Array, options: LossOptions, num_items: jax.Array | None) -> jax.Array:
        unbound: Any = self.unbind()  # the chunks' loop needs a function of arrays
        module, variables = unbound
        head = lambda x: module.apply(variables, x, method="head")
        labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)  # as many as tokens, which a mesh may split
        if options.by_row:
            return row_losses(head, x, labels, options, self.rules)
        total = summed_loss(head, x, labels, options, self.rules)
        return total / (jnp.sum(labels != IGNORE) if num_items is None else num_items)


def pack(segment_ids: jax.Array, attention_mask: Any, labels: jax.Array | None) -> tuple[Packed, jax.Array | None]:
    """segment_ids [B,T] as a mask, and labels [B,T] without the documents' first tokens and padding."""
    if attention_mask is not None:
        raise ValueError("segment_ids take the place of attention_mask: padding has segment 0; found both")
    segment_ids = jnp.asarray(segment_ids)
    if labels is not None:
        same = segment_ids == jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
        labels = jnp.where(same & (segment_ids > 0), labels, IGNORE)
    return Packed(segment_ids), labels


class SequenceClassification(Head):
    """Logits of the last real token: by attention_mask or, without one, by the config's pad_token_id."""

    def setup(self) -> None:
        self.add_base()
        self.score = Linear(self.config.num_labels, (None, "embed"), init_std=self.config.initializer_range)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        labels: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> SequenceClassifierOutput:
        out = self.run_base(input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states, output_attentions)
        x = out.last_hidden_state
        B, T, _ = x.shape
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        real = jnp.ones((B, T), bool) if attention_mask is None else jnp.asarray(attention_mask)[:, -T:].astype(bool)
        last = jnp.max(jnp.where(real, jnp.arange(T), 0), 1)
        logits = self.score(jnp.take_along_axis(x, last[:, None, None], 1)[:, 0])
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss, logits, out.cache, out.hidden_states, out.attentions)


def classifier_dropout(config: Any) -> float:
    """HF's rate before a classifier: the config's own, else that of hidden states, else 0.1."""
    values = ({**config.extra, **vars(config)}.get(name) for name in ("classifier_dropout", "hidden_dropout", "hidden_dropout_prob"))
    return next((value for value in values if value is not None), 0.1)


class TokenClassification(Head):
    """Logits [B,T,num_labels] of every token."""

    head_name: ClassVar[str] = "score"  # of the attribute and in the checkpoint

    def setup(self) -> None:
        self.add_base()
        head = Linear(self.config.num_labels, (None, "embed"), use_bias=True, init_std=self.config.initializer_range)
        setattr(self, self.head_name, head)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        labels: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **inputs: Any,
    ) -> TokenClassifierOutput:
        """labels [B,T]: classes, -100 left out. inputs: what else the base model takes, such as token_type_ids."""
        out = self.run_base(input_ids, attention_mask, position_ids, inputs_embeds, None, output_hidden_states, output_attentions, **inputs)
        logits = getattr(self, self.head_name)(dropout(self, out.last_hidden_state, classifier_dropout(self.config)))
        loss = None if labels is None else cross_entropy(logits, labels)
        return TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


class QuestionAnswering(Head):
    """Logits [B,T] of where the answer starts, and of where it ends."""

    def setup(self) -> None:
        self.add_base()
        self.qa_outputs = Linear(2, (None, "embed"), use_bias=True, init_std=self.config.initializer_range)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        start_positions: jax.Array | None = None,
        end_positions: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **inputs: Any,
    ) -> QuestionAnsweringOutput:
        """start_positions and end_positions [B]: token columns of the answer. inputs: what else the base model takes."""
        out = self.run_base(input_ids, attention_mask, position_ids, inputs_embeds, None, output_hidden_states, output_attentions, **inputs)
        start, end = jnp.unstack(self.qa_outputs(out.last_hidden_state), axis=-1)
        wanted = start_positions is not None and end_positions is not None
        loss = span_loss(start, end, start_positions, end_positions, attention_mask) if wanted else None  # type: ignore[arg-type]
        return QuestionAnsweringOutput(loss, start, end, out.hidden_states, out.attentions)
