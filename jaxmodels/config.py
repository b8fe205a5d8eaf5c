"""Configs: frozen, hashable dataclasses with HF's field names, read from and written to config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from jaxmodels.cache import KVSpec, SlidingKVSpec
from jaxmodels.ops.rope import ORIGINAL_LENGTH, RopeParameters

COUNTS = (  # at least 1
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every config shares. `extra` keeps the keys of config.json that no field reads: saved again, not compared, not hashed."""

    model_type: ClassVar[str] = ""
    spelled: ClassVar[Mapping[str, str]] = {}  # field -> its key in config.json, where that has another name; both are read
    old_names: ClassVar[Mapping[str, str]] = {}  # key of older files -> field
    is_encoder_decoder: ClassVar[bool] = False
    has_learned_positions: ClassVar[bool] = False
    part_of: ClassVar[str] = ""  # the model_type of configs of several modalities that hold one like this as text_config

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    num_labels: int = 2
    classifier_dropout: float | None = None  # None: as hidden states, or 0.1
    problem_type: str | None = None
    attn_implementation: str | None = None
    generation_config: Mapping[str, Any] = FrozenDict()  # the contents of generation_config.json
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def id2label(self) -> dict[int, str]:
        """The name of every class of a classifier."""
        named = self.extra.get("id2label") or {}
        return {i: named.get(str(i), named.get(i, f"LABEL_{i}")) for i in range(self.num_labels)}

    @property
    def label2id(self) -> dict[str, int]:
        return {name: i for i, name in self.id2label.items()}

    @property
    def layer_kinds(self) -> tuple[Hashable, ...]:
        """One entry per layer, equal for layers of the same structure; None where the family has one kind of layer."""
        return (None,) * self.num_hidden_layers

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads  # type: ignore[attr-defined]

    @property
    def head_dim(self) -> int:
        heads: int = self.num_attention_heads  # type: ignore[attr-defined]
        if self.hidden_size % heads:
            size, count = (self.spelled.get(name, name) for name in ("hidden_size", "num_attention_heads"))
            raise ValueError(f"{size} {self.hidden_size} is no multiple of {count} {heads}")
        return self.hidden_size // heads

    @property
    def learned_positions(self) -> int | None:
        """How many positions there are, where each has an embedding of its own; None where they are computed."""
        return self.max_position_embeddings if self.has_learned_positions else None  # type: ignore[attr-defined]

    def layer_spec(self, kind: Hashable) -> Any:
        """What a layer of that kind remembers: by default keys and values of `num_key_value_heads` heads."""
        return KVSpec(heads=self.num_key_value_heads, head_dim=self.head_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the contents of config.json. ValueError names what is missing or of the wrong type."""
        names = {**{key: name for name, key in cls.spelled.items()}, **cls.old_names}
        values = {names.get(k, k): v for k, v in values.items() if k != "model_type"}
        fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        if "attn_implementation" not in values:
            values["attn_implementation"] = values.pop("_attn_implementation", None)
        labels = values.get("id2label")
        values["num_labels"] = len(labels) if labels else values.get("num_labels") or 2
        if "rope_parameters" in fields and isinstance(fields["rope_parameters"].default, RopeParameters):
            length: Any = fields["max_position_embeddings"].default if "max_position_embeddings" in fields else 2048
            values = _read_rope(values, fields["rope_parameters"].default, length)
        for name in ("dtype", "torch_dtype"):
            if isinstance(values.get(name), str) and values[name] != "auto":
                read_dtype(values[name], f"{name} in the config of {cls.__name__}")
        absent = [
            n
            for n, f in fields.items()
            if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if absent:
            raise ValueError(f"config of {cls.model_type or cls.__name__} lacks {', '.join(absent)}; found are {', '.join(sorted(values))}")
        known = {k: _freeze(v) for k, v in values.items() if k in fields}
        for name, value in known.items():
            if value is not None or fields[name].default is not None:
                _check(cls, name, fields[name].type, value)
            if name in COUNTS and value is not None and value < 1:
                raise ValueError(f"{name} in the config of {cls.__name__} is {value}; expected at least 1")
        return cls(**known, extra={k: v for k, v in values.items() if k not in fields})

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, in the spellings of transformers 4 and 5 where they differ."""
        apart = ("extra", "num_labels", "attn_implementation", "experts_implementation", "generation_config", "rope_parameters")
        out = {**self.extra, "model_type": self.model_type, **{n: thaw(getattr(self, n)) for n in self.field_names() if n not in apart}}
        if self.classifier_dropout is None:
            del out["classifier_dropout"]
        if self.num_labels != len(self.extra.get("id2label") or (0, 1)):
            out["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.num_labels)}
            out["label2id"] = {f"LABEL_{i}": i for i in range(self.num_labels)}
        rope = getattr(self, "rope_parameters", None)
        if isinstance(rope, RopeParameters):
            new = rope.to_dict()
            old = {k: v for k, v in new.items() if k not in ("rope_theta", "partial_rotary_factor")}
            out |= {"rope_parameters": new, "rope_theta": rope.rope_theta, "rope_scaling": None if rope.rope_type == "default" else old}
            if rope.partial_rotary_factor != 1 or "partial_rotary_factor" in self.spelled:
                out["partial_rotary_factor"] = rope.partial_rotary_factor
        return {self.spelled.get(name, name): value for name, value in out.items()}

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))

    def matched(self, tensors: Mapping[str, Any]) -> Self:
        """As the tensors of a checkpoint show it to be, where config.json does not tell; by default itself."""
        return self

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """A decoder with rotary positions."""

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # as many as query heads
    head_dim: int = None  # type: ignore[assignment]  # hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    attention_dropout: float | None = 0.0
    rope_parameters: RopeParameters = RopeParameters()

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads {self.num_key_value_heads}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedLayers:
    """Fields of a config whose layers are of two kinds, `full_attention` and `sliding_attention`: as `layer_types` lists them, or by
    the family's `slides`."""

    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    def slides(self, layer: int) -> bool:
        """Whether layer `layer` of a config without `layer_types` attends to a window: a family's own."""
        raise NotImplementedError

    @property
    def layer_kinds(self) -> tuple[Hashable, ...]:
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        kinds = self.layer_types or tuple("sliding_attention" if self.slides(i) else "full_attention" for i in range(layers))
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if len(kinds) != layers or unknown:
            raise ValueError(
                f"layer_types has {len(kinds)} entries{f', among them {unknown}' if unknown else ''}; expected full_attention or "
                f"sliding_attention for each of num_hidden_layers = {layers} (or null, for the family's own order)"
            )
        if "sliding_attention" in kinds and self.sliding_window is None:
            raise ValueError("layers of sliding_attention need a sliding_window; found none in the config")
        return kinds

    def window(self, kind: Hashable) -> int | None:
        return self.sliding_window if kind == "sliding_attention" else None

    def layer_spec(self, kind: Hashable) -> KVSpec | SlidingKVSpec:
        heads, head_dim = self.num_key_value_heads, self.head_dim  # type: ignore[attr-defined]
        window = self.window(kind)
        return KVSpec(heads, head_dim) if window is None else SlidingKVSpec(heads, head_dim, window)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError names the file and what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; a checkpoint directory holds config.json beside its .safetensors files") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); download or write it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, expected an object")
    return values


def _read_rope(values: dict[str, Any], default: RopeParameters, length: int) -> dict[str, Any]:
    """Both spellings: `rope_parameters`, or `rope_theta` beside `rope_scaling`, whose keys count first as in HF. `default` and `length`:
    the defaults of `rope_parameters` and `max_position_embeddings`."""
    values = dict(values)
    scaling = values.pop("rope_scaling", None) or {}
    names = ("rope_theta", "partial_rotary_factor")
    defaults = {k: getattr(default, k) for k in names} | {k: values.pop(k) for k in names if values.get(k) is not None}
    found = values.get("rope_parameters")
    if not isinstance(found, RopeParameters):
        defaults["max_position_embeddings"] = values.get("max_position_embeddings", length)
        rope = scaling or found or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"the config's rope_parameters (rope_scaling) is {rope!r}; expected an object with rope_type, rope_theta, …")
        rope = dict(rope)
        if values.get("original_max_position_embeddings") and rope.get("rope_type", rope.get("type")) in ORIGINAL_LENGTH:
            rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]  # phi3's place for it
        values["rope_parameters"] = RopeParameters.from_dict(rope, **defaults)
    return values


def thaw(value: Any) -> Any:
    """The lists and dicts of JSON for the tuples and frozen dicts of a config."""
    if isinstance(value, tuple):
        return [thaw(v) for v in value]
    return {k: thaw(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _freeze(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, Mapping) and value.keys() == {"__float__"}:
        return float(value["__float__"])  # transformers 5 writes numbers so that JSON lacks, such as Infinity; others write the bare word
    return FrozenDict({k: _freeze(v) for k, v in value.items()}) if isinstance(value, Mapping) else value


def read_dtype(value: Any, name: str = "dtype") -> np.dtype:
    """A floating dtype of JAX's, numpy's or torch's, or its name; ValueError for another one."""
    try:
        found = None if value is None else jnp.dtype(str(value).removeprefix("torch.") if str(value).startswith("torch.") else value)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{name} is {value!r}; expected float32, bfloat16, float16, …")
    return found


def _check(cls: type, name: str, kind: Any, value: Any) -> None:
    simple: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    wanted = simple.get(kind.replace(" | None", "")) if isinstance(kind, str) else None
    if wanted is None or (value is None and "None" in kind):
        return
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} in the config of {cls.__name__} is {value!r}; expected {kind}")
