"""Public peaks of TPUs and GPUs, by what JAX calls them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device. flops: dense bfloat16 a second; hbm: bytes; bandwidth: of HBM, bytes a second; link: bytes a second, both ways,
    around one axis of a TPU's torus, or of all of a GPU's NVLinks."""

    name: str
    flops: float
    hbm: float
    bandwidth: float
    link: float


GiB = 2**30
# By jax.Device.device_kind, a GPU's by how that begins, the first that fits; of docs.cloud.google.com/tpu/docs and NVIDIA's data sheets.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * GiB, 1228e9, 100e9),
    "TPU v5 lite": Chip("v5e", 197e12, 15.75 * GiB, 819e9, 100e9),
    "TPU v5": Chip("v5p", 459e12, 95 * GiB, 2765e9, 200e9),
    "TPU v6 lite": Chip("v6e", 918e12, 31.25 * GiB, 1638e9, 200e9),
    "TPU7x": Chip("half a tpu7x", 1153.5e12, 96 * GiB, 3690e9, 100e9),  # a chip is two devices
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4.8e12, 900e9),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80e9, 2.0e12, 600e9),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94e9, 3.9e12, 600e9),
    "NVIDIA H100": Chip("H100", 989e12, 80e9, 3.35e12, 900e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40e9, 1.555e12, 600e9),
    "NVIDIA A100-PCIE-40GB": Chip("A100 PCIe 40GB", 312e12, 40e9, 1.555e12, 600e9),
    "NVIDIA A100 80GB PCIe": Chip("A100 PCIe", 312e12, 80e9, 1.935e12, 600e9),
    "NVIDIA A100": Chip("A100", 312e12, 80e9, 2.039e12, 600e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a jax.Device.device_kind; None where its peaks are not known, as of a part of a GPU (MIG)."""
    if "MIG" in device_kind:
        return None
    known = CHIPS.get(device_kind)
    return known or next((chip for kind, chip in CHIPS.items() if "NVIDIA" in kind and device_kind.startswith(kind)), None)
