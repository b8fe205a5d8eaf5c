"""Mamba (arXiv:2312.00752): blocks without attention, a short convolution and a recurrence whose steps depend on the input.

Axis letters: B batch, T tokens, D hidden, E channels, N state size, R time step rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import Cache, RecurrentSpec
from jaxmodels.config import Config
from jaxmodels.convert.rules import Alias, Op, Split
from jaxmodels.family import Family, tied_head
from jaxmodels.layers import CausalConv, Embedding, Layers, Linear, RMSNorm, Step, activation, parameter, uniform
from jaxmodels.model import CausalLM, Model
from jaxmodels.ops.linear import linear
from jaxmodels.ops.ssm import selective_scan
from jaxmodels.outputs import BaseModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(Config):
    model_type: ClassVar[str] = "mamba"

    vocab_size: int = 50280
    hidden_size: int = 768
    state_size: int = 16
    num_hidden_layers: int = 32
    layer_norm_epsilon: float = 1e-5
    expand: int | float = 2
    intermediate_size: int = None  # type: ignore[assignment]  # expand * hidden_size; what is given counts, as in HF
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_rank: int | str = "auto"  # hidden_size / 16, rounded up
    time_step_scale: float = 1.0
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_init_scheme: str = "random"
    rescale_prenorm_residual: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0

    def __post_init__(self) -> None:
        if self.time_step_rank == "auto":
            object.__setattr__(self, "time_step_rank", math.ceil(self.hidden_size / 16))
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", int(self.expand * self.hidden_size))

    @property
    def channels(self) -> int:
        return self.intermediate_size

    @property
    def head_dim(self) -> int:
        """Channels do not mix in the recurrence: each is a head of its own."""
        return 1

    @property
    def residual_std(self) -> float:
        """Of the initial weights that end in the residual stream: as torch's own of a linear layer, or smaller the deeper the model."""
        return (3 * self.channels * (self.num_hidden_layers if self.rescale_prenorm_residual else 1)) ** -0.5

    def layer_spec(self, kind: Hashable) -> RecurrentSpec:
        return mixer_spec(self.channels, self.state_size, self.conv_kernel)


def mixer_spec(channels: int, state_size: int, kernel: int) -> RecurrentSpec:
    """What a MambaMixer of these sizes remembers."""
    return RecurrentSpec(windows=((kernel - 1, channels, "act_mlp"),), state=((state_size, None), (channels, "act_mlp")))


class TimeSteps(nn.Module):
    """softplus(x weight' + bias) [B,T,E] float32: `weight` [E,R] and `bias` [E]. At first the bias alone gives steps whose logarithms lie
    evenly between `lowest` and `highest`."""

    features: int
    lowest: float = 0.001
    highest: float = 0.1
    floor: float = 1e-4
    scale: float = 1.0
    random: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        R = x.shape[-1]
        std = self.scale * R**-0.5
        weight = parameter(
            self, "weight", uniform(std) if self.random else nn.initializers.constant(std), ("mlp", None), (self.features, R)
        )
        bias = parameter(self, "bias", partial(even_steps, self.lowest, self.highest, self.floor), ("mlp",), (self.features,))
        return jax.nn.softplus(linear(x.astype(jnp.float32), weight, bias))


def even_steps(lowest: float, highest: float, floor: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An initialiser: what softplus makes steps of, at random between `lowest` and `highest` on a logarithmic scale."""
    steps = jnp.exp(jax.random.uniform(key, shape, minval=math.log(lowest), maxval=math.log(highest)))
    steps = jnp.maximum(steps, floor)
    return steps + jnp.log(-jnp.expm1(-steps))


class MambaMixer(nn.Module):
    channels: int
    state_size: int
    rank: int
    kernel: int
    hidden_act: str = "silu"
    use_bias: bool = False
    use_conv_bias: bool = True
    init_std: float = 0.02
    residual_std: float = 0.02
    time_steps: Any = TimeSteps

    def normalize(self, dt: jax.Array, B: jax.Array, C: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What a family does to the low-rank steps [B,T,R] and to B and C [B,T,N]."""
        return dt, B, C

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple[jax.Array, Any]:
        E, N, R = self.channels, self.state_size, self.rank
        dense = partial(Linear, init_std=self.init_std)
        (window,), h = ((None,), None) if state is None else state.read(step)
        hidden = dense(E, ("mlp", "embed"), self.use_bias, name="hidden_proj")(x)
        gate = dense(E, ("mlp", "embed"), self.use_bias, name="gate_proj")(x)
        hidden = step.constrain(hidden, "batch", "seq", "act_mlp")
        hidden, window = CausalConv(self.kernel, self.use_conv_bias, name="conv1d")(hidden, window, step)
        hidden = activation(self.hidden_act)(hidden)
        dt, B, C = jnp.split(dense(R + 2 * N, (None, "mlp"), name="x_proj")(hidden), (R, R + N), -1)
        dt, B, C = self.normalize(dt, B, C)
        dt = self.time_steps(E, name="dt_proj")(dt)
        rates = lambda key, shape: jnp.broadcast_to(jnp.log(jnp.arange(1.0, N + 1)), shape)
        A = -jnp.exp(parameter(self, "A_log", rates, ("mlp", None), (E, N)).astype(jnp.float32))
        skip = parameter(self, "D", nn.initializers.ones, ("mlp",), (E,)).astype(jnp.float32)
        y, h = selective_scan(hidden, dt, A, B, C, h, step.positions >= 0)
        y = (y + skip * hidden) * jax.nn.silu(gate.astype(jnp.float32))
        out = Linear(x.shape[-1], ("embed", "mlp"), self.use_bias, self.residual_std, name="out_proj")(y.astype(x.dtype))
        return out, None if state is None else state.write((window,), h, step)


class MambaBlock(nn.Module):
    config: Any
    mixer: ClassVar[type[MambaMixer]] = MambaMixer

    def make_mixer(self, **more: Any) -> nn.Module:
        c = self.config
        steps = partial(
            TimeSteps,
            lowest=c.time_step_min,
            highest=c.time_step_max,
            floor=c.time_step_floor,
            scale=c.time_step_scale,
            random=c.time_step_init_scheme == "random",
        )
        sizes = (c.channels, c.state_size, c.time_step_rank, c.conv_kernel, c.hidden_act, c.use_bias, c.use_conv_bias)
        return self.mixer(*sizes, c.initializer_range, c.residual_std, steps, name="mixer", **more)

    @nn.compact
    def __call__(self, x: jax.Array, state: Any, step: Step) -> tuple:
        x = step.constrain(x, "batch", "seq", "act_embed")
        h = RMSNorm(self.config.layer_norm_epsilon, name="norm")(x.astype(step.dtype))
        h, state = self.make_mixer()(h, state, step)
        return x + h, state, None


class MambaModel(Model):
    """Without attention: `position_ids` and `output_attentions` have no effect, as in HF."""

    block: ClassVar[type[nn.Module]] = MambaBlock

    def setup(self) -> None:
        c = self.config
        self.embeddings = Embedding(c.vocab_size, c.hidden_size, c.initializer_range)
        self.layers = Layers(self.block, c, self.scan_layers, self.remat)
        self.norm_f = RMSNorm(c.layer_norm_epsilon)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BaseModelOutput:
        """hidden_states are, as in HF, the layers' outputs and the last one normed, without the embeddings."""
        step, cache = self.start(input_ids, attention_mask, inputs_embeds, cache, output_hidden_states, False)
        x = self.embeddings(input_ids, self.dtype) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        if self.config.residual_in_fp32:
            x = x.astype(jnp.float32)
        last, states, inputs, _ = self.layers(x, None if cache is None else cache.layers, step)
        x = self.norm_f(last)
        return BaseModelOutput(
            last_hidden_state=x,
            cache=None if cache is None else cache.replace(layers=states),
            hidden_states=(*inputs[1:], last, x) if output_hidden_states else None,
        )


class MambaForCausalLM(CausalLM):
    base = MambaModel
    base_name = "backbone"

    def head(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        return self.backbone.embeddings.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)


def rules(config: MambaConfig) -> tuple[Op, ...]:
    mixer = "backbone.layers.*.mixer"
    return (
        Alias("backbone.embeddings.weight", ("backbone.embedding.weight",)),
        Split(f"{mixer}.in_proj.*", (f"{mixer}.hidden_proj.*", f"{mixer}.gate_proj.*"), (config.channels,) * 2),
        *tied_head(config, embeddings="backbone.embeddings.weight"),
    )


FAMILY = Family(config=MambaConfig, classes={"AutoModel": MambaModel, "AutoModelForCausalLM": MambaForCausalLM}, rules=rules)
