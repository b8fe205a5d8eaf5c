"""Output dataclasses: pytrees with HF's field names, indexed by name or, over the fields that are set, by position.

Axis letters: B rows, T tokens, S keys, D hidden, N heads, E experts, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import struct


class ModelOutput:
    """What every output shares: `out.logits`, `out["logits"]`, `out[0]`, `out.keys()`, `out.to_tuple()`; None fields do not count."""

    def keys(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, item: str | int | slice) -> Any:
        if isinstance(item, str):
            if item not in self.keys():
                raise KeyError(f"{type(self).__name__} has no {item!r}; set are {', '.join(self.keys())}")
            return getattr(self, item)
        return self.to_tuple()[item]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@struct.dataclass
class BaseModelOutput(ModelOutput):
    """last_hidden_state [B,T,D]; hidden_states: embeddings and each layer, [B,T,D] each; attentions: [B,N,T,S] each."""

    last_hidden_state: jax.Array
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """As BaseModelOutput; pooler_output [B,D] stands for a whole row, where the model has a pooler."""

    last_hidden_state: jax.Array
    pooler_output: Any = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class CausalLMOutput(ModelOutput):
    """loss [] float32 when labels were given; logits [B,T,V]."""

    loss: jax.Array | None = None
    logits: Any = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class MoeModelOutput(BaseModelOutput):
    """router_logits: [B,T,E] of each layer that has experts."""

    router_logits: tuple[jax.Array, ...] | None = None


@struct.dataclass
class MoeCausalLMOutput(ModelOutput):
    """As CausalLMOutput; aux_loss [] float32, the router's, which `loss` includes times the config's coefficient."""

    loss: jax.Array | None = None
    aux_loss: jax.Array | None = None
    logits: Any = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    router_logits: tuple[jax.Array, ...] | None = None


@struct.dataclass
class DoubleHeadsOutput(ModelOutput):
    """loss and mc_loss [] float32 when labels and mc_labels were given; logits [...,T,V]; mc_logits [...] for ids [...,T]."""

    loss: jax.Array | None = None
    mc_loss: jax.Array | None = None
    logits: Any = None
    mc_logits: Any = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class MaskedLMOutput(ModelOutput):
    """loss [] float32 when labels were given; logits [B,T,V]."""

    loss: jax.Array | None = None
    logits: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class PreTrainingOutput(ModelOutput):
    """loss [] float32 when both labels were given; prediction_logits [B,T,V]; seq_relationship_logits [B,2]."""

    loss: jax.Array | None = None
    prediction_logits: Any = None
    seq_relationship_logits: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class SequenceClassifierOutput(ModelOutput):
    """loss [] float32 when labels were given; logits [B, num_labels]."""

    loss: jax.Array | None = None
    logits: Any = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class TokenClassifierOutput(ModelOutput):
    """loss [] float32 when labels were given; logits [B, T, num_labels]."""

    loss: jax.Array | None = None
    logits: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class QuestionAnsweringOutput(ModelOutput):
    """loss [] float32 when positions were given; start_logits and end_logits [B, T]."""

    loss: jax.Array | None = None
    start_logits: Any = None
    end_logits: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class Seq2SeqModelOutput(ModelOutput):
    """last_hidden_state [B,T,D] of the decoder, encoder_last_hidden_state [B,S,D] (None where the cache stood for the encoder);
    decoder_attentions [B,N,T,T], cross_attentions [B,N,T,S], encoder_attentions [B,N,S,S] each."""

    last_hidden_state: jax.Array
    cache: Any = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: Any = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class Seq2SeqLMOutput(ModelOutput):
    """loss [] float32 when labels were given; logits [B,T,V]; the rest as Seq2SeqModelOutput."""

    loss: jax.Array | None = None
    logits: Any = None
    cache: Any = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: Any = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class Seq2SeqSequenceClassifierOutput(ModelOutput):
    """loss [] float32 when labels were given; logits [B, num_labels]; the rest as Seq2SeqModelOutput."""

    loss: jax.Array | None = None
    logits: Any = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: Any = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None


@struct.dataclass
class Seq2SeqQuestionAnsweringOutput(ModelOutput):
    """loss [] float32 when positions were given; start_logits and end_logits [B,T]; the rest as Seq2SeqModelOutput."""

    loss: jax.Array | None = None
    start_logits: Any = None
    end_logits: Any = None
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: Any = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None
