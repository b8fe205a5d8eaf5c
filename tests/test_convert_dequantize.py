"""Dequantisation against transformers' own, slice by slice, and what it says of files that do not fit."""

import math
import types

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxmodels.convert.dequantize import BlockScales, Mxfp4, dequantization, dequantized
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.tensors import NumpyTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TORCH = {np.dtype(np.float32): torch.float32, BFLOAT16: torch.bfloat16}
quick = settings(deadline=None, max_examples=40)


def config(**values):
    return types.SimpleNamespace(extra=values)


def lazy(**arrays):
    return {key: NumpyTensor(array) for key, array in arrays.items()}


def as_torch(array):
    return torch.tensor(array.astype(np.float32)).to(TORCH[array.dtype])


def same(ours, theirs):
    assert tuple(theirs.shape) == ours.shape
    assert torch.equal(as_torch(ours), theirs)


@st.composite
def cut(draw, shape):
    bounds = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return tuple(slice(a, b) for a, b in bounds)


def float8(shape, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return np.where(bits & 127 == 127, 0, bits).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)  # all but nan


@pytest.mark.parametrize("dtype", TORCH, ids=str)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_block_scales_as_transformers(dtype, lead):
    weight = float8((*lead, 24, 30))
    scales = np.random.default_rng(1).standard_normal((*lead, 6, 3)).astype(np.float32)
    (tensor,) = BlockScales((4, 10), dtype).forward(lazy(weight=weight, weight_scale_inv=scales)).values()
    theirs = Fp8Dequantize(None)._dequantize_one(
        torch.tensor(weight.view(np.uint8)).view(torch.float8_e4m3fn), torch.tensor(scales), TORCH[dtype]
    )
    same(tensor.read(), theirs)


@quick
@given(st.data(), st.sampled_from([1, 3, 128]), st.sampled_from([1, 4, 128]))
def test_slices_of_block_scales(data, m, n):
    """Blocks that the matrix does not fill; a slice is the slice of the whole."""
    shape = data.draw(st.sampled_from([(2, 9, 14), (1, 7), (17, 5)]))
    grid = (*shape[:-2], -(-shape[-2] // m), -(-shape[-1] // n))
    weight, scales = float8(shape), np.random.default_rng(2).standard_normal(grid).astype(np.float32)
    every = np.repeat(np.repeat(scales, m, -2)[..., : shape[-2], :], n, -1)[..., : shape[-1]]
    expected = weight.astype(np.float32) * every
    (tensor,) = BlockScales((m, n), BFLOAT16).forward(lazy(weight=weight, weight_scale_inv=scales)).values()
    index = data.draw(cut(shape))
    np.testing.assert_array_equal(tensor.read(index), expected[index].astype(BFLOAT16))
    out = np.empty(expected[index].shape, np.float32)
    tensor.read_into(out, index)
    np.testing.assert_array_equal(out, expected[index])  # rounded to what is asked for, once


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_mxfp4_as_transformers(dtype):
    """Every byte under every scale that is a number and does not leave the range."""
    group = np.arange(252 * 16).reshape(4, 36, 28)
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)[group % 16]
    scales = (1 + group // 16).astype(np.uint8)
    (tensor,) = Mxfp4(dtype).forward(lazy(w_blocks=blocks, w_scales=scales)).values()
    same(tensor.read(), convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=TORCH[dtype]))


@quick
@given(st.data())
def test_slices_of_mxfp4(data):
    rng = np.random.default_rng(3)
    blocks, scales = rng.integers(0, 256, (2, 5, 3, 16), np.uint8), rng.integers(100, 140, (2, 5, 3), np.uint8)
    (tensor,) = Mxfp4(BFLOAT16).forward(lazy(w_blocks=blocks, w_scales=scales)).values()
    whole, index = tensor.read(), data.draw(cut((2, 96, 5)))
    assert whole.shape == (2, 96, 5) and math.prod(whole.shape) == 2 * blocks.size
    np.testing.assert_array_equal(tensor.read(index), whole[index])
    out = np.empty(whole[index].shape, np.float32)
    tensor.read_into(out, index)
    np.testing.assert_array_equal(out, whole[index].astype(np.float32))


def test_scales_at_the_end_of_their_range():
    """The largest products are infinite, scale 255 is no number (OCP Microscaling Formats 1.0, section 5.4.1)."""
    blocks, scales = np.full((1, 3, 1, 16), 0x71, np.uint8), np.array([[[254], [255], [0]]], np.uint8)  # 0.5 and 6
    (tensor,) = Mxfp4(np.dtype(np.float32)).forward(lazy(w_blocks=blocks, w_scales=scales)).values()
    largest, none, smallest = tensor.read()[0, :2].T
    assert largest[0] == 2.0**126 and np.isinf(largest[1]) and np.isnan(none).all() and (smallest == [2.0**-128, 6 * 2.0**-127]).all()


def test_what_a_config_asks_for():
    block = {"quant_method": "fp8", "weight_block_size": [128, 64]}
    assert dequantization(config()) == dequantization(config(quantization_config={"quant_method": "gptq"})) == ()
    assert dequantization(config(quantization_config=block, torch_dtype="float32")) == (BlockScales((128, 64), np.dtype(np.float32)),)
    assert dequantization(config(quantization_config={"quant_method": "mxfp4"})) == (Mxfp4(BFLOAT16),)
    for wrong in (None, [128], [128, 0], "128"):
        with pytest.raises(CheckpointError, match="weight_block_size is"):
            dequantization(config(quantization_config=block | {"weight_block_size": wrong}))
    plain = lazy(a=np.ones((2, 3), np.float32))
    assert dequantized(plain, config(quantization_config=block))["a"] is plain["a"]


@pytest.mark.parametrize(
    ("rule", "arrays", "message"),
    [
        (BlockScales((4, 4), BFLOAT16), {"w_scale_inv": np.ones((1, 1))}, "w_scale_inv has no w beside it"),
        (
            BlockScales((4, 4), BFLOAT16),
            {"w": float8((5, 4)), "w_scale_inv": np.ones((1, 1))},
            r"w: .*expected float8 with scales \[2, 1\]",
        ),
        (BlockScales((4, 4), BFLOAT16), {"w": np.ones((4, 4), np.float32), "w_scale_inv": np.ones((1, 1))}, "w: float32.*expected float8"),
        (Mxfp4(BFLOAT16), {"w_scales": np.ones((2, 1), np.uint8)}, "w_scales has no w_blocks"),
        (Mxfp4(BFLOAT16), {"w_blocks": np.ones((2, 1, 16), np.uint8)}, "w_blocks has no w_scales"),
        (
            Mxfp4(BFLOAT16),
            {"w_blocks": np.ones((2, 1, 8), np.uint8), "w_scales": np.ones((2, 1), np.uint8)},
            "16 bytes of blocks to a scale",
        ),
    ],
)
def test_files_that_do_not_fit(rule, arrays, message):
    with pytest.raises(CheckpointError, match=message):
        rule.forward(lazy(**arrays))
