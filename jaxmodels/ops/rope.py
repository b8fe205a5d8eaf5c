"""Rotary position embeddings (arXiv:2104.09864) with the scalings of HF's `rope_parameters`.

Axis letters: B batch, T tokens, N heads, H head dim, R rotated dim (even, at most H)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
POSITIVE = ("rope_theta", "factor", "max_position_embeddings", "original_max_position_embeddings")
ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")  # types that need original_max_position_embeddings


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """HF's `rope_parameters`, hashable. Lengths are in tokens; `other` holds keys that rope does not read, kept for saving."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    short_mscale: float | None = None  # Phi-3.5-MoE's own factors on cos and sin, within the original length and beyond
    long_mscale: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    other: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **defaults: Any) -> RopeParameters:
        """From config.json's `rope_parameters` or `rope_scaling`; `defaults` fill what it leaves out. ValueError names what is missing."""
        values = {**defaults, **{k: v for k, v in values.items() if v is not None}}
        kind = values.setdefault("rope_type", values.pop("type", "default"))
        values.pop("type", None)
        if kind not in TYPES:
            raise ValueError(f"rope_type {kind!r} in the config is not supported; supported are {', '.join(TYPES)}")
        grown = "factor" if values.get("original_max_position_embeddings") is None else "max_position_embeddings"  # yarn's is one of both
        if kind in ORIGINAL_LENGTH:
            values.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        needs = {
            "linear": ("factor",),
            "dynamic": ("factor", "max_position_embeddings"),
            "yarn": (grown, "original_max_position_embeddings"),
            "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        }
        missing = [name for name in needs.get(kind, ()) if values.get(name) is None]
        if missing:
            raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)} in rope_parameters (found {', '.join(sorted(values))})")
        if kind in ("default", "linear", "llama3"):
            values.pop("max_position_embeddings", None)  # not theirs: it would make equal configs differ
        known = {f.name for f in dataclasses.fields(cls)} - {"other"}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name in known - {"rope_type"} & values.keys():
            found, many = values[name], name in ("short_factor", "long_factor")
            if not all(isinstance(x, int | float) for x in (found if isinstance(found, tuple) and many else (found,))):
                raise ValueError(f"{name} in rope_parameters is {found!r}; expected {'a list of numbers' if many else 'a number'}")
            if name in POSITIVE and not found > 0:  # nan as well
                raise ValueError(f"{name} in the config's rope_parameters is {found!r}; expected a number above 0")
        return cls(
            **{k: v for k, v in values.items() if k in known},
            other=tuple((k, v) for k, v in values.items() if k not in known),
        )

    def to_dict(self) -> dict[str, Any]:
        """The `rope_parameters` spelling, without what is unset."""
        skip = {"other", "max_position_embeddings"}
        plain = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self) if f.name not in skip}
        keep = {k: v for k, (v, default) in plain.items() if v != default or k in ("rope_type", "rope_theta")}
        return {**{k: list(v) if isinstance(v, tuple) else v for k, v in keep.items()}, **dict(self.other)}

    @property
    def length_dependent(self) -> bool:
        """Whether the frequencies of a row depend on that row's length, so that keys are cached unrotated."""
        return self.rope_type in ("dynamic", "longrope")

    def dim(self, head_dim: int) -> int:
        return int(head_dim * self.partial_rotary_factor)


def inverse_frequencies(rope: RopeParameters, head_dim: int, lengths: jax.Array | None = None) -> tuple[jax.Array, float]:
    """Radians per token, [R/2] float32 ([B, R/2] for the length-dependent types, from `lengths` [B]), and the factor on cos and sin."""
    R = rope.dim(head_dim)
    if R % 2:
        raise ValueError(f"rope turns pairs: head_dim {head_dim} with partial_rotary_factor {rope.partial_rotary_factor} has {R} to turn")
    exponent = np.arange(0, R, 2, dtype=np.float32) / np.float32(R)
    powers = (np.float64(np.float32(rope.rope_theta)) ** exponent).astype(np.float32)  # rounded once: numpy's float32 power is 2 ulp off
    plain = np.float32(1) / powers
    original = rope.original_max_position_embeddings
    if rope.rope_type == "default":
        return jnp.asarray(plain), 1.0
    if rope.rope_type == "linear":
        return jnp.asarray(plain / np.float32(rope.factor)), 1.0
    if rope.rope_type == "dynamic":  # NTK-aware: the base grows with the length
        limit, factor = rope.max_position_embeddings, rope.factor
        assert lengths is not None and limit is not None and factor is not None
        length = jnp.maximum(lengths, limit).astype(jnp.float32)[:, None]
        base = rope.rope_theta * (factor * length / limit - (factor - 1)) ** (R / (R - 2))
        return 1.0 / base**exponent, 1.0
    if rope.rope_type == "longrope":  # arXiv:2402.13753
        assert lengths is not None and original is not None
        for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
            if len(factors or ()) != len(powers):
                raise ValueError(f"{name} in rope_parameters has {len(factors or ())} numbers; expected {len(powers)}, half of {R} rotated")
        short, long = (np.float32(1) / (np.asarray(f, np.float32) * powers) for f in (rope.short_factor, rope.long_factor))
        factor = rope.factor or (rope.max_position_embeddings or original) / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return jnp.where(lengths[:, None] > original, long, short), rope.attention_factor or scale
    if rope.rope_type == "yarn":  # arXiv:2309.00071
        return _yarn(rope, R, powers)
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and original
    wavelength = np.float32(2 * np.pi) * (1 / plain)  # torch divides a number by a tensor through the reciprocal
    smooth = (np.float32(original) * (1 / wavelength) - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)  # 0: long waves, slowed by `factor`; 1: short waves, kept
    return jnp.asarray(((1 - smooth) * plain / rope.factor + smooth * plain).astype(np.float32)), 1.0


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What yarn multiplies queries and keys by where the context grows by `factor` (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(rope: RopeParameters, R: int, powers: np.ndarray) -> tuple[jax.Array, float]:
    original = rope.original_max_position_embeddings
    assert original is not None
    factor = rope.factor or (rope.max_position_embeddings or original) / original

    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = yarn_magnitude(factor, rope.mscale) / yarn_magnitude(factor, rope.mscale_all_dim)
    elif scale is None:
        scale = yarn_magnitude(factor)

    def dim_of(rotations: float) -> float:  # the dimension that turns `rotations` times over the original length
        return R * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dim_of(rope.beta_fast or 32), dim_of(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    span = high - low if high != low else 0.001
    kept = 1 - np.clip((np.arange(R // 2, dtype=np.float32) - low) / span, 0, 1)  # 0: slowed by `factor`
    return jnp.asarray((1 / (factor * powers) * (1 - kept) + 1 / powers * kept).astype(np.float32)), scale


def rope_table(frequencies: jax.Array, scale: float, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B,T,1,R/2] in `dtype` (computed in float32) of positions [B,T], for the frequencies and scale of inverse_frequencies."""
    angles = positions.astype(jnp.float32)[..., None] * (frequencies if frequencies.ndim == 1 else frequencies[:, None])
    angles = angles[:, :, None]
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array], interleaved: bool = False) -> jax.Array:
    """x [B,T,N,H] with its first R dimensions turned: dimension i pairs with i + R/2, or 2i with 2i + 1 (`interleaved`). Computed in
    float32 and rounded once."""
    cos, sin = table
    R = 2 * cos.shape[-1]
    if x.shape[-1] < R:
        raise ValueError(f"{R} dimensions of every head are to be rotated (rotary_dim in the config), and a head has {x.shape[-1]}")
    head, rest = x[..., :R].astype(jnp.float32), x[..., R:]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else jnp.split(head, 2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = jnp.stack([a, b], -1).reshape(head.shape) if interleaved else jnp.concatenate([a, b], -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1) if rest.shape[-1] else turned.astype(x.dtype)
