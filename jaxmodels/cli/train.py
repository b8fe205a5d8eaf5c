"""`jaxmodels train`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from safetensors.numpy import save as save_bytes

from jaxmodels.auto import AutoConfig, AutoModelForCausalLM
from jaxmodels.cli.settings import Settings, Source, fields_in_words, read_settings
from jaxmodels.convert.atomic import replacing
from jaxmodels.params import flatten
from jaxmodels.processing import AutoTokenizer
from jaxmodels.sharding import make_mesh, process_share, resolve_rules, to_host
from jaxmodels.sharding.processes import from_first, lockstep, spans
from jaxmodels.training.batches import batch_devices
from jaxmodels.training.checkpoints import describe, get_last_checkpoint
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
from jaxmodels.training.sources import Rows, read_rows
from jaxmodels.training.trainer import Trainer


def run(args: argparse.Namespace) -> None:
    """A run, or the rest of one whose output directory has checkpoints; then `hf/` there is what torch loads."""
    if {"-h", "--help"} & set(args.overrides):
        print(fields_in_words())
        return
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
    tokenizer = load_tokenizer(settings)
    parts, held = sequences(settings, tokenizer)  # before the model, which may take minutes
    model, params = load_model(settings)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {model.config.vocab_size}: they do not fit")
    if settings.training.resume_from_checkpoint is None:
        settings.training.resume_from_checkpoint = get_last_checkpoint(settings.training.output_dir)
    data = (preference_data if settings.job == "dpo" else language_data)(settings, tokenizer, model, parts, held)
    trainer = Trainer(model, params, settings.training, processing_class=tokenizer, peft_config=settings.lora, **data)
    if settings.job == "dpo" and not settings.dpo.reference_free:
        trainer.create_optimizer_and_scheduler(1)  # what that refuses is told before the reference takes its time
        refer = lambda pairs: referenced(settings, trainer.model, params, trainer.data_collator, pairs)
        trainer.train_dataset, trainer.eval_dataset = refer(parts[0]), refer(held[0]) if held else None
    return trainer


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


def sequences(settings: Settings, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """The examples to train on and those held out: for each source a sequence, of its rows' text or tokens, or of packed rows as they are;
    of pairs one sequence each."""
    data = settings.data
    if settings.job == "dpo":
        pair = partial(preference_example, tokenizer=tokenizer, max_length=data.length)
        join = lambda sources: [Examples(Rows([file for source in sources for file in rows_of(source).files]), pair)] if sources else []
        return join(data.train), join(data.eval)
    cut = None if data.packing else data.length  # packing cuts documents into rows and loses nothing
    example = text_example if settings.job == "pretrain" else sft_example

    def of(source: Source) -> Any:
        rows = rows_of(source)
        first = rows[0]
        if "segment_ids" in first:
            if len(first["input_ids"]) != data.length:
                raise ValueError(f"{rows.where(0)}: is packed to {len(first['input_ids'])} tokens, data.length is {data.length}")
            return rows
        if "input_ids" in first:
            return Examples(rows, partial(tokenized_example, max_length=cut))
        return Examples(rows, partial(example, tokenizer=tokenizer, field=source.text_field, max_length=cut))

    return [of(source) for source in data.train], [of(source) for source in data.eval]


def rows_of(source: Source) -> Rows:
    rows = read_rows(source.path, source.format)
    if not len(rows):
        raise ValueError(f"{source.path} has no rows")
    return rows


def language_data(settings: Settings, tokenizer: Any, model: Any, parts: list[Any], held: list[Any]) -> dict[str, Any]:
    """The Trainer's arguments that have to do with data, for documents, chats and completions."""
    data, training = settings.data, settings.training
    packed = ["segment_ids" in part[0] for part in parts + held]
    if any(packed) and not all(packed):
        raise ValueError("some sources are packed ahead of time and some are not; pack all of them or none")
    pack = {"length": data.length, "window": data.window, "pad_token_id": tokenizer.pad_token_id or 0}
    on_the_fly = data.packing and not any(packed)
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
    if collator is padded and shares > 1:  # which see their own rows alone, and need one length
        collator = dataclasses.replace(padded, padding="max_length", max_length=data.length)
    weights = [source.weight for source in data.train]
    mixed = mixture(parts, weights, seed=seed, process_index=index, process_count=shares)
    rows = training.per_device_train_batch_size * batch_devices(model) * training.gradient_accumulation_steps // shares
    stream = packed_batches(mixed, rows, seed=seed, **pack) if on_the_fly else batches(mixed, rows, collator)
    return found | {"train_dataset": stream}


def preference_data(settings: Settings, tokenizer: Any, model: Any, parts: list[Any], held: list[Any]) -> dict[str, Any]:
    """The Trainer's arguments for pairs, whose reference is still to be computed."""
    collator = DataCollatorForPreference(tokenizer.pad_token_id or 0, settings.data.pad_to_multiple_of)
    loss, count = dpo_loss(**vars(settings.dpo))
    eval_dataset = held[0] if held else None
    return {"data_collator": collator, "train_dataset": parts[0], "eval_dataset": eval_dataset, "loss": loss, "count": count}


class Referenced:
    """Pairs, made when they are asked for, with their log-probabilities [pairs] under the reference."""

    def __init__(self, pairs: Examples, logps: Mapping[str, np.ndarray]):
        self.pairs, self.rows, self.make, self.logps = pairs, pairs.rows, pairs.make, logps

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Example:
        return self.pairs[i] | {name: values[i] for name, values in self.logps.items()}


def referenced(settings: Settings, model: Any, params: Any, collator: Any, pairs: Examples) -> Referenced:
    """The pairs with their log-probabilities under the parameters without an adapter: from output_dir, where an earlier start has left
    those of these parameters and pairs, else computed and kept there."""
    reference, params = make_reference(model, settings.dpo.loss_type), without_adapter(params)
    name = f"reference-{_fingerprint([describe(model, settings.dpo.loss_type), str(model.dtype)], params, pairs)}"
    path = Path(settings.training.output_dir) / name / "logps.safetensors"
    there, together = path.exists(), spans(model.rules)
    if together:
        there = from_first("the reference", str(there)) == "True"
    if there:
        return Referenced(pairs, load_file(path))
    rows = settings.training.per_device_train_batch_size
    parts: list[dict[str, np.ndarray]] = []
    for i in range(0, len(pairs), rows):
        part = [pairs[j] for j in range(i, min(i + rows, len(pairs)))]
        batch = collator([*part, *part[:1] * (rows - len(part))])
        if model.rules is not None:
            batch = jax.device_put(batch, NamedSharding(model.rules.mesh, PartitionSpec()))
        parts.append({name: value[: len(part)] for name, value in to_host(reference(params, batch)).items()})
    logps = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    with lockstep("the reference", together):
        if jax.process_index() == 0:
            with replacing(path.parent) as directory:
                (directory / path.name).write_bytes(save_bytes(logps))
    return Referenced(pairs, logps)


def _fingerprint(about: Any, params: Any, pairs: Examples) -> str:
    """Of a model, its parameters, wherever their parts lie, and the tokens of pairs."""
    flat = flatten(params)
    sums = to_host(jax.jit(lambda leaves: jax.tree.map(_checksum, leaves))(flat))
    leaves = [[name, list(leaf.shape), str(leaf.dtype), int(sums[name])] for name, leaf in sorted(flat.items())]
    digest = hashlib.sha256(json.dumps([about, leaves], sort_keys=True).encode())
    for i in range(len(pairs)):
        for name, values in pairs[i].items():
            digest.update(f"{name} {len(values)} ".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _checksum(leaf: jax.Array) -> jax.Array:
    """Of an array's bits [] uint32, weighed by where they stand in its first and last axis; the same in whatever order they are added."""
    bits = jax.lax.bitcast_convert_type(jnp.atleast_1d(leaf), jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    first, last = (jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) for axis in (0, bits.ndim - 1))
    return jnp.sum(bits * (2 * first + 1) * (jnp.uint32(0x9E3779B2) * last + 1), dtype=jnp.uint32)


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
