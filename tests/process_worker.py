"""One process of a job that test_processes.py launches: `process_worker.py TASK PROCESS COUNT PORT DIRECTORY …`. No test of its own."""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trainer_job

import jaxmodels as jm
from jaxmodels.cli.train import referenced
from jaxmodels.convert import files, orbax, remote, sharded
from jaxmodels.sharding import global_batch, process_rows, process_share, to_host
from jaxmodels.training import (
    DataCollatorForPreference,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    get_last_checkpoint,
)
from jaxmodels.training.batches import Stream
from jaxmodels.training.checkpoints import Checkpoints, describe, restore
from jaxmodels.training.data import Examples, mixture, packed_batches
from jaxmodels.training.lora import LoraConfig, adapter_of, add_lora, frozen_by, load_adapter, save_adapter
from jaxmodels.training.objectives import dpo_loss

MESH = {"fsdp": 4, "tensor": 2}
PROMPTS = np.random.default_rng(0).integers(3, 97, (4, 12)).astype(np.int32)
MASK = np.ones((4, 12), np.int32)
MASK[1, :5] = 0
BATCHES = np.random.default_rng(1).integers(3, 97, (4, 8, 16)).astype(np.int32)


def batch(model, step):
    rows = process_rows(model.rules, len(BATCHES[step]))
    return global_batch(model.rules, {"input_ids": BATCHES[step][rows], "labels": BATCHES[step][rows]})


def numbers(path, mesh=MESH):
    """What a checkpoint gives: logits, greedy tokens, the losses of three steps and the parameters after them."""
    model, params = jm.AutoModelForCausalLM.from_pretrained(path, mesh=jm.make_mesh(**mesh))
    found = {"logits": to_host(jax.jit(lambda p: model.apply({"params": p}, PROMPTS, attention_mask=MASK).logits)(params))}
    found["tokens"] = to_host(jm.generate(model, params, PROMPTS, attention_mask=MASK, max_new_tokens=6).sequences)
    optimizer = optax.adamw(1e-2)
    state, step = jm.create_train_state(model, optimizer, params), jm.make_train_step(model, optimizer)
    losses = []
    for i in range(3):
        state, metrics = step(state, batch(model, i))
        losses.append(to_host(metrics["loss"]))
    found["losses"] = np.stack(losses)
    found["norm"] = to_host(jm.flatten(state.params)["model.norm.weight"])
    return found, model, state, step


def refusals(directory, path, process):
    """What each process is told where they do not do the same, or one of them fails."""
    told = {}
    mesh = jm.make_mesh(**MESH)
    load = lambda path, mesh=mesh, **options: jm.AutoModelForCausalLM.from_pretrained(path, mesh=mesh, **options)
    model, params = load(path)

    def refused(name, call):
        try:
            call()
            told[name] = "nothing"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    jax.config.update("jax_compilation_cache_dir", f"{directory}/programs")
    refused("cache", lambda: load(path, jm.make_mesh(data=8)))
    jax.config.update("jax_compilation_cache_dir", None)
    os.environ["JAXMODELS_COMPILATION_CACHE"] = f"{directory}/programs"  # nor does `generate` make one
    refused("mesh", lambda: load(path, jm.make_mesh(fsdp=8) if process else mesh))
    refused("rules", lambda: load(path, rules="fsdp" if process else "tensor"))
    refused("dtype", lambda: load(path, dtype="bfloat16" if process else "float32"))
    refused("path", lambda: load(f"{directory}/host{process}/model"))
    os.chdir(f"{directory}/host{process}")
    refused("config", lambda: load("model"))
    refused("missing", lambda: load("broken"))
    refused("prompt", lambda: jm.generate(model, params, np.where(PROMPTS[0, 0] == PROMPTS, process, PROMPTS), max_new_tokens=2))
    refused("ids", lambda: jm.generate(model, params, PROMPTS + 96 * (process == 1), max_new_tokens=2))
    refused("option", lambda: jm.generate(model, params, PROMPTS, max_new_tokens=-1 if process == 1 else 2))
    refused("key", lambda: jm.generate(model, params, PROMPTS, max_new_tokens=2, do_sample=True, key=jax.random.key(process)))
    refused("preset", lambda: load(path, rules="fdsp" if process == 1 else "fsdp"))
    refused("head's key", lambda: load(path, key=jax.random.key(process)))
    refused("size", lambda: jm.save_pretrained(f"{directory}/saved", model, params, max_shard_size="5QB" if process == 1 else "5GB"))
    wide = {"input_ids": np.ones((4, 12 + process), np.int32)}
    refused("shapes", lambda: global_batch(jm.Rules.preset("replicated", mesh), wide))
    examples = [{"input_ids": row, "labels": row} for row in BATCHES[0]]

    def train(examples, resume=None, **options):
        arguments = jm.TrainingArguments(f"{directory}/trained", max_steps=1, save_strategy="no", disable_tqdm=process == 0, **options)
        jm.Trainer(model, params, arguments, train_dataset=examples).train(resume)

    refused("rate", lambda: train(examples, learning_rate=0.1 * (process + 1)))
    refused("examples", lambda: train(examples[: len(examples) - process]))
    refused("resume", lambda: train(examples, resume=process == 1))
    refused("target", lambda: jm.save_pretrained(f"{directory}/saved{process}", model, params))
    jm.save_pretrained(f"{directory}/kept", model, params)
    before = {file.name: file.read_bytes() for file in Path(directory, "kept").iterdir()}
    write, calls = files.write_file, []

    def full(*arguments, **options):
        calls.append(arguments)
        if process == 1 and len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(*arguments, **options)

    files.write_file = sharded.write_file = full
    refused("disk", lambda: jm.save_pretrained(f"{directory}/kept", model, params, max_shard_size=30_000))
    files.write_file = sharded.write_file = write
    assert {file.name: file.read_bytes() for file in Path(directory, "kept").iterdir()} == before
    return told


def read_by_range(url):
    """Bytes of tensors that this process asks a server for, and that its devices need."""
    remote.GAP, asked, read = 0, [], remote.RemotePath.read

    def counting(self, start, stop):
        asked.append(stop - start)
        return read(self, start, stop)

    remote.RemotePath.read = counting
    _, params = jm.AutoModelForCausalLM.from_pretrained(url, mesh=jm.make_mesh(**MESH))
    held = {(name, str(shard.index)): shard.data.nbytes for name, leaf in jm.flatten(params).items() for shard in leaf.addressable_shards}
    return params, sum(asked), sum(held.values())


def resumed(directory, model, state, step):
    """The loss of a fourth step, and of one after a save and a restore of the whole state by the Trainer's checkpoints."""
    checkpoints, about = Checkpoints(f"{directory}/run"), describe(model, "adamw")
    checkpoints.save(3, state, about, {"seen": 24})
    checkpoints.close()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    _, metrics = step(state, batch(model, 3))
    state, run = restore(checkpoints.path(3), shapes, about)
    assert run == {"seen": 24}
    _, again = step(state, batch(model, 3))
    return to_host((metrics["loss"], again["loss"]))


def everything(process, directory, url):
    path = f"{directory}/model"
    told = refusals(directory, path, process)
    found, model, state, step = numbers(path)
    trained = jm.flatten(state.params)
    jm.save_pretrained(f"{directory}/whole", model, state.params, max_shard_size=30_000)
    jm.save_pretrained(f"{directory}/parts", model, state.params, max_shard_size=30_000, consolidate=False)
    numbered = {name: 1 + (name == "lm_head.weight") for name in trained}
    jm.save_pretrained(f"{directory}/numbered", model, state.params, fqn_to_index_mapping=numbered)
    orbax.save_orbax(f"{directory}/orbax", trained, model.config.to_dict())
    same = jax.jit(lambda a, b: jnp.array([(a[key] == b[key]).all() for key in a]).all())
    for name in ("whole", "parts", "numbered"):  # and under another mesh
        back = jm.AutoModelForCausalLM.from_pretrained(f"{directory}/{name}", mesh=jm.make_mesh(tensor=2, fsdp=-1), rules="fsdp")[1]
        assert same(jm.flatten(back), trained)
    restored, _ = orbax.restore_orbax(f"{directory}/orbax", trained)
    assert same(restored, trained)
    params, asked, held = read_by_range(url)
    found["url"] = to_host(jm.flatten(params)["model.layers.1.self_attn.k_proj.weight"])
    found["trained"] = to_host(trained["model.layers.1.self_attn.k_proj.weight"])
    found["resumed"] = np.array(resumed(directory, model, state, step))
    if process == 0:
        np.savez(f"{directory}/found.npz", **found)
    assert not Path(directory, "programs").exists()
    Path(directory, f"told{process}.json").write_text(json.dumps({"told": told, "asked": asked, "held": held}))


TRAINER = {"tensor across processes": {"tensor": 2, "fsdp": 2}, "rows across processes": {"fsdp": 2, "tensor": 2}}


def collated(examples, step):
    """Rows as wide as the longest of the batch, and labels that are left out by lot."""
    T = max(len(example["labels"]) for example in examples)
    wide = lambda name, fill: np.stack([np.pad(e[name], (0, T - len(e[name])), constant_values=fill) for e in examples])
    labels = wide("labels", -100)
    kept = (np.random.default_rng(step).random(labels.shape) < 0.7) | (np.arange(T) == 1)
    return {"input_ids": wide("input_ids", 0), "attention_mask": labels != -100, "labels": np.where(kept, labels, -100)}


def trained(directory, path, mesh):
    """The losses of two epochs of 13 ragged examples, what the model then generates for 11, and its log-probabilities for 5 pairs."""
    model, params = jm.AutoModelForCausalLM.from_pretrained(path, mesh=jm.make_mesh(jax.devices()[:4], **mesh))
    rng = np.random.default_rng(3)
    rows = [{"input_ids": row, "labels": row} for row in rng.integers(3, 97, (13, 12)).astype(np.int32)]
    ragged = [{name: row[: 12 - 3 * (i % 4)] for name, row in example.items()} for i, example in enumerate(rows)]
    options = {"num_train_epochs": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "include_num_input_tokens_seen": "non_padding"}
    generating = options | {"predict_with_generate": True, "generation_max_length": 16}
    trainer = Seq2SeqTrainer(model, params, Seq2SeqTrainingArguments(str(directory), **generating), collated, train_dataset=ragged)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    predicted = trainer.predict(rows[:11])
    pair = lambda i: {"chosen_input_ids": rows[i]["input_ids"], "rejected_input_ids": rows[i + 6]["input_ids"][:7]}
    pairs = [pair(i) | {name.replace("input_ids", "labels"): ids for name, ids in pair(i).items()} for i in range(5)]
    out = f"{directory}/{jax.process_count()} {' '.join(mesh)}"
    place = SimpleNamespace(output_dir=out, per_device_train_batch_size=2)
    settings = SimpleNamespace(dpo=SimpleNamespace(loss_type="sigmoid"), training=place)
    found = referenced(settings, model, trainer.params, DataCollatorForPreference(0), Examples(pairs, dict))
    assert len(list(Path(out).glob("reference-*/logps.safetensors"))) == 1
    kept = referenced(settings, model, trainer.params, None, Examples(pairs, dict))  # read, as there is nothing to collate with
    assert all(np.array_equal(one[name], other[name]) for one, other in zip(found, kept) for name in one)
    loss, count = dpo_loss()
    preferring = Trainer(
        model,
        trainer.params,
        TrainingArguments(f"{out} pairs", **options | {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}),
        DataCollatorForPreference(0),
        train_dataset=found,
        eval_dataset=[*found, found[0]],
        loss=loss,
        count=count,
    )
    preferring.train()  # 5 pairs in batches of 4: what is left over has no labels to be left out by
    preferred = [line["loss"] for line in preferring.state.log_history if "loss" in line]
    stream = Stream([], labels=["labels"], rules=model.rules).make({"input_ids": np.zeros((4, 12), np.int32)})
    return {
        "resumed": streamed(model.rules, ragged),
        "share": process_share(model.rules),
        "stream": [stream.rows, stream.real],
        "losses": losses,
        "tokens": [line["num_input_tokens_seen"] for line in trainer.state.log_history if "loss" in line],
        "generated": predicted.predictions,
        "labels": predicted.label_ids,
        "preferred": [*preferred, preferring.evaluate()["eval_loss"]],  # of 6, which leave a batch over that divides
        "reference": [[one["reference_chosen_logps"], one["reference_rejected_logps"]] for one in found],
    }


def streamed(rules, ragged):
    """Whether a stream that packs goes on where it stopped, and where that is on this process."""
    index, count = process_share(rules)
    documents = [{"input_ids": np.asarray(row["input_ids"]), "labels": np.asarray(row["input_ids"])} for row in ragged]
    mixed = mixture([documents], seed=1, process_index=index, process_count=count)
    source = lambda: Stream(packed_batches(mixed, 2, 16, window=3), labels=["labels"], rules=rules)
    stream, other = source(), source()
    read = stream.epoch(0)
    for _ in range(5):
        next(read)
    position = json.loads(json.dumps(stream.position()))
    other.set_position(position)
    again = other.epoch(0)
    same = all(np.array_equal(next(read).arrays["input_ids"], next(again).arrays["input_ids"]) for _ in range(4))
    return [same, len(position["shares"]), len({json.dumps(share["state"]["value"]["parent"]) for share in position["shares"]})]


def trainers(process, directory, path):
    for name, mesh in TRAINER.items():
        np.savez(f"{directory}/{name}{process}.npz", **trained(directory, path, mesh))


DECODING = {
    "quantized": {
        "cache_implementation": "quantized",
        "cache_config": {"nbits": 8, "axis_key": 0, "axis_value": 0, "q_group_size": 8, "residual_length": 8},
    },
    "offloaded": {"cache_implementation": "offloaded"},
    "windows": {"cache_implementation": "sliding_window"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"num_assistant_tokens": 3},
}


def decoded():
    """{way of decoding: tokens} of a model whose layers see 8 tokens, and the losses of an adapter of its stacked layers."""
    config = jm.AutoConfig.for_model(
        "mistral", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=8,
    )  # fmt: skip
    rules = jm.Rules.preset("fsdp+tensor", jm.make_mesh(**MESH))
    model = jm.AutoModelForCausalLM.class_for(config)(config, rules=rules, scan_layers=True)
    full = model.clone(config=dataclasses.replace(config, sliding_window=None))
    params = jax.tree.map(lambda spec: 0.15 * filled(spec), jm.abstract_params(model))
    found = {}
    for way, options in DECODING.items():
        drafts = {"assistant_model": (model, params)} if way == "assistant" else {}
        key = {"key": jax.random.key(7)} if way == "samples" else {}
        used = model if way == "windows" else full
        out = jm.generate(used, params, PROMPTS, MASK, max_new_tokens=9, eos_token_id=None, **options, **drafts, **key)
        found[way] = to_host(out.sequences)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    optimizer, options = optax.adamw(1e-2), {"frozen": frozen_by(adapter)}
    state = jm.create_train_state(model, optimizer, add_lora(model, params, adapter, jax.random.key(2)), **options)
    step, losses = jm.make_train_step(model, optimizer, **options), []
    for i in range(3):
        state, metrics = step(state, batch(model, i))
        losses.append(to_host(metrics["loss"]))
    found["adapter"] = np.stack(losses)
    return found, model, state.params, adapter


def decoding(process, directory):
    found, model, params, adapter = decoded()
    save_adapter(f"{directory}/adapter", model, params, adapter)
    back, _ = load_adapter(f"{directory}/adapter", model, jm.unflatten({k: v for k, v in jm.flatten(params).items() if "lora_" not in k}))
    same = to_host((adapter_of(back), adapter_of(params)))
    jax.tree.map(np.testing.assert_array_equal, *same)
    tokens = [jm.generate(model, given, PROMPTS, MASK, max_new_tokens=4, eos_token_id=None).sequences for given in (params, back)]
    np.testing.assert_array_equal(*to_host(tokens))
    some = jax.devices()[: len(jax.devices()) // 2]  # of the first half of the processes
    try:
        jm.Rules.preset("fsdp", jm.make_mesh(some, fsdp=-1))
        told = "nothing"
    except ValueError as error:
        told = str(error)
    np.savez(f"{directory}/decoded{process}.npz", told=told, **found)


def training(process, directory, out, steps):
    """The job of trainer_job.py over all devices: it goes on from what `out` holds."""
    job = trainer_job.trainer(out, int(steps), jm.Rules.preset("fsdp", jm.make_mesh(fsdp=-1)))
    job.train(resume_from_checkpoint=get_last_checkpoint(out))
    job.save_model(f"{out}/hf")


def filled(spec):
    numbers = np.random.default_rng(spec.size).standard_normal(spec.shape, np.float32)
    return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: numbers[index])


def families(process, directory):
    """Parameters that the file holds fused, stacked, transposed or interleaved, and scanned layers, saved together and by each alone."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    kv, experts = {"num_key_value_heads": 2}, {"num_local_experts": 4, "num_experts_per_tok": 2}
    shapes = {
        "llama": small | kv,
        "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gpt_neox": small,
        "falcon": {**small, "num_kv_heads": 2, "new_decoder_architecture": True},
        "phi3": small | kv,
        "mixtral": small | kv | experts,
        "gpt_oss": small | kv | experts | {"head_dim": 8},
    }
    for name, values in shapes.items():
        for sizes in ({"fsdp": 2, "tensor": 4}, {"tensor": 8}, {"expert": 4, "data": 2}):
            rules = jm.Rules.preset("expert", jm.make_mesh(**sizes))
            config = jm.AutoConfig.for_model(name, **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **values})
            model = jm.AutoModelForCausalLM.class_for(config)(config, rules=rules, scan_layers=name == "llama")
            params = jax.tree.map(filled, jm.abstract_params(model))
            target = f"{directory}/{name}-{'-'.join(map(str, sizes.values()))}"
            jm.save_pretrained(f"{target}-together", model, params, max_shard_size=20_000)
            jm.save_pretrained(f"{target}-parts", model, params, consolidate=False)
            jm.save_pretrained(f"{target}-alone{process}", model, to_host(params), max_shard_size=20_000)


def killed(process, directory, *_):
    """Steps and saves until a signal ends it: the checkpoint's tensors and its config all hold the number of the step."""
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxmodels.convert.files import write_checkpoint
    from jaxmodels.convert.tensors import as_tensor

    mesh = jm.make_mesh(fsdp=-1)
    halves = NamedSharding(mesh, PartitionSpec("fsdp"))
    step = jax.jit(lambda xs: jax.tree.map(lambda x: x + 1 + 0 * x.sum(), xs), out_shardings=halves)
    xs = {f"w{i}": jax.make_array_from_callback((256, 64), halves, lambda index: np.zeros((128, 64), np.float32)) for i in range(6)}
    for number in itertools.count(1):
        xs = step(xs)
        print("saving", number)
        tensors = {name: as_tensor(x) for name, x in xs.items()}
        write_checkpoint(f"{directory}/kept", tensors, max_shard_size=150_000, files={"config.json": str(number)}, together=True)
        print("saved", number)


if __name__ == "__main__":
    task, process, count, port, directory, *arguments = sys.argv[1:]
    seconds = 3 if task in ("killed", "training") else 10
    timeouts = {"heartbeat_timeout_seconds": seconds, "shutdown_timeout_seconds": seconds}
    jax.distributed.initialize(f"localhost:{port}", int(count), int(process), **timeouts)
    tasks = {function.__name__: function for function in (everything, families, killed, trainers, training, decoding)}
    tasks[task](int(process), directory, *arguments)
