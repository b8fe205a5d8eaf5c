"""Optimizers by HF's `optim` names, as optax transformations with the values of the torch optimizers that the names mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from optax import contrib

from jaxmodels.layers import Embedding, LayerNorm, Linear
from jaxmodels.params import flatten, unflatten
from jaxmodels.training.schedules import Schedule
from jaxmodels.training.transforms import STACK, galore, in_8_bits, per_layer, scale_by_muon

Rate = float | Schedule
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")  # HF's patterns, on lower-case names
_ALIASES = {
    "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "paged_adamw_32bit", "paged_adamw"),
    "adamw_8bit": ("adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"),
    "lion": ("lion_32bit", "paged_lion_32bit"),
    "lion_8bit": ("paged_lion_8bit",),
    "rmsprop": ("rmsprop_bnb", "rmsprop_bnb_32bit"),
    "galore_adamw": ("galore_adamw_layerwise",),
    "galore_adamw_8bit": ("galore_adamw_8bit_layerwise",),
    "galore_adafactor": ("galore_adafactor_layerwise",),
}
CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases)}
CANONICAL |= {name: name for name in ("adafactor", "sgd", "adagrad", "rmsprop", "muon", "schedule_free_adamw", "schedule_free_sgd", "lomo")}
REFUSED = {
    "adamw_torch_npu_fused": "a kernel for another accelerator; adamw_torch has its numbers",
    "adamw_anyprecision": "parameters are float32 here, so its summation corrects nothing; use adamw_torch",
    "adamw_torch_4bit": "4-bit states are not offered; adamw_8bit is",
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), "use optax.contrib.ademamix itself"),
    **dict.fromkeys(("rmsprop_bnb_8bit", "adalomo", "grokadamw", "stable_adamw", "schedule_free_radam"), "it is not offered"),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), "it is not offered; galore_adamw is its relative"),
}


def module_types(model: Any) -> dict[str, type[nn.Module]]:
    """The class of the module that owns each parameter, by the parameter's dotted name."""
    owners: dict[str, type[nn.Module]] = {}

    def note(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        owners[".".join(context.module.path)] = type(context.module)
        return forward(*args, **kwargs)

    inputs = model.example_inputs()
    with nn.intercept_methods(note):
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)["params"])
    types = {}
    for name in flatten(nn.unbox(params)):
        path = name.split(".")[:-1]
        ends = (".".join(path[n:]) for n in range(len(path)))  # a block does not know its place among the layers
        if owner := next((owners[end] for end in ends if end in owners), None):
            types[name] = owner
    return types


def decay_mask(model: Any) -> Callable[[Any], Any]:
    """A mask for optax: HF's parameter groups, no decay on biases and on the parameters of norms."""
    types = module_types(model)
    decays = lambda name: not (NO_DECAY.search(name.lower()) or issubclass(types.get(name, nn.Module), LayerNorm))
    return lambda params: unflatten({name: decays(name) for name in flatten(params)})


def target_weights(model: Any, targets: str | Sequence[str]) -> set[str]:
    """Names of the linear weights that `optim_target_modules` means: `all-linear`, a regular expression for the whole of a module's name,
    or a list of such or of parts of names; stacked layers go by the first layer's number. ValueError when there are none."""
    types = module_types(model)
    linear = [name for name, kind in types.items() if issubclass(kind, Linear) and name.endswith(".weight")]

    def chosen(module: str) -> bool:
        module = STACK.sub(".0.", module)
        if isinstance(targets, str):
            return targets.replace("_", "-") == "all-linear" or re.fullmatch(targets, module) is not None
        return any(target in module or re.fullmatch(target, module) for target in targets)

    found = {name for name in linear if chosen(name.removesuffix(".weight"))}
    if not found:
        raise ValueError(f"optim_target_modules {targets!r} names no linear layer; there are {', '.join(linear[:4])}, …")
    return found


def parse_optim_args(text: str | None) -> dict[str, str]:
    """HF's `optim_args`: "key1=value1,key2=value2"."""
    pairs = [pair.split("=") for pair in (text or "").replace(" ", "").split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"optim_args {text!r} is not of the form key=value,key=value")
    return dict(pairs)


class _Options:
    """optim_args, read once each; what nobody read is an error."""

    def __init__(self, name: str, values: Mapping[str, str]):
        self.name, self.left = name, dict(values)

    def __call__(self, key: str, default: Any) -> Any:
        value = self.left.pop(key, None)
        if value is None:
            return default
        return value.lower() in ("true", "1", "yes") if isinstance(default, bool) else type(default)(value)

    def finish(self) -> None:
        if self.left:
            raise ValueError(f"optim {self.name!r} has no option {', '.join(sorted(self.left))} (from optim_args)")


def _groups(labels: Callable[[str], str], **transforms: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.partition(transforms, lambda tree: unflatten({name: labels(name) for name in flatten(tree)}))


def make_optimizer(
    name: str,
    learning_rate: Rate,
    model: Any,
    *,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    warmup_steps: int = 0,
    optim_args: str | None = None,
    optim_target_modules: str | Sequence[str] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of HF's TrainingArguments with these fields, and besides HF's names `adamw`, `lion` and `muon`.

    learning_rate: a number or a schedule over steps. Decay leaves out biases and norms, and is torch's: in sgd, adagrad and rmsprop it
    joins the gradient, elsewhere it is decoupled and multiplied by the rate. model: names of parameters and the kinds of their modules are
    read from it. In a scanned model every layer of a stack is a tensor of its own. `lomo` is plain SGD: a jitted step
    updates each parameter as its gradient comes, which is the fusion that LOMO makes by hooks; `layerwise` names mean the same.
    `schedule_free_*`: parameters are those to take gradients at; evaluate optax.contrib.schedule_free_eval_params(opt_state, params).
    muon: matrices, embeddings and head apart; the rest has AdamW with the same rate. ValueError names what is unknown."""
    if name in REFUSED:
        raise ValueError(f"optim {name!r}: {REFUSED[name]}")
    if name not in CANONICAL:
        raise ValueError(f"optim {name!r} is not known; known are {', '.join(sorted(CANONICAL))}")
    kind, option = CANONICAL[name], _Options(name, parse_optim_args(optim_args))
    mask, types = decay_mask(model), module_types(model)
    decay = optax.add_decayed_weights(option("weight_decay", float(weight_decay)), mask)
    adam = optax.scale_by_adam(adam_beta1, adam_beta2, adam_epsilon)
    lion = optax.scale_by_lion(adam_beta1, adam_beta2)
    factored = optax.chain(optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    is_embedding = lambda name: any(name.endswith(n) for n, t in types.items() if issubclass(t, Embedding))
    down = optax.scale_by_learning_rate(learning_rate)

    def low_rank(full: optax.GradientTransformation) -> optax.GradientTransformation:
        if optim_target_modules is None:
            raise ValueError(f"optim {name!r} needs optim_target_modules, such as 'all-linear' or a list of ends of names")
        targets = target_weights(model, optim_target_modules)
        options = {"rank": option("rank", 128), "update_proj_gap": option("update_proj_gap", 200)}
        low = galore(full, **options, scale=option("scale", 0.25), proj_type=option("proj_type", "std"))
        return per_layer(_groups(lambda name: "low" if name in targets else "full", low=low, full=full), in_turn=True)

    match kind:
        case "adamw":
            made = optax.chain(adam, decay, down)
        case "adamw_8bit":
            made = optax.chain(in_8_bits(adam, is_embedding), decay, down)
        case "lion":
            made = optax.chain(lion, decay, down)
        case "lion_8bit":
            made = optax.chain(in_8_bits(lion, is_embedding), decay, down)
        case "adafactor":
            made = optax.chain(per_layer(factored), decay, down)
        case "sgd":
            momentum = option("momentum", 0.0)
            nesterov = option("nesterov", False)
            made = optax.chain(decay, optax.trace(momentum, nesterov) if momentum else optax.identity(), down)
        case "adagrad":
            made = optax.chain(decay, optax.scale_by_rss(0.0, option("eps", 1e-10) ** 2), down)
        case "rmsprop":
            alpha, eps, momentum = option("alpha", 0.99), option("eps", 1e-8), option("momentum", 0.0)
            scale = optax.scale_by_stddev if option("centered", False) else optax.scale_by_rms
            rms = scale(alpha, eps, eps_in_sqrt=False)
            made = optax.chain(decay, rms, optax.trace(momentum) if momentum else optax.identity(), down)
        case "lomo":
            made = optax.chain(decay, down)
        case "muon":
            hidden = {name for name, t in types.items() if issubclass(t, Linear) and name.endswith(".weight") and "head" not in name}
            inner = _groups(lambda name: "muon" if name in hidden else "rest", muon=scale_by_muon(option("momentum", 0.95)), rest=adam)
            made = optax.chain(per_layer(inner), decay, down)
        case "galore_adamw":
            made = optax.chain(low_rank(adam), decay, down)
        case "galore_adamw_8bit":
            made = optax.chain(low_rank(in_8_bits(adam, is_embedding)), decay, down)
        case "galore_adafactor":
            made = optax.chain(low_rank(factored), decay, down)
        case "schedule_free_adamw" | "schedule_free_sgd":
            made = _schedule_free(kind, learning_rate, warmup_steps, adam_beta1, adam_beta2, adam_epsilon, decay, option)
    option.finish()
    return made


def _schedule_free(
    kind: str, rate: Rate, warmup: int, b1: float, b2: float, eps: float, decay: optax.GradientTransformation, option: _Options
) -> optax.GradientTransformation:
    """(arXiv:2405.15682) Its own warm-up and no schedule; the average weighs the steps by a power of the largest rate so far."""
    if callable(rate):
        raise ValueError("schedule_free optimizers take a constant learning rate (lr_scheduler_type='constant') and warmup_steps")
    at = lambda number: rate * jnp.minimum(1, number / max(1, warmup))  # of the number-th step, from 1
    second = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    base = [second] if kind == "schedule_free_adamw" else []
    inner = optax.chain(*base, decay, optax.scale_by_learning_rate(lambda count: at(count + 1)))
    return contrib.schedule_free(inner, at, b1=b1, weight_lr_power=option("weight_lr_power", 2.0))
