"""Peak host memory of train steps of SmolLM2-135M's shape, float32 AdamW, 4×256 tokens, each case in a fresh process; and what packing and
accumulation cost in time.

    python benchmarks/train_memory.py [--only memory,time] [--rounds 3]

peak: of RssAnon, sampled every millisecond from /proc/self/status while two steps run: the process, parameters, moments, gradients and
whatever a step needs besides. What was freed before them is given back first, as Trainer does, on torch's side too; the program is compiled
before. torch is eager, without gradient checkpointing. temporaries: what the compiler sets aside for the step, gradients among it. Needs
the extra `test`."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from load_memory import sampled
from shapes import SMOLLM2_135M, paired, torch_llama, versions

ROOT = Path(__file__).resolve().parent.parent
STEPS, B, T = 2, 4, 256
CASES: dict[str, dict[str, Any]] = {  # name -> options of the step, of the model
    "torch eager": {},
    "jaxmodels": {},
    "loss_chunk=64": {"step": {"loss_chunk": 64}},
    "accumulation_steps=2": {"step": {"accumulation_steps": 2}},
    "accumulation_steps=4": {"step": {"accumulation_steps": 4}},
    "scanned": {"model": {"scan_layers": True}},
    "scanned, remat": {"model": {"scan_layers": True, "remat": "full"}},
    "scanned, remat, loss_chunk=64": {"model": {"scan_layers": True, "remat": "full"}, "step": {"loss_chunk": 64}},
}


def ids(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, SMOLLM2_135M["vocab_size"], (rows, T)).astype(np.int32)


def measure(case: str) -> dict[str, int]:
    step, temporary = torch_step() if case.startswith("torch") else our_step(CASES[case])
    ctypes.CDLL(None).malloc_trim(0)
    with sampled() as peak:
        for _ in range(STEPS):
            step()
    return {"peak": peak["RssAnon"], **temporary}


def torch_step() -> tuple[Callable[[], None], dict[str, int]]:
    import torch

    model = torch_llama().train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    tokens = torch.tensor(ids(B), dtype=torch.long)

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        adam.step()
        adam.zero_grad()

    return step, {}


def our_step(options: dict[str, Any]) -> tuple[Callable[[], None], dict[str, int]]:
    from jaxmodels.training import make_train_step

    model, optimizer, held = build(options.get("model", {}))
    batch = {"input_ids": ids(B), "labels": ids(B)}
    program = make_train_step(model, optimizer, **options.get("step", {})).lower(held[0], batch).compile()

    def run() -> None:
        held[0], metrics = program(held[0], batch)
        metrics["loss"].block_until_ready()

    return run, {"temporaries": program.memory_analysis().temp_size_in_bytes}


def build(options: dict[str, Any], **changes: Any) -> tuple[Any, Any, list[Any]]:
    """The model, AdamW, and the state, which alone holds parameters."""
    import jax
    import optax

    import jaxmodels as jm
    from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
    from jaxmodels.training import create_train_state

    model = LlamaForCausalLM(LlamaConfig.from_dict(SMOLLM2_135M | changes), **options)
    optimizer = optax.adamw(1e-4, weight_decay=0.0)
    return model, optimizer, [create_train_state(model, optimizer, jm.init_params(model, jax.random.key(0)))]


def show_memory(rounds: int) -> None:
    print("| MB | peak RssAnon | temporaries |\n|---|---|---|")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
        values = (f"{found[key] / 1e6:.0f}" if key in found else "" for key in ("peak", "temporaries"))
        print(f"| {case} | {' | '.join(values)} |", flush=True)


def show_time(rounds: int) -> None:
    """Seconds a step of several ways to see documents, with 8 of the 30 layers."""
    from jaxmodels.training import make_train_step
    from jaxmodels.training.packing import pack_documents

    rng = np.random.default_rng(1)
    documents = [rng.integers(1, SMOLLM2_135M["vocab_size"], n).astype(np.int32) for n in (64, 192, 96, 160, 128, 128, 32, 224)]
    padded = {"input_ids": np.zeros((len(documents), T), np.int32), "labels": np.full((len(documents), T), -100, np.int32)}
    for row, document in enumerate(documents):
        padded["input_ids"][row, : len(document)] = padded["labels"][row, : len(document)] = document
    plain = lambda rows: {"input_ids": ids(rows), "labels": ids(rows)}
    model, optimizer, held = build({}, num_hidden_layers=8)
    whole, chunked, halves, quarters = (
        make_train_step(model, optimizer, **options)
        for options in ({}, {"loss_chunk": 64}, {"accumulation_steps": 2}, {"accumulation_steps": 4})
    )
    jobs = {
        "4 rows, each one document": (whole, plain(4)),
        "4 rows, loss_chunk=64": (chunked, plain(4)),
        "8 documents packed in 4 rows": (whole, pack_documents(documents, T)),
        "the 8 documents, padded": (whole, padded),
        "8 rows, each one document": (whole, plain(8)),
        "8 rows in 2 parts": (halves, plain(8)),
        "8 rows in 4 parts": (quarters, plain(8)),
    }

    def run(step: Any, batch: dict[str, np.ndarray]) -> None:
        held[0], metrics = step(held[0], batch)
        metrics["loss"].block_until_ready()

    for job in jobs.values():
        run(*job)  # compiles
    times = paired({name: lambda job=job: run(*job) for name, job in jobs.items()}, rounds)
    print("| step | s | over the first | rows over the first's |\n|---|---|---|---|")
    first = next(iter(jobs))
    for name, (_, batch) in jobs.items():
        print(f"| {name} | {times[name]:.2f} | {times[name] / times[first]:.2f} | {len(batch['labels']) / 4:.0f} |", flush=True)


JOBS = {"memory": show_memory, "time": show_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(JOBS), help="comma-separated, of %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.case:
        print(json.dumps(measure(args.case)))
        return
    print(f"{os.cpu_count()} cores, {versions()}\n")
    for name in args.only.split(","):
        JOBS[name](args.rounds)


if __name__ == "__main__":
    main()
