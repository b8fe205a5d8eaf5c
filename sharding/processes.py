"""Several processes that run one program over one mesh: they agree on what they do, fail together, and each brings its rows of a batch.

    jax.distributed.initialize(…, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=20)    # before anything else
    rows = process_rows(rules, 64)                                 # which of 64 rows this process has to bring
    batch = global_batch(rules, {"input_ids": all_rows[rows]})     # arrays [64, …] over the mesh

Axis letters: B rows of a batch, b those of this process."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmodels.sharding.rules import Rules

_SHOWN = 300


class ProcessError(RuntimeError):
    """Another process failed; says which and how."""


def over_all(mesh: Any) -> bool:
    """Whether a mesh has devices of every process of several, so that all of them make the same calls."""
    if not isinstance(mesh, Mesh) or jax.process_count() == 1:
        return False
    return len({device.process_index for device in mesh.devices.flat}) == jax.process_count()


def spans(rules: Rules | None) -> bool:
    """`over_all` of the mesh of rules."""
    return rules is not None and over_all(rules.mesh)


def spread(tree: Any) -> bool:
    """Whether arrays of `tree` lie on devices of other processes, too."""
    known = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer))
    return any(not leaf.is_fully_addressable for leaf in known)


def agree(call: str, **values: Any) -> None:
    """Compare `values` (what json or str makes of them) between all processes, each of which calls this.

    ValueError on every process where they differ: which, and who has what."""
    mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    everyone = [json.loads(text) for text in _gather(call, json.dumps({"call": call, **mine}))]
    differing = sorted({name for one in everyone for name in one if any(other.get(name) != one[name] for other in everyone)})
    if differing:
        lines = [f"  {name}: {_sides([one.get(name, 'nothing') for one in everyone])}" for name in differing[:8]]
        raise ValueError("\n".join([f"{call}: the processes disagree, each must be called with the same:", *lines]))


def _sides(texts: list[str]) -> str:
    who: dict[str, list[str]] = {}
    for process, text in enumerate(texts):
        who.setdefault(text, []).append(str(process))
    return "; ".join(f"{text[:_SHOWN]} on process {', '.join(processes)}" for text, processes in who.items())


def described(rules: Rules) -> dict[str, Any]:
    """What `agree` compares of rules."""
    mesh: Mesh = rules.mesh  # type: ignore[assignment]
    devices = [device.id for device in mesh.devices.flat]
    return {"mesh": dict(mesh.shape), "devices of the mesh": devices, "rules": [rules.table, rules.optimizer, rules.gradients]}


@contextmanager
def telling(doing: str, together: bool = True) -> Iterator[None]:
    """An error within reaches the other processes, too, wherever they next compare or wait."""
    try:
        yield
    except Exception as error:
        if together and jax.process_count() > 1 and not getattr(error, "known_to_all", False):
            with suppress(Exception):  # where the others died there is nobody to tell
                _gather(doing, f"{type(error).__name__}: {error}", failed=True)
            error.known_to_all = True  # type: ignore[attr-defined]  # they leave whatever is around this, too
        raise


@contextmanager
def lockstep(doing: str, together: bool = True) -> Iterator[None]:
    """All processes leave this at the same time, and where it fails on one it fails on all: there with the error itself, on the others
    with a ProcessError that quotes it. `together`: False makes it this process' own affair."""
    with telling(doing, together):
        yield
    if together and jax.process_count() > 1:
        _gather(doing, "")


def from_first(doing: str, text: str) -> str:
    """The text of process 0, on every process."""
    return _gather(doing, text)[0]


def from_all(doing: str, text: str) -> list[str]:
    """The texts of all processes, on every process."""
    return _gather(doing, text)


def _itself(x: jax.Array) -> jax.Array:
    return x


def to_host(tree: Any) -> Any:
    """A tree of arrays as numpy arrays; those over several processes come whole to each, which all make this call."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return jax.jit(_itself, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)  # type: ignore[attr-defined]

    return jax.device_get(jax.tree.map(one, tree))


def _gather(doing: str, text: str, failed: bool = False) -> list[str]:
    """The texts of all processes; ProcessError where one of them is another's failure."""
    from jax.experimental.multihost_utils import process_allgather

    data = f"{'!' if failed else '='}{text}".encode()
    counts = process_allgather(np.int32(len(data)))
    room = max(256, 1 << int(counts.max()).bit_length())  # few lengths, as each is a program
    padded = np.frombuffer(data.ljust(room, b" "), np.uint8)
    texts = [row.tobytes()[:count].decode() for row, count in zip(process_allgather(padded), counts)]
    failures = {process: text[1:] for process, text in enumerate(texts) if text[0] == "!"}
    if failures and not failed:
        process, found = next(iter(failures.items()))
        error = ProcessError(f"{doing}: failed on process {', '.join(map(str, failures))} of {len(texts)}; process {process}: {found}")
        error.known_to_all = True  # type: ignore[attr-defined]
        raise error
    return [text[1:] for text in texts]


# ---- batches -----------------------------------------------------------------------------------------------------------


def _check_rows(rules: Rules, B: int) -> None:
    if B % rules.row_pieces:
        raise ValueError(f"a batch of {B} rows over mesh {dict(rules.mesh.shape)}: expected a multiple of {rules.row_pieces}")


def process_rows(rules: Rules, B: int) -> slice:
    """Which of a batch's B rows this process' devices hold. Processes that differ along another axis alone (tensor) hold the same rows.

    ValueError where B is no multiple of the pieces, or the rows do not lie together."""
    _check_rows(rules, B)
    indices = rules.sharding(("batch",), (B,)).addressable_devices_indices_map((B,)).values()
    held = sorted({index[0].indices(B)[:2] for index in indices})  # type: ignore[index]
    if any(a[1] != b[0] for a, b in itertools.pairwise(held)):
        raise ValueError(
            f"the rows of this process do not lie together in the mesh {dict(rules.mesh.shape)}: {held}; they do where the mesh has its "
            f"axes in the order {', '.join(rules.mesh_axes('batch'))}"
        )
    return slice(held[0][0], held[-1][1])


def process_share(rules: Rules | None) -> tuple[int, int]:
    """(i, n): this process brings the i-th of n equal shares of the rows of every batch. Processes that hold the same rows have the same i.

    ValueError where a mesh gives processes unequal shares, or as process_rows."""
    if rules is None:
        return 0, 1
    rows = process_rows(rules, rules.row_pieces)
    held = rows.stop - rows.start
    if rows.start % held or rules.row_pieces % held:
        raise ValueError(
            f"of {rules.row_pieces} parts of a batch this process holds {rows.start} to {rows.stop - 1} in the mesh "
            f"{dict(rules.mesh.shape)}: expected equal shares; choose sizes that cut the devices between the processes"
        )
    return rows.start // held, rules.row_pieces // held


def global_batch(rules: Rules, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{name: this process' rows [b, …], a host array} as arrays [B, …] over the mesh: rows, as `process_rows` gives them, over the axes of
    `batch`, the second of two axes over those of `seq`.

    ValueError where the rows do not fill the mesh, or, of the first batch of its shapes, where another process has others."""
    _, shares = process_share(rules)
    arrays = {name: np.asarray(rows) for name, rows in batch.items()}
    if spans(rules):
        shapes = {name: f"{jax.dtypes.canonicalize_dtype(rows.dtype)}{list(rows.shape)}" for name, rows in arrays.items()}
        _agree_on_shapes(rules, tuple(sorted(shapes.items())))

    def one(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) * shares, *rows.shape[1:])
        _check_rows(rules, shape[0])
        axes = ("batch", "seq") if rows.ndim == 2 else ("batch", *[None] * (rows.ndim - 1))
        return jax.make_array_from_process_local_data(rules.sharding(axes, shape), rows, shape)

    return {name: one(rows) for name, rows in arrays.items()}


@functools.lru_cache(maxsize=4096)
def _agree_on_shapes(rules: Rules, shapes: tuple[tuple[str, str], ...]) -> None:
    agree("global_batch", **dict(shapes))
