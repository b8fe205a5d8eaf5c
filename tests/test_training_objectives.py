"""Masks for fine-tuning, and preference losses against a small torch reference that follows the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
import transformers

from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import flatten, unflatten
from jaxmodels.training import create_train_state, make_train_step
from jaxmodels.training.objectives import VARIANTS, dpo_loss, make_reference, sft_labels

SHAPE = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL = LlamaForCausalLM(LlamaConfig(**SHAPE), scan_layers=False)
B, T = 4, 15


def torch_model(seed):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attn_implementation="eager"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model


def params_of(model):
    return unflatten({name: jnp.asarray(w.detach().numpy().copy()) for name, w in model.named_parameters()})


def pairs():
    """A prompt of four tokens, then two answers of uneven lengths."""
    rng = np.random.default_rng(0)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = rng.integers(0, SHAPE["vocab_size"], (B, T))
        mask = (np.arange(T) < rng.integers(6, T + 1, (B, 1))).astype(np.int64)
        labels = sft_labels(ids, attention_mask=mask, completion_mask=np.arange(T)[None] >= 4)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


def torch_log_probs(model, batch, side, mean):
    ids, mask, labels = (torch.tensor(batch[f"{side}_{n}"]) for n in ("input_ids", "attention_mask", "labels"))
    logps = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    return picked.sum(1) / (labels != -100).sum(1) if mean else picked.sum(1)


def torch_loss(kind, c, r, rc, rr, beta, s):
    """c, r: log-probabilities of the chosen and the rejected answers, rc and rr the reference's."""
    h = (c - r) - (rc - rr)
    match kind:
        case "sigmoid":
            return -F.logsigmoid(beta * h) * (1 - s) - F.logsigmoid(-beta * h) * s
        case "hinge":
            return torch.relu(1 - beta * h)
        case "ipo":
            return (h - 1 / (2 * beta)) ** 2
        case "robust":
            return (-F.logsigmoid(beta * h) * (1 - s) + F.logsigmoid(-beta * h) * s) / (1 - 2 * s)
        case "exo_pair":
            s = s or 1e-3
            p, q = torch.stack([(beta * h).sigmoid(), (-beta * h).sigmoid()]), torch.tensor([1 - s, s])[:, None]
            return (p * (p.log() - q.log())).sum(0)
        case "nca_pair":
            x, y = beta * (c - rc), beta * (r - rr)
            return -F.logsigmoid(x) - 0.5 * F.logsigmoid(-x) - 0.5 * F.logsigmoid(-y)
        case "sppo_hard":
            return (c - rc - 0.5 / beta) ** 2 + (r - rr + 0.5 / beta) ** 2
        case "apo_zero":
            return (1 - torch.sigmoid(beta * (c - rc))) + torch.sigmoid(beta * (r - rr))
        case "apo_down":
            return torch.sigmoid(beta * (c - rc)) + 1 - torch.sigmoid(beta * ((c - rc) - (r - rr)))


@pytest.fixture(scope="module")
def models():
    return torch_model(0), torch_model(1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in VARIANTS]
    + [("sigmoid", {"label_smoothing": 0.2}), ("robust", {"label_smoothing": 0.1}), ("exo_pair", {"label_smoothing": 0.05})]
    + [("sigmoid", {"rpo_alpha": 0.5}), ("sigmoid", {"reference_free": True}), ("hinge", {"loss_chunk": 4})],
)
def test_value_and_gradients_are_torchs(models, kind, options):
    policy, reference = models
    batch, beta, s = pairs(), 0.3, options.get("label_smoothing", 0.0)
    mean = kind == "ipo"
    sides = ("chosen", "rejected")
    policy.zero_grad()
    logps = [torch_log_probs(policy, batch, side, mean) for side in sides]
    with torch.no_grad():
        known = [torch_log_probs(reference, batch, side, mean) for side in sides]
    used = [torch.zeros(B)] * 2 if options.get("reference_free") else known
    losses = torch_loss(kind, *logps, *used, beta, s)
    if "rpo_alpha" in options:
        tokens = torch.tensor((batch["chosen_labels"][:, 1:] != -100).sum(1))
        losses = losses - options["rpo_alpha"] * logps[0] / tokens
    losses.mean().backward()

    ours = {name: jnp.asarray(value) for name, value in batch.items()}
    found = make_reference(MODEL, kind, loss_chunk=options.get("loss_chunk"))(params_of(reference), ours)
    for side, value in zip(sides, known):
        np.testing.assert_allclose(found[f"reference_{side}_logps"], value, rtol=2e-5)
    loss, count = dpo_loss(kind, beta=beta, **options)
    apply = lambda params, **inputs: MODEL.apply({"params": params}, **inputs)
    value = lambda params: loss(apply, params, ours | found, count(ours))
    (total, seen), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params_of(policy))
    np.testing.assert_allclose(total, losses.mean().item(), rtol=5e-5)
    rewards = [beta * (x - y).detach() for x, y in zip(logps, used)]
    np.testing.assert_allclose(seen["rewards/margins"], (rewards[0] - rewards[1]).mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(seen["rewards/accuracies"], (rewards[0] > rewards[1]).float().mean())
    wanted = {name: w.grad.numpy() for name, w in policy.named_parameters()}
    norm = np.sqrt(sum(np.sum(g**2) for g in wanted.values()))
    for name, g in flatten(grads).items():
        assert np.linalg.norm(g - wanted[name]) <= 1e-4 * max(np.linalg.norm(wanted[name]), 1e-3 * norm), name


def test_pairs_add_up_over_parts_and_training_prefers_the_chosen(models):
    batch = {name: jnp.asarray(value) for name, value in pairs().items()}
    params = params_of(models[0])
    batch |= make_reference(MODEL)(params, batch)
    loss, count = dpo_loss(beta=0.5)
    optimizer = optax.adamw(3e-3)
    runs = []
    for parts in (1, 2):
        state = create_train_state(MODEL, optimizer, params)
        step = make_train_step(MODEL, optimizer, loss, count=count, accumulation_steps=parts)
        seen = []
        for _ in range(6):
            state, metrics = step(state, batch)
            seen.append([float(metrics[name]) for name in ("loss", "rewards/margins", "grad_norm", "rewards/accuracies")])
        runs.append(seen)
    first, later = [run[0][:3] for run in runs], [run[1:] for run in runs]  # at first rounding decides which answer is ahead
    np.testing.assert_allclose(*first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*later, rtol=1e-3, atol=1e-4)
    assert abs(runs[0][0][0] - np.log(2)) < 1e-5  # the policy is the reference
    assert runs[0][-1][0] < 0.5 and runs[0][-1][3] == 1


def test_refusals():
    with pytest.raises(ValueError, match="'dpo' is not known; known are sigmoid"):
        dpo_loss("dpo")
    with pytest.raises(ValueError, match=r"label_smoothing 0.5 in \[0, 0.5\)"):
        dpo_loss("robust", label_smoothing=0.5)
    loss, count = dpo_loss()
    batch = {name: jnp.asarray(value) for name, value in pairs().items()}
    with pytest.raises(ValueError, match="no reference_chosen_logps; make_reference computes them"):
        loss(lambda *args, **inputs: None, {}, batch, count(batch))


def test_labels_of_fine_tuning():
    ids = np.arange(12).reshape(2, 6) + 3
    padding, assistant = np.array([[1] * 6, [1] * 4 + [0] * 2]), np.array([[0, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1]])
    labels = sft_labels(ids, attention_mask=padding, assistant_masks=assistant)
    np.testing.assert_array_equal(labels, [[-100, -100, 5, 6, -100, 8], [-100, 10, 11, -100, -100, -100]])
    np.testing.assert_array_equal(sft_labels(ids), ids)
    with pytest.raises(ValueError, match=r"rows \[1\] have no token to learn from"):
        sft_labels(ids, completion_mask=np.array([[1] * 6, [0] * 6]))
