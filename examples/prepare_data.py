"""Data for the other examples out of Python's own standard library: python examples/prepare_data.py data

    data/tokenizer          a byte-level BPE of 2048 tokens
    data/packed             rows of 128 tokens, documents packed ahead of time (ArrayRecord), for pretrain.yaml; data/held_out likewise
    data/functions.jsonl    {"text": a function, "label": the number of its package}, for classify.py; data/functions_held_out.jsonl
    data/chats.jsonl        conversations about functions' arguments, for sft_lora.yaml; data/chats_held_out.jsonl

What is held out is chosen by a hash, the same on every machine with the same Python."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxmodels.processing import train_bpe
from jaxmodels.training.data import text_example, write_packed

PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")
LABELLED = ("asyncio", "email", "logging", "unittest", "xml")  # whose functions are told apart
LENGTH, VOCABULARY = 128, 2048


def is_held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 16 == 0


def modules() -> Iterator[tuple[str, str]]:
    """(the package, the text) of every module."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            if "test" not in path.relative_to(library).parts:
                yield package, path.read_text(encoding="utf-8")


def functions(text: str) -> Iterator[tuple[str, list[str]]]:
    """(the source, the names of the arguments) of a module's functions and methods."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.args.args:
            source = [line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno]]
            yield "\n".join(source) + "\n", [argument.arg for argument in node.args.args]


def conversation(source: str, arguments: list[str]) -> dict[str, Any]:
    head = source.partition("\n")[0]
    question = {"role": "user", "content": f"Which arguments does this take?\n{head}"}
    return {"messages": [question, {"role": "assistant", "content": " and ".join(arguments)}]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(out: Path) -> None:
    found = list(modules())
    texts = [text for _, text in found]
    tokenizer = train_bpe(texts, VOCABULARY)
    tokenizer.save_pretrained(out / "tokenizer")
    example = partial(text_example, tokenizer=tokenizer)
    for name, held in (("packed", False), ("held_out", True)):
        documents = [example({"text": text}) for text in texts if is_held_out(text) == held]
        print(name, write_packed(out / name, documents, LENGTH))
    functions_of = [(package, *function) for package, text in found for function in functions(text)]
    for suffix, held in (("", False), ("_held_out", True)):
        chosen = [function for function in functions_of if is_held_out(function[1]) == held]
        labelled = [{"text": source, "label": LABELLED.index(package)} for package, source, _ in chosen if package in LABELLED]
        chats = [conversation(source, arguments) for _, source, arguments in chosen if source.partition("\n")[0].endswith("):")]
        for name, rows in (("functions", labelled), ("chats", chats)):
            write(out / f"{name}{suffix}.jsonl", rows)
            print(f"{name}{suffix}", len(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
