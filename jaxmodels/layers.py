"""Modules that own a parameter and call an op, and the stack of layers in its two forms.
What families need of jaxmodels.step is imported from here too.

Axis letters: B batch, T new tokens, D hidden, N heads, H head dim; of a convolution C channels, K its width."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxmodels.cache import segments
from jaxmodels.ops.activation import activation
from jaxmodels.ops.dropout import dropout as drop
from jaxmodels.ops.linear import linear
from jaxmodels.ops.lora import adapted_embedding, adapted_linear
from jaxmodels.ops.norm import layer_norm, rms_norm
from jaxmodels.ops.pipeline import pipeline
from jaxmodels.ops.ssm import causal_conv
from jaxmodels.step import Packed as Packed
from jaxmodels.step import Rope as Rope
from jaxmodels.step import Source as Source
from jaxmodels.step import Step as Step
from jaxmodels.step import attend as attend
from jaxmodels.step import begin as begin
from jaxmodels.step import cross_attend as cross_attend
from jaxmodels.step import look as look
from jaxmodels.step import remember as remember


def parameter(
    module: nn.Module, name: str, init: Callable[..., jax.Array], axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> jax.Array:
    """The module's parameter of that shape, made by `init` where there is none, with a logical name for every axis."""
    if not module.has_variable("params", name):
        return module.param(name, nn.with_logical_partitioning(init, axes), shape)  # type: ignore[return-value]
    # `module.param` would trace `init` again to learn the shape, a third of all tracing
    value: Any = nn.unbox(module.get_variable("params", name))
    if value.shape != shape:
        raise ValueError(f"parameter {'.'.join((*module.path, name))} has shape {value.shape}; this model expects {shape}")
    return value


def adapter_of(module: nn.Module) -> dict[str, Any]:
    """The leaves that jaxmodels.training.lora has put beside a module's own parameters."""
    return {name: leaf for name, leaf in module.variables["params"].items() if name.startswith("lora_")}


def dropout(module: nn.Module, x: jax.Array, rate: Any) -> jax.Array:
    """x with a share `rate` of its numbers set to 0 and the rest made larger by it, where the call has a key: rngs={"dropout": key}."""
    if not module.has_rng("dropout") or (isinstance(rate, int | float | None) and not rate):
        return x
    return drop(module.make_rng("dropout"), x, rate)


def drop_layer(module: nn.Module, x: jax.Array, after: jax.Array, rate: float) -> jax.Array:
    """What a layer makes of x or, in a share `rate` of the calls with a key, x itself for the whole batch (arXiv:1909.11556)."""
    if not rate or not module.has_rng("dropout"):
        return after
    return jnp.where(jax.random.bernoulli(module.make_rng("dropout"), rate), x, after)


def weight_dropout(module: nn.Module, rate: float | None) -> tuple[jax.Array, float] | None:
    """Attention's `dropout` option: a key and the rate, where the call has a key."""
    return (module.make_rng("dropout"), rate) if rate and module.has_rng("dropout") else None


class Linear(nn.Module):
    """torch.nn.Linear: `weight` [out, in] and `bias` [out], as the checkpoint stores them. `axes` name (out, in)."""

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = False
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, tied: jax.Array | None = None) -> jax.Array:
        """`tied`: the weight, where it is another module's."""
        normal, shape = nn.initializers.normal(self.init_std), (self.features, x.shape[-1])
        weight = parameter(self, "weight", normal, self.axes, shape) if tied is None else tied
        bias = parameter(self, "bias", nn.initializers.zeros, self.axes[:1], shape[:1]) if self.use_bias else None
        if not self.has_variable("params", "lora_A"):
            return linear(x, weight, bias)
        adapter = adapter_of(self)
        rate = adapter.get("lora_dropout")
        return adapted_linear(x, weight, bias, adapter, None if rate is None else partial(dropout, self, rate=rate))


class RMSNorm(nn.Module):
    """x over its root mean square along the last axis, times `weight` (arXiv:1910.07467)."""

    eps: float
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, parameter(self, "weight", nn.initializers.ones, (self.axis,), x.shape[-1:]), self.eps)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last axis."""

    eps: float = 1e-5
    use_weight: bool = True
    use_bias: bool = True
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = parameter(self, "weight", nn.initializers.ones, (self.axis,), x.shape[-1:]) if self.use_weight else None
        bias = parameter(self, "bias", nn.initializers.zeros, (self.axis,), x.shape[-1:]) if self.use_bias else None
        return layer_norm(x, weight, bias, self.eps)


class HeadNorm(nn.Module):
    """A layer norm of every head of [..., N, H], with weights [N, H] of its own and no biases."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, parameter(self, "weight", nn.initializers.ones, (None, None), x.shape[-2:]), None, self.eps)


class CausalConv(nn.Module):
    """torch.nn.Conv1d with a kernel per channel, over a row's own tokens: `weight` [C,1,K] and `bias` [C]."""

    width: int
    use_bias: bool = True
    axis: str | None = "mlp"

    @nn.compact
    def __call__(self, x: jax.Array, window: jax.Array | None, step: Step) -> tuple[jax.Array, jax.Array]:
        """x [B,T,C] and the inputs before it [B,K-1,C] -> the output [B,T,C], 0 at padding, and the inputs before the next token."""
        C, K = x.shape[-1], self.width
        weight = parameter(self, "weight", uniform(K**-0.5), (self.axis, None, None), (C, 1, K))
        bias = parameter(self, "bias", nn.initializers.zeros, (self.axis,), (C,)) if self.use_bias else None
        return causal_conv(x, weight[:, 0], bias, window, step.positions >= 0)


def uniform(bound: float) -> Callable[..., jax.Array]:
    """An initialiser: between -bound and bound."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Embedding(nn.Module):
    """torch.nn.Embedding: `weight` [num, features]. An id out of range gives nan, not a neighbour's row."""

    num: int
    features: int
    init_std: float = 0.02
    axis: str | None = "vocab"

    def setup(self) -> None:
        normal = nn.initializers.normal(self.init_std)
        self.weight = parameter(self, "weight", normal, (self.axis, "embed"), (self.num, self.features))

    def __call__(self, ids: Any, dtype: Any) -> jax.Array:
        x = jnp.asarray(self.weight).at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(dtype)
        return adapted_embedding(x, ids, adapter_of(self)) if self.has_variable("params", "lora_embedding_A") else x

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits [..., num] of x [..., features] against the rows: the tied head."""
        return linear(x, self.weight)


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)) [B,T,D], `features` wide inside, without biases (arXiv:2002.05202)."""

    features: int
    hidden_act: str
    init_std: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        gate = Linear(self.features, ("mlp", "embed"), init_std=self.init_std, name="gate_proj")(x)
        up = Linear(self.features, ("mlp", "embed"), init_std=self.init_std, name="up_proj")(x)
        h = step.constrain(activation(self.hidden_act)(gate) * up, "batch", "seq", "act_mlp")
        return Linear(x.shape[-1], ("embed", "mlp"), init_std=self.init_std, name="down_proj")(h)


def remat_policy(name: str) -> Any:
    """A `jax.checkpoint` policy by its name in jax.checkpoint_policies; `full` recomputes everything."""
    names = {"full": "nothing_saveable"} | {
        n: n for n in ("nothing_saveable", "everything_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
    }
    if name not in names:
        raise ValueError(f"remat policy {name!r} is not known; known are {', '.join(names)}")
    return getattr(jax.checkpoint_policies, names[name])


class Layers(nn.Module):
    """The stack: `block(config)`, or `block(config, kind=kind)` where config.layer_kinds names kinds, once per layer.

    A block is called `(x [B,T,D], state, step) -> (x, state, attention weights or None)`, the last perhaps in a tuple with what else a
    family's layers report, None where not asked for. Unrolled, layer i owns the parameters
    `i`. Scanned, each segment of repeating kinds is one loop, and layers start, start+period, … below stop share the
    parameters `start:stop:period` with a leading [layers] axis; the states ride in the loop's carry. Where the rules have stages, each
    segment whose repeats they divide is a pipeline (jaxmodels.ops.pipeline); the longest must be one, the others see all rows as usual."""

    block: Any
    config: Any
    scan: bool = False
    remat: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, states: tuple | None, step: Step) -> tuple[jax.Array, tuple | None, list, list]:
        """Returns x after the last layer, the states, every layer's input and attention weights (None where not asked for)."""
        kinds = self.config.layer_kinds
        plan = segments(kinds) if self.scan else [(i, 1, 1) for i in range(len(kinds))]
        stages = 1 if step.rules is None or self.is_initializing() else step.rules.stage_count
        if stages > 1:
            self._check_stages(plan, stages, states, step.early_exit is not None)
        inputs: list[Any] = []
        weights: list[Any] = []
        left: list[Any] = list(states or ())
        done: list[Any] = []
        stop = len(kinds) if step.early_exit is None else step.early_exit
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        # functions of this call alone: a trace depends on more than its arguments and must not find another's
        init, layer = (lambda *args: _init(*args)), (lambda *args: _layer(*args))
        if self.remat:
            layer = jax.checkpoint(layer, policy=remat_policy(self.remat), static_argnums=0)
        if isinstance(x, jax.core.Tracer):  # equal blocks are traced and lowered once
            init, layer = jax.jit(init, static_argnums=0), jax.jit(layer, static_argnums=0)
        for start, period, repeats in plan:
            if start >= stop:
                break
            mine = None if states is None else tuple(left.pop(0) for _ in range(period))
            if repeats == 1:
                inputs.append(x)
                state = None if mine is None else mine[0]
                block = self._make(kinds[start])
                params = self._params(str(start), partial(init, block, x, step))
                x, state, w = layer(block, params, x, state, step.replace(number=start), key)
                weights.append(w)
                mine = (state,)
            else:
                runs = min(repeats, -(-(stop - start) // period))
                staged = stages > 1 and repeats % stages == 0
                x, mine, ins, ws = self._scan(x, mine, step, key, start, period, repeats, runs, staged)
                pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
                inputs += [pick(ins[j], i) for i in range(runs) for j in range(period)]
                weights += [pick(ws[j], i) for i in range(runs) for j in range(period)]
            done += mine or ()
        return x, None if states is None else (*done, *left), inputs, weights

    def _make(self, kind: Hashable) -> nn.Module:
        return self.block(self.config, **({} if kind is None else {"kind": kind}), parent=None)

    def _params(self, name: str, init: Callable[[jax.Array], Any]) -> Any:
        """Asking for a variable that is there skips a trace of the initialiser, which `param` would make to check shapes."""
        return self.get_variable("params", name) if self.has_variable("params", name) else self.param(name, init)

    def _check_stages(self, plan: list[tuple[int, int, int]], stages: int, states: tuple | None, early_exit: bool) -> None:
        if not self.scan:
            raise ValueError(f"a mesh with {stages} stages needs scan_layers=True: stages are cut from stacked layers")
        if states is not None:
            raise ValueError("a pipeline has no cache: it trains; to generate, put the parameters on a mesh without `stage`")
        if early_exit:
            raise ValueError("early_exit leaves a stack after some of its layers, which a pipeline cannot: use a mesh without `stage`")
        start, period, repeats = max(plan, key=lambda segment: segment[1] * segment[2])
        if repeats % stages:
            what = f"layers {start} to {start + period * repeats - 1} repeat a period of {period} {repeats} times"
            possible = ", ".join(str(n) for n in range(2, repeats + 1) if repeats % n == 0) or "none"
            raise ValueError(f"the stack cannot be cut into {stages} stages: {what}; possible numbers of stages are {possible}")

    def _scan(
        self, x: jax.Array, states: tuple | None, step: Step, key: Any, start: int, period: int, repeats: int, runs: int, staged: bool
    ) -> tuple:
        """`runs` of `repeats` periods, the last of them perhaps not to its end."""
        stop = start + period * repeats
        cut = step.early_exit is not None and step.early_exit < start + period * runs
        blocks = [self._make(self.config.layer_kinds[start + j]) for j in range(period)]
        params = []
        for j, block in enumerate(blocks):
            init = lambda key, block=block: _stacked(block, jax.random.split(key, repeats), x, step)
            params.append(self._params(f"{start + j}:{stop}:{period}", init))

        def loop(params: Any, x: jax.Array, states: Any, step: Step, key: Any, layers: jax.Array) -> tuple:
            every = params if runs == repeats else None  # a slice of the parameters would be a copy

            def body(carry: Any, xs: Any) -> tuple:
                (x, states), (layer, mine) = carry, xs
                if mine is None:
                    mine = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, False), params)
                ins: list[Any] = []
                ws: list[Any] = []
                new: list[Any] = []
                for j, block in enumerate(blocks):
                    ins.append(x if step.output_hidden_states else None)
                    state = None if states is None else states[j]
                    place = step.replace(layer=layer, number=start + layer * period + j)
                    after, state, w = _layer(block, mine[j], x, state, place, key)
                    x = jnp.where(place.number < step.early_exit, after, x) if cut else after
                    ws.append(w)
                    new.append(state)
                return (x, None if states is None else tuple(new)), (ins, ws)

            if self.remat:
                body = jax.checkpoint(body, policy=remat_policy(self.remat), prevent_cse=False)
            scanned: Any = jax.lax.scan(body, (x, states), (layers, every))
            return *scanned[0], scanned[1]

        if not staged:
            x, states, reports = loop(params, x, states, step, key, jnp.arange(runs))
            return x, states, *reports

        def stage(params: Any, rows: tuple, number: jax.Array, piece: jax.Array) -> tuple:
            x, step = rows
            mine = repeats // rules.stage_count
            own = None if key is None else jax.random.fold_in(key, piece)
            x, _, reports = loop(params, x, None, step, own, number * mine + jnp.arange(mine))
            return (x, step), reports

        rules = step.rules
        (x, _), reports = pipeline(stage, params, (x, step.replace(number=None, rules=rules.inside_stage())), rules)
        return x, None, *reports


def _layer(block: nn.Module, params: Any, x: jax.Array, state: Any, step: Step, key: jax.Array | None) -> Any:
    rngs = None if key is None else {"dropout": jax.random.fold_in(key, step.number)}
    return block.apply({"params": params}, x, state, step, rngs=rngs)


def _init(block: nn.Module, x: jax.Array, step: Step, key: jax.Array) -> Any:
    """The block's boxed parameters."""
    return block.init(key, x, None, step)["params"]


def _stacked(block: nn.Module, keys: jax.Array, x: jax.Array, step: Step) -> Any:
    """The block's boxed parameters for each of the keys, stacked on a new axis named `layers`."""
    tree = jax.vmap(lambda key: _init(block, x, step, key))(keys)
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree.map(lambda box: box.replace(names=("layers", *box.names)) if is_box(box) else box, tree, is_leaf=is_box)
