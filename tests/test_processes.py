"""Several processes over one mesh: their numbers are one process', what they save together is whole, and they fail together."""

import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import process_worker
import pytest
import torch
import trainer_job
from processes import Job, serving
from transformers import LlamaConfig, LlamaForCausalLM

from jaxmodels.convert.files import read_checkpoint, write_checkpoint
from jaxmodels.convert.sharded import consolidate
from jaxmodels.convert.tensors import NumpyTensor
from jaxmodels.training.checkpoints import checkpoints_in, get_last_checkpoint

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """model/, and two hosts that have a model/ of another config, and a broken/ that is whole on the first alone."""
    directory = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=2, initializer_range=0.15, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(directory / "model", max_shard_size="60KB")
    for host in ("host0", "host1"):
        for name in ("model", "broken"):
            shutil.copytree(directory / "model", directory / host / name)
    (directory / "host1/broken/model-00002-of-00006.safetensors").unlink()
    file = directory / "host1/model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    return directory


@pytest.fixture(scope="module")
def alone(checkpoint):
    return process_worker.numbers(f"{checkpoint}/model")[0]


TOLD = {  # what every process is told
    "cache": "ValueError: 8 CPU devices with a compilation cache in .*/programs: programs from it mix up their collectives",
    "mesh": r"""mesh: {"fsdp": 4, "tensor": 2} on process 0\S*; {"fsdp": 8} on process""",
    "rules": "rules: .* on process 0",
    "dtype": 'dtype: "float32" on process 0; "bfloat16" on process 1',
    "path": "path: .*host0/model.* on process 0; .*host1/model.* on process 1",
    "config": "config.json, rms_norm_eps: 1e-06 on process 0.*; 0.5 on process 1",
    "missing": r"missing shards \['model-00002-of-00006.safetensors'\]",
    "prompt": "generate: the processes disagree.*\n.*input_ids and attention_mask",
    "ids": "token ids run from 99 to",
    "option": "max_new_tokens is -1",
    "key": r"generate: the processes disagree.*\n.*key \(hash\)",
    "preset": "sharding preset 'fdsp' is not known",
    "head's key": r"from_pretrained: the processes disagree.*\n  key: \[0, 0\] on process 0; \[0, 1\] on process 1",
    "size": "max_shard_size '5QB'",
    "shapes": r"global_batch: the processes disagree.*\n.*int32\[4, 12\]\S* on process 0; \S*int32\[4, 13\]\S* on process 1",
    "rate": r"train: the processes disagree, each .*:\n  learning_rate: 0.1 on process 0; 0.2 on process 1[^\n]*$",
    "examples": "examples: 8 on process 0; 7 on process 1",
    "resume": "resume_from_checkpoint=True, but .* has no checkpoint",
    "target": "path: .*saved0.*saved1",
    "disk": "No space left on device",
}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_do_what_one_does(checkpoint, alone, tmp_path, count):
    job = tmp_path / "job"
    shutil.copytree(checkpoint, job)
    for host in range(2, count):
        shutil.copytree(job / "host0", job / f"host{host}")
    with serving(job) as (url, _):
        Job("everything", job, count, 8 // count, f"{url}/model").finish()
    found = np.load(job / "found.npz")
    np.testing.assert_array_equal(found["tokens"], alone["tokens"])
    for name in ("logits", "losses", "norm"):
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["url"], read_checkpoint(job / "model")["model.layers.1.self_attn.k_proj.weight"].read())
    np.testing.assert_array_equal(found["resumed"][0], found["resumed"][1])  # bit for bit

    told = [json.loads((job / f"told{process}.json").read_text()) for process in range(count)]
    for process, of in enumerate(told):
        for name, message in TOLD.items():
            assert re.search(message, of["told"][name]), of["told"][name]
        own = process == 1  # who failed
        assert of["told"]["missing"].startswith("CheckpointError: broken" if own else "ProcessError: from_pretrained")
        for name in ("option", "preset", "size", "resume"):
            assert of["told"][name].startswith("ProcessError") == (not own)
        assert of["told"]["disk"].startswith("OSError" if own else "ProcessError: saving")
        assert of["asked"] == of["held"]  # not a byte of a tensor that is not needed here
    total = sum(tensor.nbytes for tensor in read_checkpoint(job / "model").values())
    assert all(of["held"] < 0.6 * total for of in told)
    assert not [path for path in job.iterdir() if "saving" in path.name]

    whole, parts = read_checkpoint(job / "whole"), read_checkpoint(job / "parts")
    state = torch_state({key: (tensor.shape, "float32") for key, tensor in whole.items()}, job / "parts")
    for key, tensor in whole.items():
        np.testing.assert_array_equal(state[key].numpy(), tensor.read())
    assert "shard-00002-model-00001-of-" in "".join(os.listdir(job / "parts"))
    np.testing.assert_array_equal(whole["model.layers.1.self_attn.k_proj.weight"].read(), found["trained"])
    assert sorted(os.listdir(job / "numbered")) == [
        *("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "model.safetensors.index.json",
    ]
    write_checkpoint(tmp_path / "alone", {key: NumpyTensor(tensor.read()) for key, tensor in whole.items()}, max_shard_size=30_000)
    consolidate(job / "parts", tmp_path / "from parts")
    consolidate(job / "parts")
    for directory in (job / "whole", job / "parts", tmp_path / "from parts"):
        for name in os.listdir(tmp_path / "alone"):  # byte for byte what one process writes
            assert (directory / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        assert set(os.listdir(directory)) == {*os.listdir(tmp_path / "alone"), "config.json", "generation_config.json"}
    assert set(parts) == set(whole)
    torch_model = LlamaForCausalLM.from_pretrained(job / "parts")
    np.testing.assert_array_equal(torch_model.model.layers[1].self_attn.k_proj.weight.detach(), found["trained"])


def test_trainers_of_two_processes_do_what_one_does(checkpoint, tmp_path):
    """Whether the processes have other rows or other parts of the same rows. Rows are as wide as the longest of all, labels are drawn as on
    one process, and no example is there twice."""
    Job("trainers", tmp_path, 2, 2, checkpoint / "model").finish()
    alone = process_worker.trained(tmp_path, checkpoint / "model", {"fsdp": 2, "tensor": 2})
    assert alone["tokens"][-1] == 2 * sum(12 - 3 * (i % 4) for i in range(13))
    assert [len(alone[key]) for key in ("losses", "generated", "reference")] == [8, 11, 5]
    for name in process_worker.TRAINER:
        for process in range(2):
            found = np.load(tmp_path / f"{name}{process}.npz")
            shares = 1 if name.startswith("tensor") else 2
            assert found["share"].tolist() == [process % shares, shares] and found["stream"].tolist() == [4 * shares] * 2
            assert found["resumed"].tolist()[:2] == [True, shares] and (shares == 1 or found["resumed"][2] == 2)  # other places in the data
            for key in ("tokens", "generated", "labels"):
                np.testing.assert_array_equal(found[key], alone[key], key)
            for key in ("losses", "reference", "preferred"):
                np.testing.assert_allclose(found[key], alone[key], rtol=1e-5, err_msg=key)


@pytest.mark.slow
def test_every_way_to_decode_and_adapters_of_stacked_layers(tmp_path):
    """Other caches than the plain one, beams, samples, drafts, a step that trains an adapter: what one process has over eight devices."""
    Job("decoding", tmp_path, 4, 2).finish()
    found, alone = [np.load(tmp_path / f"decoded{process}.npz") for process in range(4)], process_worker.decoded()[0]
    for process, of in enumerate(found):
        for way in process_worker.DECODING:
            np.testing.assert_array_equal(of[way], alone[way])
        np.testing.assert_allclose(of["adapter"], alone["adapter"], rtol=1e-5)
        assert f"has devices of process 0, 1 of 4, and this is process {process}: a mesh has devices of every process" in str(of["told"])


@pytest.mark.slow
def test_every_way_that_a_file_differs_from_the_tree(tmp_path):
    Job("families", tmp_path, 2, 4).finish()
    together = sorted(tmp_path.glob("*-together"))
    assert len(together) == 21
    for directory in together:
        stem = str(directory).removesuffix("-together")
        alone = Path(f"{stem}-alone1")
        assert {file.name for file in directory.iterdir()} == {file.name for file in alone.iterdir()}
        for file in alone.iterdir():
            assert (directory / file.name).read_bytes() == file.read_bytes(), file
        whole, parts = read_checkpoint(alone), read_checkpoint(f"{stem}-parts")
        assert set(parts) == set(whole)
        assert all(parts[key].read().tobytes() == whole[key].read().tobytes() for key in whole)
        from_torch = torch_state({key: (tensor.shape, tensor.dtype.name) for key, tensor in whole.items()}, f"{stem}-parts")
        assert all(from_torch[key].numpy().tobytes() == whole[key].read().tobytes() for key in whole)


@pytest.mark.slow
def test_a_kill_at_any_moment_ends_the_job_and_leaves_a_whole_checkpoint(tmp_path):
    """Twenty SIGKILLs, four jobs at a time, each in its own directory, where the next job begins over what the last has left."""

    def trial(place, turn):
        rng = random.Random(100 * place + turn)
        directory = tmp_path / str(place)
        directory.mkdir(exist_ok=True)
        job = Job("killed", directory, 2, 1)
        victim, log = rng.randrange(2), job.logs[0]
        until = time.monotonic() + 120
        while "saved 2" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        job.kill(victim)
        begun = time.monotonic()
        codes = job.wait(60)
        took = time.monotonic() - begun
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] not in (0, -signal.SIGKILL) and took < 30, (codes, took)
        told = job.logs[1 - victim].read_text()
        assert re.search("Gloo .* failed|another task died|ProcessError", told), told[-2000:]
        lines = [line for line in job.logs[victim].read_text().splitlines() if line.startswith("sav")]
        last = max(int(line.split()[1]) for log in job.logs for line in log.read_text().splitlines() if re.fullmatch(r"saved \d+", line))
        found = read_checkpoint(directory / "kept")
        values = {float(value) for tensor in found.values() for value in np.unique(tensor.read())}
        values.add(float((directory / "kept/config.json").read_text()))
        assert len(found) == 6 and len(values) == 1, values
        assert values.pop() in (last, last + 1)
        return lines[-1].startswith("saving")

    with ThreadPoolExecutor(4) as pool:
        inside = list(pool.map(lambda place: [trial(place, turn) for turn in range(5)], range(4)))
    assert sum(map(sum, inside)) >= 3  # most of the time is spent in saves


@pytest.mark.slow
def test_trainers_that_are_killed_go_on_bit_for_bit(tmp_path):
    """SIGKILL of either process around a checkpoint: the other ends too, and the next job makes of what is left what would have been."""
    start = lambda out: Job("training", tmp_path, 2, 1, tmp_path / out, 60)
    newest = lambda: max(checkpoints_in(tmp_path / "out"), default=0)
    start("whole").finish()
    moments = random.Random(0)
    for turn in range(4):
        job, reached, end = start("out"), newest(), time.monotonic() + 120
        while newest() == reached and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        job.kill(turn % 2)
        codes = job.wait(60)
        assert codes[turn % 2] == -signal.SIGKILL and codes[1 - turn % 2] not in (0, -signal.SIGKILL), codes
        assert re.search("Gloo .* failed|another task died|ProcessError", job.logs[1 - turn % 2].read_text())
    assert 0 < newest() < 60
    shutil.copytree(tmp_path / "out", tmp_path / "alone")
    start("out").finish()
    assert (tmp_path / "out/hf/model.safetensors").read_bytes() == (tmp_path / "whole/hf/model.safetensors").read_bytes()
    alone = trainer_job.trainer(tmp_path / "alone", 60, per_device_train_batch_size=8)  # one process of one device goes on, too
    alone.train(get_last_checkpoint(tmp_path / "alone"))
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    losses = [[line["loss"] for line in log if "loss" in line] for log in (alone.state.log_history, lines)]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(*losses, rtol=1e-5)


def torch_state(shapes, directory):
    """What torch's reader of sharded checkpoints makes of a directory."""
    import torch.distributed.checkpoint as dcp

    state = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (shape, dtype) in shapes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one process without torch.distributed
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(directory)))
    return state
