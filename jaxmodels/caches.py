"""Which memory a layer gets: the names of HF's `cache_implementation` and what stands behind them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from jaxmodels.cache import EncoderDecoderSpec, LayerSpec, SlidingKVSpec
from jaxmodels.cache_offloaded import OffloadedCache
from jaxmodels.cache_quantized import QuantizedCache
from jaxmodels.cache_sink import SinkCache


class CacheImplementation(Protocol):
    """A frozen dataclass, so that a cache's kind is a static argument."""

    def layer_spec(self, spec: LayerSpec) -> LayerSpec:
        """What a layer that declares `spec` remembers; itself where it is not concerned."""
        ...


PLAIN = ("dynamic", "static", "hybrid", "hybrid_chunked")  # every layer's own memory: full, or its window
WINDOW = "sliding_window"
KINDS: dict[str, type[Any]] = {
    "quantized": QuantizedCache, "sink": SinkCache, "offloaded": OffloadedCache, "offloaded_static": OffloadedCache,
    "offloaded_hybrid": OffloadedCache, "offloaded_hybrid_chunked": OffloadedCache,
}  # fmt: skip
NAMES = (*PLAIN, WINDOW, *KINDS)


def cache_implementation(name: Any, config: Mapping[str, Any] | None = None) -> Any:
    """What `name` and HF's `cache_config` mean: None for every layer's own memory, else a CacheImplementation, as which `name` may come.
    ValueError lists the names, or the options of one."""
    if name is not None and not isinstance(name, str):
        if config:
            raise ValueError(f"cache_config={dict(config)} beside {name}, which says it all; pass one of the two")
        return name
    if name is not None and name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"cache_implementation is {name!r}{hint}; expected one of {', '.join(NAMES)}")
    kind = KINDS.get(name or "")
    known = [] if kind is None else [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(config or {}) - set(known))
    if unknown:
        raise ValueError(f"cache_config has {', '.join(unknown)}; {name or 'the default cache'} knows {', '.join(known) or 'no options'}")
    return kind(**(config or {})) if kind is not None else WINDOW if name == WINDOW else None


def layer_specs(config: Any, implementation: Any) -> dict[Hashable, LayerSpec]:
    """What the layers of each of a model config's kinds remember. ValueError where the implementation concerns none of them."""
    own = {kind: config.layer_spec(kind) for kind in config.layer_kinds}
    made = cache_implementation(implementation)
    if made is None:
        return own
    if made == WINDOW:
        if not any(isinstance(spec, SlidingKVSpec) for spec in own.values()):
            raise ValueError(f"cache_implementation={WINDOW!r}: no layer of {config.model_type} has a window; its cache is 'static'")
        return own
    specs = {kind: _spec(spec, made) for kind, spec in own.items()}
    if specs == own:
        held = ", ".join(sorted({type(spec).__name__ for spec in own.values()}))
        raise ValueError(
            f"{made} is for layers of full attention; those of {config.model_type} ({held}) have memory of a fixed size already: leave out "
            "cache_implementation"
        )
    return specs


def _spec(spec: LayerSpec, made: CacheImplementation) -> LayerSpec:
    if isinstance(spec, EncoderDecoderSpec):
        return dataclasses.replace(spec, own=made.layer_spec(spec.own))
    return made.layer_spec(spec)
