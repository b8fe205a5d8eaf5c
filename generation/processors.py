"""Logits processors: small pytree dataclasses, each usable alone as `processor(sequences, logits) -> logits`.

Their values are arrays, so another value compiles nothing; which processors there are is structure. `build_processors` makes those
that a GenerationConfig asks for, in HF's order.

Axis letters: B rows, T columns of what an encoder or, without one, the model reads, E token ids."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxmodels.generation.guidance import Guidance
from jaxmodels.generation.processors_base import Follower, LogitsProcessor, Sequences, id_array, kind, to_float, to_int
from jaxmodels.generation.processors_filter import (
    EpsilonCutoff,
    EtaCutoff,
    MinP,
    Normalize,
    Temperature,
    TopH,
    TopK,
    TopP,
    Typical,
)
from jaxmodels.generation.processors_tokens import (
    EncoderNoRepeatNGram,
    EncoderRepetitionPenalty,
    ExponentialDecayLength,
    ForcedBOS,
    ForcedEOS,
    HammingDiversity,
    MinLength,
    MinNewTokens,
    NoRepeatNGram,
    RemoveInvalid,
    RepetitionPenalty,
    SequenceBias,
    SuppressTokens,
    SuppressTokensAtBegin,
    bad_words,
    sequence_biases,
)

__all__ = [
    "EncoderNoRepeatNGram",
    "EncoderRepetitionPenalty",
    "EpsilonCutoff",
    "EtaCutoff",
    "ExponentialDecayLength",
    "Follower",
    "ForcedBOS",
    "ForcedEOS",
    "Guidance",
    "HammingDiversity",
    "LogitsProcessor",
    "MinLength",
    "MinNewTokens",
    "MinP",
    "NoRepeatNGram",
    "Normalize",
    "RemoveInvalid",
    "RepetitionPenalty",
    "SequenceBias",
    "Sequences",
    "SuppressTokens",
    "SuppressTokensAtBegin",
    "Temperature",
    "TopH",
    "TopK",
    "TopP",
    "Typical",
    "bad_words",
    "build_processors",
    "kind",
    "sequence_biases",
]


def build_processors(
    config: Any,
    eos_token_id: np.ndarray,
    *,
    prompt_length: int | None = None,
    new_tokens: int | None = None,
    encoder: tuple[Any, Any] | None = None,
    allowed: tuple[LogitsProcessor, ...] = (),
    custom: tuple[LogitsProcessor, ...] = (),
    vocab_size: int | None = None,
) -> tuple[LogitsProcessor, ...]:
    """The processors that a filled GenerationConfig makes active, in HF's order; `eos_token_id` [E] with -1 for none.

    prompt_length and new_tokens: columns of the (decoder's) prompt and the most that are generated. encoder: ids and whether they are
    real, [B,T] each, of the encoder's input, without an encoder of the prompt. allowed, custom: processors of the caller's, where HF
    has prefix_allowed_tokens_fn and logits_processor. vocab_size: for watermarks."""
    inactive = lambda value, *off: not isinstance(value, jax.core.Tracer) and value in (None, *off)
    ends = bool((eos_token_id >= 0).any())
    found: list[LogitsProcessor] = []
    if not inactive(config.guidance_scale, 1.0):
        found.append(Guidance(to_float(config.guidance_scale)))
    if config.sequence_bias is not None:
        found.append(SequenceBias.of(sequence_biases(config.sequence_bias)))
    if not inactive(config.diversity_penalty, 0.0):
        found.append(HammingDiversity(to_float(config.diversity_penalty)))
    if not inactive(config.encoder_repetition_penalty, 1.0) and encoder is not None:
        found.append(EncoderRepetitionPenalty(to_float(config.encoder_repetition_penalty), *encoder))
    if not inactive(config.repetition_penalty, 1.0):
        found.append(RepetitionPenalty(to_float(config.repetition_penalty)))
    if not inactive(config.no_repeat_ngram_size, 0):
        found.append(NoRepeatNGram(to_int(config.no_repeat_ngram_size)))
    if not inactive(config.encoder_no_repeat_ngram_size, 0) and encoder is not None:
        found.append(EncoderNoRepeatNGram(to_int(config.encoder_no_repeat_ngram_size), *encoder))
    if config.bad_words_ids is not None:
        found.append(bad_words(config.bad_words_ids, eos_token_id))
    if not inactive(config.min_length, 0) and ends and config.min_new_tokens is None:
        found.append(MinLength(to_int(config.min_length), eos_token_id))
    if not inactive(config.min_new_tokens, 0) and ends:
        found.append(MinNewTokens(to_int(config.min_new_tokens), eos_token_id))
    found.extend(allowed)
    if config.forced_bos_token_id is not None:
        found.append(ForcedBOS(id_array(config.forced_bos_token_id)))
    if config.forced_eos_token_id is not None and prompt_length is not None and new_tokens is not None:
        found.append(ForcedEOS(np.int32(prompt_length + new_tokens), id_array(config.forced_eos_token_id)))
    if config.remove_invalid_values:
        found.append(RemoveInvalid())
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        found.append(ExponentialDecayLength(to_int(start), to_float(factor), eos_token_id))
    if config.suppress_tokens:
        found.append(SuppressTokens(id_array(config.suppress_tokens)))
    if config.begin_suppress_tokens:
        first = int(prompt_length == 1 and config.forced_bos_token_id is not None)
        found.append(SuppressTokensAtBegin(id_array(config.begin_suppress_tokens), np.int32(first)))
    found = [next((own for own in custom if type(own) is type(built)), built) for built in found]  # the caller's goes before its like
    found.extend(own for own in custom if not any(own is other for other in found))
    if config.do_sample:
        found.extend(_filters(config, int((eos_token_id >= 0).sum()), inactive))
    if config.watermarking_config is not None and vocab_size is not None:
        found.append(config.watermarking_config.construct_processor(vocab_size))
    if config.renormalize_logits:
        found.append(Normalize())
    return tuple(found)


def _filters(config: Any, ends: int, inactive: Any) -> list[LogitsProcessor]:
    """Those of sampling. Beams need a token that does not end them: as many stay as there are ends, and one."""
    least = None if inactive(config.num_beams, 1) else np.int32(ends + 1 if ends else 2)
    found: list[LogitsProcessor] = []
    if not inactive(config.temperature, 1.0):
        found.append(Temperature(to_float(config.temperature)))
    if not inactive(config.top_h):
        found.append(TopH(to_float(config.top_h)))
    if not inactive(config.top_k, 0):
        found.append(TopK(to_int(config.top_k), least))
    if not inactive(config.top_p, 1.0):
        found.append(TopP(to_float(config.top_p), least))
    if not inactive(config.min_p):
        found.append(MinP(to_float(config.min_p), least))
    if not inactive(config.typical_p, 1.0):
        found.append(Typical(to_float(config.typical_p), least))
    if not inactive(config.epsilon_cutoff, 0.0, 1.0):
        found.append(EpsilonCutoff(to_float(config.epsilon_cutoff), least))
    if not inactive(config.eta_cutoff, 0.0, 1.0):
        found.append(EtaCutoff(to_float(config.eta_cutoff), least))
    return found
