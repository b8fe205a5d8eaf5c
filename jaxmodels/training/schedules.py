"""Learning-rate schedules by HF's `lr_scheduler_type` names: `step -> rate`, for optax, with the values of HF's functions at every step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Schedule = Callable[[Any], jax.Array]
Factor = Callable[[jax.Array], jax.Array]  # step -> the share of the peak rate


def _warmed(warmup: int, factor: Factor) -> Factor:
    """From 0 to 1 over `warmup` steps, then `factor(step)`."""
    return lambda step: jnp.where(step < warmup, step / max(1, warmup), factor(step))


def _progress(step: jax.Array, warmup: int, total: int) -> jax.Array:
    return (step - warmup) / max(1, total - warmup)


def _cosine_curve(progress: jax.Array, num_cycles: float, floor: float) -> jax.Array:
    curve = 0.5 * (1 + jnp.cos(2 * math.pi * num_cycles * progress))
    return jnp.maximum(0, curve * (1 - floor) + floor)


def _linear(peak: float, warmup: int, total: int) -> Factor:
    return _warmed(warmup, lambda step: jnp.maximum(0, (total - step) / max(1, total - warmup)))


def _cosine(peak: float, warmup: int, total: int, *, num_cycles: float = 0.5) -> Factor:
    return _warmed(warmup, lambda step: _cosine_curve(_progress(step, warmup, total), num_cycles, 0))


def _restarts(peak: float, warmup: int, total: int, *, num_cycles: int = 1) -> Factor:
    def factor(step: jax.Array) -> jax.Array:
        progress = _progress(step, warmup, total)
        return jnp.where(progress >= 1, 0, 0.5 * (1 + jnp.cos(math.pi * (num_cycles * progress % 1))))

    return _warmed(warmup, factor)


def _polynomial(peak: float, warmup: int, total: int, *, lr_end: float = 1e-7, power: float = 1.0) -> Factor:
    if not peak > lr_end:
        raise ValueError(f"lr_end {lr_end} must be below the learning rate {peak}")

    def factor(step: jax.Array) -> jax.Array:
        left = jnp.maximum(0, 1 - _progress(step, warmup, total))
        return ((peak - lr_end) * left**power + lr_end) / peak

    return _warmed(warmup, factor)


def _inverse_sqrt(peak: float, warmup: int, total: int | None, *, timescale: int | None = None) -> Factor:
    scale = timescale or warmup or 10_000
    return _warmed(warmup, lambda step: jax.lax.rsqrt((step + scale - warmup) / scale))


def _floor(peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(f"exactly one of min_lr and min_lr_rate is needed; found min_lr={min_lr}, min_lr_rate={min_lr_rate}")
    return min_lr_rate if min_lr is None else min_lr / peak  # type: ignore[return-value]


def _cosine_min(
    peak: float, warmup: int, total: int, *, num_cycles: float = 0.5, min_lr: float | None = None, min_lr_rate: float | None = None
) -> Factor:
    floor = _floor(peak, min_lr, min_lr_rate)
    return _warmed(warmup, lambda step: _cosine_curve(_progress(step, warmup, total), num_cycles, floor))


def _cosine_warmup_min(
    peak: float,
    warmup: int,
    total: int,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Factor:
    """Its steps count from 1, and the warm-up begins at `warmup_lr_rate`."""
    floor, first = _floor(peak, min_lr, min_lr_rate), warmup_lr_rate

    def factor(step: jax.Array) -> jax.Array:
        rising = (step + 1) / max(1, warmup) if first is None else first + (1 - first) * step / max(1, warmup - 1)
        return jnp.where(step < warmup, rising, _cosine_curve(_progress(step + 1, warmup, total), num_cycles, floor))

    return factor


def _stable(
    peak: float,
    warmup: int,
    total: int | None,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Factor:
    """Warm-up, constant, decay (arXiv:2404.06395). Without num_stable_steps the constant part is what total leaves."""
    rising = {"linear": lambda p: p, "cosine": lambda p: 0.5 * (1 - jnp.cos(math.pi * p)), "1-sqrt": lambda p: 1 - jnp.sqrt(1 - p)}
    falling = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + jnp.cos(2 * math.pi * num_cycles * p)),
        "1-sqrt": lambda p: 1 - jnp.sqrt(p),
    }
    if warmup_type not in rising or decay_type not in falling:
        raise ValueError(f"warmup_type {warmup_type!r} and decay_type {decay_type!r} must be among {', '.join(rising)}")
    if num_stable_steps is None:
        if total is None:
            raise ValueError("warmup_stable_decay needs num_training_steps or num_stable_steps")
        num_stable_steps = total - warmup - num_decay_steps
    begin = warmup + num_stable_steps
    floored = lambda x: jnp.maximum(0, x * (1 - min_lr_ratio) + min_lr_ratio)

    def factor(step: jax.Array) -> jax.Array:
        up = floored(rising[warmup_type](jnp.clip(step / max(1, warmup), 0, 1)))
        down = floored(falling[decay_type](jnp.clip((step - begin) / max(1, num_decay_steps), 0, 1)))
        down = jnp.where(step < begin + num_decay_steps, down, min_lr_ratio)
        return jnp.where(step < warmup, up, jnp.where(step < begin, 1.0, down))

    return factor


SCHEDULES: Mapping[str, Callable[..., Factor]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "constant": lambda peak, warmup, total: jnp.ones_like,
    "constant_with_warmup": lambda peak, warmup, total: _warmed(warmup, jnp.ones_like),
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_min,
    "cosine_warmup_with_min_lr": _cosine_warmup_min,
    "warmup_stable_decay": _stable,
}
UNTIMED = ("constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay")  # need no number of steps
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def make_schedule(
    name: str, learning_rate: float, *, num_warmup_steps: int = 0, num_training_steps: int | None = None, **lr_scheduler_kwargs: Any
) -> Schedule:
    """The schedule that HF's `get_scheduler` makes for an optimizer of that learning rate: step [] -> rate [] float32.

    lr_scheduler_kwargs: HF's of that schedule, such as num_cycles, min_lr_rate, num_decay_steps. ValueError on an unknown name or option,
    and where num_training_steps is needed and missing."""
    if name in BY_METRIC:
        raise ValueError(f"lr_scheduler_type {name!r} follows a metric, which a jitted step does not have; choose a schedule over steps")
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler_type {name!r} is not known; known are {', '.join(SCHEDULES)}")
    if num_training_steps is None and name not in UNTIMED:
        raise ValueError(f"lr_scheduler_type {name!r} needs num_training_steps")
    known = {p.name: p for p in inspect.signature(SCHEDULES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(set(lr_scheduler_kwargs) - set(known))
    if unknown:
        raise ValueError(f"lr_scheduler_type {name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in lr_scheduler_kwargs]
    if missing:
        raise ValueError(f"lr_scheduler_type {name!r} needs {', '.join(missing)} in lr_scheduler_kwargs")
    factor = SCHEDULES[name](learning_rate, num_warmup_steps, num_training_steps, **lr_scheduler_kwargs)
    return lambda step: learning_rate * factor(jnp.asarray(step, jnp.float32))
