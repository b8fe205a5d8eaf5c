"""One family of each class of architecture, torch `transformers` and jaxmodels in turn, float32, random weights: a table with ratios.

    python benchmarks/classes.py [--only moe,ssm,sliding,dense] [--rounds 3]
    python benchmarks/classes.py --only compile    # tracing and compiling 4 and 32 scanned layers

A ratio is torch's time over ours: above 1 jaxmodels is faster. Needs the extra `test`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from shapes import SMOLLM2_135M, paired, versions

import jaxmodels as jm

NEW = 32
GRANITE_MOE = {  # granite-3.0-1b-a400m's first 8 of 24 layers: 32 experts of 512, 8 a token
    "vocab_size": 49155, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
    "logits_scaling": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625,
}  # fmt: skip
MAMBA_130M = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "expand": 2, "conv_kernel": 4}
GEMMA_3_270M = {
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256,
}  # fmt: skip
CLASSES = {  # name -> model_type, shape, prompt of a prefill, prompt of decoding
    "dense": ("llama", SMOLLM2_135M, (4, 512), (1, 64)),
    "moe": ("granitemoe", GRANITE_MOE, (4, 256), (1, 64)),
    "ssm": ("mamba", MAMBA_130M, (4, 512), (1, 64)),
    "sliding": ("gemma3_text", GEMMA_3_270M, (2, 1024), (1, 700)),
}


def ids(shape: tuple[int, int], vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, vocab_size, shape).astype(np.int32)


def compare(name: str, rounds: int) -> None:
    model_type, shape, prefill, decode = CLASSES[name]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **shape)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params = jm.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        jax.block_until_ready(params)
    forward = jax.jit(lambda params, prompt: model.apply({"params": params}, prompt, logits_to_keep=1).logits)
    prompt = ids(prefill, shape["vocab_size"])

    def torch_prefill() -> None:
        with torch.inference_mode():
            theirs(torch.tensor(prompt, dtype=torch.long), use_cache=False, logits_to_keep=1)

    row(
        f"{name}: {model_type} prefill {prefill[0]}×{prefill[1]}",
        torch_prefill,
        lambda: forward(params, prompt).block_until_ready(),
        prompt.size,
        rounds,
    )
    start = ids(decode, shape["vocab_size"])
    options: Any = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def torch_decode() -> None:
        tokens = torch.tensor(start, dtype=torch.long)
        with torch.inference_mode():
            theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    ours = lambda: jm.generate(model, params, start, np.ones_like(start), **options)
    row(f"{name}: {model_type} generate {NEW} after {decode[0]}×{decode[1]}", torch_decode, ours, decode[0] * NEW, rounds)


def row(name: str, theirs: Any, ours: Any, tokens: int, rounds: int) -> None:
    times = paired({"torch": theirs, "jaxmodels": ours}, rounds)
    per_second = [tokens / times[side] for side in ("torch", "jaxmodels")]
    print(f"| {name} | {per_second[0]:.1f} | {per_second[1]:.1f} | tokens/s | {per_second[1] / per_second[0]:.2f} |", flush=True)


def compilation() -> None:
    """Seconds to lower and to compile a train step's gradient of 4 and of 32 scanned layers."""
    from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM

    print("| scanned layers | lower, s | compile, s |\n|---|---|---|")
    for layers in (4, 4, 32):  # the first warms the tracing machinery up
        model = LlamaForCausalLM(LlamaConfig.from_dict(SMOLLM2_135M | {"num_hidden_layers": layers}), scan_layers=True, remat="full")
        tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
        loss = lambda params, tokens, model=model: model.apply({"params": params}, tokens, labels=tokens).loss
        start = time.perf_counter()
        lowered = jax.jit(jax.grad(loss)).lower(jm.abstract_params(model), tokens)
        middle = time.perf_counter()
        lowered.compile()
        print(f"| {layers} | {middle - start:.2f} | {time.perf_counter() - middle:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CLASSES), help="comma-separated, of %(default)s, or compile")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {versions()}\n")
    if args.only == "compile":
        return compilation()
    print("| job | torch | jaxmodels | unit | ratio |\n|---|---|---|---|---|")
    for name in args.only.split(","):
        compare(name, args.rounds)


if __name__ == "__main__":
    main()
