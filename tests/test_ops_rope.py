"""Rotary frequencies and tables against transformers, for every rope type and option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxmodels.models.llama import LlamaConfig
from jaxmodels.ops.rope import RopeParameters, inverse_frequencies, rope_table, rotate


def factors(head_dim, low, step):
    return [low + step * i for i in range(head_dim // 2)]


def options(head_dim):
    """Every rope type with its options, over max_position_embeddings 512."""
    longrope = {"rope_type": "longrope", "short_factor": factors(head_dim, 1, 0.1), "long_factor": factors(head_dim, 2, 0.5)}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "default": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 3.0},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "yarn": yarn,
        "yarn-betas": {**yarn, "beta_fast": 16.0, "beta_slow": 2.0},
        "yarn-mscale": {**yarn, "mscale": 0.7, "mscale_all_dim": 1.1},
        "yarn-mscale-alone": {**yarn, "mscale": 0.7},
        "yarn-untruncated": {**yarn, "truncate": False},
        "yarn-attention-factor": {**yarn, "attention_factor": 1.3},
        "yarn-factor-of-lengths": {**yarn, "factor": None},
        "yarn-shrinking": {**yarn, "factor": 0.5},
        "longrope": {**longrope, "original_max_position_embeddings": 128},
        "longrope-factor": {**longrope, "original_max_position_embeddings": 128, "factor": 8.0},
        "longrope-attention-factor": {**longrope, "original_max_position_embeddings": 128, "attention_factor": 1.3},
        "longrope-same-length": {**longrope, "original_max_position_embeddings": 512},
        "llama3": {**llama3, "factor": 8.0, "original_max_position_embeddings": 128},
        "llama3-wide": {**llama3, "factor": 32.0, "original_max_position_embeddings": 8192},
    }


def configs(option, theta, head_dim):
    theirs = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": theta, **options(head_dim)[option]},
    )
    return theirs, LlamaConfig.from_dict(theirs.to_dict())


def tables(rope, head_dim, positions, lengths, dtype=jnp.float32):
    """cos and sin of positions [B,T] in rows that are `lengths` [B] long."""
    return rope_table(*inverse_frequencies(rope, head_dim, jnp.asarray(lengths)), jnp.asarray(positions), dtype)


def ulps(a, b):
    return np.abs(np.asarray(a).view(np.int32) - np.asarray(b).view(np.int32)).max()


@pytest.mark.parametrize("head_dim", [10, 64])
@pytest.mark.parametrize("theta", [10000.0, 150000.0, 500000.0])
@pytest.mark.parametrize("option", list(options(2)))
def test_frequencies_are_torchs_within_two_ulps(option, theta, head_dim):
    theirs, ours = configs(option, theta, head_dim)
    rope = ours.rope_parameters
    for length in (1, 128, 129, 512, 513, 3000):
        mine, scale = inverse_frequencies(rope, head_dim, jnp.asarray([length]))
        if rope.rope_type == "default":
            expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
        else:
            expected, factor = ROPE_INIT_FUNCTIONS[rope.rope_type](theirs, seq_len=torch.tensor(length))
        assert scale == pytest.approx(factor, rel=1e-12)
        assert mine.dtype == jnp.float32
        assert ulps(mine.reshape(-1), expected.numpy()) <= 2  # torch's own float32 power is up to one off


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("option", ["default", "yarn-mscale", "llama3", "dynamic", "longrope"])
def test_tables_far_out(option, dtype):
    """With the same frequencies (an ulp in one is 1e-5 in a table at position 8191) the tables are torch's to 1e-6."""
    theirs, ours = configs(option, 150000.0, 64)
    positions = np.array([[0, 1, 2, 127, 511, 512, 4095, 8191]], np.int32)
    reference = LlamaRotaryEmbedding(theirs)
    reference.rope_type = "default"  # no update of the frequencies
    reference.inv_freq.copy_(torch.tensor(np.asarray(inverse_frequencies(ours.rope_parameters, 64, jnp.asarray([8192]))[0]).reshape(-1)))
    expected = reference(torch.zeros(1, dtype=getattr(torch, dtype)), torch.tensor(positions))
    got = tables(ours.rope_parameters, 64, positions, [8192], jnp.dtype(dtype))
    for mine, reference in zip(got, expected):
        assert mine.dtype == dtype and mine.shape == (1, 8, 1, 32)
        # bfloat16: the same number, or the neighbour where the float32 before it lies on the border
        atol = 1e-6 if dtype == "float32" else 2**-8
        np.testing.assert_allclose(np.asarray(mine[:, :, 0], np.float32), reference[..., :32].float().numpy(), rtol=0, atol=atol)


def test_length_dependent_tables_are_per_row():
    """Rows of one batch on both sides of the border have the tables that each has alone."""
    for option in ("dynamic", "longrope"):
        theirs, ours = configs(option, 10000.0, 32)
        lengths = (100, 600, 1500)
        positions = np.tile(np.arange(1500, dtype=np.int32), (3, 1))
        cos, sin = tables(ours.rope_parameters, 32, positions, lengths)
        for row, length in enumerate(lengths):
            expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(length)[None])
            for mine, reference in zip((cos, sin), expected):
                np.testing.assert_allclose(mine[row, :length, 0], reference[0, :, :16], rtol=0, atol=length * 2**-23)  # an ulp


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotate(dtype):
    rng = np.random.default_rng(0)
    positions = np.array([[0, 1, 7, 300], [-1, 0, 1, 2]], np.int32)
    for heads, head_dim in ((1, 2), (3, 10), (4, 64)):
        x = jnp.asarray(rng.standard_normal((2, 4, heads, head_dim)), dtype)
        table = tables(RopeParameters(), head_dim, positions, [301, 3], dtype)
        got = rotate(x, table)
        as_torch = lambda a: torch.tensor(np.asarray(a, np.float32)).to(torch.float32 if dtype == jnp.float32 else torch.bfloat16)
        cos, sin = (torch.cat([as_torch(half[:, :, 0])] * 2, -1) for half in table)
        expected, _ = apply_rotary_pos_emb(as_torch(x), as_torch(x), cos, sin, unsqueeze_dim=2)
        assert got.dtype == dtype and got.shape == x.shape
        atol = 1e-6 if dtype == jnp.float32 else 2**-6
        np.testing.assert_allclose(np.asarray(got, np.float32), expected.float().numpy(), rtol=0, atol=atol)


def test_rotate_leaves_the_rest_of_a_partly_rotated_head():
    rope = RopeParameters(partial_rotary_factor=0.5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 12)), jnp.float32)
    table = tables(rope, 12, np.arange(5)[None], [5])
    assert table[0].shape == (1, 5, 1, 3)
    got = rotate(x, table)
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
    np.testing.assert_allclose(jnp.linalg.norm(got[..., :6], axis=-1), jnp.linalg.norm(x[..., :6], axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(got[..., :6], rotate(x[..., :6], tables(RopeParameters(), 6, np.arange(5)[None], [5])))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_interleaved_rotation_is_a_product_of_complex_numbers(dtype):
    """Dimensions 2i and 2i + 1 are one number; the tail of a partly rotated head stays. Computed in float32, rounded once."""
    positions, rope = np.array([[0, 1, 7, 300]], np.int32), RopeParameters(partial_rotary_factor=0.5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 3, 12)), dtype)
    got = rotate(x, tables(rope, 12, positions, [301]), interleaved=True)
    wide = np.asarray(x, np.float64)
    turn = np.exp(1j * positions[..., None, None] * np.asarray(inverse_frequencies(rope, 12)[0], np.float64))
    turned = (wide[..., :6:2] + 1j * wide[..., 1:6:2]) * turn
    expected = np.concatenate([np.stack([turned.real, turned.imag], -1).reshape(1, 4, 3, 6), wide[..., 6:]], -1)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=1e-4 if dtype == jnp.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_interleaved_pairs(dtype):
    """Dimensions 2i and 2i + 1 turn as i and i + R/2 do otherwise."""
    for head_dim, factor in ((10, 1.0), (12, 0.5)):
        table = tables(RopeParameters(partial_rotary_factor=factor), head_dim, [[0, 3, 300]], [301], dtype)
        R = 2 * table[0].shape[-1]
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, head_dim)), dtype)
        apart = jnp.concatenate([x[..., :R:2], x[..., 1:R:2], x[..., R:]], -1)
        expected = rotate(apart, table)
        got = rotate(x, table, interleaved=True)
        np.testing.assert_allclose(got[..., :R:2], expected[..., : R // 2], rtol=0, atol=2e-7 if dtype == jnp.float32 else 2**-6)
        np.testing.assert_allclose(got[..., 1:R:2], expected[..., R // 2 : R], rtol=0, atol=2e-7 if dtype == jnp.float32 else 2**-6)
        np.testing.assert_array_equal(got[..., R:], x[..., R:])


def test_scores_depend_on_the_distance_alone():
    q, k = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 1, 32)), jnp.float32)
    table = lambda p: tables(RopeParameters(), 32, [[p]], [1000])
    scores = [float(jnp.sum(rotate(q, table(p + 5)) * rotate(k, table(p)))) for p in (0, 3, 117, 900)]
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-4)


def test_under_transformations():
    """jit, grad, vmap and scan, lengths traced."""
    _, config = configs("dynamic", 10000.0, 10)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 7, 2, 10)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(7) + 510, (2, 7))

    def turn(x, length):
        return rotate(x, tables(config.rope_parameters, 10, positions, jnp.stack([length, length + 9])))

    lengths = jnp.asarray([300, 517, 800])
    expected = jnp.stack([turn(a, n) for a, n in zip(x, lengths)])
    np.testing.assert_allclose(jax.jit(jax.vmap(turn))(x, lengths), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(jax.lax.scan(lambda _, a: (None, turn(*a)), None, (x, lengths))[1], expected, rtol=0, atol=2e-5)
    cotangent = jax.jit(jax.grad(lambda x: jnp.sum(turn(x, lengths[1]) ** 2)))(x[0])
    np.testing.assert_allclose(cotangent, 2 * x[0], rtol=0, atol=1e-5)  # a rotation keeps the norm


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_type": "helix"}, "'helix'.*supported are default"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "needs long_factor, original_max_position_embeddings"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    ],
)
def test_bad_parameters(values, message):
    with pytest.raises(ValueError, match=message):
        RopeParameters.from_dict(values)


def test_more_dimensions_than_a_head_has():
    table = rope_table(jnp.ones(4), 1.0, jnp.arange(3)[None], jnp.float32)
    with pytest.raises(ValueError, match=r"8 dimensions of every head are to be rotated .* has 6"):
        rotate(jnp.ones((1, 3, 2, 6)), table)
