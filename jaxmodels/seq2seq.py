"""What every encoder-decoder model shares: who reads what, the cache, and labels for the decoder.

Axis letters: B batch, S tokens of the encoder, T of the decoder, D hidden."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.cache import Cache
from jaxmodels.layers import Source, begin
from jaxmodels.model import Model
from jaxmodels.ops.loss import IGNORE
from jaxmodels.outputs import BaseModelOutput, Seq2SeqModelOutput


class EncoderDecoder(Model):
    """A family's base model has `encode`, which takes what an encoder takes and returns its output and the positions [B,S] of its tokens;
    `embed(ids or None, embeds or None)` [B,T,D]; and `decoder(x, states, step)`, which returns x, the states, hidden states or None, and
    each layer's pair of weights."""

    def example_inputs(self) -> dict[str, jax.Array]:
        return {name: jnp.zeros((1, 1), jnp.int32) for name in ("input_ids", "decoder_input_ids")}

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        encoder_outputs: Any = None,
        cache: Cache | None = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Seq2SeqModelOutput:
        """input_ids, attention_mask [B,S] of the encoder, padding on either side; in place of input_ids encoder_outputs: what the encoder
        returned, or (hidden [B,S,D],). decoder_input_ids, decoder_attention_mask [B,T]. A cache that holds the encoder's keys and values
        stands for the encoder and what it reads."""
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("decoder_input_ids [B,T] (or decoder_inputs_embeds, or labels to shift) are needed beside the encoder's input")
        flags = (output_hidden_states, output_attentions)
        step, after = self.start(decoder_input_ids, decoder_attention_mask, decoder_inputs_embeds, cache, *flags)
        states, encoded = None if after is None else after.layers, BaseModelOutput(None)  # type: ignore[arg-type]
        if states is None or not states[0].cross.slots:
            if encoder_outputs is None:
                encoded, positions = self.encode(input_ids, attention_mask, inputs_embeds, *flags)
            else:
                encoded = encoder_outputs if isinstance(encoder_outputs, BaseModelOutput) else BaseModelOutput(*encoder_outputs[:1])
                mask = None if attention_mask is None else jnp.asarray(attention_mask)
                B, S, _ = encoded.last_hidden_state.shape
                positions = begin((B, S), mask, None)[0].positions
            step = step.replace(source=Source(jnp.asarray(encoded.last_hidden_state, self.dtype), positions))
            states = None if states is None else tuple(s.replace(cross=s.cross.room(positions.shape[1])) for s in states)
        x, states, hidden, weights = self.decoder(self.embed(decoder_input_ids, decoder_inputs_embeds), states, step)
        own, cross = zip(*weights) if output_attentions else (None, None)
        return Seq2SeqModelOutput(
            last_hidden_state=x,
            cache=None if after is None else after.replace(layers=states),
            decoder_hidden_states=hidden,
            decoder_attentions=own,
            cross_attentions=cross,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def decoder_inputs(self, input_ids: Any, attention_mask: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` with the encoder's, shifted right, for the decoder where they have none for it."""
        if input_ids is None or any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            return inputs
        shifted = self.shift_right(input_ids, attention_mask)
        return inputs | {"decoder_input_ids": shifted, "decoder_attention_mask": attention_mask}

    def shift_right(self, ids: Any, attention_mask: Any = None) -> jax.Array:
        """decoder_start_token_id, then ids [B,T] less the last; a row's start stands at its first real token. -100 becomes padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"decoder_start_token_id is {start} and pad_token_id {pad} in the config; shifting ids to the right needs both"
            )
        real = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        shifted = jnp.where(jnp.cumsum(real, 1) <= 1, start, jnp.roll(ids, 1, axis=1))
        return jnp.where(shifted == IGNORE, pad, shifted)


def rest(out: Seq2SeqModelOutput) -> dict[str, Any]:
    """The fields that a head hands on."""
    return {f.name: getattr(out, f.name) for f in dataclasses.fields(out) if f.name not in ("last_hidden_state", "cache")}
