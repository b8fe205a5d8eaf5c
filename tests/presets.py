"""Training and generation of a family on eight devices, under every sharding preset, against the same on one device.

Axis letters: T columns of the prompts, N new tokens, M beams, V vocabulary."""

import copy
from functools import cached_property

import jax
import numpy as np
import optax
import pytest
from cases import close, random_others

from jaxmodels.convert import parity
from jaxmodels.generation import generate
from jaxmodels.ops.pipeline import spec_axes
from jaxmodels.ops.precision import parity_mode
from jaxmodels.params import flatten, param_axes
from jaxmodels.sharding import Rules, global_batch, make_mesh
from jaxmodels.training import create_train_state, make_train_step
from jaxmodels.training.trainable import placement

# four devices do not divide the heads of most of these models, but their other parts
PRESET_MESHES = {
    "replicated": {"data": 8},
    "zero1": {"data": 2, "fsdp": 4},
    "zero2": {"fsdp": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "fsdp+tensor": {"fsdp": 4, "tensor": 2},
    "sequence": {"fsdp": 2, "tensor": 2, "sequence": 2},
    "expert": {"fsdp": 2, "tensor": 2, "expert": 2},
}
GENERATING = ("replicated", "fsdp", "tensor", "fsdp+tensor", "sequence", "expert")  # zero1 and zero2 as replicated
WAYS = {"greedy": {}, "sampling": {"do_sample": True, "top_k": 20}, "beams": {"num_beams": 3}}
# Adam divides a gradient by its own size: with this epsilon, below most, those that are zero but for rounding move nothing.
OPTIMIZER = optax.adamw(3e-3, eps=1e-3, weight_decay=0.1)


def cuttable(hf_config):
    """The same with a number of words and of experts that the meshes divide."""
    config = copy.deepcopy(hf_config)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if number := getattr(config, name, None):
            setattr(config, name, number + number % 2)
    config.vocab_size = 264
    return config


def axes_of(tree):
    """The mesh axes that cut any leaf."""
    return {axis for leaf in jax.tree.leaves(tree) for entry in leaf.sharding.spec for axis in spec_axes(entry)}


def rules_of(name):
    return Rules.preset(name, make_mesh(**PRESET_MESHES[name]))


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

    def applies(self, name):
        """Experts are cut where there are any; all other presets are for every model."""
        return name != "expert" or any("experts" in axes for axes in flatten(param_axes(self.model)).values())

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

    def check_training(self, name):
        """Moments are sums of gradients: a wrong one shows in them, whatever Adam makes of it. Every axis of the mesh cuts its share."""
        if not self.applies(name):
            pytest.skip("no routed experts")
        rules, mesh = rules_of(name), PRESET_MESHES[name]
        batch = global_batch(rules, self.batch)
        (wanted, of_one, _), (numbers, of_many, state) = self.trained, self.train(self.model.clone(rules=rules), batch)
        np.testing.assert_allclose(numbers, wanted, rtol=1e-5)
        for theirs, ours in zip(map(flatten, of_one), map(flatten, of_many)):
            total = optax.tree.norm(theirs)
            for key, x in theirs.items():
                assert np.linalg.norm(ours[key] - x) <= 1e-4 * max(np.linalg.norm(x), 1e-3 * total), key
        cut, whole = {*mesh} - {"data", "sequence"}, name in ("replicated", "zero1", "zero2")
        assert axes_of(batch) == {*mesh} - {"tensor"}
        assert (axes_of(state.params), axes_of(state.opt_state)) == (set() if whole else cut, cut)

    def new_tokens(self, way, model, params):
        """The sequences [8,T+N] and logits [N,8*M,V] of one of WAYS."""
        key = {"key": jax.random.key(0)} if way == "sampling" else {}
        with parity_mode():
            out = generate(model, params, self.ids, self.mask, max_new_tokens=8, output_logits=True, **parity.GREEDY | WAYS[way], **key)
        return out.sequences, out.logits

    def check_generation(self, way, number):
        """Under one of the presets, which goes by the number and the way."""
        names = [name for name in GENERATING if self.applies(name)]
        model = self.model.clone(rules=rules_of(names[(number + 2 * list(WAYS).index(way)) % len(names)]))
        tokens, logits = self.new_tokens(way, model, jax.device_put(self.params, placement(model, self.params)))
        wanted, wanted_logits = self.new_tokens(way, self.model, self.params)
        np.testing.assert_array_equal(tokens, wanted)
        close(logits, wanted_logits)
