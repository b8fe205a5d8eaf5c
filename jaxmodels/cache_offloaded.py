"""Keys and values in the host's memory: a layer's come to the device when it attends, and only blocks with new ones go back.

Axis letters: B batch, S slots, T new tokens, K kv heads, H head dim, L stacked layers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxmodels.cache import KV, KVSpec, LayerSpec
from jaxmodels.ops.slots import at_layer, write_slots

BLOCK = 16  # slots that go to the host together: a TPU sends whole tiles


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
        return OffloadedKV(to_host_memory(self.full.init(batch, slots, dtype, layers=layers, heads_first=False)))


class OffloadedKV(struct.PyTreeNode):
    """A KV whose arrays are in the host's memory."""

    kv: KV
    memory_kind: ClassVar[str] = "pinned_host"

    @property
    def axes(self) -> OffloadedKV:
        return OffloadedKV(self.kv.axes)

    def update(self, k: jax.Array, v: jax.Array | None, step: Any) -> tuple[OffloadedKV, jax.Array, Any, jax.Array]:
        """As KV's."""
        kv, T, S = self.kv, k.shape[1], self.kv.k.shape[-3]
        size = min(S, BLOCK * ((T + BLOCK - 2) // BLOCK + 1))  # of the blocks that T slots can touch
        start = step.index // BLOCK * BLOCK

        def write(old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
            if step.fresh:
                return write_slots(old, jnp.pad(new, ((0, 0), (0, size - T), (0, 0), (0, 0))), 0, False, step.layer), new
            whole = to_device_memory(at_layer(old, step.layer))
            whole = lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), step.index, 1)
            return write_slots(old, lax.dynamic_slice_in_dim(whole, start, size, 1), start, False, step.layer), whole

        new_k, k = write(kv.k, k)
        new_v, v = (None, None) if v is None else write(kv.v, v)  # type: ignore[arg-type]
        return OffloadedKV(kv.replace(k=new_k, v=new_v)), k, v, step.key_positions

    def resize(self, slots: int) -> OffloadedKV:
        return OffloadedKV(to_host_memory(to_device_memory(self.kv).resize(slots)))

    def take(self, rows: jax.Array) -> OffloadedKV:
        return OffloadedKV(to_host_memory(to_device_memory(self.kv).take(rows)))

    def gather(self, order: jax.Array) -> OffloadedKV:
        return OffloadedKV(to_host_memory(to_device_memory(self.kv).gather(order)))


def to_host_memory(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def to_device_memory(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)
