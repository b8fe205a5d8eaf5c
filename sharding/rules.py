"""Logical axes to mesh axes: models name what an axis is, a `Rules` value says where it lives.

Parameters carry `vocab`, `embed`, `heads`, `kv_heads`, `mlp`, `experts`, `layers`; activations `batch`, `seq`, `act_embed`,
`act_heads`, `act_kv_heads`, `act_mlp`, `act_vocab`. Mesh axes are `stage`, `data`, `fsdp`, `tensor`, `sequence`, `expert`; under every
preset `stage` cuts scanned layers into the stages of a pipeline, which training runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axes = Sequence[str | None]
Table = tuple[tuple[str, tuple[str, ...]], ...]

MESH_AXES = ("stage", "data", "fsdp", "tensor", "sequence", "expert")

_ACTIVATIONS: Table = (
    ("batch", ("stage", "data", "fsdp", "expert")),  # outside the pipeline the stages share the rows
    ("layers", ("stage",)),
    ("act_heads", ("tensor",)),
    ("act_kv_heads", ("tensor",)),
    ("act_mlp", ("tensor",)),
    ("act_vocab", ("tensor",)),
)
_TENSOR: Table = (("heads", ("tensor",)), ("kv_heads", ("tensor",)), ("mlp", ("tensor",)), ("vocab", ("tensor",)))
_FSDP: Table = (("embed", ("fsdp",)),)
_STACKED: Table = (*_FSDP, ("layers", ("stage",)))

PRESETS: dict[str, Table] = {
    "replicated": _ACTIVATIONS[:2],
    "zero1": _ACTIVATIONS,
    "zero2": _ACTIVATIONS,
    "fsdp": _ACTIVATIONS + _FSDP,
    "tensor": _ACTIVATIONS + _TENSOR,
    "fsdp+tensor": _ACTIVATIONS + _FSDP + _TENSOR,
    "expert": (*_ACTIVATIONS, *_FSDP, *_TENSOR, ("experts", ("expert",))),
    "sequence": (*_ACTIVATIONS, *_FSDP, *_TENSOR, ("seq", ("sequence",))),
}


LOGICAL_AXES = {axis for table in PRESETS.values() for axis, _ in table}

SPLIT = {
    "zero1": {"optimizer": _STACKED},
    "zero2": {"optimizer": _STACKED, "gradients": _STACKED},
}  # what lives elsewhere than its parameter


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh of named sizes over `devices` (default: all), e.g. make_mesh(fsdp=4, tensor=-1); -1 takes what is left.

    Devices of several TPU slices are laid out so that the first axis (stage or data, by habit) crosses the slower network between
    slices and every other axis stays inside one. ValueError when the sizes do not fit."""
    devices = jax.devices() if devices is None else list(devices)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = [size for size in sizes.values() if size != -1]
    if any(isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1 for size in fixed):
        raise ValueError(f"mesh sizes {sizes}: expected whole numbers from 1, or -1 for what is left")
    known = math.prod(fixed)
    if len(free) > 1 or not devices or len(devices) % known or (not free and known != len(devices)):
        raise ValueError(f"mesh {sizes} does not fit {len(devices)} devices: the sizes must multiply to that number, at most one may be -1")
    sizes |= dict.fromkeys(free, len(devices) // known)
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise ValueError(f"mesh {sizes}: its first axis crosses the {slices} slices and must be a multiple of that number")
    else:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@dataclasses.dataclass(frozen=True)
class Rules:
    """A mesh and a table from logical axes to mesh axes; of the usual mesh axes, those that the mesh lacks do not count. Hashable, so
    static under jit. ValueError for a mesh axis that is neither usual nor the mesh's, and for a mesh over some of several processes: it has
    devices of all of them, which then make the same calls, or of this one alone.

    optimizer, gradients: tables for the optimizer's state and for gradients, where these do not live as their parameters: whole parameters
    beside split moments (ZeRO-1) and split gradients (ZeRO-2, arXiv:1910.02054); ZeRO-3 is `fsdp`.
    microbatches: into how many parts a batch goes through the pipeline of a mesh with `stage`, a multiple of the stages, by default as
    many; of M microbatches and S stages (S-1)/(M+S-1) of the time is idle. ValueError for another number, or without stages.
    around: the mesh axes over which what has these rules is mapped as a whole: the stages and their replicas, for the work of one."""

    mesh: Mesh | AbstractMesh
    table: Table
    optimizer: Table | None = None
    gradients: Table | None = None
    microbatches: int | None = None
    around: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_mesh(self.mesh)
        unknown = {m for _, wanted in self._lines() for m in wanted} - {*MESH_AXES, *self.mesh.shape}
        if unknown:
            raise ValueError(
                f"the rules name mesh axes {sorted(unknown)}; the mesh has {list(self.mesh.shape)}, usual are {', '.join(MESH_AXES)}"
            )
        if self.microbatches is not None and (not self.stages or self.microbatches < 1 or self.microbatches % self.stage_count):
            raise ValueError(
                f"microbatches = {self.microbatches}: with a mesh of {dict(self.mesh.shape)} they must be a multiple of its `stage`"
                + ("" if self.stages else ", which it lacks")
            )

    @classmethod
    def preset(cls, name: str, mesh: Mesh | AbstractMesh, *, microbatches: int | None = None) -> Rules:
        _check_mesh(mesh)
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"sharding preset {name!r} is not known; known are {', '.join(PRESETS)}")
        unknown = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in MESH_AXES]
        if unknown:
            raise ValueError(
                f"no preset knows the mesh axes {unknown} of {dict(mesh.shape)}: usual are {', '.join(MESH_AXES)}; for axes of your own, "
                "Rules(mesh, table)"
            )
        split = SPLIT.get(name, {})
        return cls(mesh, PRESETS[name], split.get("optimizer"), split.get("gradients"), microbatches)

    def _lines(self) -> list[tuple[str, tuple[str, ...]]]:
        lines = [line for table in (self.table, self.optimizer, self.gradients) for line in table or ()]
        for line in lines:
            if not (isinstance(line, tuple) and len(line) == 2 and isinstance(line[1], tuple)):
                raise ValueError(f'the rules have {line!r}: expected lines such as ("embed", ("fsdp",)), a logical axis and its mesh axes')
        return lines

    def check_axes(self, carried: Iterable[str | None]) -> None:
        """ValueError where the rules place a logical axis that is neither usual nor, perhaps after `act_`, one that parameters carry."""
        known = {*LOGICAL_AXES, *(name for axis in carried if axis for name in (axis, f"act_{axis}"))}
        if unknown := {axis for axis, _ in self._lines()} - known:
            raise ValueError(f"the rules place the axes {sorted(unknown)}, which no parameter has; there are {', '.join(sorted(known))}")

    def of(self, role: str) -> Rules:
        """The rules by which `params`, `gradients` or the `optimizer`'s state live."""
        table = self.gradients if role == "gradients" else self.optimizer if role == "optimizer" else None
        return self if table is None else Rules(self.mesh, table)

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The axes of the mesh that a logical axis asks for."""
        return tuple(m for m in dict(self.table).get(axis or "", ()) if m in self.mesh.shape)

    def pieces(self, mesh_axes: Iterable[str]) -> int:
        """Into how many pieces these axes of the mesh cut what lies over all of them."""
        return math.prod(self.mesh.shape[m] for m in mesh_axes)

    @property
    def row_pieces(self) -> int:
        """Into how many pieces the rows of a batch are cut."""
        return self.pieces(self.mesh_axes("batch"))

    @property
    def stages(self) -> tuple[str, ...]:
        """The mesh axes over which scanned layers are cut into the stages of a pipeline; none where these make one stage."""
        return tuple(m for m in self.mesh_axes("layers") if self.mesh.shape[m] > 1)

    @property
    def stage_count(self) -> int:
        return self.pieces(self.stages)

    @property
    def microbatch_count(self) -> int:
        return self.microbatches or self.stage_count

    @property
    def replicas(self) -> tuple[str, ...]:
        """The mesh axes, first in `batch` after the stages, over which rows are split and no parameter is."""
        rows = (m for m in self.mesh_axes("batch") if m not in self.stages)
        others = {m for axis, wanted in self.table if axis not in ("batch", "layers") for m in wanted}
        return tuple(itertools.takewhile(lambda m: m not in others, rows))

    def inside_stage(self) -> Rules:
        """The rules of what one replica of one stage computes, which knows nothing of the others."""
        return self.inside((*self.stages, *self.replicas))

    def inside(self, around: tuple[str, ...]) -> Rules:
        """The rules of what is computed at each place along the mesh axes `around` by itself."""
        table = tuple((axis, tuple(m for m in wanted if m not in around)) for axis, wanted in self.table)
        return Rules(self.mesh, table, around=around)

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform  # only what runs or compiles asks

    def spec(self, axes: Axes, shape: Sequence[int], units: Mapping[str, int] | None = None) -> PartitionSpec:
        """Where an array of `shape` with logical `axes` lives. An axis is cut only in whole units (heads) and evenly, else replicated;
        a mesh axis serves the first array axis that asks for it."""
        used, spec = set[str](), list[Any]()
        for axis, size in zip(axes, shape, strict=True):
            wanted = tuple(m for m in self.mesh_axes(axis) if m not in used)
            pieces = self.pieces(wanted)
            if not wanted or size // (units or {}).get(axis or "", 1) % pieces or size % pieces:
                spec.append(None)
                continue
            used |= set(wanted)
            spec.append(wanted if len(wanted) > 1 else wanted[0])
        return PartitionSpec(*spec)

    def sharding(self, axes: Axes, shape: Sequence[int], units: Mapping[str, int] | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape, units))

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh={mesh!r}: expected a mesh as jaxmodels.make_mesh(fsdp=4, tensor=2) makes it")
    if AxisType.Explicit in (mesh.axis_types or ()):
        sizes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
        raise ValueError(f"the mesh has axes of AxisType.Explicit, as jax.make_mesh makes them: make it by jaxmodels.make_mesh({sizes})")
    if isinstance(mesh, Mesh):
        _check_processes(mesh)


@functools.cache
def _check_processes(mesh: Mesh) -> None:
    if mesh.devices.flat[0] not in jax.devices():  # of a topology that is only compiled for
        return
    held = sorted({device.process_index for device in mesh.devices.flat})
    count, own = jax.process_count(), jax.process_index()
    if len(held) < count and held != [own]:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} has devices of process {', '.join(map(str, held))} of {count}, and this is process {own}: a mesh "
            "has devices of every process (make_mesh without devices=), or of this one alone (devices=jax.local_devices())"
        )
    folder = jax.config.values["jax_compilation_cache_dir"]
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" and folder and jax.config.values["jax_enable_compilation_cache"]:
        # Read back, XLA:CPU's programs have lost the order of their collectives: devices wait in different ones, then the process aborts.
        message = (
            f"{mesh.size} CPU devices with a compilation cache in {folder}: programs from it mix up their collectives and may abort; go on "
            "without it, by JAX_ENABLE_COMPILATION_CACHE=false"
        )
        if len(held) > 1:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)


def resolve_rules(rules: Rules | str | None, mesh: Mesh | None) -> Rules | None:
    """What from_pretrained(mesh=, rules=) means: a Rules value as it is, a preset (default fsdp+tensor) over the mesh, None without one."""
    if isinstance(rules, Rules):
        if mesh is not None and mesh != rules.mesh:
            raise ValueError("mesh and rules.mesh differ; give one of them")
        return rules
    if mesh is None:
        if rules is not None:
            raise ValueError(f"rules={rules!r} needs a mesh: jaxmodels.make_mesh(fsdp=..., tensor=...)")
        return None
    return Rules.preset(rules or "fsdp+tensor", mesh)
