"""`jaxmodels train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.auto import AutoConfig, AutoModelForCausalLM, save_pretrained
from jaxmodels.processing import AutoTokenizer
from jaxmodels.sharding import make_mesh, resolve_rules


def run(args: argparse.Namespace) -> None:
    """A run, or the rest of one whose output directory has checkpoints; then `hf/` there is what torch loads."""
    try:
        from jaxmodels.cli.settings import read_settings
        from jaxmodels.training.data import mixture  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"`jaxmodels train` needs {error.name or error}, which is not installed: pip install 'jaxmodels[train]'"
        ) from error
    settings = read_settings(args.config, args.overrides)
    start(settings)
    trainer = make_trainer(settings)
    try:
        trainer.train(settings.training.resume_from_checkpoint)
    except ArithmeticError as error:  # a loss that is not finite
        raise ValueError(str(error)) from error
    save(settings, trainer)


def start(settings: Any) -> None:
    """The processes and devices of the run, before anything asks for one."""
    if settings.cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", settings.cpu_devices)
    if settings.distributed is not None:
        jax.distributed.initialize(**{k: v for k, v in vars(settings.distributed).items() if v is not None})


def make_trainer(settings: Any) -> Any:
    """The Trainer of a job, with its model, data and, where there are checkpoints, the newest to go on from."""
    from jaxmodels.training.checkpoints import get_last_checkpoint
    from jaxmodels.training.trainer import Trainer

    tokenizer, (model, params) = load_tokenizer(settings), load_model(settings)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {model.config.vocab_size}: they do not fit")
    if settings.training.resume_from_checkpoint is None:
        settings.training.resume_from_checkpoint = get_last_checkpoint(settings.training.output_dir)
    data = (dpo_data if settings.job == "dpo" else language_data)(settings, tokenizer, model, params)
    return Trainer(model, params, settings.training, processing_class=tokenizer, peft_config=settings.lora, **data)


def load_tokenizer(settings: Any) -> Any:
    options = settings.model
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.path)
    if options.chat_template is not None:
        path = Path(options.chat_template)
        is_file = "\n" not in options.chat_template and "{" not in options.chat_template
        tokenizer.chat_template = path.read_text(encoding="utf-8") if is_file else options.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: Any) -> tuple[Any, Any]:
    options = settings.model
    rules = resolve_rules(settings.rules, None if settings.mesh is None else make_mesh(**settings.mesh))
    form = {"scan_layers": options.scan_layers, "attn_implementation": options.attn_implementation, "rules": rules}
    if options.path is not None:
        return AutoModelForCausalLM.from_pretrained(options.path, dtype=options.dtype, **form)
    config = AutoConfig.for_model(**{"model_type": None, **options.config})
    dtype = "float32" if options.dtype == "auto" else options.dtype
    return AutoModelForCausalLM.from_config(config, key=jax.random.key(settings.training.seed), dtype=dtype, **form)


# ---- Data ------------------------------------------------------------------------------------------------------------


def examples(settings: Any, sources: Sequence[Any], make: Callable[..., Any]) -> list[Any]:
    """A sequence of examples for each source; rows that hold tokens already stay as they are."""
    from jaxmodels.training.data import Examples, tokenized_example
    from jaxmodels.training.sources import read_rows

    found = []
    for source in sources:
        rows = read_rows(source.path, source.format)
        if not len(rows):
            raise ValueError(f"{source.path} has no rows")
        first = rows[0]
        if "segment_ids" in first:
            if len(first["input_ids"]) != settings.data.length:
                raise ValueError(f"{rows.where(0)}: is packed to {len(first['input_ids'])} tokens, data.length is {settings.data.length}")
            found.append(rows)
        elif "input_ids" in first:
            found.append(Examples(rows, tokenized_example))
        else:
            found.append(Examples(rows, partial(make, source)))
    return found


def language_data(settings: Any, tokenizer: Any, model: Any, params: Any) -> dict[str, Any]:
    """The Trainer's arguments that have to do with data, for documents, chats and completions."""
    from jaxmodels.training.collators import DataCollatorForSeq2Seq, default_data_collator
    from jaxmodels.training.data import Packed, batches, mixture, packed_batches, sft_example, text_example

    data, job = settings.data, settings.job
    packing = data.packing if data.packing is not None else job == "pretrain"
    # what is packed is cut into rows, so that nothing is lost
    cut = None if packing else data.length
    example = text_example if job == "pretrain" else sft_example
    make = lambda source, row: example(row, tokenizer=tokenizer, field=source.text_field, max_length=cut)
    parts, held = (examples(settings, sources, make) for sources in (data.train, data.eval))
    packed = ["segment_ids" in part[0] for part in parts + held]
    if any(packed) and not all(packed):
        raise ValueError("some sources are packed ahead of time and some are not; pack all of them or none")
    ready = any(packed)
    collator = default_data_collator if packing or ready else DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=data.pad_to_multiple_of)
    pack = {"length": data.length, "window": data.window, "pad_token_id": tokenizer.pad_token_id or 0}
    if packing and not ready:
        whole = [mixture([part], shuffle=False, epochs=1, process_index=0, process_count=1).to_iter_dataset() for part in held]
        held = [list(Packed(documents, **pack)) for documents in whole]
    evaluated = {"eval_dataset": dict(enumerate(held)) if len(held) > 1 else held[0]} if held else {}
    if len(parts) == 1 and (ready or not packing):
        return {"data_collator": collator, "train_dataset": parts[0], **evaluated}
    seed = settings.training.seed if settings.training.data_seed is None else settings.training.data_seed
    mixed = mixture(parts, [source.weight for source in data.train], seed=seed)
    rows = rows_of_process(settings, model)
    stream = packed_batches(mixed, rows, seed=seed, **pack) if packing and not ready else batches(mixed, rows, collator)
    return {"data_collator": collator, "train_dataset": stream, **evaluated}


def rows_of_process(settings: Any, model: Any) -> int:
    """How many rows this process brings to a step."""
    from jaxmodels.training.batches import batch_devices

    training = settings.training
    rows = training.per_device_train_batch_size * batch_devices(model) * training.gradient_accumulation_steps
    if rows % jax.process_count():
        raise ValueError(f"a step has {rows} rows, which {jax.process_count()} processes cannot share evenly")
    return int(rows // jax.process_count())


def dpo_data(settings: Any, tokenizer: Any, model: Any, params: Any) -> dict[str, Any]:
    """The Trainer's arguments for pairs: examples that hold the reference's log-probabilities, computed here, once."""
    from jaxmodels.training.collators import DataCollatorForPreference
    from jaxmodels.training.data import preference_example
    from jaxmodels.training.objectives import dpo_loss

    collator = DataCollatorForPreference(tokenizer.pad_token_id or 0, settings.data.pad_to_multiple_of)
    make = lambda source, row: preference_example(row, tokenizer=tokenizer, max_length=settings.data.length)
    parts = [
        [example for part in examples(settings, sources, make) for example in part] for sources in (settings.data.train, settings.data.eval)
    ]
    if not settings.dpo.reference_free:
        parts = [referenced(settings, model, params, collator, part) for part in parts]
    loss, count = dpo_loss(**vars(settings.dpo))
    return {"data_collator": collator, "train_dataset": parts[0], "eval_dataset": parts[1] or None, "loss": loss, "count": count}


def referenced(settings: Any, model: Any, params: Any, collator: Any, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from jax.experimental import multihost_utils

    from jaxmodels.training.lora import without_adapter
    from jaxmodels.training.objectives import make_reference

    reference, params = make_reference(model, settings.dpo.loss_type), without_adapter(params)
    rows = settings.training.per_device_train_batch_size
    found: list[dict[str, Any]] = []
    for i in range(0, len(pairs), rows):
        part = pairs[i : i + rows]
        batch = collator([*part, *part[:1] * (rows - len(part))])
        if model.rules is not None:
            batch = jax.device_put(batch, jax.sharding.NamedSharding(model.rules.mesh, jax.sharding.PartitionSpec()))
        logps = multihost_utils.process_allgather(reference(params, batch), tiled=True)
        found += [pair | {name: np.float32(value[j]) for name, value in logps.items()} for j, pair in enumerate(part)]
    return found


# ---- What comes out --------------------------------------------------------------------------------------------------


def save(settings: Any, trainer: Any) -> None:
    """output_dir/hf, for torch; of an adapter also PEFT's files, output_dir/adapter, and hf/ is the model with it merged in."""
    from jaxmodels.training.lora import merge

    out = Path(settings.training.output_dir)
    if settings.lora is None:
        trainer.save_model(out / "hf")
    else:
        trainer.save_model(out / "adapter")
        save_pretrained(out / "hf", trainer.model, merge(trainer.params)[0])
        if trainer.is_world_process_zero():
            trainer.processing_class.save_pretrained(out / "hf")
    if trainer.is_world_process_zero():
        print(f"{out / 'hf'}: written", flush=True)
