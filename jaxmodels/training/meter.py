"""How fast a run goes and what it holds: tokens, model FLOPs, their share of the devices' peak, memory, time left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.sharding.chips import chip_of
from jaxmodels.sharding.flops import count_flops


def input_tokens(arrays: Mapping[str, np.ndarray], *, padding: bool = False, pad_token_id: int | None = None) -> int:
    """How many tokens a batch's inputs have; without padding by its masks, where there are none by the padding token."""
    known = [name for name in arrays if name.endswith(("input_ids", "attention_mask")) and not name.startswith("decoder")]
    total = 0
    for part in {name.removesuffix("input_ids").removesuffix("attention_mask") for name in known}:
        ids, mask = arrays.get(f"{part}input_ids"), arrays.get(f"{part}attention_mask", arrays.get("segment_ids"))
        if padding or mask is None:
            real = ids if padding or pad_token_id is None else ids[ids != pad_token_id]  # type: ignore[index]
            total += 0 if real is None else real.size
        else:
            total += int(np.count_nonzero(mask))
    return total


def peak_flops(device: jax.Device) -> float | None:
    """Of one device a second, in bfloat16, where it is known."""
    chip = chip_of(device.device_kind)
    return chip.flops if chip else None


def device_memory(devices: Any) -> int | None:
    """The most bytes that one of this process's devices has held, where the platform tells."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return max(peaks, default=None)


def host_memory() -> int:
    """Bytes that this process holds in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def trim_host_memory() -> None:
    """What was freed between arrays that live goes back to the system; glibc keeps it, after setting up a run as much as its parameters."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Counts steps, tokens and FLOPs. The clock of a run starts when its first step has ended, since that one compiles, and stands still
    where `pause` says. step: the train step for a number of parts, without recomputation; its FLOPs are those over all devices."""

    def __init__(self, model: Any, step: Callable[[int], Callable[..., Any]]):
        self.step = step
        self.devices = [jax.devices()[0]] if model.rules is None else list(model.rules.mesh.devices.flat)
        peak = peak_flops(self.devices[0])
        self.peak = None if peak is None else peak * len(self.devices)
        self.known: dict[Any, float] = {}
        self.begun: float | None = None
        self.steps = self.tokens = self.total = 0
        self.flops = self.paused = self.last = 0.0

    def flops_of(self, batch: Mapping[str, jax.Array], parts: int, state: Any, key: jax.Array) -> float:
        """Of one step; traced once for every shape of a batch."""
        known = (parts, *((name, array.shape) for name, array in batch.items()))
        if known not in self.known:
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, dict(batch), key))
            self.known[known] = count_flops(self.step(parts), *shapes, recomputed=False)
        return self.known[known]

    def start(self) -> None:
        self.begun = self.last = time.perf_counter()

    def add(self, tokens: int, flops: float) -> None:
        """A step that has been begun."""
        if self.begun is not None:
            self.steps, self.tokens, self.flops = self.steps + 1, self.tokens + tokens, self.flops + flops
            self.total += 1

    def pause(self, seconds: float) -> None:
        self.paused += seconds

    def read(self, steps_left: int) -> dict[str, float]:
        """Since the last reading, of steps that have ended; nothing before the first."""
        found: dict[str, float] = {}
        now = time.perf_counter()
        if self.begun is not None and self.steps:
            seconds = max(now - self.last - self.paused, 1e-9)
            found["tokens_per_second"] = self.tokens / seconds
            found["model_flops_per_second"] = self.flops / seconds
            if self.peak is not None:
                found["mfu"] = self.flops / seconds / self.peak
            found["seconds_left"] = (now - self.begun) / self.total * steps_left
        self.steps = self.tokens = 0
        self.flops = self.paused = 0.0
        self.last = now
        memory = device_memory(self.devices)
        if memory is not None:
            found["device_memory"] = memory
        found["host_memory"] = host_memory()
        return found
