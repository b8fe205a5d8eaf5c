"""Runs that end before they are done: killed at any moment, asked to go, out of disk. What follows is what would have been."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmodels.training.checkpoints import checkpoints_in, read_meta

JOB = Path(__file__).parent / "trainer_job.py"
CLOCK = ("tokens_per_second", "model_flops_per_second", "seconds_left", "host_memory", "runtime", "samples_per_second", "steps_per_second")


class Jobs:
    """Starts the job; its programs are compiled once for all."""

    def __init__(self, cache):
        self.env = os.environ | {"PYTHONPATH": str(JOB.parent.parent), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "XLA_FLAGS": ""}

    def start(self, out, steps):
        command = [sys.executable, str(JOB), str(out), str(steps)]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, out, steps):
        process = self.start(out, steps)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory):
    """24 steps without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    jobs.finish(out, 24)
    return out


def result(out):
    """(weights as bytes, the log without what a clock says, the checkpoints' steps, callbacks' states)."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    plain = [{name: value for name, value in line.items() if not name.endswith(CLOCK)} for line in log]
    steps = checkpoints_in(out)
    run = read_meta(list(steps.values())[-1])["run"]
    return (out / "hf" / "model.safetensors").read_bytes(), plain, list(steps), run["data"], run["trainer_state"]["stateful_callbacks"]


def until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def kill(process, number=signal.SIGKILL):
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


def half_written(out):
    return any("orbax-checkpoint-tmp" in path.name for path in out.glob("checkpoint-*"))


def newest(out):
    return max(checkpoints_in(out), default=0)


def test_killed_inside_a_save_and_asked_to_go(jobs, whole, tmp_path):
    """SIGKILL while a checkpoint is half written, then SIGTERM: exit code 143 and a checkpoint of the very last step."""
    out = tmp_path / "out"
    process = jobs.start(out, 24)
    until(lambda: newest(out) >= 4 and half_written(out), process)
    output = kill(process)
    assert process.returncode == -signal.SIGKILL and 4 <= newest(out) < 24, output
    process, reached = jobs.start(out, 24), newest(out)
    until(lambda: newest(out) > reached, process)
    output = kill(process, signal.SIGTERM)
    assert process.returncode == 143, output
    assert f"SIGTERM: saved {out / f'checkpoint-{newest(out)}'}" in output and not half_written(out)
    assert newest(out) < 24
    jobs.finish(out, 24)
    assert result(out) == result(whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(jobs, tmp_path):
    whole, out, steps = tmp_path / "whole", tmp_path / "out", 160
    jobs.finish(whole, steps)
    moments, inside = random.Random(0), 0
    for number in range(20):
        process, reached = jobs.start(out, steps), newest(out)
        if number % 4 == 3:  # perhaps before anything new is there
            time.sleep(moments.uniform(0, 4))
        else:
            until(lambda reached=reached: newest(out) > reached, process)
            time.sleep(moments.uniform(0, 0.15))
            if number % 2:
                until(lambda: half_written(out), process)
        assert process.poll() is None, "the job was done before it could be killed: give it more steps"
        output = kill(process)
        assert process.returncode == -signal.SIGKILL, output
        inside += half_written(out)
    assert newest(out) < steps and inside >= 3
    jobs.finish(out, steps)
    assert result(out) == result(whole)


def test_a_full_disk_loses_nothing(jobs, whole, tmp_path):
    """A limit on the size of files stands for the disk: a real failure of a real write, in the middle of a checkpoint."""
    out = shutil.copytree(whole, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.glob("checkpoint-*/**/*") if path.is_file()}
    limit = 20_000  # bytes: more than a checkpoint's JSON takes; its arrays are 240 kB in three or four files, cut as it happens
    process = jobs.start(out, 28)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    assert "checkpoint-26 could not be written" in output and f"The last good checkpoint: {out / 'checkpoint-24'}" in output, output
    assert {path: path.read_bytes() for path in before} == before and not half_written(out)
