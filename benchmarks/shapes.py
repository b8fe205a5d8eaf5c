"""Public shapes with random weights, the same for torch and for jaxmodels, and the clock that compares the two."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def torch_llama(dtype: str = "float32", **changes: Any) -> Any:
    """A transformers LlamaForCausalLM of the SmolLM2-135M shape with random weights, in eval mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SMOLLM2_135M | changes))
    return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def write_checkpoint(path: Path, dtype: str = "float32", **changes: Any) -> None:
    torch_llama(dtype, **changes).save_pretrained(path)


def paired(runs: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each run, taken in turn. Before each that counts comes one that does not: the idle threads of the library before it
    spin for a while, and its memory goes back to the system."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
