"""`jaxmodels train`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.auto import AutoConfig, AutoModelForCausalLM
from jaxmodels.cli.settings import Settings, Source, read_settings
from jaxmodels.processing import AutoTokenizer
from jaxmodels.sharding import make_mesh, process_share, resolve_rules, to_host
from jaxmodels.training.batches import batch_devices
from jaxmodels.training.checkpoints import get_last_checkpoint
from jaxmodels.training.collators import DataCollatorForPreference, DataCollatorForSeq2Seq, default_data_collator
from jaxmodels.training.data import (
    Example,
    Examples,
    Packed,
    batches,
    mixture,
    packed_batches,
    preference_example,
    sft_example,
    text_example,
    tokenized_example,
)
from jaxmodels.training.lora import merge, without_adapter
from jaxmodels.training.objectives import dpo_loss, make_reference
from jaxmodels.training.sources import read_rows
from jaxmodels.training.trainer import Trainer


def run(args: argparse.Namespace) -> None:
    """A run, or the rest of one whose output directory has checkpoints; then `hf/` there is what torch loads."""
    settings = read_settings(args.config, args.overrides)
    start(settings)
    trainer = make_trainer(settings)
    try:
        trainer.train(settings.training.resume_from_checkpoint)
    except ArithmeticError as error:  # a loss that is not finite
        raise ValueError(str(error)) from error
    save(settings, trainer)


def start(settings: Settings) -> None:
    """The processes and devices of the run, before anything asks for one."""
    if settings.cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", settings.cpu_devices)
    if settings.distributed is not None:
        jax.distributed.initialize(**{k: v for k, v in vars(settings.distributed).items() if v is not None})


def make_trainer(settings: Settings) -> Trainer:
    """The Trainer of a job, with its model, data and, where there are checkpoints, the newest to go on from."""
    tokenizer, (model, params) = load_tokenizer(settings), load_model(settings)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {model.config.vocab_size}: they do not fit")
    if settings.training.resume_from_checkpoint is None:
        settings.training.resume_from_checkpoint = get_last_checkpoint(settings.training.output_dir)
    data = (dpo_data if settings.job == "dpo" else language_data)(settings, tokenizer, model, params)
    return Trainer(model, params, settings.training, processing_class=tokenizer, peft_config=settings.lora, **data)


def load_tokenizer(settings: Settings) -> Any:
    options = settings.model
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or str(options.path))
    if options.chat_template is not None:
        text = options.chat_template
        tokenizer.chat_template = text if "{" in text else Path(text).read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: Settings) -> tuple[Any, Any]:
    options = settings.model
    rules = resolve_rules(settings.rules, None if settings.mesh is None else make_mesh(None, **settings.mesh))
    form = {"scan_layers": options.scan_layers, "attn_implementation": options.attn_implementation, "rules": rules}
    if options.path is not None:
        return AutoModelForCausalLM.from_pretrained(options.path, dtype=options.dtype, **form)
    config = AutoConfig.for_model(**{"model_type": None, **(options.config or {})})
    for name in config.extra:  # a config.json has fields that no model reads; one that is nearly another is a slip
        if near := difflib.get_close_matches(name, config.field_names(), 1, 0.85):
            raise ValueError(f"model.config.{name} is not a field of {config.model_type}; the closest is {near[0]}")
    dtype = "float32" if options.dtype == "auto" else options.dtype
    return AutoModelForCausalLM.from_config(config, key=jax.random.key(settings.training.seed), dtype=dtype, **form)


# ---- Data ------------------------------------------------------------------------------------------------------------


def examples(settings: Settings, sources: Sequence[Source], make: Callable[..., Example], cut: int | None) -> list[Any]:
    """A sequence of examples for each source: made of its rows, the tokens that they hold already (up to `cut`), or packed rows as they
    are."""
    found: list[Any] = []
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
            found.append(Examples(rows, partial(tokenized_example, max_length=cut)))
        else:
            found.append(Examples(rows, partial(make, source)))
    return found


def language_data(settings: Settings, tokenizer: Any, model: Any, params: Any) -> dict[str, Any]:
    """The Trainer's arguments that have to do with data, for documents, chats and completions."""
    data, training = settings.data, settings.training
    packing = settings.job == "pretrain" if data.packing is None else data.packing
    cut = None if packing else data.length  # packing cuts documents into rows and loses nothing
    example = text_example if settings.job == "pretrain" else sft_example
    make = lambda source, row: example(row, tokenizer=tokenizer, field=source.text_field, max_length=cut)
    parts, held = (examples(settings, sources, make, cut) for sources in (data.train, data.eval))
    packed = ["segment_ids" in part[0] for part in parts + held]
    if any(packed) and not all(packed):
        raise ValueError("some sources are packed ahead of time and some are not; pack all of them or none")
    pack = {"length": data.length, "window": data.window, "pad_token_id": tokenizer.pad_token_id or 0}
    on_the_fly = packing and not any(packed)
    if on_the_fly:
        whole = [mixture([part], shuffle=False, epochs=1, process_index=0, process_count=1).to_iter_dataset() for part in held]
        held = [list(Packed(documents, **pack)) for documents in whole]
    padded = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=data.pad_to_multiple_of)
    collator = default_data_collator if on_the_fly or any(packed) else padded
    found: dict[str, Any] = {"data_collator": collator}
    if held:
        found["eval_dataset"] = {str(i): part for i, part in enumerate(held)} if len(held) > 1 else held[0]
    if len(parts) == 1 and not on_the_fly:
        return found | {"train_dataset": parts[0]}
    seed = training.seed if training.data_seed is None else training.data_seed
    index, shares = process_share(model.rules)
    weights = [source.weight for source in data.train]
    mixed = mixture(parts, weights, seed=seed, process_index=index, process_count=shares)
    rows = training.per_device_train_batch_size * batch_devices(model) * training.gradient_accumulation_steps // shares
    stream = packed_batches(mixed, rows, seed=seed, **pack) if on_the_fly else batches(mixed, rows, collator)
    return found | {"train_dataset": stream}


def dpo_data(settings: Settings, tokenizer: Any, model: Any, params: Any) -> dict[str, Any]:
    """The Trainer's arguments for pairs: examples that hold the reference's log-probabilities, computed here, once."""
    data = settings.data
    collator = DataCollatorForPreference(tokenizer.pad_token_id or 0, data.pad_to_multiple_of)
    make = lambda source, row: preference_example(row, tokenizer=tokenizer, max_length=data.length)
    sequences = (examples(settings, sources, make, data.length) for sources in (data.train, data.eval))
    parts = [[pair for part in found for pair in part] for found in sequences]
    if not settings.dpo.reference_free:
        parts = [referenced(settings, model, params, collator, part) for part in parts]
    loss, count = dpo_loss(**vars(settings.dpo))
    return {"data_collator": collator, "train_dataset": parts[0], "eval_dataset": parts[1] or None, "loss": loss, "count": count}


def referenced(settings: Settings, model: Any, params: Any, collator: Any, pairs: list[Example]) -> list[Example]:
    """The pairs with their log-probabilities under the parameters without an adapter."""
    reference, params = make_reference(model, settings.dpo.loss_type), without_adapter(params)
    rows = settings.training.per_device_train_batch_size
    found: list[Example] = []
    for i in range(0, len(pairs), rows):
        part = pairs[i : i + rows]
        batch = collator([*part, *part[:1] * (rows - len(part))])
        if model.rules is not None:
            batch = jax.device_put(batch, NamedSharding(model.rules.mesh, PartitionSpec()))
        logps = to_host(reference(params, batch))
        found += [pair | {name: np.float32(value[j]) for name, value in logps.items()} for j, pair in enumerate(part)]
    return found


# ---- What comes out --------------------------------------------------------------------------------------------------


def save(settings: Settings, trainer: Trainer) -> None:
    """output_dir/hf, for torch; of an adapter also PEFT's files, output_dir/adapter, and hf/ is the model with it merged in."""
    out = Path(settings.training.output_dir)
    if settings.lora is None:
        trainer.save_model(out / "hf")
    else:
        trainer.save_model(out / "adapter")
        trainer.write(out / "hf", merge(trainer.params)[0])
    if trainer.is_world_process_zero():
        print(f"{out / 'hf'}: written", flush=True)
