"""How precisely an accelerator multiplies."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax


def parity_mode() -> AbstractContextManager[Any]:
    """`with parity_mode():` float32 products are float32 throughout. By default a TPU rounds their inputs to bfloat16 and a GPU to TF32,
    which is faster and differs from torch on a CPU in the third digit. A CPU always multiplies so."""
    return jax.default_matmul_precision("highest")
