"""Keys and values in the host's memory: a layer's come to the device when it attends, and only the new ones go back.

Axis letters: B batch, S slots, T new tokens, K kv heads, H head dim, L stacked layers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
from flax import struct

from jaxmodels.cache import KV, KVSpec, LayerSpec, _at, _swap, _write_slots


@dataclasses.dataclass(frozen=True)
class OffloadedCache:
    """HF's `cache_implementation="offloaded"` and "offloaded_static": the keys and values of full-attention layers in memory of kind
    `pinned_host`; layers of other kinds are small and stay on the device."""

    def layer_spec(self, spec: LayerSpec) -> LayerSpec:
        return OffloadedKVSpec(spec) if isinstance(spec, KVSpec) else spec


@dataclasses.dataclass(frozen=True)
class OffloadedKVSpec:
    """The full-attention layer `full`, its memory on the host."""

    full: KVSpec

    def init(self, batch: int, slots: int, dtype: Any, *, layers: int | None, heads_first: bool) -> OffloadedKV:
        # slots before heads everywhere: a TPU sends whole tiles to the host, and one slot of [S,H] is a part of one
        return OffloadedKV(to_host(self.full.init(batch, slots, dtype, layers=layers, heads_first=False)))


class OffloadedKV(struct.PyTreeNode):
    """A KV whose arrays are in the host's memory."""

    kv: KV
    memory_kind: ClassVar[str] = "pinned_host"

    @property
    def axes(self) -> OffloadedKV:
        return OffloadedKV(self.kv.axes)

    def update(self, k: jax.Array, v: jax.Array | None, step: Any) -> tuple[OffloadedKV, jax.Array, Any, jax.Array]:
        """As KV's."""
        kv = self.kv
        write = lambda old, new: _write_slots(old, new, step.index, kv.heads_first, step.layer)
        kv = kv.replace(k=write(kv.k, k), v=None if v is None else write(kv.v, v))  # type: ignore[arg-type]
        if not step.fresh:
            k, v = jax.tree.map(lambda x: _swap(to_device(_at(x, step.layer)), kv.heads_first), (kv.k, kv.v))
        return OffloadedKV(kv), k, v, step.key_positions

    def resize(self, slots: int) -> OffloadedKV:
        return OffloadedKV(to_host(to_device(self.kv).resize(slots)))

    def take(self, rows: jax.Array) -> OffloadedKV:
        return OffloadedKV(to_host(to_device(self.kv).take(rows)))


def to_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)
