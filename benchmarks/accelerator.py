"""How much of one GPU or TPU chip is used: bfloat16, random weights, the table on standard output and, with --out, in a file.

    python benchmarks/accelerator.py                      # Llama-3-8B's shape on an accelerator, a tiny one on CPU
    python benchmarks/accelerator.py --only decode --out table.md

prefill: a prompt into a fresh cache; the share is MFU, FLOPs of the matrix products (causal attention whole) over the chip's peak.
decode: a token of `generate`, the difference of a longer and a shorter run; the share is that of the memory's bandwidth, from the bytes of
the weights and of the cached tokens that a step has to read. train: one AdamW step of Llama-3.2-1B's shape, rematerialised; its MFU counts
no recomputation. Needs no extra but the platform's (`cuda` or `tpu`), and no torch."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shapes import paired

import jaxmodels as jm
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.sharding.chips import chip_of
from jaxmodels.sharding.flops import count_flops
from jaxmodels.training import create_train_state, make_train_step

LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32, "rope_theta": 500000.0}
SHAPES = {
    "llama-3-8b": LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama-3.2-1b": LLAMA_3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def build(shape: str, **options: Any) -> LlamaForCausalLM:
    attention = "splash" if jax.default_backend() == "tpu" else None
    return LlamaForCausalLM(LlamaConfig.from_dict(SHAPES[shape]), dtype=jnp.bfloat16, attn_implementation=attention, **options)


def ids(model: LlamaForCausalLM, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, length)).astype(np.int32)


def flops(model: LlamaForCausalLM, function: Any, *arguments: Any) -> float:
    """Of function(model, *arguments), with attention written out and nothing recomputed."""
    plain = dataclasses.replace(model, attn_implementation=None, remat=None)
    return count_flops(lambda *arguments: function(plain, *arguments), *arguments)


def prefill(shape: str, small: bool, rounds: int) -> list[tuple]:
    model = build(shape)
    params = jm.init_params(model, jax.random.key(0), jnp.bfloat16)

    def run(model: LlamaForCausalLM, params: Any, prompt: jax.Array) -> jax.Array:
        cache = jm.init_cache(model, *prompt.shape)
        return model.apply({"params": params}, prompt, cache=cache, logits_to_keep=1).logits  # type: ignore[union-attr]

    rows = []
    for batch, length in ((2, 16),) if small else ((1, 2048), (4, 2048), (1, 8192)):
        prompt = ids(model, batch, length)
        forward = partial(jax.jit(run, static_argnums=0), model, params, prompt)
        seconds = paired({"": lambda forward=forward: forward().block_until_ready()}, rounds)[""]
        work = flops(model, run, jm.abstract_params(model, jnp.bfloat16), jnp.asarray(prompt))
        rows.append((f"prefill {shape} {batch}×{length}", batch * length / seconds, work / seconds, None))
    return rows


def decode(shape: str, small: bool, rounds: int) -> list[tuple]:
    model = build(shape)
    params = jm.init_params(model, jax.random.key(0), jnp.bfloat16)
    c = model.config
    weights = 2 * (jm.count_params(params) - (0 if c.tie_word_embeddings else params["model"]["embed_tokens"]["weight"].size))
    short, long = (4, 12) if small else (32, 160)
    rows = []
    for batch, length in ((2, 8),) if small else ((1, 512), (16, 512), (64, 512), (16, 4096)):
        prompt = ids(model, batch, length)
        run = partial(jm.generate, model, params, prompt, np.ones_like(prompt), pad_token_id=0)
        times = paired({str(n): partial(run, min_new_tokens=n, max_new_tokens=n) for n in (short, long)}, rounds)
        seconds = (times[str(long)] - times[str(short)]) / (long - short)
        cached = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (length + (short + long) / 2) * batch
        rows.append((f"decode {shape} {batch} rows after {length}", batch / seconds, None, (weights + cached) / seconds))
    return rows


def train(shape: str, small: bool, rounds: int) -> list[tuple]:
    shape = "tiny" if small else "llama-3.2-1b"
    model = build(shape, scan_layers=True, remat="full")
    batch, length = (2, 16) if small else (8, 2048)
    tokens, optimizer = ids(model, batch, length), optax.adamw(1e-4)
    state = [create_train_state(model, optimizer, jm.init_params(model, jax.random.key(0)))]
    step = make_train_step(model, optimizer)

    def run() -> None:
        state[0], metrics = step(state[0], {"input_ids": tokens, "labels": tokens})
        metrics["loss"].block_until_ready()

    gradient = lambda model, params, ids: jax.grad(lambda params: model.apply({"params": params}, ids, labels=ids).loss)(params)
    seconds = paired({"": run}, rounds)[""]
    work = flops(model, gradient, jm.abstract_params(model), jnp.asarray(tokens))
    return [(f"train {shape} {batch}×{length}", batch * length / seconds, work / seconds, None)]


JOBS = {"prefill": prefill, "decode": decode, "train": train}


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(JOBS), help="comma-separated, of %(default)s")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-3-8b, on CPU tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args(arguments)
    device = jax.devices()[0]
    shape = args.shape or ("tiny" if device.platform == "cpu" else "llama-3-8b")
    chip = chip_of(device.device_kind)
    peak = f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s" if chip else "peaks not known"
    lines = [f"{device.device_kind} ({peak}), bfloat16, jax {version('jax')}, flax {version('flax')}", ""]
    lines += ["| job | tokens/s | TFLOP/s | GB/s | share of the peak |", "|---|---|---|---|---|"]
    for name in args.only.split(","):
        for job, tokens, work, moved in JOBS[name](shape, shape == "tiny", args.rounds):
            share = f"{100 * (work / chip.flops if work else moved / chip.bandwidth):.1f} %" if chip else ""
            number = lambda value, unit: "" if value is None else f"{value / unit:.1f}"
            lines.append(f"| {job} | {tokens:.1f} | {number(work, 1e12)} | {number(moved, 1e9)} | {share} |")
    table = "\n".join(lines)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")
    return table


if __name__ == "__main__":
    main()
