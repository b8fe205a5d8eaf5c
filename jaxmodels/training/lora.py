"""LoRA as a function on parameters: an adapter is a few leaves beside each chosen module's own, and the model stays what it was.

A module's subtree with `lora_A`, `lora_B` and `lora_scale` (DoRA: `lora_magnitude`; with dropout `lora_dropout`; an embedding's are
`lora_embedding_A` and `lora_embedding_B`) is applied as jaxmodels.ops.lora says, wherever the parameters go: the train step with
`frozen=frozen_by(config, ...)`, generate, scanned layers. Names, rules and files are PEFT's.

Axis letters: B rows of a batch, I in, O out, V vocabulary, r rank, L stacked layers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.auto import conversion_of
from jaxmodels.config import read_json, thaw
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import read_file, replacing, write_file
from jaxmodels.convert.load import unload
from jaxmodels.convert.rules import members, unstack
from jaxmodels.convert.tensors import as_tensor
from jaxmodels.layers import Embedding, Linear
from jaxmodels.ops.lora import row_norms
from jaxmodels.params import Tree, flatten, unflatten
from jaxmodels.training.optimizers import module_types

Adapter = dict[str, jax.Array]  # dotted names of the leaves, as they lie in the tree
TRAINED = ("lora_A", "lora_B", "lora_magnitude", "lora_embedding_A", "lora_embedding_B")
PREFIX = "base_model.model."
# PEFT's options that would change numbers and are not offered: the values that mean "off"
OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "layers_to_transform": (None, []),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, "gaussian"),
    "megatron_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """PEFT's fields of that name. target_modules: ends of module names, a regular expression for a whole name, or `all-linear` (without the
    head). rank_pattern, alpha_pattern: {regular expression for the end of a name: value}. `extra` keeps the other keys of
    adapter_config.json; those that would change numbers here must be off."""

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.r, int) and self.r > 0):
            raise ValueError(f"LoRA's rank r is {self.r!r}; expected an integer above 0")
        for name, off in OFF.items():
            if self.extra.get(name, off[0]) not in off:
                raise ValueError(f"LoRA option {name} = {self.extra[name]!r} is not supported; it must be {off[0]!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the contents of adapter_config.json."""
        if values.get("peft_type") != "LORA":
            raise ValueError(f"adapter_config.json is of peft_type {values.get('peft_type')!r}; only LORA is known here")
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        return cls(**known, extra={name: value for name, value in values.items() if name not in names and name != "peft_type"})

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        own["exclude_modules"], own["modules_to_save"] = own["exclude_modules"] or None, own["modules_to_save"] or None
        return {"bias": "none", "task_type": None, "base_model_name_or_path": None, **self.extra, "peft_type": "LORA", **own}

    def targets(self, module: str, linear: bool) -> bool:
        """Whether the module of that (unrolled) name is adapted. `linear`: one that `all-linear` means."""
        if _listed(self.exclude_modules, module) or any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return linear
        return _listed(self.target_modules, module)

    def rank(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """alpha/r, or alpha/sqrt(r) (rsLoRA, arXiv:2312.03732)."""
        r, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _listed(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _targets(model: Any, config: LoraConfig) -> dict[str, tuple[type, list[str]]]:
    """{module in the tree: (its class, its unrolled names)} of what is adapted. ValueError when that is nothing, or half a stack."""
    found = {}
    for name, kind in module_types(model).items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not issubclass(kind, Linear | Embedding):
            continue
        inside = issubclass(kind, Linear) and module.startswith(model.base_name)
        unrolled = members(module) or [module]
        chosen = [config.targets(n, inside) for n in unrolled]
        if any(chosen):
            if not all(chosen) or len({config.rank(n) for n in unrolled}) > 1:
                raise ValueError(
                    f"{module} holds {len(unrolled)} layers in one array, of which the adapter takes a part or at several ranks; "
                    "load the model with scan_layers=False for this adapter"
                )
            if issubclass(kind, Embedding) and config.use_dora:
                raise ValueError(f"DoRA of an embedding ({module}) is not supported; leave it out or set use_dora=False")
            found[module] = (kind, unrolled)
    if not found:
        some = ", ".join(sorted({name.split(".")[-2] for name in module_types(model) if name.endswith(".weight")}))
        raise ValueError(f"target_modules {config.target_modules!r} name no linear layer or embedding; module names end in {some}")
    return found


def add_lora(model: Any, params: Any, config: LoraConfig, key: jax.Array) -> Tree:
    """`params` with a fresh adapter of float32 beside the targets: as PEFT's, one that changes nothing yet."""
    flat = dict(flatten(params))
    for module, (kind, unrolled) in _targets(model, config).items():
        weight = flat[f"{module}.weight"]
        keys = [jax.random.fold_in(key, _number(name)) for name in unrolled]
        leaves = [_fresh(kind, w, config, name, k) for w, name, k in zip(_layers(weight, module), unrolled, keys)]
        flat |= {f"{module}.{name}": _joined([leaf[name] for leaf in leaves], module) for name in leaves[0]}
    return unflatten(flat)


def _number(name: str) -> int:
    """The same for a module whether its layers are stacked or not."""
    return int.from_bytes(name.encode(), "big") % (2**31 - 1)


def _layers(x: Any, module: str) -> Sequence[Any]:
    return x if members(module) else [x]


def _joined(leaves: list[Any], module: str) -> jax.Array:
    return jnp.stack(leaves) if members(module) else jnp.asarray(leaves[0])


def _fresh(kind: type, weight: jax.Array, config: LoraConfig, name: str, key: jax.Array) -> dict[str, jax.Array]:
    r, scale = config.rank(name), jnp.float32(config.scale(name))
    if issubclass(kind, Embedding):
        V, O = weight.shape
        return {"lora_embedding_A": jnp.zeros((r, V)), "lora_embedding_B": jax.random.normal(key, (O, r)), "lora_scale": scale}
    O, I = weight.shape
    A = jax.random.uniform(key, (r, I), minval=-(I**-0.5), maxval=I**-0.5)
    leaves = {"lora_A": A, "lora_B": jnp.zeros((O, r)), "lora_scale": scale}
    if config.use_dora:
        leaves["lora_magnitude"] = row_norms(weight, A, leaves["lora_B"], scale)
    if config.lora_dropout:
        leaves["lora_dropout"] = jnp.float32(config.lora_dropout)
    return leaves


def frozen_by(config: LoraConfig) -> Callable[[str], bool]:
    """For the train step's `frozen`: all but the adapter and the modules_to_save."""
    return lambda name: not (name.rpartition(".")[2] in TRAINED or _saved(config, name))


def _saved(config: LoraConfig, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return not leaf.startswith("lora_") and any(re.search(rf"(^|\.){m}($|\.)", module) for m in config.modules_to_save)


def adapter_of(params: Any) -> Adapter:
    """The adapter's leaves alone, by name."""
    return {name: leaf for name, leaf in flatten(params).items() if name.rpartition(".")[2].startswith("lora_")}


def with_adapter(params: Any, adapter: Mapping[str, Any]) -> Tree:
    """`params` with these leaves in the place of any adapter's that are there."""
    return unflatten({**flatten(without_adapter(params)), **adapter})


def without_adapter(params: Any) -> Tree:
    return unflatten({name: leaf for name, leaf in flatten(params).items() if not name.rpartition(".")[2].startswith("lora_")})


def merge(params: Any) -> tuple[Tree, Adapter]:
    """Plain parameters that do what `params` with its adapter do, each of its dtype, and the adapter, with which `unmerge` goes back."""
    base, adapter = dict(flatten(without_adapter(params))), adapter_of(params)
    for module, leaves in _modules(adapter).items():
        weight = base[f"{module}.weight"]
        merged, norms = _each(module, _merged, weight, leaves)
        base[f"{module}.weight"] = merged.astype(weight.dtype)
        if norms is not None:
            adapter[f"{module}.lora_norm"] = norms
    return unflatten(base), adapter


def unmerge(merged: Any, adapter: Mapping[str, Any]) -> Tree:
    """The parameters that `merge` was given, up to rounding."""
    base = dict(flatten(merged))
    for module, leaves in _modules(adapter).items():
        weight = base[f"{module}.weight"]
        base[f"{module}.weight"] = _each(module, _unmerged, weight, leaves).astype(weight.dtype)
    return with_adapter(unflatten(base), {name: leaf for name, leaf in adapter.items() if not name.endswith(".lora_norm")})


def _modules(adapter: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in adapter.items():
        module, _, last = name.rpartition(".")
        found.setdefault(module, {})[last] = leaf
    return found


def _each(module: str, function: Callable[..., Any], weight: jax.Array, leaves: dict[str, Any]) -> Any:
    return (jax.vmap(function) if members(module) else function)(weight, leaves)


def _delta(leaves: Mapping[str, Any]) -> jax.Array:
    """float32, of the weight's shape."""
    if "lora_A" in leaves:
        return leaves["lora_scale"] * (leaves["lora_B"] @ leaves["lora_A"])
    return leaves["lora_scale"] * (leaves["lora_embedding_B"] @ leaves["lora_embedding_A"]).T


def _merged(weight: jax.Array, leaves: Mapping[str, Any]) -> tuple[jax.Array, jax.Array | None]:
    whole = weight.astype(jnp.float32) + _delta(leaves)
    if "lora_magnitude" not in leaves:
        return whole, None
    norms = jnp.linalg.norm(whole, axis=1)
    return whole * (leaves["lora_magnitude"] / norms)[:, None], norms


def _unmerged(weight: jax.Array, leaves: Mapping[str, Any]) -> jax.Array:
    whole = weight.astype(jnp.float32)
    if "lora_magnitude" in leaves:
        whole = whole * (leaves["lora_norm"] / leaves["lora_magnitude"])[:, None]
    return whole - _delta(leaves)


def adapters_by_row(params: Any, adapters: Sequence[Mapping[str, Any] | None], rows: Any) -> Tree:
    """`params` for a batch whose row i is under adapters[rows[i]]; None is the base model. rows [B] int. In generate, the samples or
    beams of a row share its adapter. Adapters may differ in rank and targets; each is linear layers alone, without DoRA."""
    base, rows = without_adapter(params), jnp.asarray(rows)
    flat = flatten(base)
    modules = [_modules(adapter or {}) for adapter in adapters]
    for module in sorted({name for found in modules for name in found}):
        weight, own = flat[f"{module}.weight"], [found.get(module) for found in modules]
        kinds = {last for leaves in own if leaves for last in leaves}
        if not kinds <= {"lora_A", "lora_B", "lora_scale", "lora_dropout"}:
            raise ValueError(f"{module}: adapters chosen by row must be plain LoRA of linear layers; found {', '.join(sorted(kinds))}")
        r = max(leaves["lora_A"].shape[-2] for leaves in own if leaves)
        lead, (O, I) = weight.shape[:-2], weight.shape[-2:]
        shapes = {"lora_A": (*lead, r, I), "lora_B": (*lead, O, r), "lora_scale": lead}
        for last, shape in shapes.items():
            padded = [_padded(leaves[last] if leaves else jnp.zeros(shape), shape) for leaves in own]
            flat[f"{module}.{last}"] = jnp.moveaxis(jnp.stack(padded)[rows], 0, len(lead))
    return unflatten(flat)


def _padded(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, wanted - size) for size, wanted in zip(x.shape, shape)])


# ---- PEFT's files ----------------------------------------------------------------------------------------------------


def _file_key(name: str) -> str:
    module, _, last = name.rpartition(".")
    if last in ("lora_A", "lora_B"):
        return f"{PREFIX}{name}.weight"
    return PREFIX + (f"{module}.lora_magnitude_vector" if last == "lora_magnitude" else name)


def _check_files(model: Any, flat: Mapping[str, Any], modules: Sequence[str]) -> None:
    """An adapter of a module that files keep under another name or fused with others would mean another thing to PEFT."""
    rules, prefix = conversion_of(model)
    file = unload(flat, rules=rules, base_prefix=prefix)
    for module in modules:
        for name in members(module) or [module]:
            if f"{name}.weight" not in file:
                raise ValueError(f"{name} is not a module of its own in this family's checkpoints, so PEFT cannot address it; leave it out")


def save_adapter(directory: str | Path, model: Any, params: Any, config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT's from_pretrained reads, in one piece or not at all."""
    adapter, flat = adapter_of(params), flatten(without_adapter(params))
    _check_files(model, flat, list(_modules(adapter)))
    leaves = {name: leaf for name, leaf in adapter.items() if name.rpartition(".")[2] in TRAINED}
    leaves |= {name: leaf for name, leaf in flat.items() if _saved(config, name)}
    tensors = {_file_key(name): as_tensor(leaf) for name, leaf in unstack(leaves).items()}
    with replacing(directory) as path:
        write_file(path / "adapter_model.safetensors", tensors)
        (path / "adapter_config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load_adapter(directory: str | Path, model: Any, params: Any) -> tuple[Tree, LoraConfig]:
    """`params` under the adapter that PEFT (or `save_adapter`) wrote, and its config. Every tensor of the file is used once, or
    CheckpointError names those that are left and those that lack."""
    directory = Path(directory)
    config = LoraConfig.from_dict(read_json(directory / "adapter_config.json"))
    found = dict(read_file(directory / "adapter_model.safetensors"))
    wanted = jax.eval_shape(lambda params: add_lora(model, params, config, jax.random.key(0)), params)
    flat = flatten(wanted)
    modules = _targets(model, config)
    _check_files(model, flatten(without_adapter(wanted)), list(modules))
    names = [name for name in flat if name.rpartition(".")[2] in TRAINED or _saved(config, name)]
    keys = {name: [_file_key(n) for n in members(name) or [name]] for name in names}
    # PEFT keeps the base of adapted embeddings and of a head that is tied to them
    loose = [k for k in found if k.endswith("base_layer.weight")]
    if loose:
        loose += [k for k in (f"{PREFIX}{getattr(model, 'head_name', '')}.weight",) if k in found]
    expected = {key for group in keys.values() for key in group}
    missing, left = sorted(expected - set(found)), sorted(set(found) - expected - set(loose))
    if missing or left:
        raise CheckpointError(f"{directory}: the adapter does not fit this model; missing are {missing[:4]}, not used are {left[:4]}")
    result = dict(flatten(without_adapter(params)))
    for name, group in keys.items():
        arrays = [np.asarray(found[key].read()) for key in group]
        shape = flat[name].shape if len(group) == 1 else flat[name].shape[1:]
        for key, array in zip(group, arrays):
            if array.shape != shape:
                raise CheckpointError(f"{directory}: {key} has shape {list(array.shape)}; this model and config expect {list(shape)}")
        dtype = jnp.float32 if name not in result else result[name].dtype
        result[name] = _joined([jnp.asarray(array, dtype) for array in arrays], name)
    for module, (_, unrolled) in modules.items():
        result[f"{module}.lora_scale"] = _joined([jnp.float32(config.scale(n)) for n in unrolled], module)
        if config.lora_dropout and f"{module}.lora_A" in result:
            result[f"{module}.lora_dropout"] = _joined([jnp.float32(config.lora_dropout)] * len(unrolled), module)
    return unflatten(result), config
