"""From a checkpoint directory (or a hub id) to (model, params) and back; which family and class a config asks for.

Axis letters: B rows, C choices, T tokens, D hidden, V vocabulary."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.config import Config, read_dtype, read_json, thaw
from jaxmodels.family import Family
from jaxmodels.model import Model
from jaxmodels.params import Tree, abstract_params, flatten, init_params, unflatten

FAMILIES: dict[str, str | Family] = {
    "bert": "jaxmodels.models.bert",
    "bloom": "jaxmodels.models.bloom",
    "codegen": "jaxmodels.models.codegen",
    "cohere": "jaxmodels.models.cohere",
    "cohere2": "jaxmodels.models.cohere2",
    "dbrx": "jaxmodels.models.dbrx",
    "deepseek_v2": "jaxmodels.models.deepseek_v2",
    "deepseek_v3": "jaxmodels.models.deepseek_v3",
    "exaone4": "jaxmodels.models.exaone4",
    "falcon": "jaxmodels.models.falcon",
    "falcon_mamba": "jaxmodels.models.falcon_mamba",
    "gemma": "jaxmodels.models.gemma",
    "gemma2": "jaxmodels.models.gemma2",
    "gemma3_text": "jaxmodels.models.gemma3_text",
    "glm": "jaxmodels.models.glm",
    "glm4": "jaxmodels.models.glm4",
    "gpt2": "jaxmodels.models.gpt2",
    "gpt_bigcode": "jaxmodels.models.gpt_bigcode",
    "gpt_neo": "jaxmodels.models.gpt_neo",
    "gpt_neox": "jaxmodels.models.gpt_neox",
    "gpt_oss": "jaxmodels.models.gpt_oss",
    "gptj": "jaxmodels.models.gptj",
    "granite": "jaxmodels.models.granite",
    "granitemoe": "jaxmodels.models.granitemoe",
    "jamba": "jaxmodels.models.jamba",
    "llama": "jaxmodels.models.llama",
    "llama4_text": "jaxmodels.models.llama4_text",
    "mamba": "jaxmodels.models.mamba",
    "mamba2": "jaxmodels.models.mamba2",
    "mistral": "jaxmodels.models.mistral",
    "mixtral": "jaxmodels.models.mixtral",
    "mpt": "jaxmodels.models.mpt",
    "nemotron": "jaxmodels.models.nemotron",
    "olmo": "jaxmodels.models.olmo",
    "olmo2": "jaxmodels.models.olmo2",
    "olmoe": "jaxmodels.models.olmoe",
    "opt": "jaxmodels.models.opt",
    "persimmon": "jaxmodels.models.persimmon",
    "phi": "jaxmodels.models.phi",
    "phi3": "jaxmodels.models.phi3",
    "phimoe": "jaxmodels.models.phimoe",
    "qwen2": "jaxmodels.models.qwen2",
    "qwen2_moe": "jaxmodels.models.qwen2_moe",
    "qwen3": "jaxmodels.models.qwen3",
    "qwen3_moe": "jaxmodels.models.qwen3_moe",
    "recurrent_gemma": "jaxmodels.models.recurrent_gemma",
    "smollm3": "jaxmodels.models.smollm3",
    "stablelm": "jaxmodels.models.stablelm",
    "starcoder2": "jaxmodels.models.starcoder2",
    "t5": "jaxmodels.models.t5",
    "xglm": "jaxmodels.models.xglm",
}
LABELS = ("id2label", "label2id")
OTHERWISE = {"torch_dtype": "dtype", "device_map": "mesh and rules", "config": "the fields to replace, each by its name"}
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "variant", "local_files_only")


def register(family: Family) -> None:
    """Make a family of your own known to AutoConfig, AutoModel…, from_pretrained and save_pretrained."""
    FAMILIES[family.model_type] = family


def find_family(model_type: Any, where: str = "the config") -> Family:
    """The family of a `model_type`; ValueError names `where` it was found, the known ones and the closest."""
    name = model_type if isinstance(model_type, str) else ""
    found = FAMILIES.get(name)
    if found is None:
        close = difflib.get_close_matches(name, FAMILIES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(
            f"model_type {model_type!r} in {where} is not known{hint} Known are {', '.join(sorted(FAMILIES))}; "
            "jaxmodels.register(family) adds one of your own"
        )
    return found if isinstance(found, Family) else importlib.import_module(found).FAMILY


class AutoConfig:
    """The family's Config for a checkpoint."""

    @staticmethod
    def from_pretrained(path: str | Path, **options: Any) -> Config:
        """From config.json and generation_config.json of a directory or hub id; options: the hub's, or config fields to replace."""
        directory, overrides = _resolve(path, options, weights=False)
        return read_config(directory, overrides)

    @staticmethod
    def for_model(model_type: str, **values: Any) -> Config:
        """A config of that type with HF's defaults and these values."""
        return find_family(model_type, "for_model").config.from_dict(values)


class _AutoClass:
    """Chooses the family's class for one task; returns the model, a static value, and its parameters, a tree of arrays."""

    name: ClassVar[str]

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not instantiated: use from_pretrained(path) or from_config(config, key=...)")

    @classmethod
    def class_for(cls, config: Config) -> type[Model]:
        family = find_family(config.model_type)
        if cls.__name__ not in family.classes:
            raise ValueError(f"{config.model_type} has no class for {cls.__name__}; it has {', '.join(family.classes)}")
        return family.classes[cls.__name__]

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> tuple[Model, Tree]:
        """See jaxmodels.from_pretrained, with this task's class."""
        return from_pretrained(path, cls, **options)

    @classmethod
    def from_config(cls, config: Config, *, key: jax.Array, dtype: Any = jnp.float32, **fields: Any) -> tuple[Model, Tree]:
        """The model of this task and parameters of `dtype` initialised from `key`; fields as of Model (scan_layers, remat, rules, …)."""
        dtype = read_dtype(dtype)
        model = cls.class_for(config)(config, **{"dtype": dtype, **fields})
        return model, init_params(model, key, dtype)


class AutoModel(_AutoClass):
    """The model without a head: hidden states [B,T,D]."""


class AutoModelForCausalLM(_AutoClass):
    """Logits [B,T,V] of the next token."""


class AutoModelForSeq2SeqLM(_AutoClass):
    """Logits [B,T,V] of the next token of a decoder that reads an encoder's output."""


class AutoModelForTextEncoding(_AutoClass):
    """The encoder alone, of an encoder-decoder model its own: hidden states [B,T,D]."""


class AutoModelForMaskedLM(_AutoClass):
    """Logits [B,T,V] of each token itself, for those that are masked."""


class AutoModelForPreTraining(_AutoClass):
    """A family that has no heads of its own for pretraining is pretrained as what generates text."""

    @classmethod
    def class_for(cls, config: Config) -> type[Model]:
        own = cls.__name__ in find_family(config.model_type).classes
        return super().class_for(config) if own else text_task(config).class_for(config)


class AutoModelForNextSentencePrediction(_AutoClass):
    """Logits [B,2]: whether a row's second text follows its first."""


class AutoModelForMultipleChoice(_AutoClass):
    """Logits [B,C] of a row's choices, each a text of its own."""


class AutoModelForSequenceClassification(_AutoClass):
    """Logits [B,num_labels]."""


class AutoModelForTokenClassification(_AutoClass):
    """Logits [B,T,num_labels]."""


class AutoModelForQuestionAnswering(_AutoClass):
    """Two logits [B,T] each: where the answer starts and where it ends."""


def text_task(config: Config) -> type[_AutoClass]:
    """The task whose class generates text: a causal or a sequence-to-sequence language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def from_pretrained(
    path: str | Path,
    task: type[_AutoClass] | type[Model] = AutoModelForCausalLM,
    *,
    dtype: Any = "auto",
    compute_dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Any = None,
    scan_layers: bool = False,
    remat: str | None = None,
    attn_implementation: str | None = None,
    key: jax.Array | None = None,
    progress: bool | None = None,
    **options: Any,
) -> tuple[Model, Tree]:
    """Load a HF checkpoint: (model, params).

    path: a directory, a URL that fsspec knows (s3://, https://, …), of which only the byte ranges are read that this process' devices
    hold, or a hub id with the hub's options (revision, token, cache_dir, subfolder, variant, local_files_only).
    task: an auto class, or a family's class. dtype: of the parameters and the computation; "auto" keeps every tensor as stored
    and computes in the dtype that holds most of the bytes. compute_dtype overrides the second. mesh, rules: place every
    parameter as it is read (a Rules value or a preset's name, `fsdp+tensor` by default). key: for a head that the checkpoint
    lacks (default jax.random.key(0)). Other options replace config fields, e.g. num_labels=3 or id2label.

    Over a mesh with devices of several processes every process makes the same call. Raises CheckpointError (a ValueError) for a bad
    checkpoint, ValueError for a bad config or for processes that disagree, ProcessError where another process failed."""
    from jaxmodels.convert.dequantize import dequantized
    from jaxmodels.convert.files import read_checkpoint
    from jaxmodels.convert.hub import weights_at
    from jaxmodels.convert.load import load
    from jaxmodels.sharding.processes import agree, described, lockstep, over_all, spans, telling, to_host
    from jaxmodels.sharding.rules import resolve_rules

    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    with telling("from_pretrained", over_all(mesh)):
        placing = resolve_rules(rules, mesh)
    if placing is not None and spans(placing):
        fields = {name: value for name, value in options.items() if name not in hub}
        asked = {"task": task.__name__, "dtype": str(dtype), "compute_dtype": str(compute_dtype), "scan_layers": scan_layers}
        asked |= {"remat": remat, "attn_implementation": attn_implementation}
        asked["key"] = None if key is None else to_host(jax.random.key_data(key)).tolist()
        agree(
            "from_pretrained",
            path=str(path),
            **asked,
            options={k: v for k, v in hub.items() if k != "token"} | fields,
            **described(placing),
        )
    with lockstep(f"from_pretrained({str(path)!r})", spans(placing)):
        directory, overrides = _resolve(path, options)
        config = read_config(directory, overrides)
        cls = task.class_for(config) if issubclass(task, _AutoClass) else task
        where = weights_at(path, directory, hub.get("subfolder"))
        source = dequantized(read_checkpoint(where, variant=hub.get("variant")), config)
        stored = main_dtype(source) if dtype == "auto" else read_dtype(dtype)
        model = cls(
            config.matched(source),
            dtype=stored if compute_dtype is None else read_dtype(compute_dtype, "compute_dtype"),
            scan_layers=scan_layers,
            remat=remat,
            attn_implementation=attn_implementation,
            rules=placing,
        )
        if spans(placing):
            agree("from_pretrained", **{f"config.json, {name}": value for name, value in model.config.to_dict().items()})
        conversion, prefix = conversion_of(model)
        key = jax.random.key(0) if key is None else key
        params, _ = load(
            source,
            flatten(abstract_params(model, stored)),
            rules=conversion,
            base_prefix=prefix,
            init=lambda names: init_params(model, key, stored, only=names),
            keep_dtypes=dtype == "auto",
            progress=progress,
            where=str(where),
        )
    return model, unflatten(params)


def save_pretrained(
    path: str | Path,
    model: Model,
    params: Mapping[str, Any],
    *,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    generation_config: Any = None,
    progress: bool | None = None,
    fqn_to_index_mapping: Mapping[str, int] | None = None,
    consolidate: bool = True,
) -> None:
    """Write what torch's save_pretrained writes: config.json, generation_config.json, safetensors (in shards above `max_shard_size`).

    The directory appears, or is replaced, in one step; other files in it (a tokenizer) are kept. Tensors that were loaded and
    not changed are the same bytes. generation_config: a GenerationConfig in place of the one that the model was loaded with.

    Parameters that lie on devices of several processes are saved by all of them, to a directory that they share: each writes the parts
    that it holds, and these are then made the same files as one process writes; consolidate=False leaves them as they are, for
    `jaxmodels.convert.consolidate`, from_pretrained or torch.distributed.checkpoint's HuggingFaceStorageReader.
    fqn_to_index_mapping: {key in the file: number of its file, from 1}, in place of max_shard_size."""
    from jaxmodels.convert.files import write_checkpoint
    from jaxmodels.convert.load import unload
    from jaxmodels.sharding.processes import spread, telling

    together = spread(params)
    with telling(f"saving {path}", together):
        rules, prefix = conversion_of(model)
        tensors = unload(flatten(params), rules=rules, base_prefix=prefix)
        files = json_files(model, tensors, generation_config)
    options: dict[str, Any] = {"max_shard_size": max_shard_size, "variant": variant, "progress": progress}
    options |= {"fqn_to_index_mapping": fqn_to_index_mapping, "consolidate": consolidate, "together": together}
    write_checkpoint(path, tensors, files=files, **options)


def json_files(model: Model, tensors: Mapping[str, Any], generation_config: Any = None) -> dict[str, str]:
    """config.json and, where there is one, generation_config.json for a checkpoint of these tensors."""
    dtype = str(main_dtype(tensors))
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": dtype, "torch_dtype": dtype}
    config.pop("quantization_config", None)  # what was quantised was dequantised as it was read
    generation = thaw(model.config.generation_config) if generation_config is None else generation_config.to_dict()
    contents = {"config.json": config, "generation_config.json": generation}
    return {name: json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n" for name, values in contents.items() if values}


def conversion_of(model: Model) -> tuple[list[Any], str]:
    """The conversion rules of a model's checkpoints, file to tree, and the prefix of its base model in them."""
    return find_family(model.config.model_type).conversion(type(model), model.config)


def read_config(directory: Path, overrides: Mapping[str, Any] = {}) -> Config:
    """The Config of a checkpoint directory, its generation_config.json included; `overrides` replace fields."""
    path = directory / "config.json"
    values = text_part(read_json(path))
    cls = find_family(values.get("model_type"), str(path)).config
    unknown = [name for name in overrides if name not in (*cls.field_names(), *LABELS)]
    if unknown:
        hints = "".join(f"; instead of {name} pass {OTHERWISE[name]}" for name in unknown if name in OTHERWISE)
        raise ValueError(f"{', '.join(unknown)}: no option here and no field of {cls.__name__} ({', '.join(cls.field_names())}){hints}")
    given = overrides.get("id2label") or {}
    named = given or values.get("id2label") or {}
    count = overrides.get("num_labels", len(named))
    if given and count != len(given):
        raise ValueError(f"num_labels is {count}, and id2label names {len(given)}: leave out one of them")
    if given or count != len(named):
        values = {k: v for k, v in values.items() if k not in LABELS} | {"label2id": {name: int(i) for i, name in given.items()}}
    if (directory / "generation_config.json").is_file():
        values["generation_config"] = read_json(directory / "generation_config.json")
    try:
        return cls.from_dict({**values, **overrides})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def text_part(values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json; of a model of several modalities whose language model is a family here, that one's alone, with the
    special tokens and the quantisation of the whole where it names none."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        return values
    name = text.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES or find_family(name).config.part_of != values.get("model_type"):
        return values
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
    return text | {name: values[name] for name in shared if text.get(name) is None and values.get(name) is not None}


def main_dtype(tensors: Mapping[str, Any]) -> np.dtype:
    """The floating dtype that holds most of the bytes."""
    sizes: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            sizes[np.dtype(tensor.dtype)] = sizes.get(np.dtype(tensor.dtype), 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=np.dtype(np.float32))


def _resolve(path: str | Path, options: dict[str, Any], weights: bool = True) -> tuple[Path, dict[str, Any]]:
    """The local directory, and the options that are not the hub's."""
    from jaxmodels.convert.hub import resolve

    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    return resolve(path, **hub, weights=weights), {name: value for name, value in options.items() if name not in hub}
