"""Dropout of every family beside torch in train mode: both draw the same numbers, and every rate of a config is another, so that the
outputs agree only where each acts at torch's places and nowhere else."""

import itertools
import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import close, sensitive
from jax.interpreters.partial_eval import dce_jaxpr
from test_family_keys import SMALL, TINY

from jaxmodels import auto
from jaxmodels.convert.files import read_checkpoint
from jaxmodels.ops.attention import attention
from jaxmodels.ops.dropout import dropout
from jaxmodels.params import abstract_params

CHANGES = {  # where TINY and SMALL do not make it so
    "dbrx": {"attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_v2": {"num_key_value_heads": 3},
    "deepseek_v3": {"num_key_value_heads": 3},
    "falcon_new": {"new_decoder_architecture": True},
    "falcon_alibi": {"alibi": True, "parallel_attn": False},
    "gpt_neox_sequential": {"use_parallel_residual": False},
    "gpt_oss": {"num_local_experts": 4},
    "mamba2": {"num_heads": 6, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 4, "mamba_d_state": 4},
    "bloom_post": {"apply_residual_connection_post_layernorm": True},
    "opt_post": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "stablelm_parallel": {"use_parallel_residual": True},
    "t5": {
        "d_model": 24,
        "d_ff": 20,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 3,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    },
}
HEADS = {  # that have dropout of their own, beside the language model and token classification
    "bert": ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice"),
    "gpt2": ("AutoModelForPreTraining",),
    "t5": ("AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"),
}
HEAD_DIM_IS_COMPUTED = {"deepseek_v2", "deepseek_v3", "falcon", "jamba"}
WITHOUT_DROPOUT = {"mamba", "mamba2", "falcon_mamba"}
CASES = sorted({*auto.FAMILIES, *CHANGES} - WITHOUT_DROPOUT)
RATES = [n / 16 for n in range(1, 9)]
KEY = jax.random.key(0)


def classes(model_type):
    return auto.find_family(model_type).classes


def family_of(case):
    return case if case in auto.FAMILIES else case.rpartition("_")[0]


def with_rates(values, rates):
    """The config's values with every rate of dropout set: the first to `rates[0]`, the next to `rates[1]` and so on."""
    rates = iter(rates)
    rated = lambda values: {k: next(rates) if "drop" in k else rated(v) if k == "attn_config" else v for k, v in sorted(values.items())}
    return rated(values)


def configured(case, rates):
    """HF's config of a tiny model."""
    model_type = family_of(case)
    values = {**SMALL.get(model_type, {}), **CHANGES.get(case, {}), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {} if model_type == "t5" else {k: v for k, v in TINY.items() if k != "head_dim" or model_type not in HEAD_DIM_IS_COMPUTED}
    values = transformers.AutoConfig.for_model(**auto.AutoConfig.for_model(model_type, **shape | values).to_dict()).to_dict()
    values = with_rates({"classifier_dropout": None, **values}, rates)
    attention = values.pop("attn_config") if model_type == "mpt" else {}
    config = transformers.AutoConfig.for_model(**values)
    if attention:  # HF's own check wants a whole number, which published files have
        vars(config.attn_config).update(attention)
    return config


class Draws:
    """Numbers in [0,1): the nth array of a size is the same for everybody. The second single one is small: layerdrop skips a layer."""

    def __init__(self):
        self.counts, self.keys = Counter(), set()

    def __call__(self, shape, key=None):
        size = math.prod(shape)
        self.counts[size] += 1
        self.keys.add(None if key is None else tuple(jax.random.key_data(key).tolist()))
        return np.random.default_rng([self.counts[size], size, 1]).random(shape)


@pytest.fixture
def same_draws(monkeypatch):
    """torch's and ours."""
    theirs, ours = Draws(), Draws()

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * torch.from_numpy(theirs(x.shape) < 1 - p) / (1 - p) if training and p else x

    def attention(q, k, v, attn_mask, dropout_p, is_causal):
        return dropout(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + attn_mask, -1), dropout_p) @ v

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch, "rand", lambda shape: torch.tensor(theirs(shape)))
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape=(): jnp.asarray(ours(shape, key) < p))
    return theirs, ours


@pytest.mark.parametrize("case", CASES)
def test_acts_where_torchs_does(case, same_draws, tmp_path):
    """Every draw has a key of its own."""
    model_type, config = family_of(case), configured(case, RATES)
    ids = np.random.default_rng(0).integers(3, 37, (2, 6))
    ids[:, -1] = config.eos_token_id
    names = [n for n in ("AutoModelForCausalLM", "AutoModelForTokenClassification", *HEADS.get(model_type, ())) if n in classes(model_type)]
    for name in names:
        hf = getattr(transformers, name).from_config(config, attn_implementation="sdpa" if case == "falcon_alibi" else "eager")
        hf = sensitive(hf).train()
        for experts in (module for module in hf.modules() if "Sparse" in type(module).__name__):
            experts.eval()  # phimoe draws which
        hf.save_pretrained(tmp_path / name)
        model, params = getattr(auto, name).from_pretrained(tmp_path / name, dtype=jnp.float32)
        inputs = {"input_ids": ids[None] if name == "AutoModelForMultipleChoice" else ids}
        if name == "AutoModelForSeq2SeqLM":
            inputs["decoder_input_ids"] = ids[:, :5]
        with torch.no_grad():
            theirs = hf(**{k: torch.tensor(v) for k, v in inputs.items()})
        ours = model.apply({"params": params}, **inputs, rngs={"dropout": KEY})
        for key in [k for k in theirs if "logits" in k]:
            close(ours[key], theirs[key])
        skipped = same_draws[1].counts - same_draws[0].counts
        assert not same_draws[0].counts - same_draws[1].counts and bool(skipped) == hasattr(config, "layerdrop")
        assert len(same_draws[1].keys) == same_draws[1].counts.total() > 0
        for draws in same_draws:
            draws.__init__()


@pytest.mark.parametrize("model_type", sorted(auto.FAMILIES))
def test_a_key_alone_changes_nothing(model_type):
    """Without rates the program is that without a key, to the letter, once what nothing reads is left out."""
    values = configured(model_type, itertools.repeat(0.0)).to_dict()
    named = {*values, *values.get("attn_config", {})} - {"classifier_dropout"}
    assert any("drop" in name for name in named) == (model_type not in WITHOUT_DROPOUT)
    config = auto.AutoConfig.for_model(**values)
    model = next(cls for name, cls in classes(model_type).items() if name != "AutoModel")(config)
    params, inputs = abstract_params(model), model.example_inputs()
    call = lambda rngs, params, key: model.apply({"params": params}, **inputs, rngs=rngs(key))
    programs = [jax.make_jaxpr(partial(call, rngs))(params, KEY).jaxpr for rngs in (lambda key: None, lambda key: {"dropout": key})]
    read = [str(dce_jaxpr(program, [True] * len(program.outvars))[0]) for program in programs]
    assert read[0] == read[1]


def test_attention_by_name():
    """The compiler's own attention is written out where weights drop; a kernel that cannot says so."""
    q, positions = jax.random.normal(KEY, (2, 5, 3, 8)), jnp.broadcast_to(jnp.arange(5), (2, 5))
    call = partial(attention, q, q, q, positions, positions, dropout=(KEY, 0.5))
    for name in (None, "xla"):
        np.testing.assert_array_equal(call(implementation=name)[0], call(implementation="eager")[0])
    with pytest.raises(ValueError, match="'splash' has no dropout, which the model needs; possible are eager, xla"):
        call(implementation="splash")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt2", "embd_pdrop"),
        ("gpt2", "attn_pdrop"),
        ("gpt2", "resid_pdrop"),
        ("opt", "layerdrop"),
        ("bert", "attention_probs_dropout_prob"),
    ],
)
def test_a_rate_of_one(model_type, name, tmp_path):
    """Nothing is left of what is dropped, and its gradient is 0: torch's numbers, as nothing is drawn."""
    config = configured(model_type, itertools.repeat(0.0))
    setattr(config, name, 1.0)
    auto_name = "AutoModelForMaskedLM" if model_type == "bert" else "AutoModelForCausalLM"
    hf = sensitive(getattr(transformers, auto_name).from_config(config, attn_implementation="eager")).train()
    hf.save_pretrained(tmp_path)
    model, params = getattr(auto, auto_name).from_pretrained(tmp_path, dtype=jnp.float32)
    ids, weigh = np.random.default_rng(0).integers(3, 37, (2, 6)), np.random.default_rng(1).standard_normal((2, 6, hf.config.vocab_size))
    theirs = hf(torch.tensor(ids)).logits
    (theirs * torch.tensor(weigh)).sum().backward()

    def weighed(params):
        logits = model.apply({"params": params}, ids, rngs={"dropout": KEY}).logits
        return (logits * weigh).sum(), logits

    (_, ours), gradients = jax.value_and_grad(weighed, has_aux=True)(params)
    close(ours, theirs.detach())
    wanted = {key: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy() for key, leaf in hf.named_parameters()}
    auto.save_pretrained(tmp_path / "gradients", model, gradients)
    found = {key: tensor.read() for key, tensor in read_checkpoint(tmp_path / "gradients").items()}
    assert any(not leaf.any() for leaf in wanted.values())
    for key, leaf in found.items():
        assert np.linalg.norm(leaf - wanted[key]) <= 1e-4 * max(np.linalg.norm(wanted[key]), 1e-3), key


def test_rates_that_are_none():
    with pytest.raises(ValueError, match=r"dropout of 1\.5: expected a share from 0 to 1"):
        dropout(KEY, jnp.ones(3), 1.5)
