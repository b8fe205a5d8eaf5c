"""Configs of the families beside transformers' own: an omitted key of config.json means the same."""

import pytest
import transformers

from jaxmodels.auto import AutoConfig

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
