"""Which drafts a call of `generate` asks for, by HF's options, and what does not go with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxmodels.cache import KV, Recurrent, SlidingKV
from jaxmodels.cache_offloaded import OffloadedCache, OffloadedKV
from jaxmodels.cache_sink import SinkCache, SinkKV
from jaxmodels.caches import WINDOW, cache_implementation
from jaxmodels.generation.assisted import Assisted, Drafter, Memory
from jaxmodels.generation.config import GenerationConfig
from jaxmodels.generation.drafts import DraftModel, PromptLookup
from jaxmodels.generation.processors_base import id_array, to_float, to_int
from jaxmodels.generation.universal import Given, Reencoder, SharedWords, shared_words

TAKE_BACK = KV | SlidingKV | Recurrent | OffloadedKV | SinkKV  # recurrent states read the accepted drafts again
FORGETS = "drafts that are wrong are taken back, and a cache in few bits has rounded older tokens by then"
ROUNDS = 2  # the columns of so many rounds are room for what a batch's rows reject, before the cache is compacted
DEFAULTS: dict[str, Any] = {"num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4}


def build_drafter(
    config: Any, model: Any, params: Any, assistant_model: Any = None, tokenizers: tuple[Any, Any] = (None, None), cache: Any = None
) -> Drafter | None:
    """What drafts tokens by a filled GenerationConfig, None where nothing does. `tokenizers`: the model's and the assistant's; `cache`: the
    one to be continued. ValueError for what contradicts itself."""
    asked = {
        "assistant_model": assistant_model is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
    }
    names = [name for name, active in asked.items() if active]
    if tokenizers[1] is not None and not asked["assistant_model"]:
        raise ValueError("assistant_tokenizer belongs to an assistant_model: pass assistant_model=(model, params)")
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are both set: tokens are drafted in one way; choose one")
    _check(config, names[0])
    if cache is not None and not all(isinstance(getattr(state, "own", state), TAKE_BACK) for state in cache.layers):
        raise ValueError(f"{names[0]}: {FORGETS}; begin with another cache")
    if asked["prompt_lookup_num_tokens"]:
        if config.assistant_ensemble_weight is not None:
            raise ValueError("assistant_ensemble_weight weighs an assistant's probabilities, and prompt_lookup_num_tokens has none")
        num, ngram = config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2
        return PromptLookup(to_int(num), to_int(ngram), columns=columns(num))
    if asked["assistant_early_exit"]:
        layers, most = config.assistant_early_exit, model.config.num_hidden_layers
        if model.config.is_encoder_decoder:
            raise ValueError("assistant_early_exit leaves a decoder after some of its layers; this model is an encoder-decoder")
        if layers >= most:
            raise ValueError(f"assistant_early_exit={layers} leaves the model after its last layer: it has {most}, use 1 to {most - 1}")
        return _draft_model(config, model.clone(early_exit=layers), params, shared=True)
    return _assistant(config, model, assistant_model, tokenizers, cache)


def recall(drafter: Drafter | None, memory: Memory | None) -> Memory | None:
    """What a cache remembers for the drafter, None where it is another's."""
    known = memory is not None and isinstance(drafter, DraftModel) and not drafter.shared and memory.model == drafter.model
    return memory if known else None


def columns(num: int) -> int:
    """How many columns a check of `num` drafts has: a power of two, so that a few more drafts compile nothing."""
    return max(8, 1 << int(num).bit_length())


def _check(config: Any, name: str) -> None:
    beams, returned = config.num_beams, config.num_return_sequences
    other = {
        f"num_beams={beams}": beams > 1,
        f"num_return_sequences={returned}": returned > 1,
        f"dola_layers={config.dola_layers!r}": config.dola_layers is not None,
        f"guidance_scale={config.guidance_scale}": config.guidance_scale not in (None, 1.0),
        f"penalty_alpha={config.penalty_alpha} and top_k={config.top_k}": bool(config.penalty_alpha and config.top_k > 1)
        and not config.do_sample,
        "use_cache=False": config.use_cache is False,
    }
    found = [words for words, active in other.items() if active]
    if found:
        raise ValueError(f"{name} goes with greedy decoding and sampling of one sequence per prompt; found {', '.join(found)}")
    made = cache_implementation(config.cache_implementation, config.cache_config)
    if made not in (None, WINDOW) and not isinstance(made, OffloadedCache | SinkCache):
        raise ValueError(f"{name} and cache_implementation={config.cache_implementation!r}: {FORGETS}; choose another cache")
    for option in ("num_assistant_tokens", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if isinstance(getattr(config, option), jax.core.Tracer):
            raise ValueError(f"{option} decides shapes: make it static in jax.jit, static_argnames=({option!r},)")


def build_reencoder(
    config: Any, assistant_model: tuple[Any, Any], tokenizers: tuple[Any, Any], ids: Any, real: Any, assisted: Any
) -> Reencoder:
    """What drafts on the host for `assisted`, an Assisted, after prompts ids [B,T] of which real [B,T] is no padding."""
    if isinstance(ids, jax.core.Tracer):
        raise ValueError("with two tokenizers the assistant reads text, on the host: this cannot be used inside jax.jit")
    draft, params = assistant_model
    drafter = _draft_model(config, draft, params, shared=False)
    if config.do_sample:
        parts = {f.name: getattr(drafter, f.name) for f in dataclasses.fields(drafter) if f.name != "kind"}
        drafter = SharedWords(**parts, words=shared_words(*tokenizers, (assisted.drafter.logits, draft.config.vocab_size)))
    else:
        ends = id_array(GenerationConfig.from_model_config(draft.config).eos_token_id)
        drafter = dataclasses.replace(drafter, logits=False)
        assisted = Assisted((), ends, np.int32(0), None, np.int32(np.iinfo(np.int32).max), None, None)
    lookbehind = (config.target_lookbehind or 10, config.assistant_lookbehind or 10)
    return Reencoder(drafter, assisted, tokenizers, lookbehind, [row[keep] for row, keep in zip(ids, real)])


def _assistant(config: Any, model: Any, assistant_model: Any, tokenizers: tuple[Any, Any], cache: Any) -> Drafter:
    if not isinstance(assistant_model, tuple | list) or len(assistant_model) != 2 or not hasattr(assistant_model[0], "apply"):
        found = type(assistant_model).__name__
        raise ValueError(f"assistant_model is a pair (model, params), as from_pretrained returns it; found {found}")
    draft, params = assistant_model
    seq2seq = [("a decoder alone", "an encoder-decoder")[c.is_encoder_decoder] for c in (draft.config, model.config)]
    if seq2seq[0] != seq2seq[1]:
        raise ValueError(f"the assistant is {seq2seq[0]} and the model {seq2seq[1]}: they cannot read the same")
    drafter = _draft_model(config, draft, params, shared=False)
    if tokenizers[1] is not None:
        if tokenizers[0] is None:
            raise ValueError("assistant_tokenizer is one of two: pass tokenizer=, the model's own, too")
        if model.config.is_encoder_decoder or cache is not None or config.assistant_ensemble_weight is not None:
            raise ValueError(
                "with two tokenizers drafts go through text: not with an encoder-decoder, a cache or assistant_ensemble_weight"
            )
        vocab = model.config.vocab_size if config.do_sample else None
        return Given(drafter.num, columns=drafter.columns, heuristic=drafter.heuristic, logits=vocab)
    if draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the assistant has a vocabulary of {draft.config.vocab_size} tokens and the model of {model.config.vocab_size}: with two "
            "tokenizers pass both, tokenizer= and assistant_tokenizer="
        )
    if model.config.is_encoder_decoder and cache is not None and recall(drafter, getattr(cache, "memory", None)) is None:
        raise ValueError("the cache holds what the model's encoder read and nothing of the assistant's: begin with this assistant_model")
    return drafter


def _draft_model(config: Any, model: Any, params: Any, shared: bool) -> DraftModel:
    own = GenerationConfig.from_model_config(model.config)
    choose = lambda name, default: next((c for c in (getattr(config, name), getattr(own, name)) if c is not None), default)
    num, schedule, threshold = (choose(name, default) for name, default in DEFAULTS.items())
    heuristic = schedule != "constant"
    wanted = bool(config.do_sample) or config.assistant_ensemble_weight is not None
    return DraftModel(
        params, np.int32(num), to_float(threshold), model=model, columns=columns(2 * num if heuristic else num), shared=shared,
        heuristic=heuristic, logits=wanted,
    )  # fmt: skip
