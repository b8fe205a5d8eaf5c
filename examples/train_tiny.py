"""Train a Llama of 3 million parameters on Python's own standard library, from nothing to a Hugging Face directory.

    python examples/train_tiny.py --out /tmp/tiny-python

One process, CPU or accelerator. Kill it and run it again: it resumes from the last checkpoint, with the data in the same
order, and reports the losses that the uninterrupted run would have reported. Written with the parts that any training
script uses: LlamaForCausalLM with scanned layers and remat, the jitted train step, optax, Orbax, save_pretrained."""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from jaxmodels.auto import save_pretrained
from jaxmodels.generation import GenerationConfig
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import count_params, init_params
from jaxmodels.processing import Tokenizer
from jaxmodels.training import TrainState, create_train_state, make_eval_step, make_train_step

END = "<|endoftext|>"  # id 0: begins, separates and ends documents
# Tests, vendored code, and modules that are mostly tables of data.
EXCLUDED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "__phello__", "turtledemo"}
EXCLUDED |= {"entities.py", "stringprep.py", "this.py", "html5lib", "_bundled", "crashers"}
# Newlines, indentation, words with their leading space and underscores, up to three digits, punctuation.
WORDS = r"[\r\n]+| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[ \t\f\v]+|\s+"


def read_sources(root: Path) -> dict[str, str]:
    """{relative path: text} of the modules under `root` that parse, in the order of their names."""
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED & set(name.parts) or name.parts[0].startswith(("config-", "lib-")):
            continue
        try:
            text = "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").expandtabs().splitlines()).strip() + "\n"
            ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(text) > 200:
            texts[name.as_posix()] = text
    return texts


def is_held_out(name: str) -> bool:
    """About one module in thirty, chosen by its name, so the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 30 == 0


def without_docstrings(text: str) -> str:
    """A module without the docstrings that have code after them."""
    lines, dropped = text.splitlines(), set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            first, *rest = node.body
            start, end = first.lineno - 1, first.end_lineno or first.lineno
            if rest and rest[0].lineno > end and not lines[start][: first.col_offset].strip():
                while end < len(lines) and not lines[end]:
                    end += 1
                dropped |= set(range(start, end))
    return "\n".join(line for i, line in enumerate(lines) if i not in dropped) + "\n"


def pieces(text: str) -> list[str]:
    """A module cut before and after every top-level function and class, with its decorators and the comments above it."""
    lines = text.splitlines()
    cuts = {0, len(lines)}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while start and lines[start - 1].startswith("#"):
                start -= 1
            cuts |= {start, node.end_lineno or start}
    edges = sorted(cuts)
    found = ("\n".join(lines[a:b]).strip("\n") for a, b in itertools.pairwise(edges))
    return [piece + "\n" for piece in found if piece.strip()]


def train_tokenizer(texts: list[str], vocab_size: int) -> Backend:
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def encode(tokenizer: Backend, texts: list[str]) -> np.ndarray:
    """All texts one after the other, each behind <|endoftext|>: [N] int32."""
    return np.concatenate([np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch(texts)])


class Corpus:
    """Modules as token streams, and the rows of every epoch as a function of the seed alone."""

    def __init__(self, tokenizer: Backend, texts: list[str], seed: int):
        self.whole = [encode(tokenizer, [text]) for text in texts]
        self.cut = [encode(tokenizer, pieces(without_docstrings(text))) for text in texts]
        self.seed = seed

    def epoch(self, number: int, length: int) -> np.ndarray:
        """Rows [R, length]: shuffled modules, each whole or, on a coin's toss, in pieces without docstrings.

        The pieces teach the model to begin with code after a signature and to end where the function ends."""
        rng = np.random.default_rng((self.seed, number))
        picked = [self.cut[i] if rng.random() < 0.5 else self.whole[i] for i in rng.permutation(len(self.whole))]
        stream = np.concatenate(picked)[rng.integers(length) :]
        rows = stream[: len(stream) // length * length].reshape(-1, length)
        return rows[rng.permutation(len(rows))]

    def batches(self, batch: int, length: int, skip: int) -> Iterator[np.ndarray]:
        """Batches [batch, length] without end, the first `skip` left out."""
        number = 0
        while True:
            rows = self.epoch(number, length)
            full = len(rows) // batch
            if not full:
                raise ValueError(f"an epoch has {len(rows)} rows of {length} tokens, fewer than one batch of {batch}")
            for i in range(skip, full):
                yield rows[i * batch : (i + 1) * batch]
            skip, number = max(0, skip - full), number + 1


def evaluate(eval_step, params, rows: np.ndarray, batch: int) -> float:
    """Mean loss per token over rows [R, length]; the rows that do not fill a batch are left out."""
    total = tokens = 0.0
    for i in range(0, len(rows) // batch * batch, batch):
        out = eval_step(params, as_batch(rows[i : i + batch]))
        total, tokens = total + float(out["loss"]) * float(out["tokens"]), tokens + float(out["tokens"])
    return total / tokens


def as_batch(rows: np.ndarray) -> dict[str, jax.Array]:
    ids = jnp.asarray(rows)
    return {"input_ids": ids, "labels": ids}


def save(args: argparse.Namespace, model: LlamaForCausalLM, state: TrainState, tokenizer: Backend) -> None:
    """The Hugging Face directory: bfloat16 weights, config, tokenizer."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    generation = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, max_new_tokens=128, repetition_penalty=1.1)
    save_pretrained(args.out / "hf", model, params, generation_config=generation)
    named = Tokenizer(tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=args.length)
    named.save_pretrained(args.out / "hf")


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    sources = read_sources(args.source)
    texts = [text for name, text in sources.items() if not is_held_out(name)]
    kept = [text for name, text in sources.items() if is_held_out(name)] or texts[:1]
    if not (args.out / "tokenizer.json").exists():
        train_tokenizer(texts, args.vocab).save(str(args.out / "tokenizer.json"))
    tokenizer = Backend.from_file(str(args.out / "tokenizer.json"))
    corpus = Corpus(tokenizer, texts, args.seed)
    held = encode(tokenizer, kept)
    held = held[: len(held) // args.length * args.length].reshape(-1, args.length)

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config, scan_layers=True, remat=None if args.remat == "none" else args.remat)
    warmup = max(1, args.steps // 40)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, args.lr, warmup), optax.linear_schedule(args.lr, 0.0, args.steps - warmup)], [warmup]
    )
    decayed = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=args.weight_decay, mask=decayed)
    )
    train_step, eval_step = make_train_step(model, optimizer), make_eval_step(model)
    state = create_train_state(model, optimizer, init_params(model, jax.random.key(args.seed)))
    print(
        f"{len(texts)} modules, {sum(map(len, corpus.whole)):,} tokens; held out {len(kept)} modules, {held.size:,} tokens; "
        f"{count_params(state.params):,} parameters; {args.steps} steps of {args.batch} x {args.length} tokens",
        flush=True,
    )

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(args.out.absolute() / "state", options=options)
    first = manager.latest_step() or 0
    if first:
        state = manager.restore(first, args=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)))
        print(f"resumed at step {first}", flush=True)
    log = args.out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first))

    began = last = time.monotonic()
    batches = corpus.batches(args.batch, args.length, skip=first)
    for step in range(first + 1, args.steps + 1):
        state, metrics = train_step(state, as_batch(next(batches)))
        if step % args.log_every == 0 or step == args.steps:
            line = {"step": step, "loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}
            line["lr"], now = float(schedule(step - 1)), time.monotonic()
            done = min(args.log_every, step - first)
            line["tokens_per_s"] = round(done * args.batch * args.length / (now - last))
            if step % args.eval_every == 0 or step == args.steps:
                line["held_out_loss"] = evaluate(eval_step, state.params, held if step == args.steps else held[::6], args.batch)
            left = (now - began) / (step - first) * (args.steps - step) / 60
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()),
                f" {left:.1f} min left",
                flush=True,
            )
            last = time.monotonic()
        if step % args.save_every == 0 or step == args.steps:
            manager.save(step, args=ocp.args.StandardSave(state))
    manager.close()
    save(args, model, state, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer, the log, the checkpoints and hf/")
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of .py files")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--mlp", type=int, default=448)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--steps", type=int, default=4700)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--remat", default="full", help="a jax.checkpoint policy by name, or none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=200)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
