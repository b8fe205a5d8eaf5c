"""Several documents in a row give the losses and gradients of the documents alone."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.auto import FAMILIES, find_family
from jaxmodels.cache import RecurrentSpec
from jaxmodels.layers import Packed
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.ops.loss import LossOptions
from jaxmodels.params import flatten, init_params
from jaxmodels.training.packing import pack_documents

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTHS = ((9, 1, 14, 5), (3, 22, 2))  # of the documents in each row of T tokens; the rest is padding
T = 30


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.integers(3, SMALL["vocab_size"], n) for n in row] for row in LENGTHS]


def packed_rows(docs):
    """input_ids and labels [B,T], segment_ids [B,T]; one label in five does not count, and rows end in padding."""
    ids, segments = np.zeros((len(docs), T), np.int32), np.zeros((len(docs), T), np.int32)
    for b, row in enumerate(docs):
        joined = np.concatenate(row)
        ids[b, : len(joined)] = joined
        segments[b, : len(joined)] = np.repeat(np.arange(1, len(row) + 1), [len(d) for d in row])
    return {"input_ids": jnp.asarray(ids), "labels": jnp.where(ids % 5 == 0, -100, ids), "segment_ids": jnp.asarray(segments)}


def single_rows(docs):
    """Each document in a row of its own, padded on the right."""
    flat = [d for row in docs for d in row]
    ids, mask = np.zeros((len(flat), T), np.int32), np.zeros((len(flat), T), np.int32)
    for i, d in enumerate(flat):
        ids[i, : len(d)], mask[i, : len(d)] = d, 1
    return {
        "input_ids": jnp.asarray(ids),
        "labels": jnp.where((mask == 0) | (ids % 5 == 0), -100, ids),
        "attention_mask": jnp.asarray(mask),
    }


def assert_packing_is_exact(model, **options):
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), init_params(model, jax.random.key(0)))
    docs = documents()
    value = lambda params, batch: model.apply({"params": params}, **batch, **options).loss
    gradients = jax.jit(jax.value_and_grad(value))
    loss, grads = gradients(params, packed_rows(docs))
    wanted, alone = gradients(params, single_rows(docs))
    assert abs(loss - wanted) <= 1e-5 * wanted
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(alone)))
    for (name, g), w in zip(flatten(grads).items(), flatten(alone).values()):
        assert np.linalg.norm(g - w) <= 1e-4 * max(np.linalg.norm(w), 1e-3 * norm), name


@pytest.mark.parametrize(("scanned", "attention"), [(False, "eager"), (True, "xla")])
def test_llama(scanned, attention):
    config = LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)
    model = LlamaForCausalLM(config, scan_layers=scanned, attn_implementation=attention)
    assert_packing_is_exact(model, loss_options=LossOptions(chunk=7, z_loss=0.01, label_smoothing=0.1))


# Windows shorter than a document, biases by distance, learned positions, soft-capped logits: what sees positions, by family.
SPECIAL = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "head_dim": 8},
    "bloom": {},
    "gpt2": {},
    "gpt_neo": {"window_size": 4, "attention_types": ((("global", "local"), 1),), "num_layers": 2, "num_heads": 4},
}


@pytest.mark.parametrize("family", SPECIAL)
def test_families_that_see_positions_in_other_ways(family):
    assert_packing_is_exact(_small(family))


def _small(name, task="AutoModelForCausalLM"):
    """A tiny model of a family from its default config."""
    family = find_family(name)
    known = set(family.config.field_names()) | set(family.config.spelled.values())
    values = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "ffn_dim": 48}
    values |= {"word_embed_proj_dim": 32, "rotary_dim": 4, "pad_token_id": 0, "d_model": 32, "attention_heads": 4, "num_heads": 4}
    values |= SPECIAL.get(name, {})
    return family.classes[task](family.config.from_dict({k: v for k, v in values.items() if k in known}))


def test_a_document_does_not_see_its_neighbour():
    """The test's own sensitivity: without segments the loss is another."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), init_params(model, jax.random.key(0)))
    batch = packed_rows(documents())
    kept = model.apply({"params": params}, **batch).loss
    batch.pop("segment_ids")
    assert abs(kept - model.apply({"params": params}, **batch).loss) > 1e-3 * kept


def test_refusals():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48))
    params, batch = init_params(model, jax.random.key(0)), packed_rows(documents())
    apply = lambda model=model, **changed: model.apply({"params": params}, **{**batch, **changed})
    with pytest.raises(ValueError, match="take the place of attention_mask"):
        apply(attention_mask=jnp.ones_like(batch["input_ids"]))
    with pytest.raises(ValueError, match="segment_ids are int32"):
        apply(attention_mask=Packed(batch["segment_ids"][:, 1:]), segment_ids=None)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = LlamaConfig.from_dict({**SMALL, "intermediate_size": 48, "rope_parameters": rope, "max_position_embeddings": 16})
    with pytest.raises(ValueError, match="turns by a row's length"):
        apply(LlamaForCausalLM(dynamic))


def family_model(name):
    """The model that the family's own tests use."""
    family = find_family(name)
    classes = [c for c in vars(importlib.import_module(f"test_{name}")).values() if isinstance(c, type)]
    configs = [c.hf_config for c in classes if getattr(getattr(c, "hf_config", None), "model_type", None) == name]
    return family.classes["AutoModelForCausalLM"](family.config.from_dict(configs[0].to_dict()))


def carries_state(config):
    return any(isinstance(config.layer_spec(kind), RecurrentSpec) for kind in config.layer_kinds)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SPECIAL) - {"llama"}))
def test_every_decoder_is_exact_or_refuses(family):
    if "AutoModelForCausalLM" not in find_family(family).classes:
        return
    model = family_model(family)
    rope = getattr(model.config, "rope_parameters", None)
    if carries_state(model.config) or getattr(rope, "length_dependent", False):
        with pytest.raises(ValueError, match="give every document its own row"):
            assert_packing_is_exact(model)
    else:
        assert_packing_is_exact(model)


def test_a_family_with_recurrent_state_refuses():
    model = _small("mamba")
    assert carries_state(model.config)
    with pytest.raises(ValueError, match=r"MambaModel has layers that carry more than keys and values.*RecurrentSpec"):
        assert_packing_is_exact(model)


def test_an_encoder_sees_both_ways_within_a_document():
    """`Packed` in the place of the mask; positions and logits are those of each document alone."""
    model = _small("bert", "AutoModelForMaskedLM")
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), init_params(model, jax.random.key(0)))
    docs = documents()
    packed, alone = packed_rows(docs), single_rows(docs)
    call = jax.jit(lambda ids, mask: model.apply({"params": params}, ids, attention_mask=mask).logits)
    together = call(packed["input_ids"], Packed(packed["segment_ids"]))
    single = iter(call(alone["input_ids"], alone["attention_mask"]))
    for b, row in enumerate(docs):
        start = 0
        for document in row:
            found, wanted = together[b, start : start + len(document)], next(single)[: len(document)]
            np.testing.assert_allclose(found, wanted, atol=2e-5)
            start += len(document)


@given(lengths=st.lists(st.integers(1, 12), max_size=30), labelled=st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_document_is_packed_once_and_whole(lengths, labelled):
    rng = np.random.default_rng(len(lengths))
    docs = [rng.integers(1, 50, n) for n in lengths]
    labels = [np.where(d % 2, d, -100) for d in docs]
    rows = pack_documents(docs, 12, labels=labels if labelled else None, pad_token_id=99)
    found = []
    for ids, targets, segments in zip(*(rows[name] for name in ("input_ids", "labels", "segment_ids"))):
        assert np.all(ids[segments == 0] == 99) and np.all(targets[segments == 0] == -100)
        for n in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == n)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            found.append((tuple(ids[at]), tuple(targets[at])))
    assert sorted(found) == sorted((tuple(d), tuple(t)) for d, t in zip(docs, labels if labelled else docs))
    assert len(rows["input_ids"]) <= max(1, -(-2 * sum(lengths) // 12)) or not lengths  # no two rows are both at most half full


def test_documents_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="document 1 has 9 tokens and 9 labels; expected 1 to 8"):
        pack_documents([np.ones(3, int), np.ones(9, int)], 8)
    with pytest.raises(ValueError, match="document 0 has 3 tokens and 2 labels"):
        pack_documents([np.ones(3, int)], 8, labels=[np.ones(2, int)])
    assert pack_documents([], 8)["input_ids"].shape == (0, 8)
