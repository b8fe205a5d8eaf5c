"""torch `transformers` and jaxmodels in turn, on random weights of the SmolLM2-135M shape: a table with ratios.

    python benchmarks/speed.py [--only decode,prefill,train,first-token,overhead] [--rounds 5]

A ratio is torch's time over ours, both taken in turn in one process: above 1 jaxmodels is faster. Needs the extra `test`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import torch
from shapes import SMOLLM2_135M, paired, versions, write_checkpoint

import jaxmodels as jm
from jaxmodels.training import create_train_state, make_train_step

VOCAB = SMOLLM2_135M["vocab_size"]
NEW = 64


def ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, (batch, length)).astype(np.int32)


def both(folder: Path, dtype: str) -> tuple[Any, Any, Any]:
    """The same checkpoint in torch and in jaxmodels."""
    import transformers

    path = folder / dtype
    if not path.exists():
        write_checkpoint(path, dtype)
    model, params = jm.AutoModelForCausalLM.from_pretrained(path)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval(), model, params


def row(name: str, times: dict[str, float], work: float, unit: str) -> None:
    torch_s, ours = times["torch"], times["jaxmodels"]
    print(f"| {name} | {work / torch_s:.1f} | {work / ours:.1f} | {unit} | {torch_s / ours:.2f} |", flush=True)


def decode(folder: Path, rounds: int) -> None:
    for dtype in ("float32", "bfloat16"):
        theirs, model, params = both(folder, dtype)
        for batch in (1, 8):
            prompt = ids(batch, 32)
            mask = np.ones_like(prompt)

            def run_torch(prompt: np.ndarray = prompt, theirs: Any = theirs) -> None:
                tokens = torch.tensor(prompt, dtype=torch.long)
                with torch.inference_mode():
                    theirs.generate(
                        tokens,
                        attention_mask=torch.ones_like(tokens),
                        min_new_tokens=NEW,
                        max_new_tokens=NEW,
                        do_sample=False,
                        pad_token_id=0,
                    )

            def run_ours(prompt: np.ndarray = prompt, mask: np.ndarray = mask, model: Any = model, params: Any = params) -> None:
                out = jm.generate(model, params, prompt, mask, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0)
                assert out.lengths.tolist() == [NEW] * len(prompt)

            row(f"decode {dtype}, batch {batch}", paired({"torch": run_torch, "jaxmodels": run_ours}, rounds), batch * NEW, "tokens/s")


def prefill(folder: Path, rounds: int) -> None:
    prompt = ids(8, 128)
    for dtype in ("float32", "bfloat16"):
        theirs, model, params = both(folder, dtype)
        forward = jax.jit(lambda params, prompt, model=model: model.apply({"params": params}, prompt).logits)

        def run_torch(theirs: Any = theirs) -> None:
            with torch.inference_mode():
                theirs(torch.tensor(prompt, dtype=torch.long), use_cache=False)

        times = paired(
            {"torch": run_torch, "jaxmodels": lambda forward=forward, params=params: forward(params, prompt).block_until_ready()}, rounds
        )
        row(f"prefill {dtype}, 8×128", times, prompt.size, "tokens/s")


def train(folder: Path, rounds: int) -> None:
    """AdamW on 4×256 tokens, float32, no gradient checkpointing on either side."""
    theirs, model, params = both(folder, "float32")
    batch = ids(4, 256)
    theirs.train()
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0)
    tokens = torch.tensor(batch, dtype=torch.long)

    def run_torch() -> None:
        theirs(tokens, labels=tokens, use_cache=False).loss.backward()
        adam.step()
        adam.zero_grad()

    optimizer = optax.adamw(1e-4, weight_decay=0.0)
    state = [create_train_state(model, optimizer, params)]
    step = make_train_step(model, optimizer)

    def run_ours() -> None:
        state[0], metrics = step(state[0], {"input_ids": batch, "labels": batch})
        metrics["loss"].block_until_ready()

    row("train step float32, 4×256", paired({"torch": run_torch, "jaxmodels": run_ours}, rounds), batch.size, "tokens/s")


FIRST = {
    "torch": """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(1, 33)[None]
with torch.inference_mode():
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
""",
    "jaxmodels": """
import sys, numpy as np, jaxmodels as jm
model, params = jm.AutoModelForCausalLM.from_pretrained(sys.argv[1])
jm.generate(model, params, np.arange(1, 33, dtype=np.int32)[None], max_new_tokens=1)
""",
}


def first_token(folder: Path, rounds: int) -> None:
    """From a fresh process to the first token of a 32-token prompt, imports and loading included, compilation cache warm."""
    both(folder, "float32")
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    run = lambda code: subprocess.run(
        [sys.executable, "-c", code, str(folder / "float32")], check=True, env=environment, capture_output=True
    )
    times = paired({name: lambda code=code: run(code) for name, code in FIRST.items()}, rounds)
    print(
        f"| first token, fresh process | {times['torch']:.2f} | {times['jaxmodels']:.2f} | s | {times['torch'] / times['jaxmodels']:.2f} |"
    )


def overhead(folder: Path, rounds: int) -> None:
    """A repeated `generate` call of 2 tokens less twice the time a token takes within a longer one."""
    _, model, params = both(folder, "float32")
    prompt = ids(1, 32)
    run = lambda n: jm.generate(model, params, prompt, max_new_tokens=n, min_new_tokens=n)
    step = jax.jit(
        lambda params, prompt: model.apply({"params": params}, prompt, cache=jm.init_cache(model, 1, 48), logits_to_keep=1).logits
    )
    times = paired({"two": lambda: run(2), "ten": lambda: run(10), "prefill": lambda: step(params, prompt).block_until_ready()}, 3 * rounds)
    token = (times["ten"] - times["two"]) / 8
    print(f"| generate beyond its prefill and loop | | {1000 * (times['two'] - times['prefill'] - token):.1f} | ms | |")


JOBS = {"decode": decode, "prefill": prefill, "train": train, "first-token": first_token, "overhead": overhead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(JOBS), help="comma-separated, of %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {versions()}\n")
    print("| job | torch | jaxmodels | unit | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only.split(","):
            JOBS[name](Path(folder), args.rounds)


if __name__ == "__main__":
    main()
