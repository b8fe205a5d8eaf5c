"""Sixty steps of AdamW beside torch on the same data and weights, one family of each class; the gradients of the first step by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxmodels as jm
from jaxmodels.auto import conversion_of
from jaxmodels.convert.load import unload
from jaxmodels.convert.parity import _sample, _torch_gradients
from jaxmodels.params import flatten
from jaxmodels.training import create_train_state, make_train_step
from jaxmodels.training.optimizers import make_optimizer
from jaxmodels.training.schedules import make_schedule

STEPS, LR, DECAY, VOCAB = 60, 1e-3, 0.1, 128
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "intermediate_size": 96}
CLASSES = {
    "dense": (transformers.LlamaConfig, SMALL | HEADS | {"num_key_value_heads": 2}, "CausalLM"),
    "moe": (
        transformers.MixtralConfig,
        SMALL | HEADS | {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
        "CausalLM",
    ),
    "ssm": (transformers.MambaConfig, SMALL | {"state_size": 8, "time_step_rank": 8}, "CausalLM"),
    "encoder": (transformers.BertConfig, SMALL | HEADS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "MaskedLM"),
}


def batches(causal):
    """Rows of uneven lengths; a language model's labels are the ids, a masked one's a few of them."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, VOCAB, (VOCAB, 3))  # something to learn: each token has three followers
    for _ in range(STEPS):
        ids = np.empty((4, 32), np.int64)
        ids[:, 0] = rng.integers(0, VOCAB, 4)
        for t in range(1, 32):
            ids[:, t] = table[ids[:, t - 1], rng.integers(0, 3, 4)]
        mask = np.arange(32) < rng.integers(12, 33, (4, 1))
        labels = np.where(mask & (causal | (rng.random(ids.shape) < 0.3)), ids, -100)
        yield {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_sixty_steps_beside_torch(name, tmp_path):
    make, options, task = CLASSES[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"AutoModelFor{task}").from_config(make(**options, pad_token_id=None), attn_implementation="eager")
    theirs.train().save_pretrained(tmp_path)
    model, params = getattr(jm, f"AutoModelFor{task}").from_pretrained(tmp_path, dtype="float32", scan_layers=True)

    decays = set(transformers.Trainer.get_decay_parameter_names(None, theirs))
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if (n in decays) == decayed], "weight_decay": DECAY * decayed}
        for decayed in (True, False)
    ]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    scheduler = transformers.get_scheduler("linear", adam, 6, STEPS)
    schedule = make_schedule("linear", LR, num_warmup_steps=6, num_training_steps=STEPS)
    optimizer = make_optimizer("adamw_torch", schedule, model, weight_decay=DECAY)
    step = make_train_step(model, optimizer, max_grad_norm=1.0)
    state = create_train_state(model, optimizer, params)
    gradients = jax.jit(jax.grad(lambda params, batch: model.apply({"params": params}, **batch).loss))
    losses = []
    for number, batch in enumerate(batches(task == "CausalLM")):
        adam.zero_grad()
        out = theirs(**{k: torch.from_numpy(v) for k, v in batch.items()})
        out.loss.backward()
        ours = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
        if number == 0:
            first = {n: None if p.grad is None else p.grad.clone() for n, p in theirs.named_parameters()}
            wanted = _torch_gradients(theirs)
            for n, p in theirs.named_parameters():
                p.grad = first[n]
            rules, prefix = conversion_of(model)
            found = unload(flatten(gradients(state.params, ours)), rules=rules, base_prefix=prefix)
            total = np.sqrt(sum(np.sum(g**2) for g in wanted.values()))
            assert set(found) <= set(wanted)
            for n, g in found.items():
                assert np.linalg.norm(_sample(g.read()) - wanted[n]) <= 1e-4 * max(np.linalg.norm(wanted[n]), 1e-3 * total), n
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
        scheduler.step()
        state, metrics = step(state, ours)
        losses.append((float(metrics["loss"]), out.loss.item()))
    ours, wanted = np.transpose(losses)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)
    assert wanted[-10:].mean() < wanted[:10].mean() - 0.2
