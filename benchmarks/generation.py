"""`generate` of torch `transformers` and of jaxmodels in turn, on random weights of the SmolLM2-135M shape, float32: a table with ratios.

    python benchmarks/generation.py [--only beam,options] [--rounds 3]

A ratio is torch's time over ours, both taken in turn in one process: above 1 jaxmodels is faster. Needs the extra `test`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from shapes import SMOLLM2_135M, paired, versions, write_checkpoint

import jaxmodels as jm
from jaxmodels.processing.train import train_bpe

NEW = 64
BEAMS = 4


def ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, SMOLLM2_135M["vocab_size"], (batch, length)).astype(np.int32)


def beam(theirs: Any, model: Any, params: Any, rounds: int) -> None:
    """4 beams, 64 new tokens."""
    for batch, length in ((1, 32), (1, 512), (2, 32)):
        prompt = ids(batch, length)
        options = {"num_beams": BEAMS, "min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1}
        found = {}

        def run_torch(prompt: np.ndarray = prompt, options: Any = options, found: Any = found) -> None:
            tokens = torch.tensor(prompt, dtype=torch.long)
            with torch.inference_mode():
                found["torch"] = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options).numpy()

        def run_ours(prompt: np.ndarray = prompt, options: Any = options, found: Any = found) -> None:
            found["ours"] = jm.generate(model, params, prompt, np.ones_like(prompt), **options).sequences

        times = paired({"torch": run_torch, "jaxmodels": run_ours}, rounds)
        same = np.array_equal(found["torch"], found["ours"])
        row(f"{BEAMS} beams, batch {batch}, prompt {length}, tokens {'equal' if same else 'DIFFER'}", times, batch * NEW)


def reorder(theirs: Any, model: Any, params: Any, rounds: int) -> None:
    """A step of the model over 4 rows and what moving the cache adds, in ms."""
    rows = jnp.array([1, 0, 0, 2])
    moves: dict[str, Any] = {
        "no move": lambda cache: cache,
        "rows stay": lambda cache: cache.reorder(jnp.arange(BEAMS), cache.index - 16, cache.index),
        "16 columns differ": lambda cache: cache.reorder(rows, cache.index - 16, cache.index),
        "all columns differ": lambda cache: cache.reorder(rows, jnp.int32(0), cache.index),
        "take": lambda cache: cache.take(rows),
    }

    def loop(move: Any) -> Any:
        def body(params: Any, carry: Any) -> Any:
            out = model.apply({"params": params}, carry[0], cache=carry[1])
            return out.logits.argmax(-1), move(out.cache).replace(index=carry[1].index)

        token = jnp.ones((BEAMS, 1), jnp.int32)
        return jax.jit(lambda params, cache: jax.lax.fori_loop(0, 16, lambda _, carry: body(params, carry), (token, cache)))

    for slots in (96, 1024):
        start = jm.init_cache(model, BEAMS, slots).replace(index=jnp.int32(slots - 32), fresh=False)
        loops = {name: loop(move) for name, move in moves.items()}
        runs = {name: lambda run=run, start=start: jax.block_until_ready(run(params, start)) for name, run in loops.items()}
        for name, seconds in paired(runs, rounds).items():
            print(f"| step, {slots} slots, {name} | | {1000 * seconds / 16:.1f} | ms | |", flush=True)


def options(_: Any, model: Any, params: Any, rounds: int) -> None:
    """What sampling adds to greedy decoding, also with Llama 3's 128256 tokens, and what a JSON schema does; a vocabulary learnt from the
    standard library's source."""
    sources = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    tokenizer = train_bpe(sources, SMOLLM2_135M["vocab_size"])
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "year": {"type": "integer"}}, "required": ["name", "year"]}
    grammar = jm.Grammar.json_schema(tokenizer, schema, SMOLLM2_135M["vocab_size"])
    jobs: dict[str, dict[str, Any]] = {
        "greedy": {},
        "top-k 50 and top-p 0.9": {"do_sample": True, "top_k": 50, "top_p": 0.9, "key": jax.random.key(0)},
        "a JSON schema": {"grammar": grammar},
    }
    wide = dataclasses.replace(model.config, vocab_size=128256)
    rows = jax.random.normal(jax.random.key(0), (wide.vocab_size, wide.hidden_size)) * wide.initializer_range
    larger = {**params, "model": {**params["model"], "embed_tokens": {"weight": rows}}}
    sampled = {name: more for name, more in jobs.items() if "grammar" not in more}
    for said, which, weights, some in (("", model, params, jobs), (", 128256 tokens", model.clone(config=wide), larger, sampled)):
        for batch in (1, 8):
            prompt = ids(batch, 32)

            def run(prompt: np.ndarray = prompt, which: Any = which, weights: Any = weights, **more: Any) -> None:
                out = jm.generate(which, weights, prompt, np.ones_like(prompt), max_new_tokens=NEW, pad_token_id=1, eos_token_id=-1, **more)
                assert out.lengths.tolist() == [NEW] * len(prompt)

            times = paired({name: partial(run, **more) for name, more in some.items()}, rounds)
            for name, seconds in times.items():
                more = f"{100 * (seconds / times['greedy'] - 1):+.1f} %"
                print(f"| {name}{said}, batch {batch} | | {batch * NEW / seconds:.1f} | tokens/s | {more} |", flush=True)


def assisted(theirs: Any, model: Any, params: Any, rounds: int) -> None:
    """Drafts against our own plain greedy decoding, 64 new tokens. The prompt is 24 tokens said four times; a random model with tied
    embeddings goes on with one token again and again. For the draft model's sake all layers but three write next to nothing: with these
    three alone it nearly always drafts the right token, at a third of the work."""
    prompt, kept = np.tile(ids(1, 24), 4), 3
    layers = dict(params["model"]["layers"])
    quiet = lambda path, x: x * 1e-3 if "o_proj" in str(path) or "down_proj" in str(path) else x
    for i in range(kept, model.config.num_hidden_layers):
        layers[str(i)] = jax.tree_util.tree_map_with_path(quiet, layers[str(i)])
    put = lambda layers: {**params, "model": {**params["model"], "layers": layers}}
    short = model.clone(config=dataclasses.replace(model.config, num_hidden_layers=kept))
    draft = (short, put({str(i): layers[str(i)] for i in range(kept)}))
    options = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1}
    sure = {"num_assistant_tokens": 7, "assistant_confidence_threshold": 0.0}
    jobs: dict[str, tuple[Any, dict[str, Any]]] = {
        "prompt lookup, 7 drafts": (params, {"prompt_lookup_num_tokens": 7}),
        "prompt lookup, 15 drafts": (params, {"prompt_lookup_num_tokens": 15}),
        f"a draft model of {kept} layers, 7 drafts": (put(layers), {"assistant_model": draft, **sure}),
        f"early exit after {kept} layers, 7 drafts": (put(layers), {"assistant_early_exit": kept, **sure}),
    }
    for name, (params, more) in jobs.items():
        found = {}

        def run(way: str, params: Any = params, found: Any = found, **more: Any) -> None:
            found[way] = jm.generate(model, params, prompt, np.ones_like(prompt), **options, **more)

        times = paired({"greedy": partial(run, "greedy"), "drafts": partial(run, "drafts", **more)}, rounds)
        same = np.array_equal(found["greedy"].sequences, found["drafts"].sequences)
        said = f"{name}, {int(found['drafts'].assistance.rounds)} rounds, tokens {'equal' if same else 'DIFFER'}"
        print(f"| {said} | | {NEW / times['drafts']:.1f} | tokens/s | {times['greedy'] / times['drafts']:.2f} × greedy |", flush=True)


def row(name: str, times: dict[str, float], work: float) -> None:
    torch_s, ours = times["torch"], times["jaxmodels"]
    print(f"| {name} | {work / torch_s:.1f} | {work / ours:.1f} | tokens/s | {torch_s / ours:.2f} |", flush=True)


JOBS = {"beam": beam, "reorder": reorder, "options": options, "assisted": assisted}


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(JOBS), help="comma-separated, of %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="a float32 Llama checkpoint in place of random weights")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {versions()}\n")
    print("| job | torch | jaxmodels | unit | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or Path(folder) / "float32"
        if not path.exists():
            write_checkpoint(path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model, params = jm.AutoModelForCausalLM.from_pretrained(path)
        for name in args.only.split(","):
            JOBS[name](theirs, model, params, args.rounds)


if __name__ == "__main__":
    main()
