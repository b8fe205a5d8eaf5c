"""Saves that are killed at any moment: `kill_worker.py TASK DIRECTORY TRIALS`. No test of its own.

The parent has imported everything and started nothing; its children save, and are killed, or say what stands there."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxmodels.cli import checkpoint, main  # noqa: F401  # for the children
from jaxmodels.convert.files import PART, read_checkpoint, write_checkpoint
from jaxmodels.convert.orbax import is_orbax, restore_orbax
from jaxmodels.convert.sharded import consolidate
from jaxmodels.convert.tensors import as_tensor
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import abstract_params, flatten
from jaxmodels.training.checkpoints import NAME, Checkpoints, checkpoints_in, restore

tqdm.set_lock(threading.RLock())  # its own is shared with forked children: one killed while it holds it would hang the rest
tqdm.monitor_interval = 0
SHAPE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


def forked(function, *arguments):
    """The child's process id, and the end of a pipe from which its answer comes as JSON."""
    source, sink = os.pipe()
    child = os.fork()
    if child:
        os.close(sink)
        return child, source
    code = 1
    try:
        os.write(sink, json.dumps(function(*arguments)).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finished(child, source):
    answer = os.fdopen(source).read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(answer)


def values_in(directory):
    """The one number that every tensor of a checkpoint and its config's `made` hold; None without a checkpoint."""
    if not os.path.lexists(directory):
        return None
    if is_orbax(directory):
        arrays = {name: np.asarray(leaf) for name, leaf in restore_orbax(directory)[0].items()}
        expected = 12
    else:
        arrays = {name: tensor.read() for name, tensor in read_checkpoint(directory).items()}
        expected = len(SHAPES)
    made = json.loads((directory / "config.json").read_text())["made"]
    values = {float(x) for array in arrays.values() for x in np.unique(array)} | {float(made)}
    assert len(arrays) == expected and len(values) == 1, (len(arrays), values)
    return values.pop()


def llama():
    """{name: shape} of its tensors."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))
    return {name: spec.shape for name, spec in flatten(abstract_params(model)).items()}


def write(directory, value, **options):
    """A Llama's checkpoint in which everything is `value`."""
    config = json.dumps({**SHAPE, "num_key_value_heads": 2, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "made": value})
    tensors = {name: as_tensor(np.full(shape, value, np.float32)) for name, shape in SHAPES.items()}
    write_checkpoint(directory, tensors, files={"config.json": config}, **options)


def command(*arguments):
    code = main.main(["convert", *map(str, arguments)])
    assert code == 0, code


class Converted:
    """`jaxmodels convert`: to safetensors from one of two checkpoints in another dtype and shard size each, with `options` to Orbax."""

    def __init__(self, place, *options, back=False):
        self.place, self.target, self.options, self.back = place, place / "dst" / "m", options, back

    def start(self):
        for value in (1, 2):
            write(self.place / f"src{value}", value, max_shard_size=1_000_000)
            if self.back:
                command(self.place / f"src{value}", self.place / f"orbax{value}", "--format", "orbax", "--scan")

    def save(self, value):
        form = self.options or (("--dtype", "bfloat16") if value == 1 else ("--max-shard-size", "500KB"))
        command(self.place / f"{'orbax' if self.back else 'src'}{value}", self.target, *form)

    def held(self):
        value = values_in(self.target)
        if value is not None and not self.options:
            dtypes = {str(tensor.dtype) for tensor in read_checkpoint(self.target).values()}
            files = len(list(self.target.glob("*.safetensors")))
            assert (dtypes, files > 1) == (({"bfloat16"}, False) if value == 1 else ({"float32"}, True)), (value, dtypes, files)
        return value

    def prepare(self, trial):
        """Every third time there is nothing yet."""
        if trial % 3 == 2:
            shutil.rmtree(self.target, ignore_errors=True)

    def next(self, held):
        return 1 if held == 2 else 2

    def leftovers(self):
        return {name for name in os.listdir(self.target.parent) if name != self.target.name}


class Written(Converted):
    """`write_checkpoint` over what there is, in files of any number; another file there stays."""

    def start(self):
        write(self.target, 0)
        (self.target / "tokenizer.json").write_text("tok")

    def save(self, value):
        write(self.target, value, max_shard_size=random.Random(value).choice([500_000, 10**9]))

    def held(self):
        assert sorted(n for n in os.listdir(self.target) if not n.startswith("model")) == ["config.json", "tokenizer.json"]
        return values_in(self.target)

    def prepare(self, trial):
        pass

    def next(self, held):
        return held + 1


class Consolidated(Converted):
    """`consolidate` of the parts that a target holds (0), whose files (1) take their place."""

    def start(self):
        write(self.place / "parts", 7, consolidate=False, max_shard_size=500_000)
        (self.place / "parts" / "tokenizer.json").write_text("tok")
        shutil.copytree(self.place / "parts", self.target)

    def save(self, value):
        consolidate(self.target)

    def held(self):
        assert values_in(self.target) == 7
        names = set(os.listdir(self.target))
        parts = set(filter(PART.fullmatch, names))
        assert names - parts >= {"config.json", "tokenizer.json"}
        whole = {name for name in names if name.startswith("model")}
        assert len(names) == 2 + len(parts or whole) and len(parts or whole) > 5, names
        return 0 if parts else 1

    def prepare(self, trial):
        shutil.rmtree(self.target)
        shutil.copytree(self.place / "parts", self.target)

    def next(self, held):
        return 1


class Trained(Converted):
    """A run's checkpoints, written in the background: of two that stay, the first is the best; each holds its step. One that is too many
    goes once the newest is there."""

    about = {"model": "m", "config": {}, "optimizer": "o"}  # noqa: RUF012

    def state(self, value):
        return jax.device_put({name: np.full((256, 256), value, np.float32) for name in "abcd"})

    def start(self):
        self.save(1)

    def save(self, value):
        checkpoints = Checkpoints(self.target, limit=2)
        checkpoints.best = str(checkpoints.path(1))
        checkpoints.save(value, self.state(value), self.about, {"step": value})
        checkpoints.close()

    def held(self):
        found = checkpoints_in(self.target)
        assert 1 in found and len(found) <= 3, list(found)
        for step, path in found.items():
            state, run = restore(path, self.state(0), self.about)
            assert run == {"step": step} and all((np.asarray(leaf) == step).all() for leaf in state.values()), path
        return max(found)

    def prepare(self, trial):
        pass

    def next(self, held):
        return held + 1

    def leftovers(self):
        return {name for name in os.listdir(self.target) if not NAME.fullmatch(name)}


TASKS = {
    "write": Written,
    "convert": Converted,
    "stack": lambda place: Converted(place, "--format", "orbax", "--scan"),
    "unstack": lambda place: Converted(place, back=True),
    "consolidate": Consolidated,
    "train": Trained,
}


def writing(task, child, before):
    """Waits until the child has begun to write, or is done."""
    while not task.leftovers() - before and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.0005)


def times(task):
    """Seconds until a save writes, and from then on."""
    task.prepare(0)
    value = task.next(finished(*forked(task.held)))
    begun = time.perf_counter()
    child, source = forked(task.save, value)
    writing(task, child, task.leftovers())
    writes = time.perf_counter()
    finished(child, source)
    return writes - begun, time.perf_counter() - writes


def run(task, trials, rng):
    """Kills at random, of every two the second once something is written; how many found the old, how many the new, how many left
    something behind, which the next save removes."""
    finished(*forked(task.start))
    taken = [times(task) for _ in range(4)]
    longest, shortest = max(map(sum, taken)), min(after for _, after in taken)
    counts = {"old": 0, "new": 0, "inside": 0}
    for trial in range(trials):
        task.prepare(trial)
        old = finished(*forked(task.held))
        left = task.leftovers()
        child, source = forked(task.save, new := task.next(old))
        if trial % 2:
            writing(task, child, left)
        time.sleep(rng.random() * (shortest if trial % 2 else longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(source)
        held = finished(*forked(task.held))
        assert held in (old, new), (held, old, new)
        counts["old" if held == old else "new"] += 1
        counts["inside"] += bool(task.leftovers() - left)
    task.prepare(0)
    finished(*forked(task.save, new := task.next(finished(*forked(task.held)))))
    assert finished(*forked(task.held)) == new
    assert not task.leftovers(), task.leftovers()
    return counts


if __name__ == "__main__":
    name, directory, trials = sys.argv[1:]
    place = Path(directory)
    SHAPES = finished(*forked(llama))
    (place / "dst").mkdir(parents=True)
    print(json.dumps(run(TASKS[name](place), int(trials), random.Random(0))))
