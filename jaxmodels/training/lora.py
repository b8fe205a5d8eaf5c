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
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.auto import conversion_of
from jaxmodels.config import read_json, thaw
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import read_file, write_file
from jaxmodels.convert.rules import Rename, Split, Tie, fill, forward, inverse, match, members, unstack
from jaxmodels.convert.sharded import replacing_together
from jaxmodels.convert.tensors import Spec, as_tensor
from jaxmodels.layers import Embedding, Linear
from jaxmodels.ops.lora import row_norms
from jaxmodels.params import Tree, flatten, unflatten
from jaxmodels.sharding.processes import spread, to_host
from jaxmodels.training.optimizers import module_types

Adapter = dict[str, jax.Array]  # dotted names of the leaves, as they lie in the tree
TRAINED = ("lora_A", "lora_B", "lora_magnitude", "lora_embedding_A", "lora_embedding_B")
PREFIX = "base_model.model."
# what PEFT adds to modules_to_save by itself, whichever of them the model has
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
# PEFT's options that would change numbers and are not offered: the values that mean "off"
OFF: dict[str, tuple[Any, ...]] = {
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
    head). rank_pattern, alpha_pattern: {regular expression for the end of a name: value}. task_type: `SEQ_CLS`, `TOKEN_CLS` and
    `QUESTION_ANS` add the head to modules_to_save. ensure_weight_tying: embeddings in modules_to_save stay one with a head that is tied
    to them. bias must be "none". `extra` keeps the other keys of adapter_config.json; those that would change numbers here must be off."""

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
    task_type: str | None = None
    bias: str = "none"
    ensure_weight_tying: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.r, int) and self.r > 0):
            raise ValueError(f"LoRA's rank r is {self.r!r}; expected an integer above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; expected at least 0 and below 1")
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save is {self.modules_to_save!r}; expected a list of names, [{self.modules_to_save}]")
        values = {**self.extra, "bias": self.bias}
        for name, off in {**OFF, "bias": ("none",)}.items():
            if values.get(name, off[0]) not in off:
                raise ValueError(f"LoRA option {name} = {values[name]!r} is not supported; it must be {off[0]!r}")
        heads = [name for name in HEADS.get(str(self.task_type), ()) if name not in self.modules_to_save]
        object.__setattr__(self, "modules_to_save", (*self.modules_to_save, *heads))

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
        return {"base_model_name_or_path": None, **self.extra, "peft_type": "LORA", **own}

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


def _file_module(rules: Sequence[Any], module: str) -> str:
    """The module of a family's checkpoints that an (unrolled) module of the tree is, or is a part of, as of a fused projection."""
    key = f"{module}.weight"
    for rule in reversed(rules):
        if isinstance(rule, Split):
            key = next((fill(rule.source, texts) for t in rule.targets if (texts := match(t, key)) is not None), key)
        elif isinstance(rule, Rename):
            (key,) = rule.inverse({key: Spec((1, 1), np.float32)})
    return key.removesuffix(".weight")


def _targets(model: Any, config: LoraConfig) -> dict[str, tuple[type, list[str]]]:
    """{module in the tree: (its class, the files' names of its layers)} of what is adapted. ValueError when that is nothing, or half a
    stack."""
    found, names, rules = {}, set(), conversion_of(model)[0]
    tied = {rule.canonical: rule.key for rule in _ties(model)}
    types = module_types(model)
    for name, kind in types.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not issubclass(kind, Linear | Embedding):
            continue
        inside = issubclass(kind, Linear) and module.startswith(model.base_name)
        unrolled = [_file_module(rules, name) for name in members(module) or [module]]
        names |= {name.rpartition(".")[2] for name in unrolled}
        chosen = [config.targets(n, inside) for n in unrolled]
        if any(chosen):
            if not all(chosen) or len({config.rank(n) for n in unrolled}) > 1:
                raise ValueError(
                    f"{module} holds {len(unrolled)} layers in one array, of which the adapter takes a part or at several ranks; "
                    "load the model with scan_layers=False for this adapter"
                )
            if f"{module}.weight" in tied:
                warnings.warn(
                    f"{module} is adapted as embeddings alone, while {tied[f'{module}.weight']} is tied to it: merged, the adapter would "
                    "change both",
                    stacklevel=3,
                )
            if issubclass(kind, Embedding) and config.use_dora:
                raise ValueError(f"DoRA of an embedding ({module}) is not supported; leave it out or set use_dora=False")
            found[module] = (kind, unrolled)
    if not found:
        raise ValueError(
            f"target_modules {config.target_modules!r} name no linear layer or embedding; module names end in {', '.join(sorted(names))}"
        )
    shared = {key: head for key, head in tied.items() if _saved(config.modules_to_save, key)}
    for name in config.modules_to_save:
        known = name in HEADS.get(str(config.task_type), ()) or any(_saved([name], key) for key in (*types, *shared.values()))
        if not known:
            raise ValueError(f"modules_to_save {name!r} is no module with parameters of its own (a tied head is the embeddings)")
    if shared and not config.ensure_weight_tying:
        key, head = next(iter(shared.items()))
        raise ValueError(
            f"modules_to_save has {key}, to which {head} is tied: PEFT would train and load the one without the other; "
            "ensure_weight_tying=True keeps them one"
        )
    return found


def _ties(model: Any) -> list[Tie]:
    return [rule for rule in conversion_of(model)[0] if isinstance(rule, Tie)]


def add_lora(model: Any, params: Any, config: LoraConfig, key: jax.Array) -> Tree:
    """`params` with a fresh adapter of float32 beside the targets: as PEFT's, one that changes nothing yet."""
    flat = dict(flatten(params))
    for module, (kind, unrolled) in _targets(model, config).items():
        make: Callable[..., Adapter] = partial(_adapter, kind=kind, module=module, unrolled=unrolled, config=config, key=key)
        weight = flat[f"{module}.weight"]
        if spread(weight):  # over several processes: it has no slices outside of a program, and what goes with it lies with it
            make = jax.jit(make, out_shardings=NamedSharding(weight.sharding.mesh, PartitionSpec()))
        flat |= make(weight)
    return unflatten(flat)


def check_adapter(model: Any, params: Any, config: LoraConfig) -> None:
    """ValueError where the adapter in `params` is not one of this config: names, shapes, scales and dropout."""
    make = lambda params: adapter_of(add_lora(model, params, config, jax.random.key(0)))
    shapes: Callable[[Adapter], dict[str, Any]] = lambda adapter: {name: list(leaf.shape) for name, leaf in adapter.items()}
    found, wanted = shapes(adapter_of(params)), shapes(jax.eval_shape(make, without_adapter(params)))
    for module, (_, unrolled) in _targets(model, config).items():
        wanted[f"{module}.lora_scale"] = np.asarray([config.scale(name) for name in unrolled], np.float32).tolist()
        if f"{module}.lora_scale" in found:
            found[f"{module}.lora_scale"] = np.ravel(to_host(flatten(params)[f"{module}.lora_scale"])).tolist()
    sides = [(name, found.get(name, "nothing"), wanted.get(name, "nothing")) for name in sorted({*found, *wanted})]
    lines = [f"  {name}: {has}, the config says {says}" for name, has, says in sides if has != says]
    if lines:
        raise ValueError("\n".join(["the parameters have an adapter of another LoraConfig:", *lines[:6], *["  …"] * (len(lines) > 6)]))


def _adapter(weight: jax.Array, kind: type, module: str, unrolled: list[str], config: LoraConfig, key: jax.Array) -> Adapter:
    keys = [jax.random.fold_in(key, _number(name)) for name in members(module) or [module]]
    leaves = [_fresh(kind, w, config, name, k) for w, name, k in zip(_layers(weight, module), unrolled, keys)]
    return {f"{module}.{name}": _joined([leaf[name] for leaf in leaves], module) for name in leaves[0]}


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
    return lambda name: not (name.rpartition(".")[2] in TRAINED or _saved(config.modules_to_save, name))


def _saved(modules: Sequence[str], name: str) -> bool:
    """Whether a parameter's module, or one around it, has a name that ends in one of these, as PEFT goes by them."""
    module, _, leaf = name.rpartition(".")
    return not leaf.startswith("lora_") and any(f"{end}." in f"{module}." for end in modules)


def adapter_of(params: Any) -> Adapter:
    """The adapter's leaves alone, by name."""
    return {name: leaf for name, leaf in flatten(params).items() if name.rpartition(".")[2].startswith("lora_")}


def with_adapter(params: Any, adapter: Mapping[str, Any]) -> Tree:
    """`params` with these leaves in the place of any adapter's that are there."""
    return unflatten({**flatten(without_adapter(params)), **adapter})


def without_adapter(params: Any) -> Tree:
    """`params` without any adapter's leaves."""
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
# A projection that files fuse has one adapter there, ours one for each part: the same A, and B cut by the family's rules. Back, parts with
# an A of their own are one adapter of the sum of their ranks, its B zero where a part's rows meet another's A.


def _file_key(module: str, last: str) -> str:
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
    return f"{PREFIX}{module}.{names.get(last, last)}"


def _structure(model: Any) -> list[Any]:
    return [rule for rule in conversion_of(model)[0] if isinstance(rule, Split | Rename)]


def _parts(model: Any, modules: Sequence[str]) -> dict[str, list[str]]:
    """{module of the files: the tree's (unrolled) modules that it is}."""
    parts: dict[str, list[str]] = {}
    for module in modules:
        for name in members(module) or [module]:
            parts.setdefault(_file_module(_structure(model), name), []).append(name)
    return parts


def save_adapter(directory: str | Path, model: Any, params: Any, config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT's from_pretrained reads, in one piece or not at all. Of arrays
    over several processes, all make the call and the first writes."""
    leaves = {name: np.asarray(leaf) for name, leaf in unstack(to_host(adapter_of(params))).items()}
    tensors = {_file_key(*name.rsplit(".", 1)): leaf for name, leaf in leaves.items() if "embedding" in name.rpartition(".")[2]}
    rows: dict[str, np.ndarray] = {}  # what has the weight's rows, by the tree's names
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for file, parts in _parts(model, [m for m, own in _modules(adapter_of(params)).items() if "lora_A" in own]).items():
        As = [leaves[f"{name}.lora_A"] for name in parts]
        same = all(np.array_equal(A, As[0]) for A in As)
        tensors[_file_key(file, "lora_A")] = As[0] if same else np.concatenate(As)
        for i, name in enumerate(parts):
            B, r = leaves[f"{name}.lora_B"], len(As[0])
            rows[f"{name}.lora_B"] = B if same else np.pad(B, ((0, 0), (i * r, (len(parts) - 1 - i) * r)))
            if config.use_dora:
                rows[f"{name}.lora_magnitude"] = leaves[f"{name}.lora_magnitude"]
        if not same:
            scale, r = config.scale(file), r * len(parts)
            ranks = {re.escape(file): r, **ranks}
            alphas = {re.escape(file): scale * (math.sqrt(r) if config.use_rslora else r), **alphas}
    fused = inverse(_structure(model), {name: as_tensor(leaf) for name, leaf in rows.items()})
    out = {key: as_tensor(np.ascontiguousarray(leaf)) for key, leaf in tensors.items()}
    out |= {_file_key(*name.rsplit(".", 1)): tensor for name, tensor in fused.items()}
    saved = unstack(
        to_host({name: leaf for name, leaf in flatten(without_adapter(params)).items() if _saved(config.modules_to_save, name)})
    )
    out |= {_file_key(*name.rsplit(".", 1)): as_tensor(leaf) for name, leaf in saved.items()}
    for rule in _ties(model):
        module, head = (_file_key(*name.rsplit(".", 1)) for name in (rule.canonical, rule.key))
        out |= {head: out[module]} if module in out else {}
    config = dataclasses.replace(config, rank_pattern=ranks, alpha_pattern=alphas)
    together = spread(params)
    with replacing_together(directory, together=together) as path:
        if not together or jax.process_index() == 0:
            write_file(path / "adapter_model.safetensors", out)
            (path / "adapter_config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load_adapter(directory: str | Path, model: Any, params: Any) -> tuple[Tree, LoraConfig]:
    """`params` under the adapter that PEFT (or `save_adapter`) wrote, and its config. Every tensor of the file is used, or
    CheckpointError names those that are left and those that lack."""
    directory = Path(directory)
    config = LoraConfig.from_dict(read_json(directory / "adapter_config.json"))
    found = dict(read_file(directory / "adapter_model.safetensors"))
    modules = _targets(model, config)
    base = flatten(without_adapter(params))
    wanted = flatten(jax.eval_shape(lambda params: add_lora(model, params, config, jax.random.key(0)), unflatten(base)))
    names = [name for name in wanted if name.rpartition(".")[2] in TRAINED or _saved(config.modules_to_save, name)]
    plain = [n for name in names for n in members(name) or [name]]
    source = {n: _file_key(_file_module(_structure(model), n.rpartition(".")[0]), n.rpartition(".")[2]) for n in plain}
    # PEFT keeps the base of adapted embeddings, and of a head that is tied to them
    loose = [key for key in found if key.endswith("base_layer.weight")]
    loose += [key for key in (f"{PREFIX}{getattr(model, 'head_name', '')}.weight",) if loose and key in found]
    loose += [f"{PREFIX}{rule.key}" for rule in _ties(model) if _saved(config.modules_to_save, rule.canonical)]
    missing = sorted(set(source.values()) - set(found))
    left = sorted(set(found) - set(source.values()) - set(loose))
    if missing or left:
        raise CheckpointError(f"{directory}: the adapter does not fit this model; missing are {missing[:4]}, not used are {left[:4]}")
    whole: dict[str, Any] = {}
    for name, key in source.items():
        module, _, last = name.rpartition(".")
        file = _file_module(_structure(model), module)
        if last in ("lora_B", "lora_magnitude"):
            whole |= forward(_structure(model), {f"{file}.{last}": found[key]})
        else:
            whole[name] = found[key]
    result = dict(base)
    for name in names:
        group = members(name) or [name]
        shape = wanted[name].shape[1:] if members(name) else wanted[name].shape
        for n in group:
            if whole[n].shape != shape:
                found_shape, expected = list(whole[n].shape), list(shape)
                raise CheckpointError(f"{directory}: {source[n]} has shape {found_shape}; this model and config expect {expected}")
        result[name] = _joined([jnp.asarray(whole[n].read(), wanted[name].dtype) for n in group], name)
    for module, (_, unrolled) in modules.items():
        result[f"{module}.lora_scale"] = _joined([jnp.float32(config.scale(n)) for n in unrolled], module)
        if config.lora_dropout and f"{module}.lora_A" in result:
            result[f"{module}.lora_dropout"] = _joined([jnp.float32(config.lora_dropout)] * len(unrolled), module)
    return unflatten(result), config
