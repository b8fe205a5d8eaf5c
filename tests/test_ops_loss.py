"""Losses and their gradients against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels.ops.loss import causal_lm_loss, classification_loss, cross_entropy, span_loss

F = torch.nn.functional
RNG = np.random.default_rng(0)


def agree(mine, theirs, logits, dtype=jnp.float32):
    """Loss and gradient of both functions at the same logits."""
    x = jnp.asarray(logits, dtype)
    t = torch.tensor(np.asarray(x, np.float32), requires_grad=True)
    expected = theirs(t)
    expected.backward()
    value, gradient = jax.jit(jax.value_and_grad(mine))(x)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    rtol = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(gradient, np.float32), t.grad, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1, 50])
def test_cross_entropy(dtype, scale):
    for shape in ((1,), (5,), (2, 7)):
        logits = RNG.standard_normal((*shape, 11)) * scale
        labels = RNG.integers(0, 11, shape)
        labels.flat[1:3] = -100
        agree(
            lambda x, y=labels: cross_entropy(x, jnp.asarray(y)),
            lambda t, y=labels: F.cross_entropy(t.reshape(-1, 11), torch.tensor(y).reshape(-1)),
            logits,
            dtype,
        )


def test_all_labels_left_out():
    labels = np.full(3, -100)
    assert F.cross_entropy(torch.zeros(3, 4), torch.tensor(labels)).isnan()
    assert jnp.isnan(cross_entropy(jnp.zeros((3, 4)), jnp.asarray(labels)))


def test_causal_lm_loss_predicts_the_following_token():
    logits, labels = RNG.standard_normal((3, 9, 13)), RNG.integers(0, 13, (3, 9))
    labels[0, :4], labels[2, 5:] = -100, -100
    agree(
        lambda x: causal_lm_loss(x, jnp.asarray(labels)),
        lambda t: F.cross_entropy(t[:, :-1].reshape(-1, 13), torch.tensor(labels[:, 1:]).reshape(-1)),
        logits,
    )


def test_classification():
    logits = RNG.standard_normal((4, 3)) * 5
    classes, several = RNG.integers(0, 3, 4), RNG.integers(0, 2, (4, 3)).astype(np.float32)
    targets = RNG.standard_normal((4, 3)).astype(np.float32)
    for problem in (None, "single_label_classification"):
        agree(
            lambda x, p=problem: classification_loss(x, jnp.asarray(classes), p),
            lambda t: F.cross_entropy(t, torch.tensor(classes)),
            logits,
        )
    for problem in (None, "multi_label_classification"):
        agree(
            lambda x, p=problem: classification_loss(x, jnp.asarray(several), p),
            lambda t: F.binary_cross_entropy_with_logits(t, torch.tensor(several)),
            logits,
        )
    agree(lambda x: classification_loss(x, jnp.asarray(targets), "regression"), lambda t: F.mse_loss(t, torch.tensor(targets)), logits)
    one, wanted = logits[:, :1], targets[:, 0]
    agree(lambda x: classification_loss(x, jnp.asarray(wanted), None), lambda t: F.mse_loss(t.squeeze(), torch.tensor(wanted)), one)
    with pytest.raises(ValueError, match="'ranking' is none of regression"):
        classification_loss(jnp.asarray(logits), jnp.asarray(classes), "ranking")


def test_large_logits_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0]])
    assert jnp.isfinite(classification_loss(logits, jnp.asarray([[1.0, 0.0, 1.0]]), "multi_label_classification"))
    assert jnp.isfinite(cross_entropy(logits, jnp.asarray([1])))


@pytest.mark.parametrize(("start", "end"), [([0, 3, 6], [2, 6, 6]), ([0, 7, 2], [1, 900, 3]), ([[1], [2], [3]], [[4], [5], [6]])])
def test_span(start, end):
    """Positions at or beyond the length are left out."""
    logits = RNG.standard_normal((3, 7, 2))

    def theirs(t):
        clamp = lambda p: torch.tensor(p).reshape(-1).clamp(0, 7)
        return sum(F.cross_entropy(t[..., i], clamp(p), ignore_index=7) for i, p in enumerate((start, end))) / 2

    agree(lambda x: span_loss(x[..., 0], x[..., 1], jnp.asarray(start), jnp.asarray(end)), theirs, logits)


def test_span_of_padded_rows():
    """The row's loss without its padding, on either side; a position in the padding is outside."""
    logits = jnp.asarray(RNG.standard_normal((1, 5, 2)), jnp.float32)
    wanted = span_loss(logits[..., 0], logits[..., 1], jnp.array([1]), jnp.array([3]))
    for before, after in ((0, 2), (2, 0)):
        padded = jnp.pad(logits, ((0, 0), (before, after), (0, 0)), constant_values=3.0)
        rows, mask = jnp.concatenate([padded, padded]), jnp.pad(jnp.ones((2, 5)), ((0, 0), (before, after)))
        outside = 6 if after else 0
        found = span_loss(rows[..., 0], rows[..., 1], jnp.array([1 + before, outside]), jnp.array([3 + before, outside]), mask)
        assert found == pytest.approx(float(wanted), rel=1e-6)
