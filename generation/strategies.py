"""Which strategy a configuration asks for, by HF's rules, and what contradicts itself in it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxmodels.generation.assisted import Assisted, Drafter
from jaxmodels.generation.beam import EARLY_STOPPING, BeamSearch
from jaxmodels.generation.constraints import ConstrainedBeamSearch, Tries, all_constraints
from jaxmodels.generation.contrastive import ContrastiveSearch
from jaxmodels.generation.diverse import DiverseBeamSearch
from jaxmodels.generation.dola import DoLa, early_layers
from jaxmodels.generation.processors import LogitsProcessor
from jaxmodels.generation.processors_base import to_float
from jaxmodels.generation.sampling import Sampling, Strategy


def build_strategy(
    config: Any,
    model_config: Any,
    processors: tuple[LogitsProcessor, ...],
    eos_token_id: np.ndarray,
    pad_token_id: int,
    key: jax.Array | None,
    limit: int,
    columns: int,
    drafter: Drafter | None = None,
) -> Strategy:
    """The strategy of a filled GenerationConfig for at most `limit` new tokens, in room for `columns`. `eos_token_id` [E], -1 for none.
    The key is used where config.do_sample is set."""
    pad, key = np.int32(pad_token_id), key if config.do_sample else None
    if drafter is not None:
        weight = None if config.assistant_ensemble_weight is None else to_float(config.assistant_ensemble_weight)
        return Assisted(processors, eos_token_id, pad, key, np.int32(limit), weight, drafter, model_config.learned_positions)
    if config.num_beams > 1:
        constraints = all_constraints(config.constraints, config.force_words_ids)
        beams = {
            "processors": processors, "eos_token_id": eos_token_id, "pad_token_id": pad, "key": key,
            "length_penalty": to_float(config.length_penalty), "early_stopping": np.int32(EARLY_STOPPING[config.early_stopping]),
            "max_new_tokens": np.int32(limit), "copies": config.num_beams, "returned": config.num_return_sequences,
            "candidates": max(2, 1 + int((eos_token_id >= 0).sum())), "columns": columns,
        }  # fmt: skip
        if constraints:
            return ConstrainedBeamSearch(**beams, tries=Tries.of(constraints))
        if config.num_beam_groups > 1:
            return DiverseBeamSearch(**beams, groups=config.num_beam_groups)
        return BeamSearch(**beams)
    if contrastive(config):
        return ContrastiveSearch(processors, eos_token_id, pad, to_float(config.penalty_alpha), copies=config.top_k)
    if config.dola_layers is not None:
        layers = early_layers(config.dola_layers, model_config.num_hidden_layers, model_config.tie_word_embeddings)
        return DoLa(processors, eos_token_id, pad, key, copies=config.num_return_sequences, layers=layers)
    return Sampling(processors, eos_token_id, pad, key, copies=config.num_return_sequences)


def contrastive(config: Any) -> bool:
    """Whether a filled GenerationConfig asks for contrastive search, by HF's rule."""
    if config.num_beams > 1 or config.do_sample or not _active(config.penalty_alpha):
        return False
    if isinstance(config.top_k, jax.core.Tracer):
        raise ValueError("top_k decides shapes in contrastive search: make it static in jax.jit, static_argnames=('top_k',)")
    return config.top_k > 1


def _active(value: Any) -> bool:
    """Set to something other than 0; what is traced may be."""
    return isinstance(value, jax.core.Tracer) or bool(value)


def check(config: Any, model_config: Any, streamer: Any = None) -> None:
    """Raise ValueError where a filled GenerationConfig's options cannot go together."""
    beams, returned = config.num_beams, config.num_return_sequences
    if beams > 1 and streamer is not None:
        raise ValueError(f"a streamer cannot follow num_beams={beams}: which beam is best is known at the end")
    if beams > 1 and returned > beams:
        raise ValueError(f"num_return_sequences={returned} exceeds num_beams={beams}: beam search returns at most as many as it has beams")
    if beams == 1 and returned > 1 and not config.do_sample:
        raise ValueError(
            f"num_return_sequences={returned} returns equal rows in greedy decoding; set do_sample=True or num_beams={returned} or more"
        )
    _check_beams(config, model_config.vocab_size)
    _check_chunks(config)
    if contrastive(config) and config.top_k > model_config.vocab_size:
        raise ValueError(f"top_k={config.top_k} candidates are more than the vocabulary's {model_config.vocab_size} tokens")
    looks = {"penalty_alpha": contrastive(config), "dola_layers": config.dola_layers is not None}
    if config.dola_layers is not None:
        if beams > 1 or looks["penalty_alpha"]:
            raise ValueError("dola_layers goes with greedy decoding and sampling: leave out num_beams and penalty_alpha")
        if model_config.is_encoder_decoder:
            raise ValueError("dola_layers contrasts a decoder's layers; this model is an encoder-decoder")
        early_layers(config.dola_layers, model_config.num_hidden_layers, model_config.tie_word_embeddings)
    if any(looks.values()) and config.guidance_scale not in (None, 1.0):
        name = next(name for name, active in looks.items() if active)
        raise ValueError(f"guidance_scale={config.guidance_scale} and {name} cannot be combined: both change what the likeliest tokens are")


def _check_beams(config: Any, vocab_size: int) -> None:
    """Groups and constraints."""
    beams, groups, penalty = config.num_beams, config.num_beam_groups, config.diversity_penalty
    constraints = all_constraints(config.constraints, config.force_words_ids)
    if groups > 1:
        if beams % groups or beams == 1:
            raise ValueError(f"num_beam_groups={groups} divides the beams into equal groups; num_beams={beams} is no multiple of it")
        if not _active(penalty):
            raise ValueError(
                f"num_beam_groups={groups} without a diversity_penalty above 0 would be {groups} times the same search; set one"
            )
    elif _active(penalty):
        raise ValueError(
            f"diversity_penalty={penalty} is between groups of beams: set num_beam_groups to 2 or more, and num_beams to a multiple"
        )
    if constraints and beams == 1:
        raise ValueError("constraints and force_words_ids are for beam search: set num_beams to 2 or more")
    named = "constraints" if constraints else f"num_beam_groups={groups}"
    if constraints and groups > 1:
        raise ValueError(f"constraints and num_beam_groups={groups} cannot be combined")
    if (constraints or groups > 1) and config.do_sample:
        raise ValueError(f"{named} and do_sample=True cannot be combined: set do_sample=False")
    if groups > 1 and config.guidance_scale not in (None, 1.0):
        raise ValueError(f"{named} and guidance_scale={config.guidance_scale} cannot be combined")
    largest = max((token for constraint in constraints for phrase in constraint.phrases for token in phrase), default=0)
    if largest >= vocab_size:
        raise ValueError(f"a constraint names token {largest}; the model's vocabulary has {vocab_size} (0..{vocab_size - 1})")


def _check_chunks(config: Any) -> None:
    size = config.prefill_chunk_size
    if isinstance(size, jax.core.Tracer):
        raise ValueError("prefill_chunk_size decides shapes: make it static in jax.jit, static_argnames=('prefill_chunk_size',)")
    if size is not None and config.use_cache is False:
        raise ValueError(f"prefill_chunk_size={size}: chunks of a prompt follow one another through a cache; leave out use_cache=False")
    if size is not None and contrastive(config):
        raise ValueError(f"prefill_chunk_size={size}: contrastive search looks at the whole prompt; leave it or penalty_alpha out")
