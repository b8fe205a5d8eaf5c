"""Optimizers by HF's names against torch's, on the same parameters and gradients, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax import contrib
from transformers import LlamaConfig as TorchConfig
from transformers import LlamaForCausalLM as TorchLlama
from transformers import Trainer
from transformers.optimization import Adafactor
from transformers.training_args import OptimizerNames

from jaxmodels.auto import find_family
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import flatten, init_params, unflatten
from jaxmodels.training import create_train_state, make_train_step
from jaxmodels.training.optimizers import CANONICAL, REFUSED, decay_mask, make_optimizer, target_weights
from jaxmodels.training.schedules import make_schedule
from jaxmodels.training.transforms import Quantized, codebook, galore

SHAPE = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False}
UNROLLED = LlamaForCausalLM(LlamaConfig(**SHAPE))
SCANNED = LlamaForCausalLM(LlamaConfig(**SHAPE), scan_layers=True)
STEPS, LR, DECAY = 6, 1e-2, 0.1
SCHEDULE = make_schedule("linear", LR, num_warmup_steps=2, num_training_steps=20)


def arrays():
    """Parameters and STEPS gradients by name; some gradients are tiny."""
    rng = np.random.default_rng(0)
    shapes = {name: leaf.shape for name, leaf in flatten(jax.eval_shape(lambda: init_params(UNROLLED, jax.random.key(0)))).items()}
    draw = lambda shape: (rng.normal(size=shape) * rng.choice([1.0, 1e-3], shape)).astype(np.float32)
    return {n: draw(s) for n, s in shapes.items()}, [{n: draw(s) for n, s in shapes.items()} for _ in range(STEPS)]


def stacked(flat):
    """The same arrays in the scanned model's form."""
    flat, L = dict(flat), SHAPE["num_hidden_layers"]
    for name in [name for name in flat if ".layers.0." in name]:
        rows = [flat.pop(name.replace(".layers.0.", f".layers.{i}.")) for i in range(L)]
        flat[name.replace(".layers.0.", f".layers.0:{L}:1.")] = np.stack(rows)
    return flat


def ours(name, *, scanned=False, rate=SCHEDULE, weight_decay=DECAY, see=lambda state, params: params, **options):
    """Parameters by name after every step."""
    form = stacked if scanned else dict
    params, gradients = arrays()
    optimizer = make_optimizer(name, rate, SCANNED if scanned else UNROLLED, weight_decay=weight_decay, **options)
    params = jax.tree.map(jnp.asarray, unflatten(form(params)))
    state, seen = optimizer.init(params), []

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = step(unflatten(form(grads)), state, params)
        seen.append(flatten(see(state, params)))
    return seen


def decays(name):
    return "norm" not in name and not name.endswith("bias")


def theirs(make, rate=SCHEDULE):
    """The same from torch: `make` gets the two groups that HF makes, and names by parameter."""
    params, gradients = arrays()
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    groups = [
        {"params": [t for n, t in tensors.items() if decays(n)], "weight_decay": DECAY},
        {"params": [t for n, t in tensors.items() if not decays(n)], "weight_decay": 0.0},
    ]
    optimizer, seen = make(groups, tensors), []
    for number, grads in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(number)) if callable(rate) else rate
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        optimizer.step()
        seen.append({name: tensor.detach().numpy().copy() for name, tensor in tensors.items()})
    return seen


def assert_same(found, wanted, tolerance):
    """Off by at most a small share of how far the parameter has moved."""
    start = arrays()[0]
    for number, (ours, theirs) in enumerate(zip(found, wanted)):
        for name, value in theirs.items():
            moved = np.linalg.norm(value - start[name])
            off = np.linalg.norm(ours[name] - value)
            rounding = 1.2e-7 * np.linalg.norm(value) * (number + 1)  # float32's own, once a step
            assert off <= max(tolerance * max(moved, LR), rounding), (number, name, off, moved)
    assert all(np.any(value != start[name]) for name, value in wanted[-1].items())


class Lion(torch.optim.Optimizer):
    """arXiv:2302.06675, algorithm 2."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": LR, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(0.9 * m + 0.1 * p.grad)
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
                m.mul_(0.999).add_(p.grad, alpha=0.001)


class GaLore(torch.optim.Optimizer):
    """arXiv:2403.03507, algorithm 1 as galore_torch has it; the groups decide the decay, `low` which matrices are projected."""

    def __init__(self, groups, low, rank, gap, scale, factored=False):
        super().__init__(groups, {"lr": LR, "weight_decay": 0.0})
        self.low, self.rank, self.gap, self.scale, self.factored = low, rank, gap, scale, factored

    def adam(self, g, s):
        t = s["t"]
        s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
        s["v"] = 0.999 * s.get("v", 0) + 0.001 * g * g
        return s["m"] / (1 - 0.9**t) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)

    def adafactor(self, g, s):
        beta, squares = 1 - s["t"] ** -0.8, g * g + 1e-30
        if g.ndim == 2:
            s["r"] = beta * s.get("r", 0) + (1 - beta) * squares.mean(1)
            s["c"] = beta * s.get("c", 0) + (1 - beta) * squares.mean(0)
            u = g / (s["r"] / s["r"].mean()).sqrt()[:, None] / s["c"].sqrt()
        else:
            s["v"] = beta * s.get("v", 0) + (1 - beta) * squares
            u = g / s["v"].sqrt()
        return u / max(1.0, (u.norm() / u.numel() ** 0.5).item())

    @torch.no_grad()
    def step(self):
        rule = self.adafactor if self.factored else self.adam
        for group in self.param_groups:
            for p in group["params"]:
                s, g = self.state[p], p.grad
                s["t"] = s.get("t", 0) + 1
                if id(p) in self.low:
                    rows = g.shape[0] >= g.shape[1]
                    if (s["t"] - 1) % self.gap == 0:
                        u, _, v = torch.linalg.svd(g, full_matrices=False)
                        p_ = v[: self.rank].T if rows else u[:, : self.rank]
                        s["p"] = p_ * p_.gather(0, p_.abs().argmax(0)[None]).sign()  # the library leaves the signs open
                    small = rule(g @ s["p"] if rows else s["p"].T @ g, s)
                    update = self.scale * (small @ s["p"].T if rows else s["p"] @ small)
                else:
                    update = rule(g, s)
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))


class ScheduleFree(torch.optim.Optimizer):
    """arXiv:2405.15682: x is the average, z the base sequence, parameters are y."""

    def __init__(self, groups, warmup, adam):
        super().__init__(groups, {"lr": LR, "weight_decay": 0.0})
        self.warmup, self.adam, self.t, self.total = warmup, adam, 0, 0.0

    @torch.no_grad()
    def step(self):
        self.t += 1
        lr = LR * min(1.0, self.t / self.warmup)
        weight = lr**2
        self.total += weight
        c = weight / self.total
        for group in self.param_groups:
            for y in group["params"]:
                s = self.state[y]
                z, x = s.setdefault("z", y.clone()), s.setdefault("x", y.clone())
                g = y.grad
                if self.adam:
                    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g * g
                    g = g / ((s["v"] / (1 - 0.999**self.t)).sqrt() + 1e-8)
                z.sub_(lr * (g + group["weight_decay"] * y))
                x.mul_(1 - c).add_(z, alpha=c)
                y.copy_(0.9 * x + 0.1 * z)


def low_names(tensors):
    return {id(t) for n, t in tensors.items() if n.endswith("_proj.weight")}


CASES = {
    "adamw_torch": ({}, lambda g, t: torch.optim.AdamW(g, betas=(0.9, 0.999), eps=1e-8)),
    "adafactor": ({}, lambda g, t: Adafactor(g, lr=LR, scale_parameter=False, relative_step=False)),
    "lion_32bit": ({}, lambda g, t: Lion(g)),
    "sgd": ({}, lambda g, t: torch.optim.SGD(g)),
    "sgd momentum": ({"optim_args": "momentum=0.9, nesterov=true"}, lambda g, t: torch.optim.SGD(g, momentum=0.9, nesterov=True)),
    "adagrad": ({}, lambda g, t: torch.optim.Adagrad(g)),
    "rmsprop": ({}, lambda g, t: torch.optim.RMSprop(g)),
    "rmsprop momentum": ({"optim_args": "momentum=0.9,alpha=0.9"}, lambda g, t: torch.optim.RMSprop(g, momentum=0.9, alpha=0.9)),
    "rmsprop centered": ({"optim_args": "centered=True,eps=1e-3"}, lambda g, t: torch.optim.RMSprop(g, centered=True, eps=1e-3)),
    "lomo": ({}, lambda g, t: torch.optim.SGD(g)),
    "galore_adamw": (
        {"optim_args": "rank=5,update_proj_gap=4,scale=0.5", "optim_target_modules": ["attn", "mlp"]},
        lambda g, t: GaLore(g, low_names(t), 5, 4, 0.5),
    ),
    "galore_adafactor_layerwise": (
        {"optim_args": "rank=5,update_proj_gap=4,scale=0.5", "optim_target_modules": r"model\.layers\..*_proj"},
        lambda g, t: GaLore(g, low_names(t), 5, 4, 0.5, factored=True),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torch_at_every_step(case):
    """Under a schedule, with HF's groups; every layer of a scanned model as if it were its own tensor."""
    options, make = CASES[case]
    name = case.split()[0]
    wanted = theirs(make)
    found = ours(name, **options)
    # a centered variance is a difference of nearly equal numbers, and singular vectors move with those of nearly equal values
    assert_same(found, wanted, 1e-4 if "galore" in case or "centered" in case else 1e-5)
    for scanned, expected in zip(ours(name, scanned=True, **options), found):
        for key, value in stacked(expected).items():
            np.testing.assert_allclose(scanned[key], value, rtol=1e-4, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_schedule_free(name):
    wanted = theirs(lambda g, t: ScheduleFree(g, 3, "adamw" in name), rate=LR)
    assert_same(ours(name, rate=LR, warmup_steps=3), wanted, 1e-5)
    average = ours(name, rate=LR, warmup_steps=3, see=contrib.schedule_free_eval_params)
    torch_average = []
    theirs_ = theirs(lambda g, t: torch_average.append(ScheduleFree(g, 3, "adamw" in name)) or torch_average[0], rate=LR)
    tensors = [p for group in torch_average[0].param_groups for p in group["params"]]
    names = [n for n in theirs_[-1] if decays(n)] + [n for n in theirs_[-1] if not decays(n)]
    for key, tensor in zip(names, tensors):
        np.testing.assert_allclose(average[-1][key], torch_average[0].state[tensor]["x"], rtol=1e-4, atol=2e-6)
    with pytest.raises(ValueError, match="constant learning rate"):
        make_optimizer(name, SCHEDULE, UNROLLED)


def test_muon_is_torch_muon():
    """torch orthogonalises in bfloat16, so it is met within that; matrices of hidden layers alone, AdamW for the rest."""
    hidden = lambda name: name.endswith("_proj.weight")

    class Both:
        def __init__(self, groups, tensors):
            rest = [{**g, "params": [p for p in g["params"] if not any(p is t for n, t in tensors.items() if hidden(n))]} for g in groups]
            self.muon = torch.optim.Muon([t for n, t in tensors.items() if hidden(n)], lr=LR, weight_decay=DECAY)
            self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.999), eps=1e-8)
            self.param_groups = self.muon.param_groups + self.adam.param_groups

        def step(self):
            self.muon.step()
            self.adam.step()

    wanted = theirs(Both)
    found = ours("muon")
    pick = lambda seen, keep: [{n: v for n, v in step.items() if keep(n)} for step in seen]
    assert_same(pick(found, lambda n: not hidden(n)), pick(wanted, lambda n: not hidden(n)), 1e-5)
    assert_same(pick(found, hidden), pick(wanted, hidden), 2e-2)
    for one, other in zip(ours("muon", scanned=True), found):
        for key, value in stacked(other).items():
            np.testing.assert_allclose(one[key], value, rtol=1e-4, atol=2e-6)


def test_the_8_bit_codebook_is_dynamic_tree_quantization():
    """256 rising numbers; the printed ends of the tables that 8-bit optimizers ship with."""
    for signed in (True, False):
        table = codebook(signed)
        assert table.shape == (256,) and table[-1] == 1 and np.all(np.diff(table) > 0) and 0 in table
        np.testing.assert_allclose(table[0], -0.99296875 if signed else 0, rtol=1e-6)
        np.testing.assert_allclose(table[-2], 0.99296875 if signed else 0.996484375, rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_blocks_round_to_the_nearest_code(signed):
    x = np.random.default_rng(0).normal(size=(19, 300)).astype(np.float32) ** 3
    x[4] = 0
    x = x if signed else np.abs(x)
    kept = Quantized.encode(jnp.asarray(x), signed)
    assert kept.codes.shape == x.shape and kept.codes.dtype == jnp.uint8 and kept.scales.shape == (-(-x.size // 256),)
    scales = np.repeat(np.asarray(kept.scales), 256)[: x.size].reshape(x.shape)
    nearest = np.abs(x[..., None] / np.where(scales > 0, scales, 1)[..., None] - codebook(signed)).min(-1) * scales
    off = np.abs(np.asarray(kept.decode()) - x)
    np.testing.assert_allclose(off, nearest, atol=1e-6 * np.abs(x).max())
    np.testing.assert_array_equal(kept.decode()[4], 0)


@pytest.mark.parametrize(("name", "wide"), [("adamw_bnb_8bit", "adamw_torch"), ("lion_8bit", "lion_32bit")])
def test_8_bit_states_follow_32_bit_ones(name, wide):
    """Descent on a quadratic: nearly the same way, with a quarter of the memory; embeddings and small parameters keep 32 bits."""
    config = LlamaConfig(**{**SHAPE, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "num_hidden_layers": 1})
    model = LlamaForCausalLM(config)
    target = init_params(model, jax.random.key(1))

    def train(name):
        optimizer = make_optimizer(name, 2e-3, model)
        params = jax.tree.map(jnp.zeros_like, target)
        state = optimizer.init(params)
        kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Quantized))}

        @jax.jit
        def step(state, params):
            updates, state = optimizer.update(jax.tree.map(jnp.subtract, params, target), state, params)
            return state, optax.apply_updates(params, updates)

        for _ in range(20):
            state, params = step(state, params)
        return params, state, kinds

    params, state, kinds = train(name)
    wanted, full, _ = train(wide)
    assert "Quantized" in kinds
    for (key, value), w in zip(flatten(params).items(), flatten(wanted).values()):
        assert np.linalg.norm(value - w) <= 0.1 * np.linalg.norm(w), key
    bytes_of = lambda tree: {jax.tree_util.keystr(p): x.nbytes for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    small, large = bytes_of(state), bytes_of(full)
    projection = "['up_proj']['weight']"
    mine, theirs = (sum(v for k, v in sizes.items() if projection in k) for sizes in (small, large))
    assert mine < 0.27 * theirs
    rest = "['embed_tokens']['weight']"
    assert sum(v for k, v in small.items() if rest in k) == sum(v for k, v in large.items() if rest in k)


def test_groups_are_those_of_hf():
    """Which parameters decay, for norms of all names and classes."""
    for name in ("llama", "gpt2", "olmo2", "bloom", "mpt"):
        family = find_family(name)
        small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        known = set(family.config.field_names())
        config = family.config.from_dict({family.config.spelled.get(k, k): v for k, v in small.items() if k in known})
        for scanned in (False, True):
            model = family.classes["AutoModelForCausalLM"](config, scan_layers=scanned)
            params = jax.eval_shape(lambda model=model: init_params(model, jax.random.key(0)))
            mask = flatten(decay_mask(model)(params))
            for key, decayed in mask.items():
                expected = not any(part in key for part in ("norm", "ln_", "bias"))
                assert decayed == expected, (name, key)
    torch_model = TorchLlama(TorchConfig(**SHAPE))
    wanted = set(Trainer.get_decay_parameter_names(None, torch_model))
    params = jax.eval_shape(lambda: init_params(UNROLLED, jax.random.key(0)))
    assert {key for key, decayed in flatten(decay_mask(UNROLLED)(params)).items() if decayed} == wanted


def test_targets():
    assert len(target_weights(UNROLLED, "all-linear")) == 7 * SHAPE["num_hidden_layers"] + 1
    assert target_weights(UNROLLED, r".*\.1\..*q_proj") == {"model.layers.1.self_attn.q_proj.weight"}
    assert target_weights(SCANNED, ["gate_proj"]) == {"model.layers.0:2:1.mlp.gate_proj.weight"}
    with pytest.raises(ValueError, match="names no linear layer; there are lm_head"):
        target_weights(UNROLLED, "gate")


def test_lomo_holds_no_gradients():
    """The step updates a parameter as its gradient comes: beside the parameters, which are donated, it needs less than their gradients."""
    config = LlamaConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4})
    model = LlamaForCausalLM(config)

    def temporary(**options):
        optimizer = make_optimizer("lomo", 1e-3, model)
        state = jax.eval_shape(lambda: create_train_state(model, optimizer, init_params(model, jax.random.key(0))))
        batch = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in ("input_ids", "labels")}
        step = make_train_step(model, optimizer, **options)
        params = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes / params

    assert temporary() < 0.6
    assert temporary(max_grad_norm=1.0) > 0.9


def test_names():
    """Every name that HF lists is there or refused with a sentence; so are options nobody reads."""
    assert {name.value for name in OptimizerNames} <= set(CANONICAL) | set(REFUSED)
    assert not set(CANONICAL) & set(REFUSED)
    with pytest.raises(ValueError, match="'adamm' is not known; known are adafactor"):
        make_optimizer("adamm", LR, UNROLLED)
    with pytest.raises(ValueError, match="4-bit states are not offered"):
        make_optimizer("adamw_torch_4bit", LR, UNROLLED)
    with pytest.raises(ValueError, match="'adamw' has no option momentum"):
        make_optimizer("adamw", LR, UNROLLED, optim_args="momentum=0.9")
    with pytest.raises(ValueError, match="needs optim_target_modules"):
        make_optimizer("galore_adamw", LR, UNROLLED)
    with pytest.raises(ValueError, match="not of the form key=value"):
        make_optimizer("sgd", LR, UNROLLED, optim_args="momentum")
    with pytest.raises(ValueError, match="known are std, reverse_std"):
        make_optimizer("galore_adamw", LR, UNROLLED, optim_target_modules="all-linear", optim_args="proj_type=full")


def test_a_projection_of_full_rank_loses_nothing():
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
    for kind in ("std", "reverse_std", "right", "left"):
        rule = galore(optax.identity(), rank=6, scale=1.0, proj_type=kind)
        updates, _ = rule.update(g, rule.init(g), g)
        np.testing.assert_allclose(updates["w"], g["w"], atol=1e-5)
