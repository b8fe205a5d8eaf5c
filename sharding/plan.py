"""What a job would need on a TPU slice that is not here: the real program, compiled for the real topology by libtpu on any machine.

    report = plan(config, topology="v5e:16x16", mesh={"fsdp": 64, "tensor": 4}, job="train", batch=256, length=2048)

Needs the extra `tpu` (libtpu); no weights are read and nothing runs. Time is a roofline of our own: XLA's estimate counts a loop's
body once."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxmodels.cache import cache_shardings, init_cache
from jaxmodels.params import abstract_params, count_params
from jaxmodels.sharding.chips import CHIPS, Chip, chip_of
from jaxmodels.sharding.flops import count_flops
from jaxmodels.sharding.hlo import Program, analyse
from jaxmodels.sharding.rules import MESH_AXES, Rules, make_mesh

JOBS = ("train", "prefill", "decode")
LIBTPU = (
    "TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_LOG_DIR=disabled ALLOW_MULTIPLE_LIBTPU_LOAD=1"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one compiled program needs of a chip. Bytes are per chip; `flops` of the whole job, recomputation included; seconds are
    lower bounds, and `seconds` the largest of the three, as if all overlapped."""

    job: str
    topology: str
    mesh: Mapping[str, int]
    remat: str | None
    chip: Chip
    batch: int
    length: int
    parameters: int
    arguments: int
    temporaries: int
    outputs: int  # beyond the arguments' own buffers
    code: int
    flops: float
    useful_flops: float
    program: Program | None
    refused: str = ""  # the compiler's words where it found no room
    microbatches: int = 1  # of a pipeline
    row_pieces: int = 1  # into which the mesh would cut the rows

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def needed(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code

    @property
    def bubble(self) -> float:
        """The share of its time that a stage of the pipeline is idle."""
        stages = self.mesh.get("stage", 1)
        return (stages - 1) / (self.microbatches + stages - 1)

    @property
    def fits(self) -> bool:
        return not self.refused and self.needed <= self.chip.hbm

    @property
    def compute_seconds(self) -> float:
        return self.flops / self.chips / self.chip.flops

    @property
    def memory_seconds(self) -> float:
        return self.program.traffic / self.chip.bandwidth if self.program else 0.0

    @property
    def collective_seconds(self) -> float:
        return sum(seconds for _, _, _, seconds in self.collectives()) if self.program else 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.collective_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.batch * (1 if self.job == "decode" else self.length) / self.seconds

    @property
    def mfu(self) -> float:
        """Useful FLOPs, those of a forward (and backward) pass without recomputation, over what the chips could do in `seconds`."""
        return self.useful_flops / self.chips / self.chip.flops / self.seconds

    def collectives(self) -> list[tuple[str, int, int, float]]:
        """(kind over how many devices, how often, bytes, seconds), of rings around one axis of the torus."""
        table: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
        for c in self.program.collectives if self.program else ():
            # bytes that cross a link, of a device's share: twice around for an all-reduce, half a ring on average for an all-to-all
            factor = {"all-reduce": 2.0, "all-to-all": c.group / 4, "collective-permute": 2.0}.get(c.kind, 1.0)
            line = table[f"{c.kind} over {c.group}"]
            line[0] += c.count
            line[1] += c.count * c.bytes
            line[2] += c.count * factor * c.bytes * (1 if c.kind == "collective-permute" else (c.group - 1) / c.group) / self.chip.link
        return sorted(((k, int(n), int(b), s) for k, (n, b, s) in table.items()), key=lambda row: -row[3])

    def __str__(self) -> str:
        gb = lambda n: f"{n / 1e9:.2f} GB"
        mesh = ",".join(f"{k}={v}" for k, v in self.mesh.items())
        lines = [
            f"{self.job} of {self.batch} × {self.length} tokens on {self.topology} ({self.chips} × {self.chip.name}), mesh {mesh}"
            + (f", remat {self.remat}" if self.job == "train" else "")
            + (f", {self.microbatches} microbatches: stages idle {100 * self.bubble:.0f} % of the time" if self.bubble else ""),
            f"parameters   {self.parameters:,}",
        ]
        if self.batch % self.row_pieces:
            lines.append(f"rows         {self.batch} are no multiple of {self.row_pieces}: every chip computes all of them")
        if self.refused:
            return "\n".join([*lines, f"does NOT fit: {self.refused}"])
        lines += [
            f"memory       {gb(self.needed)} of {gb(self.chip.hbm)} a chip: {'fits' if self.fits else 'does NOT fit'}",
            f"             arguments {gb(self.arguments)}, temporaries {gb(self.temporaries)}, outputs {gb(self.outputs)}, "
            f"code {gb(self.code)}",
            f"work         {self.flops / 1e12:,.1f} TFLOP in all, {gb(self.program.traffic)} to and from memory a chip",  # type: ignore[union-attr]
            f"at least     {1e3 * self.compute_seconds:.2f} ms computing, {1e3 * self.memory_seconds:.2f} ms of memory, "
            f"{1e3 * self.collective_seconds:.2f} ms of collectives",
            f"roofline     {1e3 * self.seconds:.2f} ms a step, {self.tokens_per_second:,.0f} tokens/s"
            + (f", MFU {100 * self.mfu:.1f} %" if self.job != "decode" else ""),
            "collectives  of one step and chip",
        ]
        lines += [f"  {kind:<28}{n:>6} × {gb(b):>12} in all {1e3 * s:>10.2f} ms" for kind, n, b, s in self.collectives()]
        lines += ["largest buffers"]
        lines += [f"  {gb(n):>10}  {source}" for n, source in self.program.buffers]  # type: ignore[union-attr]
        return "\n".join(lines)


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology such as v5e:16x16 or v5p:4x4x4, described by libtpu. ValueError when it is missing or refuses."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for TPU needs libtpu: pip install 'jaxmodels[tpu]'")
    for setting in LIBTPU.split():
        os.environ.setdefault(*setting.split("="))
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # as a job sees a v4: one device a chip
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # the runtime's own type, undocumented
        raise ValueError(
            f"topology {name!r}: {str(error).splitlines()[0]}; known forms are v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1"
        ) from error


def _slice(topology: str) -> tuple[Sequence[jax.Device], Chip]:
    devices = topology_devices(topology)
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise ValueError(f"topology {topology!r}: no peaks are known for {devices[0].device_kind!r}; known are {', '.join(CHIPS)}")
    return devices, chip


def plan(
    config: Any,
    *,
    topology: str,
    mesh: Mapping[str, int],
    job: str,
    batch: int,
    length: int,
    rules: str | None = None,
    remat: str | None = "full",
    dtype: Any = jnp.bfloat16,
    scan_layers: bool = True,
    microbatches: int | None = None,
) -> Plan:
    """Compile `job` of the config's language model (a causal one, an encoder-decoder, or an encoder with its masked head) for the
    topology and read what it needs.

    train: one AdamW step on [batch, length] tokens, float32 master parameters, compute in `dtype`; prefill: a prompt [batch, length] into
    a cache; decode: one token a row with a cache of `length` slots. Of an encoder-decoder, encoder and decoder train on so many tokens
    each, the encoder reads the prompt, and decoding looks back on as many of its tokens as there are slots.
    rules: a preset; default the one that the mesh's axes ask for. microbatches: as in Rules, of a mesh with `stage`.
    ValueError for bad arguments; a program for which the compiler finds no room is a Plan that says so."""
    if job not in JOBS:
        raise ValueError(f"job {job!r} is none of {', '.join(JOBS)}")
    cls = _class_for(config, job)
    devices, chip = _slice(topology)
    laid = Rules.preset(rules or preset_for(mesh), make_mesh(devices, **mesh), microbatches=microbatches)
    attention = "splash" if job != "decode" and flash_suffices(cls(config)) else None
    model = cls(
        config, dtype=dtype, scan_layers=scan_layers, remat=remat if job == "train" else None, rules=laid, attn_implementation=attention
    )
    jitted, arguments = PROGRAMS[job](model, batch, length)
    unstaged = Rules(laid.mesh, tuple(line for line in laid.table if line[0] != "layers"))
    plain = PROGRAMS[job](dataclasses.replace(model, remat=None, rules=unstaged), batch, length)[0]
    share = _own_rows(laid)
    flops = count_flops(jitted, *arguments, ragged_share=share)
    useful = count_flops(plain, *arguments, ragged_share=share, recomputed=False)
    shape: dict[str, Any] = {
        "job": job, "topology": topology, "mesh": dict(laid.mesh.shape), "remat": model.remat, "chip": chip, "batch": batch,
        "length": length, "parameters": count_params(abstract_params(model)), "flops": flops, "useful_flops": useful,
        "microbatches": laid.microbatch_count, "row_pieces": laid.row_pieces,
    }  # fmt: skip
    try:
        with _uncached():
            compiled = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(**shape, arguments=0, temporaries=0, outputs=0, code=0, program=None, refused=_short(str(error)))
    m = compiled.memory_analysis()
    return Plan(
        **shape,
        arguments=m.argument_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        outputs=m.output_size_in_bytes - m.alias_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        program=analyse(compiled.as_text(), len(devices)),
    )


def _class_for(config: Any, job: str) -> Any:
    from jaxmodels.auto import AutoModelForMaskedLM, find_family, text_task

    if getattr(config, "is_decoder", True) or "AutoModelForMaskedLM" not in find_family(config.model_type).classes:
        return text_task(config).class_for(config)
    if job != "train":
        raise ValueError(
            f"job {job!r} is for models that write text; {config.model_type} reads all tokens at once (is_decoder is false): train"
        )
    return AutoModelForMaskedLM.class_for(config)


@contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's persistent cache, from which programs for chips that are not here cannot be read back."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # else JAX goes by what it found before
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


def preset_for(mesh: Mapping[str, int]) -> str:
    """The preset that puts every axis of a mesh to use."""
    for axis, preset in (("expert", "expert"), ("sequence", "sequence")):
        if axis in mesh:
            return preset
    return "fsdp+tensor" if "tensor" in mesh else "fsdp"


def flash_suffices(model: Any) -> bool:
    """Whether the flash kernel has all options that the layers of the model ask attention for."""
    try:
        abstract_params(dataclasses.replace(model, attn_implementation="splash"))
    except ValueError:
        return False
    return True


def sweep(
    config: Any,
    *,
    topology: str,
    job: str,
    mesh: Mapping[str, int] = {},
    remats: Sequence[str | None] = ("full", "dots_with_no_batch_dims_saveable"),
    **options: Any,
) -> Iterator[Plan]:
    """A plan for every mesh of `sweep_meshes` that keeps the sizes in `mesh` and, to train, every remat policy; `rank` orders them. What a
    mesh cannot do (a stack that its stages do not divide) is a Plan that says so."""
    devices, chip = _slice(topology)
    for sizes in sweep_meshes(len(devices), job, mesh):
        for remat in remats if job == "train" else (None,):
            try:
                yield plan(config, topology=topology, mesh=sizes, job=job, remat=remat, **options)
            except ValueError as error:
                shape: dict[str, Any] = {"job": job, "topology": topology, "mesh": sizes, "remat": remat, "chip": chip}
                shape |= dict.fromkeys(("parameters", "arguments", "temporaries", "outputs", "code", "flops", "useful_flops"), 0)
                yield Plan(**shape, batch=options["batch"], length=options["length"], program=None, refused=str(error))


def sweep_meshes(chips: int, job: str, fixed: Mapping[str, int]) -> list[dict[str, int]]:
    """Meshes of the fixed sizes and, of the chips that are left, powers of two over `tensor`, to 16, and the rest over `fsdp`; over `data`
    to decode and in pipelines. ValueError where the fixed sizes do not divide the chips."""
    if unknown := sorted(set(fixed) - set(MESH_AXES)):
        raise ValueError(f"mesh axes {unknown} are none of {', '.join(MESH_AXES)}")
    known = math.prod(fixed.values())
    rows = "data" if job == "decode" or fixed.get("stage", 1) > 1 else "fsdp"
    free = [axis for axis in (rows, "tensor") if axis not in fixed]
    if known < 1 or chips % known or not (free or known == chips):
        raise ValueError(
            f"a sweep over {chips} chips that keeps {dict(fixed)}: the sizes must divide them and leave {rows} or tensor to try"
        )
    left = chips // known
    tensors = [n for n in (1, 2, 4, 8, 16) if left % n == 0] if len(free) == 2 else [left if free == ["tensor"] else 1]
    tried = [{**fixed, **{axis: n if axis == "tensor" else left // n for axis in free}} for n in tensors]
    return [{axis: sizes[axis] for axis in sorted(sizes, key=MESH_AXES.index)} for sizes in tried]


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit, the fastest first, then the others by what they need, and those that cannot be."""
    return sorted(plans, key=lambda p: (not p.fits, bool(p.refused), p.seconds if p.fits else p.needed))


def _short(message: str) -> str:
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    return f"{used[1]} of {used[2]} HBM" if used else message.splitlines()[0][:200]


def _own_rows(rules: Rules) -> float:
    """Of the tokens that a device gathers along the axes that split the experts, the share that goes to its own."""
    return 1 / rules.pieces(rules.mesh_axes("experts"))


def _train(model: Any, batch: int, length: int) -> tuple[Any, tuple]:
    import optax

    from jaxmodels.training.step import TrainState, make_train_step, state_placement

    optimizer, params, tokens = optax.adamw(1e-4), abstract_params(model), _tokens(model, batch, length)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))  # type: ignore[arg-type]
    return make_train_step(model, optimizer), (_placed(state, state_placement(model, state)), {"input_ids": tokens, "labels": tokens})


def _tokens(model: Any, batch: int, columns: int) -> jax.ShapeDtypeStruct:
    shape = (batch, columns)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=model.rules.sharding(("batch", "seq"), shape))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings)


def _prefill(model: Any, batch: int, length: int) -> tuple[Any, tuple]:
    def prefill(params: Any, input_ids: jax.Array, attention_mask: jax.Array) -> tuple[jax.Array, Any]:
        start = {"decoder_input_ids": jnp.zeros((batch, 1), jnp.int32)} if model.config.is_encoder_decoder else {}
        cache = init_cache(model, batch, length)
        out = model.apply({"params": params}, input_ids, attention_mask=attention_mask, cache=cache, logits_to_keep=1, **start)
        return out.logits[:, -1].argmax(-1), out.cache

    tokens = _tokens(model, batch, length)
    return jax.jit(prefill), (abstract_params(model, model.dtype), tokens, tokens)


def _decode(model: Any, batch: int, length: int) -> tuple[Any, tuple]:
    """The greedy loop, of as many steps as it is told: one step counts."""

    encoded = model.config.is_encoder_decoder

    def empty() -> Any:
        cache = init_cache(model, batch, length)
        return cache.replace(layers=tuple(s.replace(cross=s.cross.room(length)) for s in cache.layers)) if encoded else cache

    def decode(params: Any, input_ids: jax.Array, cache: Any, limit: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        def step(carry: tuple) -> tuple:
            token, cache, n = carry
            out = model.apply({"params": params}, **{"decoder_input_ids" if encoded else "input_ids": token}, cache=cache)
            return out.logits[:, -1:].argmax(-1).astype(jnp.int32), out.cache, n + 1

        return jax.lax.while_loop(lambda carry: carry[2] < limit, step, (input_ids, cache, jnp.int32(0)))

    cache = jax.eval_shape(empty).replace(fresh=False)
    placed = _placed(cache, cache_shardings(cache, model.rules))
    arguments = (abstract_params(model, model.dtype), _tokens(model, batch, 1), placed, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.jit(decode, donate_argnums=2), arguments


PROGRAMS = {"train": _train, "prefill": _prefill, "decode": _decode}
