"""Training and generation of a family on eight devices, under every sharding preset, against the same on one device."""

import copy
from functools import cache, cached_property

import jax
import numpy as np
import optax
import pytest
from cases import close, random_others

from jaxmodels.cache import segments
from jaxmodels.convert import parity
from jaxmodels.generation import generate
from jaxmodels.ops.pipeline import spec_axes
from jaxmodels.ops.precision import parity_mode
from jaxmodels.params import flatten, param_axes
from jaxmodels.sharding import Rules, global_batch, make_mesh
from jaxmodels.training import create_train_state, make_train_step
from jaxmodels.training.trainable import placement

TRAINING = [  # four devices do not divide the heads of most of these models, but their other parts
    ("replicated", {"data": 8}),
    ("zero1", {"data": 2, "fsdp": 4}),
    ("zero2", {"fsdp": 8}),
    ("fsdp", {"fsdp": 8}),
    ("tensor", {"data": 2, "tensor": 4}),
    ("fsdp+tensor", {"fsdp": 4, "tensor": 2}),
    ("sequence", {"fsdp": 2, "tensor": 2, "sequence": 2}),
    ("expert", {"fsdp": 2, "tensor": 2, "expert": 2}),
    ("fsdp", {"stage": 2, "data": 2, "fsdp": 2}),
]
GENERATING = [  # zero1 and zero2 as replicated; a pipeline has no cache
    where for where in TRAINING if where[0] not in ("zero1", "zero2") and "stage" not in where[1]
]
WAYS = [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}]
# Adam divides a gradient by its own size: with this epsilon, below most, those that are zero but for rounding move nothing.
OPTIMIZER = optax.adamw(1e-2, eps=1e-3, weight_decay=0.1)


def cuttable(hf_config):
    """The same with a number of words and of experts that the meshes divide."""
    config = copy.deepcopy(hf_config)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if number := getattr(config, name, None):
            setattr(config, name, number + number % 2)
    config.vocab_size = 264
    return config


def by_name(where):
    return "-".join((where[0], *where[1]))


def axes_of(tree):
    """The mesh axes that cut any leaf."""
    return {axis for leaf in jax.tree.leaves(tree) for entry in leaf.sharding.spec for axis in spec_axes(entry)}


class OneDevice:
    """A model with its parameters and what it makes of eight rows of very different lengths. others: as of Case.make."""

    def __init__(self, case, others):
        self.model, self.params = case.load(scan_layers=True)
        if hasattr(self.model.config, "output_router_logits"):  # the router's loss too
            self.model = self.model.clone(config=self.model.config.replace(output_router_logits=True))
        halves = [parity.hostile_inputs(264, 62, seed=seed) for seed in (0, 1)]
        self.ids, self.mask = (np.concatenate(parts) for parts in zip(*((half.input_ids, half.attention_mask) for half in halves)))
        labels = np.where(self.mask & (np.arange(62) % 7 != 3), self.ids, -100)
        self.batch = {"input_ids": self.ids, "attention_mask": self.mask, "labels": labels, **random_others(others, self.ids.shape)}
        self.new_tokens = cache(self._new_tokens)

    def rules(self, preset, mesh):
        """Skips what is for models with experts, and stages that do not divide the layers; all else is for every model."""
        if "expert" in mesh and not any("experts" in axes for axes in flatten(param_axes(self.model)).values()):
            pytest.skip("no routed experts")
        longest = max(segments(self.model.config.layer_kinds), key=lambda segment: segment[1] * segment[2])
        if longest[2] % mesh.get("stage", 1):
            pytest.skip("layers that make no two equal stages")
        return Rules.preset(preset, make_mesh(**mesh))

    @cached_property
    def trained(self):
        return self.train(self.model, self.batch)

    def train(self, model, batch):
        """After two clipped steps of AdamW: the losses and norms, how far each parameter went and its first moment, the state."""
        step, state = make_train_step(model, OPTIMIZER, max_grad_norm=1.0), create_train_state(model, OPTIMIZER, self.params)
        numbers = []
        for _ in range(2):
            state, metrics = step(state, batch)
            numbers.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        moved = jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), state.params, self.params)
        return numbers, (moved, state.opt_state[0].mu), state

    def check_training(self, preset, mesh):
        """Moments are sums of gradients: a wrong one shows in them, whatever Adam makes of it. Every axis of the mesh cuts its share."""
        rules = self.rules(preset, mesh)
        batch = global_batch(rules, self.batch)
        (wanted, of_one, _), (numbers, of_many, state) = self.trained, self.train(self.model.clone(rules=rules), batch)
        np.testing.assert_allclose(numbers, wanted, rtol=1e-5)
        for theirs, ours in zip(map(flatten, of_one), map(flatten, of_many)):
            total = optax.tree.norm(theirs)
            for name, x in theirs.items():
                assert np.linalg.norm(ours[name] - x) <= 1e-4 * max(np.linalg.norm(x), 1e-3 * total), name
        cut, whole = {*mesh} - {"data", "sequence"}, preset in ("replicated", "zero1", "zero2")
        assert axes_of(batch) == {*mesh} - {"tensor"}
        assert (axes_of(state.params), axes_of(state.opt_state)) == (set() if whole else cut, cut)

    def _new_tokens(self, way, rules=None):
        """The sequences [8*R,T+N] and logits [N,8*R,V] of one of WAYS."""
        model = self.model.clone(rules=rules)
        params = self.params if rules is None else jax.device_put(self.params, placement(model, self.params))
        options = parity.GREEDY | WAYS[way] | ({"key": jax.random.key(0)} if "do_sample" in WAYS[way] else {})
        with parity_mode():
            out = generate(model, params, self.ids, self.mask, max_new_tokens=8, output_logits=True, **options)
        return out.sequences, out.logits

    def check_generation(self, preset, mesh, way):
        (tokens, logits), (wanted, wanted_logits) = self.new_tokens(way, self.rules(preset, mesh)), self.new_tokens(way)
        np.testing.assert_array_equal(tokens, wanted)
        close(logits, wanted_logits)
