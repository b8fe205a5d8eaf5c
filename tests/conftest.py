"""What every test needs before jax is imported: eight virtual CPU devices, no network, no cache in the user's home.

Most of the suite's time is the compiler's, on programs that run once: it optimises little here, and as for users when JAXMODELS_OPTIMIZED
is set (as .ci/run does for the quick subset) or records are written."""

import gc
import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
LEAST = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_use_fusion_emitters=false"]
LEAST += ["--xla_cpu_parallel_codegen_split_count=1"]  # small programs: parts cost more than they save
if version("jaxlib").startswith("0.10.") and not {"JAXMODELS_OPTIMIZED", "JAXMODELS_RECORD"} & os.environ.keys():
    FLAGS += LEAST  # flags come and go, and an unknown one ends the process
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ["JAXMODELS_COMPILATION_CACHE"] = "off"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # several devices on CPU do without
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch beside XLA's threads and a second test process

QUICK = re.compile("test_(config|generation_config|llama|sharding|(convert|family|ops|processing)_.*)")


def pytest_configure(config):
    """Not in pyproject.toml, as a family of one's own is tested from elsewhere."""
    config.addinivalue_line("markers", "quick: one family and what all of them stand on, in under three minutes")
    config.addinivalue_line("markers", "slow: training at length, every family under every preset; run by .ci/run, not by default")


def pytest_collection_modifyitems(items):
    for item in items:
        if QUICK.fullmatch(item.path.stem) and not item.get_closest_marker("slow"):
            item.add_marker("quick")


def pytest_collection_finish():
    """A tenth of the time was the collector's, over what torch, transformers and jax made when they were imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Every compiled program holds a few memory maps, and Linux gives a process 65,530: past a number, those of earlier files go."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 12_000:
        import jax

        jax.clear_caches()
        gc.collect()
