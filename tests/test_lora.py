"""Adapters against the peft library: outputs, gradients, files both ways; merged, trained, several at once."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxmodels as jm
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.convert.rules import unstack
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import flatten, init_params, unflatten
from jaxmodels.training import create_train_state, make_train_step
from jaxmodels.training.lora import (
    LoraConfig,
    adapter_of,
    adapters_by_row,
    add_lora,
    frozen_by,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
    with_adapter,
    without_adapter,
)

# peft asks transformers a deprecated question
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
UNROLLED, SCANNED = (LlamaForCausalLM(LlamaConfig(**SHAPE), scan_layers=scanned) for scanned in (False, True))
IDS = np.random.default_rng(0).integers(0, 61, (3, 14))

OPTIONS = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": r".*\.(q|o|gate)_proj",
        "rank_pattern": {"q_proj": 2, r"self_attn\.o_proj": 5},
        "alpha_pattern": {r"layers\.1\.mlp\.gate_proj": 3},
        "exclude_modules": ["k_proj"],
    },
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"], "modules_to_save": ["lm_head"]},
}


def torch_base():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attn_implementation="eager"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def our_base(model):
    flat = {name: jnp.asarray(weight.detach().numpy()) for name, weight in torch_base().named_parameters()}
    return unflatten(_stacked(flat) if model.scan_layers else flat)


def _stacked(flat):
    flat, L = dict(flat), SHAPE["num_hidden_layers"]
    for name in [name for name in flat if ".layers.0." in name]:
        rows = [flat.pop(name.replace(".layers.0.", f".layers.{i}.")) for i in range(L)]
        flat[name.replace(".layers.0.", f".layers.0:{L}:1.")] = jnp.stack(rows)
    return flat


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{case: (directory that peft wrote, its logits, its gradients by the file's names)}."""
    made = {}
    for case, options in OPTIONS.items():
        model = peft.get_peft_model(torch_base(), peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.2)
        directory = tmp_path_factory.mktemp(case)
        out = model(torch.tensor(IDS), labels=torch.tensor(IDS))
        out.loss.backward()
        grads = {
            n.replace(".default", "").removeprefix("base_model.model."): p.grad.numpy()
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            model.save_pretrained(directory)
        made[case] = (directory, out.logits.detach().numpy(), grads)
    return made


@jax.jit
def unrolled_logits(params):
    return UNROLLED.apply({"params": params}, jnp.asarray(IDS)).logits


@jax.jit
def scanned_logits(params):
    return SCANNED.apply({"params": params}, jnp.asarray(IDS)).logits


def logits_of(model, params):
    return (scanned_logits if model.scan_layers else unrolled_logits)(params)


def file_names(flat):
    """peft's names for our leaves."""
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector.weight"}
    renamed = lambda name: ".".join([*name.split(".")[:-1], names.get(name.split(".")[-1], name.split(".")[-1])])
    return {renamed(name): leaf for name, leaf in unstack(flat).items()}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("model", [UNROLLED, SCANNED], ids=["unrolled", "scanned"])
def test_pefts_files_give_pefts_outputs_and_gradients(written, case, model):
    directory, logits, grads = written[case]
    params, config = load_adapter(directory, model, our_base(model))
    assert np.abs(logits_of(model, params) - logits).max() <= 1e-4 * max(1, logits.std())
    value = lambda params: model.apply({"params": params}, jnp.asarray(IDS), labels=jnp.asarray(IDS)).loss
    frozen = frozen_by(config)
    found = file_names({name: g for name, g in flatten(jax.jit(jax.grad(value))(params)).items() if not frozen(name)})
    wanted = {name.replace("modules_to_save.", ""): g for name, g in grads.items()}
    assert {n for n in wanted if "base_layer" not in n} == set(found)
    total = np.sqrt(sum(np.sum(g**2) for g in wanted.values()))
    for name, g in found.items():
        assert np.linalg.norm(g - wanted[name]) <= 1e-4 * max(np.linalg.norm(g), 1e-3 * total), name


@pytest.mark.parametrize("case", OPTIONS)
def test_peft_reads_what_we_write(written, case, tmp_path):
    """From the scanned form; the same tensors under the same keys."""
    directory, logits, _ = written[case]
    params, config = load_adapter(directory, SCANNED, our_base(SCANNED))
    save_adapter(tmp_path / "adapter", SCANNED, params, config)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (directory, tmp_path / "adapter"))
    extra = {k for k in theirs if k.endswith("base_layer.weight")}
    assert set(ours) == set(theirs) - extra and all(np.array_equal(ours[k], theirs[k]) for k in ours)
    model = peft.PeftModel.from_pretrained(torch_base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        again = model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(again - logits).max() <= 1e-6


@pytest.mark.parametrize("case", OPTIONS)
def test_merge_and_back(written, case):
    directory, logits, _ = written[case]
    for model in (UNROLLED, SCANNED):
        params, _ = load_adapter(directory, model, our_base(model))
        plain, adapter = merge(params)
        assert jax.tree.structure(plain) == jax.tree.structure(our_base(model))
        assert np.abs(logits_of(model, plain) - logits).max() <= 1e-4 * max(1, logits.std())
        back = flatten(unmerge(plain, adapter))
        for name, leaf in flatten(params).items():
            np.testing.assert_allclose(back[name], leaf, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing_and_is_the_same_scanned(dora):
    config = LoraConfig(r=3, use_dora=dora)
    key = jax.random.key(5)
    params, scanned = add_lora(UNROLLED, our_base(UNROLLED), config, key), add_lora(SCANNED, our_base(SCANNED), config, key)
    np.testing.assert_allclose(logits_of(UNROLLED, params), logits_of(UNROLLED, our_base(UNROLLED)), atol=1e-5)
    for name, leaf in unstack(flatten(scanned)).items():
        np.testing.assert_array_equal(leaf, flatten(params)[name], err_msg=name)
    A = flatten(params)["model.layers.0.mlp.up_proj.lora_A"]
    assert A.shape == (3, 32) and 0.9 * 32**-0.5 < np.abs(A).max() <= 32**-0.5


def test_trains_as_peft():
    """Five steps of AdamW on the adapter and the saved head; the base does not move and has no moments."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    theirs = peft.get_peft_model(torch_base(), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    start = {
        n.replace(".default", "").removeprefix("base_model.model."): p.detach().numpy().copy()
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    config = LoraConfig(**config)
    fresh = add_lora(SCANNED, our_base(SCANNED), config, jax.random.key(0))
    given = _stacked(
        {n.replace("A.weight", "A").replace("B.weight", "B").replace("modules_to_save.", ""): jnp.asarray(x) for n, x in start.items()}
    )
    params = unflatten(flatten(fresh) | given)
    optimizer, frozen = optax.adamw(1e-2, weight_decay=0.1), frozen_by(config)
    adam = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    state = create_train_state(SCANNED, optimizer, params, frozen=frozen)
    step = make_train_step(SCANNED, optimizer, frozen=frozen)
    batch = {name: jnp.asarray(IDS, jnp.int32) for name in ("input_ids", "labels")}
    for _ in range(5):
        adam.zero_grad()
        loss = theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
        loss.backward()
        adam.step()
        state, metrics = step(state, batch)
        assert abs(float(metrics["loss"]) - loss.item()) <= 1e-4 * loss.item()
    paths = {jax.tree_util.keystr(p).replace("']['", ".") for p, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert any("lora_A" in p for p in paths) and not any("lora_scale" in p or "proj.weight" in p for p in paths)
    for name, leaf in flatten(our_base(SCANNED)).items():
        assert np.array_equal(leaf, flatten(state.params)[name]) == (name != "lm_head.weight"), name


def test_adapters_by_row(written):
    """Every row under its own adapter, or none, as if it were alone; also in generate, with several samples a row."""
    adapters = [adapter_of(load_adapter(written[case][0], SCANNED, our_base(SCANNED))[0]) for case in ("plain", "all-linear")]
    base, rows = our_base(SCANNED), [1, 2, 0]
    mixed = logits_of(SCANNED, adapters_by_row(base, [*adapters, None], rows))
    alone = [logits_of(SCANNED, with_adapter(base, a) if a else base) for a in (*adapters, None)]
    for i, row in enumerate(rows):
        np.testing.assert_allclose(mixed[i], alone[row][i], atol=2e-5)
    options = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    ids = jnp.asarray(IDS[:, :5])
    together = jm.generate(SCANNED, adapters_by_row(base, [*adapters, None], rows), ids, **options).sequences
    for i, row in enumerate(rows):
        params = with_adapter(base, adapters[row]) if row < 2 else base
        single = jm.generate(SCANNED, params, ids[i : i + 1], **options).sequences
        np.testing.assert_array_equal(together[2 * i : 2 * i + 2], single)
    dora = adapter_of(load_adapter(written["dora"][0], SCANNED, base)[0])
    with pytest.raises(ValueError, match=r"must be plain LoRA of linear layers; found .*lora_magnitude"):
        adapters_by_row(base, [dora], [0, 0, 0])


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_the_adapters_input(dora):
    """Without a key none; with one, another noise for every key and layer, and right on average."""
    config = LoraConfig(r=4, target_modules=["up_proj"], lora_dropout=0.5, use_dora=dora)
    params = add_lora(UNROLLED, our_base(UNROLLED), config, jax.random.key(0))
    noisy = {
        n: x + (0.3 * jax.random.normal(jax.random.key(1), x.shape) if n.endswith("lora_B") else 0) for n, x in flatten(params).items()
    }
    plain = unflatten({n: x for n, x in noisy.items() if not n.endswith("lora_dropout")})
    params = unflatten(noisy)
    quiet = logits_of(UNROLLED, params)
    np.testing.assert_array_equal(quiet, logits_of(UNROLLED, plain))
    call = jax.jit(jax.vmap(lambda key: UNROLLED.apply({"params": params}, jnp.asarray(IDS), rngs={"dropout": key}).logits))
    one, again, other = call(jax.random.split(jax.random.key(0), 3)[jnp.asarray([0, 0, 1])])
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2 and np.abs(one - quiet).max() > 1e-2


def test_refusals(tmp_path, written):
    base = our_base(UNROLLED)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'qproj' name no linear layer"):
        add_lora(UNROLLED, base, LoraConfig(target_modules="qproj"), key)
    with pytest.raises(ValueError, match="holds 3 layers in one array, of which the adapter takes a part"):
        add_lora(SCANNED, our_base(SCANNED), LoraConfig(target_modules=r"model\.layers\.1\..*q_proj"), key)
    with pytest.raises(ValueError, match="rank r is 0"):
        LoraConfig(r=0)
    with pytest.raises(ValueError, match="bias = 'all' is not supported; it must be 'none'"):
        LoraConfig.from_dict({"peft_type": "LORA", "bias": "all"})
    with pytest.raises(ValueError, match="peft_type 'IA3'"):
        LoraConfig.from_dict({"peft_type": "IA3"})
    wide = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"down_proj.*has shape \[4, 48\]; this model and config expect \[4, 64\]"):
        load_adapter(written["plain"][0], wide, init_params(wide, key))
    directory = tmp_path / "cut"
    directory.mkdir()
    tensors = load_file(written["plain"][0] / "adapter_model.safetensors")
    tensors["base_model.model.extra.lora_A.weight"] = tensors.pop(sorted(tensors)[0])
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text((written["plain"][0] / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match=r"missing are .*down_proj\.lora_A.*not used are .*extra"):
        load_adapter(directory, UNROLLED, base)
    with pytest.raises(ValueError, match="modules_to_save 'heads' is no module with parameters of its own"):
        add_lora(UNROLLED, base, LoraConfig(modules_to_save=["heads"]), key)


def test_the_config_keeps_what_it_does_not_read(written, tmp_path):
    directory = written["patterns"][0]
    params, config = load_adapter(directory, UNROLLED, our_base(UNROLLED))
    save_adapter(tmp_path / "a", UNROLLED, params, config)
    theirs, ours = (json.loads((path / "adapter_config.json").read_text()) for path in (directory, tmp_path / "a"))
    same = lambda value: sorted(value) if isinstance(value, list) else value
    assert {k: same(v) for k, v in ours.items()} == {k: same(v) for k, v in theirs.items()}
    assert flatten(without_adapter(params)).keys() == flatten(our_base(UNROLLED)).keys()


@pytest.mark.parametrize("dora", [False, True])
def test_projections_that_files_fuse(dora, tmp_path):
    """GPT-2's c_attn, which is three of ours, and its transposed weights: peft's file, its outputs, and back; trained apart, the parts are
    one adapter of three times the rank."""
    torch.manual_seed(0)
    shape = {"vocab_size": 47, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, attn_implementation="eager")).eval()
    base.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": dora, "use_rslora": True}
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.random.default_rng(0).integers(0, 47, (2, 9))
    model, params = jm.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32", scan_layers=True)
    call = jax.jit(lambda params: model.apply({"params": params}, jnp.asarray(ids)).logits)

    def peft_logits(model):
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.numpy()

    params, config = load_adapter(tmp_path / "theirs", model, params)
    assert "transformer.h.0:2:1.attn.k_proj.lora_B" in flatten(params)
    np.testing.assert_allclose(call(params), peft_logits(theirs), atol=1e-4)
    save_adapter(tmp_path / "ours", model, params, config)
    written, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert written.keys() == again.keys() and all(np.array_equal(written[k], again[k]) for k in written)

    noise = lambda name, x: x + 0.3 * jax.random.normal(jax.random.key(len(name)), x.shape) if "lora_A" in name or "lora_B" in name else x
    apart = unflatten({name: noise(name, x) for name, x in flatten(params).items()})
    apart["transformer"]["h"]["0:2:1"]["attn"]["v_proj"]["lora_A"] *= -1.5
    save_adapter(tmp_path / "apart", model, apart, config)
    fresh = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base", attn_implementation="eager")
    read = peft.PeftModel.from_pretrained(fresh, tmp_path / "apart").eval()
    np.testing.assert_allclose(peft_logits(read), call(apart), atol=1e-4)
    back, _ = load_adapter(tmp_path / "apart", model, params)
    np.testing.assert_allclose(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(ids)).logits)(back), call(apart), atol=1e-4)


@pytest.mark.parametrize(
    ("head", "tied", "options"),
    [
        ("SequenceClassification", False, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
        ("CausalLM", False, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("CausalLM", True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
    ids=["heads by task", "ends of names", "tied"],
)
def test_what_peft_saves_whole(head, tied, options, tmp_path):
    """A task's head, of which PEFT names two; every module whose name ends so; embeddings that stay one with the head."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"LlamaFor{head}")
    config = transformers.LlamaConfig(**SHAPE | {"tie_word_embeddings": tied, "num_hidden_layers": 1}, pad_token_id=0)
    kind(config).eval().save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs.eval()(torch.tensor(IDS)).logits.detach().numpy()
    model, base = getattr(jm, f"AutoModelFor{head}").from_pretrained(tmp_path / "base")
    params, loaded = load_adapter(tmp_path / "theirs", model, base)
    for own in (params, merge(params)[0]):
        np.testing.assert_allclose(model.apply({"params": own}, jnp.asarray(IDS)).logits, wanted, atol=1e-5)
    fresh = add_lora(model, base, LoraConfig(r=4, **options), jax.random.key(0))  # our words for the same
    assert flatten(fresh).keys() == flatten(params).keys()
    trained = lambda config: {name for name in flatten(params) if not frozen_by(config)(name)}
    assert trained(LoraConfig(r=4, **options)) == trained(loaded) >= {name for name in flatten(params) if "lora_A" in name}
    save_adapter(tmp_path / "ours", model, params, loaded)
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    np.testing.assert_allclose(again(torch.tensor(IDS)).logits.detach().numpy(), wanted, atol=1e-6)


def test_a_tied_head_is_not_left_behind():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": True, "num_hidden_layers": 1}))
    params, key = init_params(model, jax.random.key(0)), jax.random.key(0)
    with pytest.raises(ValueError, match=r"to which lm_head\.weight is tied.*ensure_weight_tying=True keeps them one"):
        add_lora(model, params, LoraConfig(modules_to_save=["embed_tokens"]), key)
    with pytest.warns(UserWarning, match=r"while lm_head\.weight is tied to it: merged"):
        add_lora(model, params, LoraConfig(target_modules=["embed_tokens"]), key)
