"""From the tensors of a file to the arrays of a parameter tree, and back.

    arrays, report = load(source, expected, rules=rules, base_prefix="model", init=init)
    tensors = unload(params, rules=rules, base_prefix="model")

`source` is {file key: Tensor}, `expected` is {dotted tree path: jax.ShapeDtypeStruct}, unrolled or scanned, and `params` {dotted tree path:
array}, parameters or gradients alike. Rules speak of keys as a model with a head spells them (`model.layers.…`). A base model's tree (no
name in it begins with `base_prefix`) has them without the prefix, and so may a file: the prefix is added and removed as needed.

What is in a file is checked against the file that the expected tree would be written as, so errors speak of file keys.
"""

from __future__ import annotations

import difflib
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.files import quiet
from jaxmodels.convert.rules import Alias, Detachable, Ignore, Op, Tensors, Tie, forward, inverse, match, members, stacks
from jaxmodels.convert.tensors import Index, NumpyTensor, Tensor, as_tensor, full_index, lengths
from jaxmodels.sharding.processes import lockstep

logger = logging.getLogger(__name__)
_THREADS = 8  # enough to keep a disk busy; memory is bounded by _Budget
_SHOWN = 8


@dataclass(frozen=True)
class LoadReport:
    """What `load` did beside copying: tree names it initialised, file keys it left out because they belong to another head (`dropped`),
    match an `Ignore` (`ignored`) or repeat a tied weight (`tied`); `nbytes` of the arrays that came from the file."""

    initialized: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    nbytes: int = 0


def load(
    source: Mapping[str, Tensor],
    expected: Mapping[str, jax.ShapeDtypeStruct],
    *,
    rules: Sequence[Op] = (),
    base_prefix: str = "",
    init: Callable[[list[str]], Mapping[str, jax.Array]] | None = None,
    keep_dtypes: bool = False,
    progress: bool | None = None,
    where: str = "the checkpoint",
) -> tuple[dict[str, jax.Array], LoadReport]:
    """The arrays of `expected`, each read as the slices its sharding covers and cast on the way.

    expected: the dtypes are what the arrays get (with `keep_dtypes`, floating ones stay as stored); `.sharding` None is the default device.
    rules: file to tree. `Alias`, `Tie` and `Ignore` act on the file's keys before the others, wherever they stand.
    base_prefix: keys outside it are a head's, and those of a `Detachable`. A head that the file lacks comes from `init(names)`, with a
        warning; another head is dropped and logged.
    progress: None shows a bar on a terminal once the work takes over two seconds. where: the source's name in messages.

    Raises CheckpointError, before anything is read, for a missing, unexpected or doubled key, a wrong shape or kind of dtype."""
    wanted, base = _to_file({name: as_tensor(spec) for name, spec in expected.items()}, rules, base_prefix)
    tensors, ignored, tied = _canonical(source, wanted, rules, base_prefix)
    dropped = _check(tensors, wanted, rules, base_prefix, init is not None, where)
    tree = forward(_structure(rules), {key: tensors[key] for key in wanted if key in tensors})
    if base:
        tree = {key.removeprefix(f"{base_prefix}."): tensor for key, tensor in tree.items()}
    tree = stacks(name for name in expected if all(member in tree for member in members(name) or ())).forward(tree)
    initialized = [name for name in expected if name not in tree]
    if set(tree) - set(expected):
        raise CheckpointError(f"rules that are no inverses of themselves: they made {sorted(set(tree) - set(expected))[:_SHOWN]}")
    spread = any(spec.sharding is not None and not spec.sharding.is_fully_addressable for spec in expected.values())
    if progress is None and spread and jax.process_index():
        progress = False  # one bar for all processes
    with lockstep(f"reading {where}", spread):
        arrays = _place(tree, expected, keep_dtypes, progress, any(tensor.remote for tensor in source.values()))
    report = LoadReport(tuple(initialized), dropped, ignored, tied, sum(array.nbytes for array in arrays.values()))
    if initialized:
        assert init is not None  # else _check has refused
        names = ", ".join(initialized)
        warnings.warn(f"{where} has no weights for {names}: initialised at random, to be trained before use", UserWarning, stacklevel=2)
        made = init(initialized)
        arrays |= {name: _as_expected(name, made[name], expected[name]) for name in initialized}
    return {name: arrays[name] for name in expected}, report


def canonical(
    source: Mapping[str, Tensor],
    expected: Mapping[str, Any],
    *,
    rules: Sequence[Op] = (),
    base_prefix: str = "",
    where: str = "the checkpoint",
) -> dict[str, Tensor]:
    """The file's own tensors, lazily, under the keys it would be written with, after the checks of `load`: file to file, nothing held."""
    wanted, base = _to_file({name: as_tensor(spec) for name, spec in expected.items()}, rules, base_prefix)
    tensors, _, _ = _canonical(source, wanted, rules, base_prefix)
    _check(tensors, wanted, rules, base_prefix, False, where)
    bare = lambda key: key.removeprefix(f"{base_prefix}.") if base else key
    return {bare(key): tensors[key] for key in sorted(wanted, key=_reading_order)}


def unload(params: Mapping[str, Any], *, rules: Sequence[Op] = (), base_prefix: str = "") -> dict[str, Tensor]:
    """The file's tensors, lazily, for a tree of arrays (or shapes): scanned layers unrolled, rules inverted, in reading order."""
    tensors, base = _to_file({name: as_tensor(array) for name, array in params.items()}, rules, base_prefix)
    if base:
        tensors = {key.removeprefix(f"{base_prefix}."): tensor for key, tensor in tensors.items()}
    return {key: tensors[key] for key in sorted(tensors, key=_reading_order)}


def _reading_order(key: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in key.split(".")]


# ---- keys ------------------------------------------------------------------------------------------------------------


def _structure(rules: Iterable[Op]) -> list[Op]:
    return [rule for rule in rules if not isinstance(rule, Alias | Tie | Ignore)]


def _to_file(tree: Tensors, rules: Sequence[Op], base_prefix: str) -> tuple[Tensors, bool]:
    """The tree as a file of a model with a head, and whether it was a base model's tree."""
    tree = stacks(tree).inverse(tree)
    base = bool(base_prefix) and not any(name.startswith(f"{base_prefix}.") for name in tree)
    if base:
        tree = {f"{base_prefix}.{name}": tensor for name, tensor in tree.items()}
    return inverse(_structure(rules), tree), base


def _canonical(
    source: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rules: Sequence[Op], base_prefix: str
) -> tuple[Tensors, tuple[str, ...], tuple[str, ...]]:
    """The source under canonical keys, with the prefix; which keys were ignored, which tied."""
    tensors = forward([rule for rule in rules if isinstance(rule, Alias)], source)  # the prefix may be part of an alias
    if base_prefix and not any(key.startswith(f"{base_prefix}.") for key in tensors):
        own = {*wanted, *(rule.key for rule in rules if isinstance(rule, Tie))}  # without the prefix anywhere
        tensors = {key if key in own else f"{base_prefix}.{key}": tensor for key, tensor in tensors.items()}
    left: dict[type[Op], list[str]] = {Alias: [], Ignore: [], Tie: []}
    for rule in rules:
        if isinstance(rule, Alias | Ignore | Tie):
            kept = rule.forward(tensors)
            left[type(rule)] += [key for key in tensors if key not in kept]
            tensors = kept
    return tensors, tuple(left[Ignore]), tuple(left[Tie])


def _check(tensors: Tensors, wanted: Tensors, rules: Sequence[Op], base_prefix: str, can_init: bool, where: str) -> tuple[str, ...]:
    """The keys of other heads; raises if anything else is not as wanted."""
    detachable = [pattern for rule in rules if isinstance(rule, Detachable) and not rule.required for pattern in rule.patterns]
    required = [pattern for rule in rules if isinstance(rule, Detachable) and rule.required for pattern in rule.patterns]
    foreign = [pattern for pattern in required if all(match(pattern, key) is None for key in wanted)]

    def head(key: str) -> bool:
        inside = key.startswith(f"{base_prefix}.") and all(match(pattern, key) is None for pattern in detachable)
        return bool(base_prefix) and not inside

    missing = [key for key in wanted if key not in tensors and not (head(key) and can_init)]
    extra = [key for key in tensors if key not in wanted]
    modules = {key.rpartition(".")[0] for key in wanted}  # a head that the model has is no other one: lm_head.bias beside lm_head.weight
    others = [key for key in extra if head(key) and key.rpartition(".")[0] not in modules]
    dropped = tuple(key for key in extra if key in others or any(match(pattern, key) is not None for pattern in foreign))
    unexpected = [key for key in extra if key not in dropped]
    wrong = [key for key in wanted if key in tensors and not _fits(tensors[key], wanted[key])]

    def lines(title: str, keys: list[str], line: Callable[[str], str]) -> list[str]:
        rest = [f"    … and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
        return [f"  {title} ({len(keys)}):", *(f"    {line(key)}" for key in keys[:_SHOWN]), *rest] if keys else []

    def near(key: str, others: Iterable[str]) -> str:
        close = difflib.get_close_matches(key, list(others), 1, 0.7)
        return f"; closest on the other side: {close[0]}" if close else ""

    problems = [
        *lines("missing, the model expects", missing, lambda key: f"{key} {list(wanted[key].shape)}{near(key, extra)}"),
        *lines("unexpected, the model has no", unexpected, lambda key: f"{key} {list(tensors[key].shape)}{near(key, missing)}"),
        *lines("wrong", wrong, lambda key: f"{key}: found {_show(tensors[key])}, expected {_show(wanted[key])}"),
    ]
    if problems:
        raise CheckpointError("\n".join([f"{where} does not fit the model (another config.json, or another class?):", *problems]))
    if dropped:
        logger.warning("%s: left out, as another head's: %s", where, ", ".join(dropped))
    return dropped


def _show(tensor: Tensor) -> str:
    path = getattr(tensor, "path", "")
    return f"{tensor.dtype} {list(tensor.shape)}" + (f" in {path}" if path else "")


def _fits(found: Tensor, expected: Tensor) -> bool:
    """Same shape, and a dtype that casts: 8-bit floats and integers stand for quantised numbers, which their scales belong to."""
    floats = [jnp.issubdtype(t.dtype, jnp.floating) and t.dtype.itemsize > 1 for t in (found, expected)]
    integers = [jnp.issubdtype(t.dtype, jnp.integer) for t in (found, expected)]
    return found.shape == expected.shape and (found.dtype == expected.dtype or all(floats) or all(integers))


# ---- arrays ----------------------------------------------------------------------------------------------------------


class _Budget:
    """Lets threads hold at most `limit` bytes together, or one of them any number."""

    def __init__(self, limit: int) -> None:
        self.free = self.limit = limit
        self.changed = threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        count = min(count, self.limit)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self.changed:
                self.free += count
                self.changed.notify_all()


def _place(
    tree: Tensors, expected: Mapping[str, jax.ShapeDtypeStruct], keep_dtypes: bool, progress: bool | None, remote: bool
) -> dict[str, jax.Array]:
    from tqdm import tqdm

    def dtype(name: str) -> np.dtype:
        stored = tree[name].dtype
        return stored if keep_dtypes and jnp.issubdtype(stored, jnp.floating) else np.dtype(expected[name].dtype)

    def size(name: str) -> int:
        """Bytes that this process reads of it."""
        return sum(math.prod(lengths(index)) for index in _indices(tree[name].shape, expected[name].sharding)) * dtype(name).itemsize

    sizes = {name: size(name) for name in tree}
    budget, device = _Budget(max(sizes.values(), default=0)), jax.config.jax_default_device  # type: ignore[attr-defined]

    def one(name: str) -> jax.Array:
        with budget.take(sizes[name]), jax.default_device(device):  # a default device set by a context is this thread's alone
            return _array(tree[name], dtype(name), expected[name].sharding, remote)

    bar = tqdm(total=sum(sizes.values()), desc="Loading", unit="B", unit_scale=True, delay=2, disable=quiet(progress))
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        futures = {pool.submit(one, name): name for name in tree}
        arrays = {}
        try:
            for future in as_completed(futures):
                arrays[futures[future]] = future.result()
                bar.update(sizes[futures[future]])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return arrays


def _indices(shape: tuple[int, ...], sharding: Any) -> list[Index]:
    """The slices that this process' devices hold, each once."""
    if sharding is None:
        return [full_index((), shape)]
    found = (full_index(index, shape) for index in sharding.addressable_devices_indices_map(shape).values())
    return list({tuple((s.start, s.stop) for s in index): index for index in found}.values())


def _array(tensor: Tensor, dtype: np.dtype, sharding: Any, remote: bool) -> jax.Array:
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    indices = _indices(tensor.shape, sharding)
    box = tuple(slice(min(s.start for s in along), max(s.stop for s in along)) for along in zip(*indices))
    base, start = tensor, (0,) * len(tensor.shape)
    if remote and len(indices) > 1 and sum(math.prod(lengths(index)) for index in indices) == math.prod(lengths(box)):
        base, start = NumpyTensor(tensor.read(box)), tuple(s.start for s in box)  # neighbours at once: requests cost more than memory

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        index = full_index(index or (), tensor.shape)
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:  # replicas of a shard are read once
            parts[key] = _aligned(lengths(index), dtype)
            base.read_into(parts[key], [slice(s.start - a, s.stop - a) for s, a in zip(index, start)])
        return parts[key]

    if sharding is None:
        return jax.device_put(read(())).block_until_ready()
    return jax.make_array_from_callback(tensor.shape, sharding, read, dtype).block_until_ready()


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Empty memory at the alignment that lets a CPU device take it over instead of copying it."""
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)


def _as_expected(name: str, array: jax.Array, spec: jax.ShapeDtypeStruct) -> jax.Array:
    if array.shape != spec.shape:
        raise ValueError(f"init gave {name} the shape {list(array.shape)}, expected {list(spec.shape)}")
    return jax.device_put(array.astype(spec.dtype), spec.sharding)
