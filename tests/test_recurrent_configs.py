"""Configs of the recurrent families beside transformers' own, and their checkpoints under the keys that files on the hub have."""

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jaxmodels import auto
from jaxmodels.params import abstract_params, flatten, unflatten

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12}
FAMILIES = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 2},
    "recurrent_gemma": HEADS,
    "jamba": HEADS | {"num_experts": 2},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_hfs(model_type):
    ours, theirs = auto.AutoConfig.for_model(model_type), transformers.AutoConfig.for_model(model_type)
    mine, other = ours.to_dict(), theirs.to_dict()
    filled = {"rope_parameters", "head_dim", "lru_width", "num_key_value_heads"}  # that one side fills in and the other works out
    shared = (mine.keys() & other.keys()) - filled
    assert len(shared) > 12
    plain = lambda x: list(x) if isinstance(x, tuple) else x
    assert {k: mine[k] for k in shared} == {k: plain(other[k]) for k in shared}
    assert type(ours).from_dict(other).layer_kinds == ours.layer_kinds
    attends = [kind == "attention" or (isinstance(kind, tuple) and kind[0]) for kind in ours.layer_kinds]
    assert attends == [kind != "linear_attention" for kind in theirs.layer_types]
    assert type(ours).from_dict(mine) == ours
    assert type(theirs)(**mine).to_dict().keys() >= other.keys()


def test_infinity_in_either_spelling():
    written = [{"time_step_limit": [0.0, {"__float__": "Infinity"}]}, {"time_step_limit": [0.0, float("inf")]}, {}]
    configs = [auto.AutoConfig.for_model("mamba2", **values) for values in written]
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys(model_type, tmp_path):
    for tied in (True, False):
        config = auto.AutoConfig.for_model(model_type, **SIZES, **FAMILIES[model_type], tie_word_embeddings=tied)
        model = auto.AutoModelForCausalLM.class_for(config)(config)
        rng = np.random.default_rng(0)
        params = {key: rng.standard_normal(leaf.shape, np.float32) for key, leaf in flatten(abstract_params(model)).items()}
        auto.save_pretrained(tmp_path, model, unflatten(params))
        file = tmp_path / "model.safetensors"
        written, prefix = load_file(file), f"{model.base_name}."
        table = next(key for key in written if "embed" in key)
        variants = [written]
        if tied:
            assert "lm_head.weight" not in written
            variants.append({**written, "lm_head.weight": written[table]})
            variants.append({k: v for k, v in variants[1].items() if k != table})
        variants += [{key.removeprefix(prefix): tensor for key, tensor in tensors.items()} for tensors in variants[:2]]
        for tensors in variants:
            save_file(tensors, file)
            loaded = flatten(auto.from_pretrained(tmp_path, dtype="float32")[1])
            assert loaded.keys() == params.keys()
            assert all(np.array_equal(loaded[key], params[key]) for key in params)
