"""The benchmark of one accelerator, run on what is here with a tiny shape: what a GPU would run, no more and no less."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxmodels.sharding.chips import chip_of
from jaxmodels.training.meter import peak_flops


@pytest.fixture(scope="module")
def accelerator():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield importlib.import_module("accelerator")


def test_the_table(accelerator, tmp_path):
    table = accelerator.main(["--shape", "tiny", "--rounds", "1", "--out", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text() == table + "\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert [row[0] for row in rows] == ["prefill tiny 2×16", "decode tiny 2 rows after 8", "train tiny 2×16"]
    assert all(len(row) == 5 and re.fullmatch(r"-?[\d.]+", row[1]) for row in rows)  # a difference of tiny times may be negative


def test_work(accelerator):
    """8B: two FLOPs a weight and token but for the embedding's, and attention; 16 GB of weights."""
    model = accelerator.build("llama-3-8b")
    run = lambda model, params, ids: model.apply({"params": params}, ids, logits_to_keep=1).logits
    ids = jax.ShapeDtypeStruct((1, 2048), "int32")
    found = accelerator.flops(model, run, accelerator.jm.abstract_params(model), ids)
    weights, head = 8_030_261_248 - 2 * 128256 * 4096, 128256 * 4096
    assert found == pytest.approx(2 * 2048 * weights + 2 * head + 32 * 2 * 2 * 2048**2 * 4096, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2e12),
        ("NVIDIA H100 NVL", 835e12, 3.9e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 1.935e12),
        ("TPU v5", 459e12, 2765e9),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v6 lite", 918e12, 1638e9),
    ],
)
def test_peaks(kind, flops, bandwidth):
    chip = chip_of(kind)
    assert (chip.flops, chip.bandwidth) == (flops, bandwidth)
    assert peak_flops(SimpleNamespace(device_kind=kind)) == flops  # so that a training run shows its MFU


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GH200 480GB"])
def test_peaks_that_are_not_known(kind):
    assert chip_of(kind) is None and peak_flops(SimpleNamespace(device_kind=kind)) is None
