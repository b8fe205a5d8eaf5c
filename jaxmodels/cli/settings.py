"""What `jaxmodels train` is told: a YAML file and the command line, as dataclasses. What is unknown or of the wrong type is an error that
names the closest or the expected."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodels.cli.main import DTYPES
from jaxmodels.training.arguments import REFUSED, TrainingArguments
from jaxmodels.training.lora import LoraConfig
from jaxmodels.training.objectives import dpo_loss

try:
    import yaml
except ImportError as error:
    raise ImportError("the settings of a run need PyYAML, which is not installed: pip install 'jaxmodels[train]'") from error


class _Loader(yaml.SafeLoader):
    """With YAML 1.2's scalars, among which 1e-4 is a number and `no` a word. A name that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice in one place", node.start_mark)
        return super().construct_mapping(node, deep)


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in _REPLACED] for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_REPLACED[0], re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_FLOAT = r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
_Loader.add_implicit_resolver(_REPLACED[1], re.compile(_FLOAT), list("-+0123456789."))
WORDS = {"yes": True, "on": True, "no": False, "off": False}  # YAML 1.1's, where a field is yes or no

JOBS = ("pretrain", "sft", "dpo", "lora")


@dataclasses.dataclass
class ModelSettings:
    """path: a checkpoint directory or hub id; or config: the fields of a config.json, `model_type` among them, for a model from nothing
    (its seed is training's). tokenizer: a directory or hub id, by default `path`. chat_template: Jinja text, or a file of it.

    dtype: of the checkpoint's parameters and of the computation, `auto` as stored; trained parameters are float32 in any case."""

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str = "auto"
    scan_layers: bool = False
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")


@dataclasses.dataclass
class Source:
    """Files: see jaxmodels.training.sources.read_rows. weight: of its examples in the mixture. text_field: of rows that are text."""

    path: str | list[str]
    format: str | None = None
    weight: float = 1.0
    text_field: str = "text"

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; expected a number above 0")


@dataclasses.dataclass
class DataSettings:
    """train, eval: sources. length: tokens of a row at most. packing: several documents in a row, by default for pretraining alone; rows
    that were packed ahead of time stay as they are. window: documents that are packed together. pad_to_multiple_of: lengths of batches
    that are not packed."""

    train: list[Source]
    eval: list[Source] = dataclasses.field(default_factory=list)
    length: int = 1024
    packing: bool | None = None
    window: int = 1024
    pad_to_multiple_of: int = 64

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty; expected a source, such as [{path: corpus/*.jsonl}]")
        for name, least in (("length", 2), ("window", 1), ("pad_to_multiple_of", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")


@dataclasses.dataclass
class DpoSettings:
    """As jaxmodels.training.objectives.dpo_loss."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None
    reference_free: bool = False

    def __post_init__(self) -> None:
        dpo_loss(**vars(self))  # which refuses what it cannot do


@dataclasses.dataclass
class Distributed:
    """As jax.distributed.initialize: every process is started with the same file and its own process_id. On TPU pods and under Slurm an
    empty section is enough."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass
class Settings:
    """job: pretrain (text, every token), sft (chats, completions or text), dpo (pairs), lora (sft of an adapter; with a section `lora` the
    other jobs train one too). mesh: {axis: devices}, with `rules` a sharding preset. cpu_devices: so many virtual devices on CPU."""

    data: DataSettings
    job: str = "pretrain"
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    training: TrainingArguments = dataclasses.field(default_factory=TrainingArguments)
    lora: LoraConfig | None = None
    dpo: DpoSettings = dataclasses.field(default_factory=DpoSettings)
    mesh: dict[str, int] | None = None
    rules: str | None = None
    distributed: Distributed | None = None
    cpu_devices: int | None = None

    def __post_init__(self) -> None:
        if self.job not in JOBS:
            raise ValueError(f"job is {self.job!r}; expected one of {', '.join(JOBS)}")
        if (self.model.path is None) == (self.model.config is None):
            raise ValueError("model needs a path (of a checkpoint) or a config (for a model from nothing), one of them")
        if self.model.path is None and self.model.tokenizer is None:
            raise ValueError("model.tokenizer is missing: a model from nothing has none of its own")
        if self.mesh is not None and not all(isinstance(size, int) for size in self.mesh.values()):
            raise ValueError(f"mesh is {self.mesh}; expected numbers of devices, such as {{fsdp: 4, tensor: 2}}")
        if self.cpu_devices is not None and self.cpu_devices < 1:
            raise ValueError(f"cpu_devices is {self.cpu_devices}; expected at least 1")
        if self.rules is not None and self.mesh is None:
            raise ValueError(f"rules {self.rules!r} need a mesh, such as mesh: {{fsdp: 4, tensor: 2}}")
        if self.job == "dpo" and (self.data.packing or any(source.weight != 1 for source in self.data.train)):
            raise ValueError("job dpo takes no data.packing and no weights: its sources are read one after another, a pair to a row")
        if self.data.packing is None:
            self.data.packing = self.job == "pretrain"
        if self.training.eval_strategy != "no" and not self.data.eval:
            raise ValueError(f"training.eval_strategy is {self.training.eval_strategy!r}: evaluation needs data.eval, further sources")
        if self.job == "lora" and self.lora is None:
            self.lora = LoraConfig()


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """From a YAML file, and overrides as they stand on the command line: `--section.field value`, `--section.field=value`,
    `section.field=value`; items of lists by number; a field that one section alone has may go without it. Values are YAML.
    ValueError names what is wrong and where."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # which is a safe one
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected fields, such as {', '.join(_fields(Settings))}")
    for name, value in _pairs(overrides):
        _set(values, _qualified(name), value)
    return _build(Settings, values, "")


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    found, left = [], list(overrides)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--") and left and not left[0].startswith("--"):
            value, equals = left.pop(0), "="
        if not equals:
            raise ValueError(f"{word!r}: expected --section.field value or section.field=value")
        try:
            found.append((name, yaml.load(value, _Loader)))
        except yaml.YAMLError:
            raise ValueError(f"{name}: {value!r} is not readable as YAML") from None
    return found


def _fields(cls: Any) -> dict[str, Any]:
    """{field: its type} of what may be set from outside."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name != "extra"}


def fields_in_words(cls: Any = Settings, where: str = "") -> str:
    """Every field, its type and its default, a line each; sections with what they say of themselves."""
    text, lines = " ".join((cls.__doc__ or "").split()), []
    for field in dataclasses.fields(cls):
        kind, name = _fields(cls).get(field.name), _path(where, field.name)
        if kind is None:
            continue
        if dataclasses.is_dataclass(_inner(kind)):
            lines.append(fields_in_words(_inner(kind), f"{name}.0" if field.type.startswith("list") else name))  # type: ignore[union-attr]
            continue
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        lines.append(f"  {name}: {field.type}" + ("" if made is dataclasses.MISSING else f" = {made!r}"))
    return "\n".join([f"\n{where or 'fields'}: {text}\n", *lines])


def _inner(kind: Any) -> Any:
    """The type, without None and one level of list."""
    if isinstance(kind, types.UnionType):
        (kind, *_) = [part for part in typing.get_args(kind) if part is not type(None)]
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def _qualified(name: str) -> str:
    """A field's name with its section."""
    top, field = _fields(Settings), name.partition(".")[0]
    if field in top:
        return name
    sections = [section for section, kind in top.items() if dataclasses.is_dataclass(_inner(kind)) and field in _fields(_inner(kind))]
    if len(sections) > 1:
        raise ValueError(f"{field} is a field of {' and of '.join(sections)}: say which, as {sections[0]}.{name}")
    return f"{sections[0]}.{name}" if sections else name


def _set(values: Any, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for i, part in enumerate(path):
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[_key(values, part, ".".join(path[:i]))]
    values[_key(values, last, ".".join(path))] = value


def _key(values: Any, part: str, where: str) -> Any:
    """What `part` of a name is in the fields or the list at `where`."""
    if isinstance(values, dict):
        return part
    if not isinstance(values, list):
        raise ValueError(f"{where} is {values!r}, which has no field {part!r}")
    if not (part.isdecimal() and int(part) < len(values)):
        raise ValueError(f"{where} is a list of {len(values)}; {part!r} is the number of none of them")
    return int(part)


def _build(cls: Any, values: Any, where: str) -> Any:
    """A dataclass of the values, and of those inside them."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; expected fields, such as {', '.join(list(_fields(cls))[:6])}")
    fields = _fields(cls)
    known = {**fields, **dict.fromkeys(REFUSED)} if cls is TrainingArguments else fields  # which says itself why it refuses
    for name in values:
        if name not in known:
            raise ValueError(f"{_path(where, name)} is not a field{_closest(str(name), where)}")
    required = {field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"{_path(where, missing[0])} is missing")
    made = {name: _value(fields.get(name, Any), value, _path(where, str(name))) for name, value in values.items()}
    try:
        return cls(**made)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _closest(name: str, where: str) -> str:
    """What an unknown field of section `where` may have meant: one of the section, else one of another."""
    top = _fields(Settings)
    sections = {section: _inner(kind) for section, kind in top.items() if dataclasses.is_dataclass(_inner(kind))}
    every = {"": list(top)} | {section: list(_fields(kind)) for section, kind in sections.items()}
    here = list(_fields(Source)) if where.startswith("data.") else every[where]
    near = [_path(where, found) for found in difflib.get_close_matches(name, here, 1)]
    near += [_path(section, name) for section, names in every.items() if name in names]
    near += [_path(s, found) for s, names in every.items() for found in difflib.get_close_matches(name, names, 1, 0.75)]
    return f"; the closest is {near[0]}" if near else f"; known are {', '.join(sorted(here))}"


def _value(kind: Any, value: Any, where: str) -> Any:
    """The value as its annotation wants it. ValueError where it is of another type."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return None
    if section := next(filter(dataclasses.is_dataclass, kinds), None):
        return _build(section, {} if value is None else value, where)
    if isinstance(value, list) and dataclasses.is_dataclass(_inner(kind)):
        return [_build(_inner(kind), item, f"{where}.{i}") for i, item in enumerate(value)]
    plain = [typing.get_origin(each) or each for each in kinds]
    fits = isinstance(value, tuple(each for each in plain if each is not Any)) and (bool in plain or not isinstance(value, bool))
    if fits or Any in plain:
        return value
    if bool in plain and str not in plain and str(value).lower() in WORDS:
        return WORDS[value.lower()]
    number = next((each for each in (int, float) if each in plain), None)
    if number and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            if float(value) == number(float(value)):  # YAML takes 1_000.0 for text
                return number(float(value))
    raise ValueError(f"{where} is {value!r}; expected {' or '.join('nothing' if e is types.NoneType else e.__name__ for e in plain)}")
