"""What every family with routed experts is held to beside the checks of tests/tester.py."""

import jax
import numpy as np
import torch
from cases import close
from tester import FamilyTester

from jaxmodels.ops.loss import causal_lm_loss


class MoeTester(FamilyTester):
    def test_dense_experts(self, case):
        """Hidden states and logits of the other way to run experts; its gradients are the op's, see test_ops_moe.py and test_mixtral.py."""
        case.check(*case.load(experts_implementation="dense", scan_layers=True), gradients=False)

    def test_router_loss(self, case):
        """Router logits of every layer that has them, and the loss with the router's in it, of a padded batch; asked for or configured."""
        ids, mask = case.inputs.input_ids[1:3, -50:].copy(), np.ones((2, 50), np.int32)
        mask[1, :23] = 0
        labels = np.where(mask == 1, ids, -100)
        as_long = lambda x: torch.tensor(x, dtype=torch.long)
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        with torch.no_grad():
            inputs = {"attention_mask": as_long(mask), "position_ids": as_long(positions), "labels": as_long(labels)}
            theirs = case.hf(as_long(ids), **inputs, output_router_logits=True)
        model, params = case.scanned
        call = lambda model, **asked: jax.jit(lambda p: model.apply({"params": p}, ids, attention_mask=mask, labels=labels, **asked))
        asked = call(model, output_router_logits=True)
        out = asked(params)
        close(out.loss, theirs.loss)
        close(out.aux_loss, theirs.aux_loss)
        assert len(out.router_logits) == len(theirs.router_logits)
        for mine, reference in zip(out.router_logits, theirs.router_logits):
            close(np.asarray(mine)[mask == 1], reference.reshape(*mask.shape, -1)[as_long(mask) == 1])
        configured = call(model.clone(config=model.config.replace(output_router_logits=True)))
        assert configured.lower(params).as_text() == asked.lower(params).as_text()  # the same program
        assert jax.eval_shape(call(model), params).router_logits is None
        assert jax.jit(causal_lm_loss)(out.logits, labels) < out.loss
