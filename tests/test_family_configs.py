"""Configs of the families beside transformers' own: an omitted key of config.json means the same."""

import json
from collections import Counter

import pytest
import transformers
from transformers.models.auto import modeling_auto

from jaxmodels import auto
from jaxmodels.auto import AutoConfig
from jaxmodels.cache import segments
from jaxmodels.config import Config
from jaxmodels.params import abstract_params

COMPUTED = {"rope_parameters", "layer_types", "no_rope_layers", "moe_layers", "head_dim"}  # that one side fills in and the other works out
FAMILIES = [
    *("deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
    *("cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "llama", "mistral", "nemotron"),
    *("olmo", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_hfs(model_type):
    ours, theirs = AutoConfig.for_model(model_type), transformers.AutoConfig.for_model(model_type)
    mine, other = ours.to_dict(), theirs.to_dict()
    if model_type.startswith("qwen") and not ours.use_sliding_window:
        mine["sliding_window"] = 0 if model_type == "qwen2_moe" else None
    if model_type == "nemotron":
        assert other.pop("num_key_value_heads") is None  # as many as query heads
    shared = (mine.keys() & other.keys()) - COMPUTED
    assert len(shared) > 12
    assert {k: mine[k] for k in shared} == {k: other[k] for k in shared}
    ropes, theirs_ropes = mine["rope_parameters"], other["rope_parameters"]
    assert {**ropes, "partial_rotary_factor": 1.0} | ropes == {**theirs_ropes, "partial_rotary_factor": 1.0} | theirs_ropes
    if hasattr(theirs, "layer_types"):
        assert [kind[0] if isinstance(kind, tuple) else kind for kind in ours.layer_kinds] == theirs.layer_types
    if model_type == "smollm3":
        assert [int(ours.has_rope(i)) for i in range(ours.num_hidden_layers)] == theirs.no_rope_layers
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert type(ours).from_dict(other).layer_kinds == ours.layer_kinds


ALL = sorted(auto.FAMILIES)
# What one side writes out and the other works out, or leaves to the modules.
FILLED = {"layer_types", "no_rope_layers", "moe_layers", "attn_config", "ffn_config", "num_kv_heads", "ffn_hidden_size", "sliding_window"}


@pytest.mark.parametrize("model_type", ALL)
def test_a_config_of_its_model_type_alone(model_type, tmp_path):
    """The same as HF's default config written out in full, and as one with keys that nobody knows; HF reads ours as its own."""
    theirs = transformers.AutoConfig.for_model(model_type)
    theirs.save_pretrained(tmp_path)
    full = AutoConfig.from_pretrained(tmp_path)
    bare, more = (
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **unknown})) and AutoConfig.from_pretrained(tmp_path)
        for unknown in ({}, {"of_tomorrow": [1, {"a": None}], "auto_map": {"AutoConfig": "evil.Config"}})
    )
    assert more == bare and more.to_dict()["of_tomorrow"] == [1, {"a": None}]
    values = lambda config: {name: getattr(config, name) for name in config.field_names() if name not in {"extra", *FILLED}}
    assert values(bare) == values(full)
    assert bare.layer_kinds == full.layer_kinds
    assert [bare.layer_spec(kind) for kind in set(bare.layer_kinds)] == [full.layer_spec(kind) for kind in set(bare.layer_kinds)]
    again = transformers.AutoConfig.for_model(**bare.to_dict())
    written, expected = again.to_dict(), theirs.to_dict()
    computed = COMPUTED - {"rope_parameters"} | {"num_key_value_heads"}
    assert {k: written[k] for k in expected.keys() - computed} == {k: expected[k] for k in expected.keys() - computed}


CAUSAL_ROPES = [name for name in ALL if "rope_parameters" in auto.find_family(name).config.field_names() and name != "gemma3_text"]


@pytest.mark.parametrize("model_type", CAUSAL_ROPES)
def test_both_spellings_of_every_rope(model_type):
    """rope_parameters, and rope_theta beside rope_scaling, with `type` or `rope_type`: the same config."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for kind in ("linear", "llama3"):
        read = lambda **values: AutoConfig.for_model(model_type, max_position_embeddings=256, **values).rope_parameters
        new = read(rope_parameters={"rope_type": kind, "rope_theta": 5e5, **scaling})
        for name in ("type", "rope_type"):
            assert read(rope_theta=5e5, rope_scaling={name: kind, **scaling}) == new
        assert (new.rope_type, new.factor, new.rope_theta) == (kind, 4.0, 5e5)


def test_every_auto_class_that_hf_has_finds_its_head():
    """For each of HF's tasks over text and each family that HF lists for it: our auto class of that name gives the class of that name."""
    found = Counter[str]()
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or name == "AutoModelForDecision":  # JEV's, whose config is not a family's
            continue
        for model_type in set(auto.FAMILIES) & set(mapping._model_mapping):
            theirs = mapping._model_mapping[model_type]
            config = AutoConfig.for_model(model_type)
            assert getattr(auto, name).class_for(config).__name__ == (theirs if isinstance(theirs, str) else theirs[0]), (name, model_type)
            found[name] += 1
    assert found["AutoModel"] == len(auto.FAMILIES) and found["AutoModelForCausalLM"] == len(auto.FAMILIES) - 1  # t5 is no causal one
    assert found["AutoModelForSequenceClassification"] > 35 and len(found) == 11
    encoder = auto.AutoModelForTextEncoding.class_for(AutoConfig.for_model("llama4_text"))  # HF lists it for the whole Llama 4
    assert encoder.__name__ == modeling_auto.AutoModelForTextEncoding._model_mapping._model_mapping["llama4"]


SHARED = [name for name in ALL if auto.find_family(name).config.head_dim is Config.head_dim]


@pytest.mark.parametrize("model_type", SHARED)
def test_heads_that_do_not_divide(model_type):
    """An error with both numbers under the file's names, before a parameter is made or read."""
    spelled = auto.find_family(model_type).config.spelled
    size, heads = (spelled.get(name, name) for name in ("hidden_size", "num_attention_heads"))
    config = AutoConfig.for_model(model_type, **{size: 48, heads: 5})
    with pytest.raises(ValueError, match=f"{size} 48 is no multiple of {heads} 5"):
        abstract_params(auto.AutoModelForCausalLM.class_for(config)(config))


UNEVEN = {
    "falcon": {"num_attention_heads": 6, "num_kv_heads": 4, "new_decoder_architecture": True},
    "dbrx": {"n_heads": 6, "d_model": 48, "attn_config": {"kv_n_heads": 4}},
    "jamba": {"num_attention_heads": 6, "num_key_value_heads": 4, "attn_layer_offset": 0},
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("model_type", UNEVEN)
def test_key_heads_that_do_not_divide(model_type):
    def make():
        config = AutoConfig.for_model(model_type, **{"hidden_size": 48, **UNEVEN[model_type]})
        abstract_params(auto.AutoModelForCausalLM.class_for(config)(config))

    with pytest.raises(ValueError, match=r"6 .* 4"):
        make()


@pytest.mark.parametrize("model_type", ALL)
def test_every_stack_is_scanned(model_type):
    """HF's default stack of each family is one or two loops, whatever kinds of layers it mixes; no layer stands alone."""
    plan = segments(AutoConfig.for_model(model_type).layer_kinds)
    assert len(plan) <= 2 and all(period <= 8 and repeats > 1 for _, period, repeats in plan)


@pytest.mark.parametrize(
    ("model_type", "key"), [("mpt", "attn_config"), ("smollm3", "num_key_value_heads"), ("deepseek_v3", "num_key_value_heads")]
)
def test_null_is_what_hf_makes_of_it(model_type, key):
    ours, theirs = AutoConfig.for_model(model_type, **{key: None}), transformers.AutoConfig.for_model(model_type, **{key: None})
    if key == "attn_config":
        assert ours == AutoConfig.for_model("mpt") and theirs.attn_config.softmax_scale is None
    else:
        assert ours.num_key_value_heads == theirs.num_key_value_heads == theirs.num_attention_heads
