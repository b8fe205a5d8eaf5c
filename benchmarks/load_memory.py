"""Peak host memory of loading and saving a checkpoint of SmolLM2-135M's shape (float32, 538 MB), each case in a fresh process; the
cases "over HTTP" read it by ranges from a server here, which takes aiohttp.

    python benchmarks/load_memory.py

A thread samples RssAnon and RssFile from /proc/self/status every millisecond. The bound on RssAnon is 1.15 x the resident parameters + the
largest tensor of the file; `process` is what an idle process with jax and its backend holds, and is part of the peak. File pages are the
mapped checkpoint: the kernel takes them back whenever it needs them, so they are shown apart. Exit status 1 when a case is over."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYERS, HIDDEN, KV, MLP, VOCAB = 30, 576, 192, 1536, 49152
CASES = {  # name -> dtype, scanned, virtual devices
    "float32": ("float32", False, 1),
    "float32, scanned": ("float32", True, 1),
    "bfloat16": ("bfloat16", False, 1),
    "float32, fsdp over 8": ("float32", False, 8),
    "float32, over HTTP": ("float32", False, 1),
    "float32, fsdp over 8, over HTTP": ("float32", False, 8),
    "save float32": ("float32", False, 1),
}


def shapes(scanned: bool = False) -> dict[str, tuple[int, ...]]:
    block = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    block |= {f"self_attn.{name}_proj": (rows, HIDDEN) for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN))}
    block |= {"mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
    if scanned:
        layers = {f"model.layers.0:{LAYERS}:1.{name}.weight": (LAYERS, *shape) for name, shape in block.items()}
    else:
        layers = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in block.items()}
    return {"model.embed_tokens.weight": (VOCAB, HIDDEN), **layers, "model.norm.weight": (HIDDEN,)}


def memory() -> dict[str, int]:
    with open("/proc/self/status") as file:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith(("RssAnon", "RssFile"))}


@contextmanager
def sampled() -> Iterator[dict[str, int]]:
    peak, stop = memory(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            for key, value in memory().items():
                peak[key] = max(peak[key], value)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def measure(directory: str, case: str) -> dict[str, Any]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxmodels.convert.files import read_checkpoint, write_checkpoint
    from jaxmodels.convert.load import load, unload

    dtype, scanned, count = CASES[case]
    mesh = jax.make_mesh((count,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    along = lambda shape: PartitionSpec(None, "x") if "HTTP" in case and len(shape) > 1 else PartitionSpec("x")  # columns are the harder
    sharding = lambda shape: NamedSharding(mesh, along(shape)) if count > 1 else None
    expected = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(shape)) for name, shape in shapes(scanned).items()}
    jax.block_until_ready(jax.device_put(0))
    process = memory()
    saving = case.startswith("save")
    source = read_checkpoint(directory)
    largest = max(tensor.nbytes for tensor in source.values())
    if saving:
        arrays, _ = load(source, expected, base_prefix="model")
    with sampled() as peak:
        begun = time.perf_counter()
        if saving:
            write_checkpoint(Path(directory).parent / "out", unload(arrays, base_prefix="model"))
        else:
            arrays, _ = load(source, expected, base_prefix="model")
        seconds = time.perf_counter() - begun
    resident = sum(array.nbytes for array in arrays.values())
    bound = round(1.15 * resident) + largest
    return {"process": process["RssAnon"], "resident": resident, "bound": bound, "seconds": seconds, "after": memory()["RssAnon"], **peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.directory, options.case)))
        return 0

    import numpy as np

    from jaxmodels.convert.files import write_checkpoint
    from jaxmodels.convert.tensors import as_tensor

    rng, over = np.random.default_rng(0), False
    sys.path.insert(0, str(ROOT / "tests"))
    from processes import serving

    with tempfile.TemporaryDirectory() as temporary, serving(temporary) as (url, _):
        tensors = {name: as_tensor(rng.standard_normal(shape, np.float32)) for name, shape in shapes().items()}
        write_checkpoint(Path(temporary) / "in", tensors)
        columns = ("process", "resident", "peak RssAnon", "bound", "after", "file pages", "seconds")
        print(f"{'MB':32}" + "".join(f"{column:>14}" for column in columns))
        for case, (_, _, count) in CASES.items():
            flags = f"--xla_force_host_platform_device_count={count}"
            command = [sys.executable, __file__, "--case", case, "--directory", f"{url if 'HTTP' in case else temporary}/in"]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
            found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            values = [found[key] / 1e6 for key in ("process", "resident", "RssAnon", "bound", "after", "RssFile")]
            over |= found["RssAnon"] > found["bound"]
            print(f"{case:32}" + "".join(f"{value:14.0f}" for value in values) + f"{found['seconds']:14.2f}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
