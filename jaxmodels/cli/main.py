"""The `jaxmodels` command: one subcommand per job, each in a module that is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _hub(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hub ids")
    group.add_argument("--revision", help="branch, tag or commit")
    group.add_argument("--token", help="access token; default: the one huggingface_hub has stored")
    group.add_argument("--cache-dir", help="where downloads are kept")
    group.add_argument("--subfolder", help="folder inside the repository or directory")
    group.add_argument("--variant", help="e.g. fp16 for model.fp16.safetensors")


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    """The hub options that were given, as from_pretrained takes them."""
    names = ("revision", "token", "cache_dir", "subfolder", "variant")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def mesh_sizes(text: str) -> dict[str, int]:
    """--mesh fsdp=4,tensor=2 as {name: size}."""
    try:
        pairs = [(name, int(size)) for name, size in (part.split("=") for part in text.split(","))]
        if all(size > 0 or size == -1 for _, size in pairs) and len(dict(pairs)) == len(pairs):
            return dict(pairs)
    except ValueError:
        pass
    raise ValueError(f"--mesh {text!r}: expected sizes such as fsdp=4,tensor=2")


def count(text: str) -> int:
    """A number of things, at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number}: expected a number of 64 bits")
    return number


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help="checkpoint directory or hub id; default: the tiny Python model that ships")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="parameter and compute dtype; auto: as stored")
    _hub(parser)


def _sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=count, default=max_new_tokens)
    sample = "draw tokens instead of taking the likeliest; default: as the checkpoint's generation_config.json says"
    parser.add_argument("--sample", action=argparse.BooleanOptionalAction, help=sample)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=seed, default=0)


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **options: Any) -> None:
        from importlib.metadata import version

        print(f"jaxmodels {version('jaxmodels')}, jax {version('jax')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxmodels", description="Hugging Face checkpoints in JAX.")
    parser.add_argument("--version", action=_Version, help="the version of jaxmodels and of jax")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    generate = command("generate", "text:generate", "Continue prompts: one streams to the terminal, several run as a batch.")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: one per line of --file or of standard input")
    generate.add_argument("--file", help="prompts, one per line, or JSON lines with a `prompt`")
    generate.add_argument("--jsonl", metavar="OUT", help="write prompt, text and new token count as JSON lines; - for standard output")
    generate.add_argument("--batch-size", type=count, default=8)
    _sampling(generate, 64)
    _model(generate)

    chat = command("chat", "text:chat", "Talk to a model with a chat template; an empty line ends it.")
    chat.add_argument("--system", help="a system message")
    _sampling(chat, 512)
    _model(chat)

    convert = command("convert", "checkpoint:convert", "Write a checkpoint in another dtype, shard size or format.")
    convert.add_argument("source", metavar="SRC", help="checkpoint directory, hub id, or Orbax directory written by this command")
    convert.add_argument("destination", metavar="DST")
    convert.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: as stored")
    convert.add_argument("--max-shard-size", default="50GB", metavar="SIZE", help="e.g. 500MB, 5GB (default %(default)s)")
    convert.add_argument("--format", choices=("safetensors", "orbax"), default="safetensors")
    convert.add_argument("--scan", action="store_true", help="orbax: layers stacked, as scan_layers=True wants them")
    _hub(convert)

    info = command("info", "checkpoint:info", "Parameters, bytes by dtype and, for a mesh, memory per device.")
    info.add_argument("path", metavar="PATH")
    info.add_argument("--mesh", help="e.g. fsdp=4,tensor=2: sizes of a mesh that need not exist here")
    info.add_argument("--rules", default="fsdp+tensor", help="sharding preset for --mesh (default %(default)s)")
    _hub(info)

    plan = command(
        "plan",
        "plan:run",
        "Compile a job for a TPU slice that is not here: memory, collectives, roofline. Exit status 1 if it does not fit.",
    )
    plan.add_argument("path", metavar="PATH_OR_CONFIG", help="checkpoint directory, hub id, or a config.json; no weights are read")
    plan.add_argument("--topology", required=True, help="e.g. v5e:16x16, v5p:4x4x4, v6e:8x8")
    plan.add_argument("--job", required=True, choices=("train", "prefill", "decode"))
    plan.add_argument("--mesh", help="e.g. fsdp=64,tensor=4; -1 takes what is left")
    plan.add_argument("--rules", help="sharding preset; default: the one that the mesh's axes ask for")
    plan.add_argument("--batch", type=count, required=True, help="rows")
    plan.add_argument("--microbatches", type=count, help="train on a mesh with stage=N: parts of the batch in the pipeline; default N")
    plan.add_argument("--length", type=count, required=True, help="tokens a row; decode: slots of the cache")
    plan.add_argument("--remat", default="full", help="train: a jax.checkpoint policy, or none (default %(default)s)")
    plan.add_argument("--dtype", default="bfloat16", choices=DTYPES[1:], help="compute dtype; serving: of the parameters too")
    plan.add_argument("--sweep", action="store_true", help="try meshes, which keep the sizes in --mesh, and remat policies; rank them")
    _hub(plan)

    train = command("train", "train:run", "Train by a YAML file: pretraining, SFT, DPO, LoRA. Started again, it goes on where it stopped.")
    train.add_argument("config", metavar="CONFIG.yaml")
    what = "--section.field VALUE | section.field=VALUE"
    train.add_argument("overrides", nargs=argparse.REMAINDER, metavar=what, help="in place of the file's; --help here lists all fields")

    command("families", "families:families", "The families, their heads and their parity with torch as the tests recorded it.")

    parity = command("parity", "checkpoint:parity", "Compare with torch: layers, greedy tokens, gradients. Exit status 1 over tolerance.")
    what = "PATH | record PATH FILE | check PATH FILE"
    parity.add_argument("arguments", nargs="+", metavar=what, help="record keeps torch's answers, check needs no torch")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; errors about input, or a package that is missing, are one line on standard error and exit status 1 (2 for usage)."""
    args = build_parser().parse_args(argv)
    module, function = args.run.split(":")
    try:
        status = getattr(importlib.import_module(f"jaxmodels.cli.{module}"), function)(args) or 0
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough; what is left must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"jaxmodels: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
