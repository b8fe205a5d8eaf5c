"""Every schedule has HF's value at every step, also beyond the last."""

import jax
import numpy as np
import pytest
import torch
from transformers import get_scheduler

from jaxmodels.training.schedules import SCHEDULES, make_schedule

LR, WARMUP, STEPS = 3e-3, 7, 40
CASES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 13}),
    ("cosine_with_min_lr", {"min_lr": 1e-3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 0.75}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-4, "warmup_lr_rate": 0.05}),
    ("warmup_stable_decay", {"num_decay_steps": 12}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 5, "warmup_type": "cosine", "decay_type": "linear"}),
]


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_hf_at_every_step(name, options, warmup):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=LR)
    total = None if "num_stable_steps" in options else STEPS  # HF warns where both are given
    theirs = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=dict(options))
    wanted = []
    for _ in range(STEPS + 5):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = jax.vmap(make_schedule(name, LR, num_warmup_steps=warmup, num_training_steps=total, **options))(np.arange(STEPS + 5))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6 * LR)


def test_every_name_is_tested():
    assert {name for name, _ in CASES} == set(SCHEDULES)


def test_refusals():
    with pytest.raises(ValueError, match="'cosin' is not known; known are linear"):
        make_schedule("cosin", LR)
    with pytest.raises(ValueError, match="needs num_training_steps"):
        make_schedule("linear", LR)
    with pytest.raises(ValueError, match="'linear' has no option num_cycles; it has none"):
        make_schedule("linear", LR, num_training_steps=9, num_cycles=2)
    with pytest.raises(ValueError, match="exactly one of min_lr and min_lr_rate"):
        make_schedule("cosine_with_min_lr", LR, num_training_steps=9)
    with pytest.raises(ValueError, match="'warmup_stable_decay' needs num_decay_steps in lr_scheduler_kwargs"):
        make_schedule("warmup_stable_decay", LR, num_training_steps=9)
    with pytest.raises(ValueError, match="follows a metric"):
        make_schedule("reduce_lr_on_plateau", LR)
    with pytest.raises(ValueError, match="must be below the learning rate"):
        make_schedule("polynomial", 1e-8, num_training_steps=9)
    with pytest.raises(ValueError, match="num_training_steps or num_stable_steps"):
        make_schedule("warmup_stable_decay", LR, num_decay_steps=3)
