"""`GenerationConfig`: HF's generation options, read from and written to generation_config.json."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from flax.core import FrozenDict

from jaxmodels.caches import NAMES as CACHES
from jaxmodels.config import read_json
from jaxmodels.convert.atomic import replace_text
from jaxmodels.convert.hub import local_directory
from jaxmodels.generation.watermark import as_watermarking_config

FILE_NAME = "generation_config.json"

# Options of HF's that `generate` does not follow, and why.
UNSUPPORTED = {
    "use_mtp": "the layers of a checkpoint that predict further tokens (of these families DeepSeek-V3's) are not loaded",
    "speculation_type": "its drafts ('dflash') come from models of a kind of their own, which none of these families is",
}

# What only sampling, and only beams, look at, and the values at which it does nothing.
SAMPLING_ONLY = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
BEAMS_ONLY = {"early_stopping": False, "length_penalty": 1.0}
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
TOKENS = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")

ABOVE_0 = "a number above 0 (for greedy decoding set do_sample=False)"  # 0 is in files of models that decode greedily

# value -> what it must be, where the option is set
CHECKS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "max_length": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "min_new_tokens": (lambda x: _whole(x) and x >= 0, "an integer, 0 or more"),
    "min_length": (lambda x: _whole(x) and x >= 0, "an integer, 0 or more"),
    "do_sample": (lambda x: isinstance(x, bool), "True or False"),
    "temperature": (lambda x: _real(x) and x >= 0, ABOVE_0),
    "top_k": (lambda x: _whole(x) and x >= 0, "an integer, 0 for no limit"),
    "top_p": (lambda x: _real(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "min_p": (lambda x: _real(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda x: _real(x) and x > 0, "a number above 0"),
    "num_beams": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "length_penalty": (lambda x: _real(x), "a number"),
    "num_beam_groups": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "diversity_penalty": (lambda x: _real(x) and x >= 0, "a number, 0 or more"),
    "top_h": (lambda x: _real(x) and 0 < x <= 1, "a number above 0, up to 1"),
    "typical_p": (lambda x: _real(x) and 0 < x <= 1, "a number above 0, up to 1"),
    "epsilon_cutoff": (lambda x: _real(x) and 0 <= x < 1, "a number from 0, below 1"),
    "eta_cutoff": (lambda x: _real(x) and 0 <= x < 1, "a number from 0, below 1"),
    "encoder_repetition_penalty": (lambda x: _real(x) and x > 0, "a number above 0"),
    "no_repeat_ngram_size": (lambda x: _whole(x) and x >= 0, "an integer, 0 for no limit"),
    "encoder_no_repeat_ngram_size": (lambda x: _whole(x) and x >= 0, "an integer, 0 for no limit"),
    "bad_words_ids": (lambda x: isinstance(x, tuple) and x and all(map(_ids, x)), "a list of lists of token ids"),
    "sequence_bias": (lambda x: _biases(x), "{(token ids): bias} or [[[token ids], bias], …]"),
    "forced_bos_token_id": (lambda x: _id(x), "a token id"),
    "forced_eos_token_id": (lambda x: _id(x) or _ids(x), "a token id or a list of them"),
    "suppress_tokens": (lambda x: x == () or _ids(x), "a list of token ids"),
    "begin_suppress_tokens": (lambda x: x == () or _ids(x), "a list of token ids"),
    "remove_invalid_values": (lambda x: isinstance(x, bool), "True or False"),
    "renormalize_logits": (lambda x: isinstance(x, bool), "True or False"),
    "exponential_decay_length_penalty": (
        lambda x: isinstance(x, tuple) and len(x) == 2 and _whole(x[0]) and _real(x[1]) and x[1] > 0,
        "(tokens before it begins, factor above 0)",
    ),
    "guidance_scale": (lambda x: _real(x), "a number"),
    "max_time": (lambda x: _real(x) and x > 0, "seconds, above 0"),
    "stop_strings": (
        lambda x: _text(x) or (isinstance(x, tuple) and x and all(map(_text, x))),
        "a string or a list of strings, none of them empty",
    ),
    "token_healing": (lambda x: isinstance(x, bool), "True or False"),
    "output_attentions": (lambda x: isinstance(x, bool), "True or False"),
    "output_hidden_states": (lambda x: isinstance(x, bool), "True or False"),
    "penalty_alpha": (lambda x: _real(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "dola_layers": (lambda x: x in ("low", "high") or (isinstance(x, tuple) and all(map(_whole, x))), "'low', 'high' or a list of layers"),
    "num_return_sequences": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "num_assistant_tokens": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "num_assistant_tokens_schedule": (lambda x: x in SCHEDULES, f"one of {', '.join(map(repr, SCHEDULES))}"),
    "assistant_confidence_threshold": (lambda x: _real(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "assistant_ensemble_weight": (lambda x: _real(x) and 0 < x < 1, "a number between 0 and 1"),
    "assistant_early_exit": (lambda x: _whole(x) and x > 0, "an integer above 0: a number of layers"),
    "assistant_lookbehind": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "target_lookbehind": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "prompt_lookup_num_tokens": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "max_matching_ngram_size": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "output_scores": (lambda x: isinstance(x, bool), "True or False"),
    "output_logits": (lambda x: isinstance(x, bool), "True or False"),
    "pad_token_id": (lambda x: _whole(x), "an integer"),
    "bos_token_id": (lambda x: _whole(x), "an integer"),
    "eos_token_id": (lambda x: _whole(x) or (isinstance(x, tuple) and x and all(map(_whole, x))), "an integer or a list of integers"),
    "early_stopping": (lambda x: isinstance(x, bool) or x == "never", "True, False or 'never'"),
    "use_cache": (lambda x: isinstance(x, bool), "True or False"),
    "cache_implementation": (lambda x: x in CACHES, f"one of {', '.join(CACHES)}"),
    "cache_config": (lambda x: isinstance(x, Mapping), "a dictionary of the cache_implementation's options"),
    "prefill_chunk_size": (lambda x: _whole(x) and x > 0, "an integer above 0"),
    "max_cache_len": (lambda x: _whole(x) and x > 0, "an integer above 0"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of `generate` with HF's names. None is unset: the model's own value or HF's default counts then.

    Defaults: 20 new tokens, do_sample False, temperature 1, top_k 50, top_p 1, repetition_penalty 1, num_return_sequences 1;
    pad, bos and eos ids from the model's config, pad else the first eos. The options of UNSUPPORTED are kept and saved, and are an
    error of `generate` when they are active. `extra` holds unknown keys of a file; saved again, not compared."""

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    early_stopping: bool | str | None = None
    max_time: float | None = None
    stop_strings: Any = None
    do_sample: bool | None = None
    num_beams: int | None = None
    use_mtp: bool | None = None
    use_cache: bool | None = None
    cache_implementation: str | None = None
    cache_config: Any = None
    max_cache_len: int | None = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: Any = None
    encoder_repetition_penalty: float | None = None
    length_penalty: Any = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: Any = None
    renormalize_logits: bool | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Any = None
    remove_invalid_values: bool | None = None
    exponential_decay_length_penalty: Any = None
    suppress_tokens: Any = None
    begin_suppress_tokens: Any = None
    sequence_bias: Any = None
    token_healing: bool | None = None
    guidance_scale: float | None = None
    watermarking_config: Any = None
    num_return_sequences: int | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    return_dict_in_generate: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    encoder_no_repeat_ngram_size: int | None = None
    decoder_start_token_id: Any = None
    is_assistant: bool | None = None
    num_assistant_tokens: int | None = None
    num_assistant_tokens_schedule: str | None = None
    assistant_confidence_threshold: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    assistant_early_exit: int | None = None
    assistant_lookbehind: int | None = None
    target_lookbehind: int | None = None
    assistant_ensemble_weight: float | None = None
    speculation_type: str | None = None
    compile_config: Any = None
    disable_compile: bool | None = None
    penalty_alpha: Any = None
    dola_layers: Any = None
    diversity_penalty: Any = None
    num_beam_groups: int | None = None
    constraints: Any = None
    force_words_ids: Any = None
    prefill_chunk_size: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequence_bias", _bias_pairs(self.sequence_bias))
        object.__setattr__(self, "watermarking_config", as_watermarking_config(self.watermarking_config))
        for name in FIELDS:
            object.__setattr__(self, name, _freeze(getattr(self, name)))
        for name, (check, wanted) in CHECKS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, jax.core.Tracer) and not check(value):
                raise ValueError(f"{name} is {value!r}; expected {wanted}")

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{k}={v!r}' for k, v in self._set().items())})"

    def _set(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """From the contents of generation_config.json; unknown keys go to `extra`. With return_unused_kwargs, (config, unused): the
        overrides that are no options are handed back instead."""
        unused = {k: v for k, v in overrides.items() if k not in FIELDS} if return_unused_kwargs else {}
        values = {**values, **{k: v for k, v in overrides.items() if k not in unused}}
        known = {k: v for k, v in values.items() if k in FIELDS}
        config = cls(**known, extra={k: v for k, v in values.items() if k not in FIELDS})
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The contents of generation_config.json: what is set, and the unknown keys."""
        return {**self.extra, **{k: _thaw(v) for k, v in self._set().items()}}

    @classmethod
    def from_model_config(cls, config: Any, without: Iterable[str] = ()) -> Self:
        """What a model's config says about generation: its special tokens, and before them what its generation_config.json says. `without`:
        options that are not looked at, for what is wrong there does no harm."""
        tokens = {name: getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")}
        return cls.from_dict({k: v for k, v in {**tokens, **config.generation_config}.items() if k not in without})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike, config_file_name: str = FILE_NAME, *, subfolder: str = "", **kwargs: Any
    ) -> Any:
        """From a checkpoint directory or a hub id. `kwargs`: options that override the file's, `return_unused_kwargs` (see from_dict), and
        `revision`, `token`, `cache_dir`, `local_files_only` for the hub. ValueError names a missing or unreadable file."""
        from jaxmodels.convert.hub import resolve

        hub = {k: kwargs.pop(k) for k in list(kwargs) if k in inspect.signature(resolve).parameters}
        path = resolve(pretrained_model_name, subfolder=subfolder or None, weights=False, **hub) / config_file_name
        if not path.is_file():
            there = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) or "no .json file"
            raise ValueError(f"{path} does not exist; the directory holds {there}. generate takes the options directly, too")
        return cls.from_dict(read_json(path), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, config_file_name: str = FILE_NAME) -> Path:
        """Write the options that are set, as HF writes them; returns the file's path."""
        folder = local_directory(save_directory)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / config_file_name, text)
        return folder / config_file_name

    def replace(self, **changes: Any) -> Self:
        """With other values; ValueError, as in HF, names an unknown option and the closest known one."""
        for name in changes:
            if name not in FIELDS:
                close = difflib.get_close_matches(name, FIELDS, 1)
                raise ValueError(f"{name!r} is no option of generate{f'; did you mean {close[0]!r}?' if close else ''}")
        return dataclasses.replace(self, **changes)

    def filled(self, model_config: Any) -> Self:
        """With the checkpoint's options, then HF's defaults, in place of what is unset, lengths aside. ValueError names options that are
        active and not supported, contradict each other or name tokens that the model does not have; a warning those without effect."""
        own = GenerationConfig.from_model_config(model_config, self._set())
        defaults = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "num_return_sequences": 1}
        defaults |= {"num_beams": 1, "num_beam_groups": 1, "early_stopping": False, "length_penalty": 1.0}
        full = dataclasses.replace(self, **{k: v for k, v in {**defaults, **own._set()}.items() if getattr(self, k) is None})
        for name, reason in UNSUPPORTED.items():
            if getattr(full, name):
                raise ValueError(
                    f"{name}={getattr(full, name)!r} is not supported: {reason}. Tokens are drafted by assistant_model, "
                    "assistant_early_exit or prompt_lookup_num_tokens"
                )
        if full.do_sample and not isinstance(full.temperature, jax.core.Tracer) and full.temperature == 0:
            raise ValueError(f"temperature is {full.temperature!r}; expected {ABOVE_0}")
        full._check_tokens(model_config.vocab_size)
        used = {"top_k"} if full.penalty_alpha is not None else set()
        idle = [k for k, off in SAMPLING_ONLY.items() if not full.do_sample and k not in used and _differs(getattr(self, k), off)]
        idle += [k for k, off in BEAMS_ONLY.items() if full.num_beams == 1 and _differs(getattr(self, k), off)]
        if idle:
            warnings.warn(f"{', '.join(idle)}: without effect as do_sample={full.do_sample}, num_beams={full.num_beams}", stacklevel=3)
        return full

    def _check_tokens(self, vocab_size: int) -> None:
        words = {"sequence_bias": [ids for ids, _ in self.sequence_bias or ()]} | {name: getattr(self, name) for name in TOKENS}
        for name, ids in words.items():
            largest = max(_flat(ids), default=0)
            if largest >= vocab_size:
                raise ValueError(f"{name} names token {largest}; the model's vocabulary has {vocab_size} (0..{vocab_size - 1})")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = set(_flat(getattr(self, name)))
            if forced and forced <= set(self.suppress_tokens or ()):
                raise ValueError(f"suppress_tokens forbids every token of {name}, {sorted(forced)}: nothing could be generated there")


FIELDS = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra")


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _real(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _id(x: Any) -> bool:
    return _whole(x) and x >= 0


def _ids(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) > 0 and all(map(_id, x))


def _text(x: Any) -> bool:
    return isinstance(x, str) and x != ""


def _biases(x: Any) -> bool:
    """HF's list form, as which its dictionary is kept."""
    return isinstance(x, tuple) and len(x) > 0 and all(isinstance(p, tuple) and len(p) == 2 and _ids(p[0]) and _real(p[1]) for p in x)


def _freeze(value: Any) -> Any:
    """Hashable: numpy and jax scalars as Python's, lists as tuples."""
    if isinstance(value, jax.core.Tracer):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return FrozenDict({k: _freeze(v) for k, v in value.items()})
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: _thaw(v) for k, v in value.items()}
    return [_thaw(v) for v in value] if isinstance(value, tuple) else value


def _flat(value: Any) -> Iterator[int]:
    if value is not None:
        yield from itertools.chain.from_iterable(map(_flat, value)) if isinstance(value, tuple | list) else (value,)


def _differs(value: Any, off: Any) -> bool:
    return value is not None and (isinstance(value, jax.core.Tracer) or value != off)


def _bias_pairs(biases: Any) -> Any:
    """HF's dictionary {(ids): bias} as its list [[[ids], bias], …], which a file can hold; the keys of a file it wrote are text."""
    if not isinstance(biases, Mapping):
        return biases
    return [[list(ast.literal_eval(ids) if isinstance(ids, str) else ids), bias] for ids, bias in biases.items()]
