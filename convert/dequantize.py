"""Quantised checkpoints, dequantised as they are read: float8 weights with one scale per block, and mxfp4.

    source = dequantized(read_checkpoint(directory), config)      # by config.json's `quantization_config`, lazily

Both rules turn several tensors of the file into one, whose slices are computed from slices of the file. They go one way: what is saved is
the dequantised tensor, without a `quantization_config`.

Axis letters: `...` any leading axes (experts), O rows, I columns, m x n a block of scales, G groups of 32 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.rules import Op, Tensors, forward
from jaxmodels.convert.tensors import Index, Tensor, Transposed

GROUP = 32  # columns that share a scale in mxfp4
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by the lower three bits; the fourth is the sign
_ROWS = 1024  # decoded at a time
# How GPTQ's and AWQ's, bitsandbytes' and compressed-tensors' keys end
PACKED = (".qweight", ".absmax", ".SCB", ".weight_packed", ".weight_scale")


def dequantization(config: Any) -> tuple[Op, ...]:
    """The rules that a config's `quantization_config` asks for: none where it has none or one of another method."""
    found = config.extra.get("quantization_config") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"quantization_config is {found!r}, expected an object with a quant_method")
    dtype = np.dtype(config.extra.get("dtype") or config.extra.get("torch_dtype") or ml_dtypes.bfloat16)
    if found.get("quant_method") == "mxfp4":
        return (Mxfp4(dtype),)
    if found.get("quant_method") == "fp8":
        block = found.get("weight_block_size")
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
            raise CheckpointError(f"quantization_config: weight_block_size is {block!r}, expected the rows and columns of a block")
        return (BlockScales((block[0], block[1]), dtype),)
    return ()


def dequantized(source: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint of `config` without quantisation, under the keys of an unquantised one."""
    rules = dequantization(config)
    packed = next((key for key in source if key.endswith(PACKED)), None)
    if packed is not None and not rules:
        method = (config.extra.get("quantization_config") or {}).get("quant_method")
        raise CheckpointError(
            f"{packed}: quantised weights (quant_method {method!r} in config.json), of which fp8 and mxfp4 can be read here; "
            "use the unquantised checkpoint, or dequantise this one with torch and save it"
        )
    return forward(rules, source)


@dataclass(frozen=True)
class BlockScales(Op):
    """DeepSeek-V3's float8 (arXiv:2412.19437): `X` [..., O, I] in float8 and `X_scale_inv` [..., ceil(O/m), ceil(I/n)] are their product
    `X`, multiplied in float32 and rounded once. `dtype`: of X where nobody asks for another."""

    block: tuple[int, int]
    dtype: np.dtype

    def forward(self, tensors: Tensors) -> Tensors:
        def pairs() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors.items():
                if key.endswith("_scale_inv"):
                    _partner(tensors, key, key.removesuffix("_scale_inv"))
                elif f"{key}_scale_inv" in tensors:
                    yield key, _Scaled(key, tensor, tensors[f"{key}_scale_inv"], self.block, self.dtype)
                else:
                    yield key, tensor

        return dict(pairs())

    def inverse(self, tensors: Tensors) -> Tensors:
        return tensors


@dataclass(frozen=True)
class Mxfp4(Op):
    """gpt_oss's experts (OCP Microscaling Formats 1.0): `X_blocks` [..., O, G, 16], two values to a byte, the lower bits first, and the
    exponents `X_scales` [..., O, G], 127 too high, are `X` [..., I, O] with I = 32 G. Every product is exact in bfloat16."""

    dtype: np.dtype

    def forward(self, tensors: Tensors) -> Tensors:
        def pairs() -> Iterator[tuple[str, Tensor]]:
            for key, tensor in tensors.items():
                name = key.removesuffix("_scales").removesuffix("_blocks")
                if name == key:
                    yield key, tensor
                elif key.endswith("_scales"):
                    _partner(tensors, key, f"{name}_blocks")
                else:
                    rows = _Mxfp4(name, tensor, _partner(tensors, key, f"{name}_scales"), self.dtype)
                    rank = len(rows.shape)
                    yield name, Transposed(rows, (*range(rank - 2), rank - 1, rank - 2))

        return dict(pairs())

    def inverse(self, tensors: Tensors) -> Tensors:
        return tensors


def _partner(tensors: Tensors, key: str, name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{key} has no {name} beside it: the checkpoint is incomplete, fetch it again")
    return tensors[name]


class _Scaled(Tensor):
    def __init__(self, key: str, base: Tensor, scales: Tensor, block: tuple[int, int], dtype: np.dtype) -> None:
        super().__init__(base.shape, dtype)
        grid = tuple(-(-size // length) for size, length in zip(base.shape[-2:], block))
        if len(base.shape) < 2 or scales.shape != (*base.shape[:-2], *grid) or base.dtype.itemsize > 1:
            raise CheckpointError(
                f"{key}: {base.dtype}{list(base.shape)} with scales {list(scales.shape)}, expected float8 with scales "
                f"{[*base.shape[:-2], *grid]} for blocks of {list(block)}"
            )
        self.base, self.scales, self.block = base, scales, block

    def _fill(self, out: np.ndarray, index: Index) -> None:
        *lead, rows, columns = index
        m, n = self.block
        grid = [slice(s.start // size, -(-s.stop // size)) for s, size in ((rows, m), (columns, n))]
        scales = self.scales.read((*lead, *grid)).astype(np.float32)
        scales = scales[..., np.arange(columns.start, columns.stop) // n - grid[1].start]  # [..., block rows, columns]
        for number, block in enumerate(range(grid[0].start, grid[0].stop)):
            part = slice(max(rows.start, block * m), min(rows.stop, (block + 1) * m))
            values = _floats(self.base.dtype)[self.base.read((*lead, part, columns)).view(np.uint8)]
            values *= scales[..., number, None, :]
            np.copyto(out[..., part.start - rows.start : part.stop - rows.start, :], values, casting="unsafe")


class _Mxfp4(Tensor):
    """[..., O, I], as the file has it."""

    def __init__(self, key: str, blocks: Tensor, scales: Tensor, dtype: np.dtype) -> None:
        if blocks.shape != (*scales.shape, GROUP // 2) or len(scales.shape) < 2 or {blocks.dtype, scales.dtype} != {np.dtype(np.uint8)}:
            raise CheckpointError(
                f"{key}: blocks {blocks.dtype}{list(blocks.shape)} with scales {scales.dtype}{list(scales.shape)}, expected uint8 "
                f"and {GROUP // 2} bytes of blocks to a scale"
            )
        super().__init__((*scales.shape[:-1], scales.shape[-1] * GROUP), dtype)
        self.blocks, self.scales = blocks, scales

    def _fill(self, out: np.ndarray, index: Index) -> None:
        *lead, rows, columns = index
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        cut = slice(columns.start - groups.start * GROUP, columns.stop - groups.start * GROUP)
        dtype = self.dtype if out.dtype == self.dtype else np.dtype(np.float32)
        table = _pairs(dtype)
        for start in range(rows.start, rows.stop, _ROWS):
            part = slice(start, min(start + _ROWS, rows.stop))
            scales = self.scales.read((*lead, part, groups)).astype(np.uint16)
            found = table[scales[..., None] << 8 | self.blocks.read((*lead, part, groups))]  # [..., rows, G, 16], two values each
            values = found.reshape(*found.shape[:-2], -1).view(dtype)[..., cut]
            np.copyto(out[..., start - rows.start : part.stop - rows.start, :], values, casting="unsafe")


@lru_cache(maxsize=4)
def _floats(dtype: np.dtype) -> np.ndarray:
    """[256] float32: the value of every byte, which a table gives faster than a cast."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


@lru_cache(maxsize=4)
def _pairs(dtype: np.dtype) -> np.ndarray:
    """[65536]: the two values of every byte under every scale, at 256 * scale + byte, as one unsigned number. Scale 255 is no number."""
    nibble = np.concatenate([_E2M1, -_E2M1])
    byte = np.arange(256)
    pairs = np.stack([nibble[byte & 15], nibble[byte >> 4]], -1)
    values = np.ldexp(pairs.astype(np.float64), byte[:, None, None] - 127)
    values[255] = np.nan
    with np.errstate(over="ignore"):  # 4 and 6 under the largest scale are infinite
        return values.astype(dtype).reshape(-1, 2).view(f"u{2 * dtype.itemsize}")[:, 0]
