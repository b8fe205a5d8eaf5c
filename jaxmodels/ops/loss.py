"""Losses in float32, with HF's meaning of labels: -100 is left out.

Axis letters: B rows, T tokens, D hidden, V vocabulary, C labels of a sequence, G groups of devices that hold the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.ops.pipeline import spec_axes

IGNORE = -100

Head = Callable[[jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array, num_items: jax.Array | None = None) -> jax.Array:
    """Mean over labels [...] other than -100 of -log softmax(logits [..., V])[label]; nan when there is none, as in torch. With
    num_items [], their sum divided by it."""
    logits = logits.astype(jnp.float32)
    real = labels != IGNORE
    target = jnp.take_along_axis(logits, jnp.where(real, labels, 0)[..., None], -1)[..., 0]
    losses = jax.nn.logsumexp(logits, -1) - target
    return jnp.sum(losses * real) / (jnp.sum(real) if num_items is None else num_items)


def causal_lm_loss(logits: jax.Array, labels: jax.Array, num_items: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of logits [B,T,V] against the following label of labels [B,T]."""
    return cross_entropy(logits[:, :-1], labels[:, 1:], num_items)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What training may ask of a language model's loss.

    label_smoothing: the share of the mean of -log softmax over the whole vocabulary, as in HF's LabelSmoother. z_loss: this times
    logsumexp² is added (arXiv:2204.02311 §5). chunk: tokens of each row whose logits exist at one time, None for all of them.
    by_row: the loss is a sum for every row, [B]."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int | None = None
    by_row: bool = False


def token_losses(logits: jax.Array, labels: jax.Array, options: LossOptions = LossOptions()) -> jax.Array:
    """float32 [...]: the loss of every label [...] under logits [..., V], 0 where the label is -100."""
    logits = logits.astype(jnp.float32)
    real = labels != IGNORE
    target = jnp.take_along_axis(logits, jnp.where(real, labels, 0)[..., None], -1)[..., 0]
    if options.label_smoothing:
        target = (1 - options.label_smoothing) * target + options.label_smoothing * jnp.mean(logits, -1)
    normalizer = jax.nn.logsumexp(logits, -1)
    losses = normalizer - target
    if options.z_loss:
        losses = losses + options.z_loss * normalizer**2
    return jnp.where(real, losses, 0)


def row_losses(head: Head, x: jax.Array, labels: jax.Array, options: LossOptions, rules: Any = None) -> jax.Array:
    """As `summed_loss`, but a sum for every row, [B]. In chunks the logits are computed again for the gradient, since what weighs a row
    is not known sooner."""
    if options.chunk is None or options.chunk >= x.shape[1]:
        return jnp.sum(token_losses(_whole(head, x, rules), labels, options), 1)
    groups = _Groups(rules, *labels.shape)
    pieces = groups.pieces(x, labels, options.chunk)
    head, weights = jax.closure_convert(head, pieces[0][0, 0])
    piece = groups.each(lambda x, labels, weights: jnp.sum(token_losses(groups.place(head(x, *weights)), labels, options), 1))
    copies = groups.copies(weights)
    body = jax.checkpoint(lambda sums, xs: (sums + piece(*xs, copies), None), prevent_cse=False)
    return groups.rows(lax.scan(body, jnp.zeros(pieces[1].shape[1:3], jnp.float32), pieces)[0])


def summed_loss(head: Head, x: jax.Array, labels: jax.Array, options: LossOptions, rules: Any = None) -> jax.Array:
    """The sum [] of `token_losses` of head(x [B,T,D]) -> [B,T,V] against labels [B,T]. rules: the model's, of logical axes to mesh axes.

    With options.chunk the logits of so many tokens a row exist at a time, forward and backward: where a gradient is wanted the forward
    loop makes it at once, so no logits are computed twice. Over a mesh every device adds up the head's gradient from its own tokens, and
    these sums are reduced once, after the loop."""
    if options.chunk is None or options.chunk >= x.shape[1]:
        return jnp.sum(token_losses(_whole(head, x, rules), labels, options))
    groups = _Groups(rules, *labels.shape)
    x, labels = groups.pieces(x, labels, options.chunk)
    head, weights = jax.closure_convert(head, x[0, 0])
    one = lambda x, labels, weights: jnp.sum(token_losses(groups.place(head(x, *weights)), labels, options))
    piece, slope = groups.each(one), groups.each(jax.value_and_grad(one, (0, 2)))
    zero = lambda shape: groups.copies([jnp.zeros(shape, jnp.float32)])[0]

    @jax.custom_vjp
    def total(x: jax.Array, labels: jax.Array, weights: list[jax.Array]) -> jax.Array:
        copies = groups.copies(weights)
        return jnp.sum(lax.scan(lambda sums, xs: (sums + piece(*xs, copies), None), zero(()), (x, labels))[0])

    def forward(x: jax.Array, labels: jax.Array, weights: list[jax.Array]) -> tuple:
        copies = groups.copies(weights)

        def body(carry: tuple, xs: tuple) -> tuple:
            value, (dx, dw) = slope(*xs, copies)
            return jax.tree.map(jnp.add, carry, (value, dw)), dx  # the sums in float32, whatever dw's dtype

        scanned: Any = lax.scan(body, (zero(()), [zero(w.shape) for w in weights]), (x, labels))
        (value, dw), dx = scanned
        return jnp.sum(value), (dx, [jnp.sum(g, 0) for g in dw])

    def backward(gradients: tuple, cotangent: jax.Array) -> tuple:
        dx, dw = gradients
        return (cotangent * dx).astype(x.dtype), None, [(cotangent * g).astype(w.dtype) for g, w in zip(dw, weights)]

    total.defvjp(forward, backward)
    return total(x, labels, weights)


def _whole(head: Head, x: jax.Array, rules: Any) -> jax.Array:
    logits = head(x)
    return logits if rules is None else rules.constrain(logits, ("batch", "seq", "act_vocab"))


class _Groups:
    """Tokens [B,T] as G groups along the mesh axes that split them, to compute on each by itself: without rules one group.

    The partitioner would reduce a weight's gradient over all groups in every turn of a loop. With a leading axis G, of copies that each
    lie on their own group, a turn has nothing to reduce."""

    def __init__(self, rules: Any, B: int, T: int):
        self.rules, self.B = rules, B
        axes = () if rules is None else rules.spec(("batch", "seq"), (B, T))
        over = [spec_axes(axis) for axis in axes] or [(), ()]
        self.axes = (*over[0], *over[1])
        self.rowwise, self.columnwise = (rules.pieces(axes) if axes else 1 for axes in over)
        self.inside = rules and rules.inside(self.axes)

    def pieces(self, x: jax.Array, labels: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
        """[B,T,D] and [B,T] as [pieces,G,b,c,D] and [pieces,G,b,c] of `chunk` tokens a row, padded with labels that do not count."""
        own = labels.shape[1] // self.columnwise
        chunk = min(own, -(-chunk // self.columnwise))
        count = -(-own // chunk)

        def cut(x: jax.Array, fill: int) -> jax.Array:
            rest = x.shape[2:]
            x = x.reshape(self.rowwise, -1, self.columnwise, own, *rest).swapaxes(1, 2).reshape(-1, self.B // self.rowwise, own, *rest)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, count * chunk - own), *[(0, 0)] * len(rest)), constant_values=fill)
            return jnp.moveaxis(self._spread(x.reshape(*x.shape[:2], count, chunk, *rest)), 2, 0)

        return cut(x, 0), cut(labels, IGNORE)

    def rows(self, sums: jax.Array) -> jax.Array:
        """[G,b] of every group's tokens as [B]."""
        return sums.reshape(self.rowwise, self.columnwise, -1).sum(1).reshape(-1)

    def copies(self, weights: list[jax.Array]) -> list[jax.Array]:
        """[…] as [G, …]."""
        return [self._spread(jnp.broadcast_to(w, (self.rowwise * self.columnwise, *w.shape))) for w in weights]

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of every group's own."""
        if self.axes:
            return jax.vmap(function, spmd_axis_name=self.axes)
        return lambda *own: jax.tree.map(lambda y: y[None], function(*jax.tree.map(lambda x: x[0], own)))

    def place(self, logits: jax.Array) -> jax.Array:
        """One group's logits [b,c,V]."""
        return logits if self.inside is None else self.inside.constrain(logits, ("batch", "seq", "act_vocab"))

    def _spread(self, x: jax.Array) -> jax.Array:
        if not self.axes:
            return x
        spec = PartitionSpec(self.axes, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
        return lax.with_sharding_constraint(x, NamedSharding(self.rules.mesh, spec))


def classification_loss(logits: jax.Array, labels: jax.Array, problem_type: str | None) -> jax.Array:
    """HF's sequence-classification loss of logits [B,C]; `problem_type` None is inferred from C and the labels' dtype.

    regression: mean squared error; single_label_classification: cross-entropy of labels [B];
    multi_label_classification: binary cross-entropy of labels [B,C] in {0, 1}."""
    logits = logits.astype(jnp.float32)
    if problem_type is None:
        integral = jnp.issubdtype(labels.dtype, jnp.integer)
        problem_type = (
            "regression" if logits.shape[-1] == 1 else "single_label_classification" if integral else "multi_label_classification"
        )
    if problem_type == "regression":
        return jnp.mean((logits.reshape(labels.shape) - labels) ** 2)
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    if problem_type == "multi_label_classification":
        return jnp.mean(jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits))))
    raise ValueError(
        f"problem_type {problem_type!r} is none of regression, single_label_classification, multi_label_classification; "
        "set it in the config, or leave it None to infer it"
    )


def answer_labels(position: jax.Array, T: int, mask: jax.Array | None = None) -> jax.Array:
    """Positions [B] among T columns of a text as labels: -100 from T on, and where mask [B,T] leaves the column out."""
    position = jnp.maximum(position.reshape(-1), 0)
    real = position < T
    if mask is not None:
        real &= jnp.take_along_axis(mask, jnp.minimum(position, T - 1)[:, None], 1)[:, 0] > 0
    return jnp.where(real, position, IGNORE)


def span_loss(start_logits: jax.Array, end_logits: jax.Array, start: jax.Array, end: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of the two cross-entropies of logits [B,T] against positions [B]; positions outside the text are left out. Padding, where
    mask [B,T] is 0, is nobody's choice."""
    T = start_logits.shape[-1]

    def one(logits: jax.Array, position: jax.Array) -> jax.Array:
        logits = logits if mask is None else jnp.where(mask > 0, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        return cross_entropy(logits, answer_labels(position, T, mask))

    return (one(start_logits, start) + one(end_logits, end)) / 2
