"""Mamba-2 (arXiv:2405.21060): heads of channels that share one decay, B and C of groups of heads, and a gated norm after the recurrence.

Axis letters: B batch, T tokens, D hidden, E channels, H heads, P head dim, G groups, N state size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import RecurrentSpec
from jaxmodels.config import Config
from jaxmodels.convert.rules import Alias, Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import CausalConv, Linear, RMSNorm, Step, activation, parameter
from jaxmodels.models.mamba import MambaForCausalLM, MambaModel, even_steps
from jaxmodels.ops.norm import rms_norm
from jaxmodels.ops.ssm import CHUNK, ssd


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(Config):
    model_type: ClassVar[str] = "mamba2"

    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    num_heads: int = 128
    head_dim: int = 64
    n_groups: int = 8
    layer_norm_epsilon: float = 1e-5
    expand: int | float = 2
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, ...] = (0.0, math.inf)
    rescale_prenorm_residual: bool = False
    chunk_size: int = 256
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        if self.channels != int(self.expand * self.hidden_size):
            raise ValueError(
                f"num_heads {self.num_heads} times head_dim {self.head_dim} is {self.channels}; expand {self.expand} times hidden_size "
                f"{self.hidden_size} is {self.expand * self.hidden_size}: the two must be equal"
            )

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def residual_std(self) -> float:
        """Of the initial weights that end in the residual stream: as torch's own of a linear layer, or smaller the deeper the model."""
        return (3 * self.channels * (self.num_hidden_layers if self.rescale_prenorm_residual else 1)) ** -0.5

    def layer_spec(self, kind: Hashable) -> RecurrentSpec:
        W, groups = self.conv_kernel - 1, 2 * self.n_groups * self.state_size
        return RecurrentSpec(
            windows=((W, self.channels, "act_mlp"), (W, groups, None)),
            state=((self.num_heads, "act_heads"), (self.head_dim, None), (self.state_size, None)),
        )


class GatedRMSNorm(nn.Module):
    """The RMS norm of x * silu(gate), each of `groups` parts of the last axis by itself, times `weight`; float32."""

    eps: float
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, ("heads",), x.shape[-1:])
        parts = (self.groups, x.shape[-1] // self.groups)
        x = x.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        return rms_norm(x.reshape(*x.shape[:-1], *parts), weight.reshape(parts), self.eps).reshape(x.shape)


class Mamba2Mixer(nn.Module):
    config: Mamba2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple[jax.Array, Any]:
        c = self.config
        (B, T, D), E, H, P, G, N = x.shape, c.channels, c.num_heads, c.head_dim, c.n_groups, c.state_size
        windows, h = ((None, None), None) if state is None else state.read(step)
        dense = partial(Linear, use_bias=c.use_bias, init_std=c.initializer_range)
        conv = partial(CausalConv, c.conv_kernel, c.use_conv_bias)
        gate = dense(E, ("heads", "embed"), name="gate_proj")(x)
        hidden = step.constrain(dense(E, ("heads", "embed"), name="hidden_proj")(x), "batch", "seq", "act_mlp")
        hidden, window = conv("heads", name="hidden_conv")(hidden, windows[0], step)
        groups, other = conv(None, name="group_conv")(dense(2 * G * N, (None, "embed"), name="group_proj")(x), windows[1], step)
        hidden, groups = activation(c.hidden_act)(hidden), activation(c.hidden_act)(groups)
        dt = dense(H, (None, "embed"), name="dt_proj")(x)
        bias = parameter(self, "dt_bias", partial(even_steps, c.time_step_min, c.time_step_max, c.time_step_floor), (None,), (H,))
        dt = jnp.clip(jax.nn.softplus(dt.astype(jnp.float32) + bias.astype(jnp.float32)), *c.time_step_limit)
        A = -jnp.exp(parameter(self, "A_log", lambda key, shape: jnp.log(jnp.arange(1.0, H + 1)), (None,), (H,)).astype(jnp.float32))
        skip = parameter(self, "D", nn.initializers.ones, (None,), (H,)).astype(jnp.float32)
        hidden = hidden.reshape(B, T, H, P)
        b, c_ = jnp.split(groups.reshape(B, T, 2 * G, N), 2, 2)
        y, h = ssd(hidden, dt, A, b, c_, h, step.positions >= 0, chunk=min(c.chunk_size, CHUNK))
        y = GatedRMSNorm(c.layer_norm_epsilon, G, name="norm")((y + skip[:, None] * hidden).reshape(B, T, E), gate)
        out = Linear(D, ("embed", "heads"), c.use_bias, c.residual_std, name="out_proj")(y.astype(x.dtype))
        return out, None if state is None else state.write((window, other), h, step)


class Mamba2Block(nn.Module):
    config: Mamba2Config

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        x = step.constrain(x, "batch", "seq", "act_embed")
        h = RMSNorm(self.config.layer_norm_epsilon, name="norm")(x.astype(step.dtype))
        h, state = Mamba2Mixer(self.config, name="mixer")(h, state, step)
        return x + h, state, None


class Mamba2Model(MambaModel):
    block = Mamba2Block


class Mamba2ForCausalLM(MambaForCausalLM):
    base = Mamba2Model


def rules(config: Mamba2Config) -> tuple[Op, ...]:
    """The file has all projections of the input in one, and one convolution."""
    mixer = "backbone.layers.*.mixer"
    E, groups = config.channels, 2 * config.n_groups * config.state_size
    parts = tuple(f"{mixer}.{name}_proj.*" for name in ("gate", "hidden", "group", "dt"))
    return (
        Alias("backbone.embeddings.weight", ("backbone.embedding.weight",)),
        Split(f"{mixer}.in_proj.*", parts, (E, E, groups, config.num_heads)),
        Split(f"{mixer}.conv1d.*", (f"{mixer}.hidden_conv.*", f"{mixer}.group_conv.*"), (E, groups)),
        *tied_head(config, embeddings="backbone.embeddings.weight"),
    )


FAMILY = Family(config=Mamba2Config, classes={"AutoModel": Mamba2Model, "AutoModelForCausalLM": Mamba2ForCausalLM}, rules=rules)
