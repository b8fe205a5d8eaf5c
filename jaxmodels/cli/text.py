"""`jaxmodels generate` and `jaxmodels chat`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.assets import TINY_PYTHON
from jaxmodels.auto import AutoConfig, text_task
from jaxmodels.cli.main import hub_options
from jaxmodels.generation import TextStreamer
from jaxmodels.generation import generate as run
from jaxmodels.processing import AutoTokenizer


def _load(args: argparse.Namespace, check: Callable[[Any, Any], None] = lambda config, tokenizer: None) -> tuple[Any, Any, Any]:
    """(model, params, tokenizer); `check` may raise before the weights are fetched and read."""
    path = args.model or TINY_PYTHON
    hub = hub_options(args)
    config, tokenizer = AutoConfig.from_pretrained(path, **hub), AutoTokenizer.from_pretrained(path, **hub)
    check(config, tokenizer)
    return *text_task(config).from_pretrained(path, dtype=args.dtype, **hub), tokenizer


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """generate's keyword arguments: what was asked for on the command line, the checkpoint's defaults for the rest."""
    asked = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    asked |= {"max_new_tokens": args.max_new_tokens, "do_sample": args.sample}
    return {"key": jax.random.key(args.seed), **{name: value for name, value in asked.items() if value is not None}}


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts and args.file is not None:
        raise ValueError("prompts as arguments and in --file: give one of the two")
    if args.prompts:
        return args.prompts
    if args.file is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, in --file, or on standard input")
    where = args.file or "standard input"
    try:
        with open(args.file, encoding="utf-8") if args.file else contextlib.nullcontext(sys.stdin) as source:
            lines = [line.removeprefix("\ufeff").rstrip("\r\n") for line in source if line.strip("\ufeff \t\r\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} holds bytes that are no UTF-8 ({error}); convert the text first") from None
    if not lines:
        raise ValueError(f"{where} holds no prompt: expected one per line, or JSON lines with a `prompt`")
    return [_prompt_of(line, n) for n, line in enumerate(lines, 1)]


def _prompt_of(line: str, number: int) -> str:
    """The prompt in a line, the `number`-th that is not empty."""
    if line.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(line)
            if not isinstance(found.get("prompt"), str):
                raise ValueError(f"prompt {number}: a JSON line with the keys {sorted(found)}; expected `prompt`, a string")
            return found["prompt"]
    if any("\ud800" <= character <= "\udfff" for character in line):  # what a terminal's input holds in place of bytes that are no text
        raise ValueError(f"prompt {number}: bytes that are no UTF-8; convert the text first")
    return line


def generate(args: argparse.Namespace) -> None:
    prompts = _prompts(args)
    if args.jsonl not in (None, "-") and not Path(args.jsonl).absolute().parent.is_dir():
        raise ValueError(f"--jsonl {args.jsonl}: there is no directory {Path(args.jsonl).absolute().parent} to write it to")
    model, params, tokenizer = _load(args)
    options = _options(args)
    start = time.perf_counter()
    if len(prompts) == 1 and args.jsonl is None:
        encoded = tokenizer(prompts, return_tensors="np")
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        out = run(model, params, encoded.input_ids, encoded.attention_mask, streamer=streamer, **options)
        print(_rate(int(out.lengths.sum()), time.perf_counter() - start), file=sys.stderr)
        return
    total = 0
    results = _batches(model, params, tokenizer, prompts, args.batch_size, options)
    first = next(results)  # what is wrong with the model comes before anything is written
    with _sink(args.jsonl) as sink:
        for result in itertools.chain([first], results):
            total += result["tokens"]
            if sink is None:
                print(("" if model.config.is_encoder_decoder else result["prompt"]) + result["text"], end="\n\n", flush=True)
            else:
                print(json.dumps(result, ensure_ascii=False), file=sink, flush=True)
    print(_rate(total, time.perf_counter() - start), file=sys.stderr)


@contextlib.contextmanager
def _sink(path: str | None) -> Iterator[Any]:
    if path in (None, "-"):
        yield None if path is None else sys.stdout
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file


def _batches(model: Any, params: Any, tokenizer: Any, prompts: list[str], size: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if len(prompts) > 1 and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for i in range(0, len(prompts), size):
        batch = prompts[i : i + size]
        encoded = tokenizer(batch, padding=len(batch) > 1, padding_side="left", return_tensors="np")
        options["key"], key = jax.random.split(options["key"])
        out = run(model, params, encoded.input_ids, encoded.attention_mask, **{**options, "key": key})
        start = 1 if model.config.is_encoder_decoder else encoded.input_ids.shape[1]
        new = np.asarray(out.sequences)[:, start:]
        for prompt, tokens, length in zip(batch, new, out.lengths):
            yield {"prompt": prompt, "text": tokenizer.decode(tokens[:length], skip_special_tokens=True), "tokens": int(length)}


def chat(args: argparse.Namespace) -> None:
    def check(config: Any, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"{args.model or TINY_PYTHON} has no chat template; continue text with `jaxmodels generate`")
        if config.is_encoder_decoder:
            raise ValueError(f"{args.model}: {config.model_type} has an encoder, which reads once; a chat needs a causal language model")

    model, params, tokenizer = _load(args, check)
    options = _options(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    known: list[int] = []  # the tokens that the cache stands for
    cache = None
    asked = {**model.config.generation_config, **options}
    # A cache holds no ids: what counts those of the whole conversation needs them again.
    counts = asked.get("repetition_penalty") not in (None, 1) or bool(asked.get("no_repeat_ngram_size"))
    while line := _ask():
        messages.append({"role": "user", "content": line})
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is anybody's code
            raise ValueError(f"{args.model}: its chat template fails on this conversation: {error}") from error
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids[: len(known)] != known:  # the template rewrote what was said
            known, cache = [], None
        new = np.asarray([ids[len(known) :]], np.int32)
        options["key"], key = jax.random.split(options["key"])
        start = time.perf_counter()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = run(model, params, new, np.ones_like(new), cache=cache, streamer=streamer, **{**options, "key": key})
        answer = np.asarray(out.sequences)[0, new.shape[1] :][: int(out.lengths[0])].tolist()
        print(_rate(len(answer), time.perf_counter() - start), file=sys.stderr)
        known, cache = ([], None) if counts else (ids + answer, out.cache)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").rstrip("\r")
    except EOFError:
        return ""
