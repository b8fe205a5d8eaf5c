"""Configs: HF's fields and both spellings of rope, read, written, and read by transformers again."""

import json

import jax
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxmodels.assets import TINY_PYTHON
from jaxmodels.auto import AutoConfig, AutoModelForCausalLM
from jaxmodels.config import Config, read_dtype, read_json
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.ops.rope import RopeParameters, inverse_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "truncate": False}
ROPES = [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, YARN, LONGROPE, LLAMA3]


def small(**values):
    return {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | values


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_both_spellings_mean_the_same(rope):
    new = LlamaConfig.from_dict(small(max_position_embeddings=256, rope_parameters={"rope_theta": 5e5, **rope}))
    old = LlamaConfig.from_dict(small(max_position_embeddings=256, rope_theta=5e5, rope_scaling=rope))
    older = LlamaConfig.from_dict(
        small(
            max_position_embeddings=256,
            rope_theta=5e5,
            rope_scaling={"type": rope["rope_type"]} | {k: v for k, v in rope.items() if k != "rope_type"},
        )
    )
    assert new == old == older and new.rope_parameters.rope_theta == 5e5
    written = json.loads(json.dumps(new.to_dict()))
    assert LlamaConfig.from_dict(written) == new
    for spelling in (("rope_parameters",), ("rope_theta", "rope_scaling")):  # what transformers 5, or 4, reads of it
        others = {"rope_parameters", "rope_theta", "rope_scaling"} - set(spelling)
        assert LlamaConfig.from_dict({k: v for k, v in written.items() if k not in others}) == new


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, *ROPES], ids=lambda rope: rope["rope_type"])
def test_transformers_reads_what_we_write(rope, tmp_path):
    theirs = transformers.LlamaConfig(**small(max_position_embeddings=256, rope_parameters={"rope_theta": 5e5, **rope}))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LlamaConfig.from_dict(read_json(tmp_path / "theirs" / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, transformers.LlamaConfig)
    assert {k: v for k, v in again.rope_parameters.items() if k != "type"} == theirs.rope_parameters
    apart = {"rope_parameters", "rope_theta", "rope_scaling", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in again.to_dict().items() if k not in apart} == {k: v for k, v in theirs.to_dict().items() if k not in apart}


def test_old_keys_count_first():
    """As in HF: a config with both spellings and different values means rope_scaling."""
    both = small(
        rope_scaling={"rope_type": "linear", "factor": 4.0}, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    )
    assert LlamaConfig.from_dict(both).rope_parameters.factor == transformers.LlamaConfig(**both).rope_parameters["factor"] == 4.0


def test_original_length_beside_the_rope():
    for spelling in ("rope_scaling", "rope_parameters"):
        values = small(max_position_embeddings=256, original_max_position_embeddings=128)
        values[spelling] = {k: v for k, v in LONGROPE.items() if k != "original_max_position_embeddings"}
        assert LlamaConfig.from_dict(values).rope_parameters.original_max_position_embeddings == 128
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**values)).config  # HF moves it when a model is built
        assert theirs.rope_parameters["original_max_position_embeddings"] == 128


def test_lengths_default_to_the_models():
    rope = LlamaConfig.from_dict(small(max_position_embeddings=99, rope_scaling={"rope_type": "dynamic", "factor": 2.0})).rope_parameters
    assert rope.max_position_embeddings == 99
    rope = LlamaConfig.from_dict(small(max_position_embeddings=99, rope_scaling={"rope_type": "yarn", "factor": 2.0})).rope_parameters
    assert rope.original_max_position_embeddings == 99


def test_defaults_are_hfs():
    ours, theirs = LlamaConfig().to_dict(), transformers.LlamaConfig().to_dict()
    differ = {k: (ours[k], theirs[k]) for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]}
    assert set(differ) <= {"rope_parameters"}, differ
    assert LlamaConfig.from_dict(theirs) == LlamaConfig()
    assert LlamaConfig(hidden_size=96, num_attention_heads=6).head_dim == 16
    assert LlamaConfig(num_attention_heads=6).num_key_value_heads == 6


def test_unknown_keys_are_kept_and_do_not_count():
    values = small(pretraining_tp=1, _name_or_path="somewhere", a_key_of_tomorrow={"deep": [1, 2]})
    config = LlamaConfig.from_dict(values)
    assert {k: config.to_dict()[k] for k in ("pretraining_tp", "a_key_of_tomorrow")} == {
        "pretraining_tp": 1,
        "a_key_of_tomorrow": {"deep": [1, 2]},
    }
    plain = LlamaConfig.from_dict(small())
    assert config == plain and hash(config) == hash(plain)
    calls = jax.jit(lambda model, x: x * model.config.hidden_size, static_argnums=0)
    calls(LlamaForCausalLM(config), 1.0), calls(LlamaForCausalLM(plain), 1.0)
    assert calls._cache_size() == 1


def test_every_field_counts():
    base = LlamaConfig.from_dict(small())
    changes = {
        "vocab_size": 101,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": (1, 2),
        "rope_parameters": RopeParameters(rope_theta=5.0),
    }
    for name, value in changes.items():
        assert base.replace(**{name: value}) != base


def test_special_tokens_and_labels():
    config = LlamaConfig.from_dict(small(eos_token_id=[7, 8], id2label={"0": "no", "1": "yes", "2": "maybe"}))
    assert config.eos_token_id == (7, 8) and config.num_labels == 3
    written = config.to_dict()
    assert written["eos_token_id"] == [7, 8] and written["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert len(config.replace(num_labels=5).to_dict()["id2label"]) == 5
    assert transformers.LlamaConfig(**config.replace(num_labels=5).to_dict()).num_labels == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size in the config of LlamaConfig is '32'; expected int"),
        ({"attention_bias": 1}, "attention_bias .* is 1; expected bool"),
        ({"vocab_size": True}, "vocab_size .* is True; expected int"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "helix"}}, "rope_type 'helix' .* supported are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(small(**values))


def test_missing_fields():
    with pytest.raises(ValueError, match=r"lacks hidden_size, num_hidden_layers; found are .*vocab_size"):
        Config.from_dict({"vocab_size": 3})


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing; a checkpoint directory holds"):
        read_json(tmp_path / "config.json")
    for content, message in (("{", "not readable JSON"), ("[1]", "holds a JSON list, expected an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ValueError, match="not readable JSON"):
        read_json(tmp_path / "config.json")


def test_rope_turns_pairs():
    with pytest.raises(ValueError, match=r"head_dim 7 with partial_rotary_factor 1.0 has 7 to turn"):
        inverse_frequencies(RopeParameters(), 7)


def test_named_classes_as_an_option():
    names = {0: "no", 1: "yes", 2: "maybe"}
    config = AutoConfig.from_pretrained(TINY_PYTHON, id2label=names)
    assert config.num_labels == 3 and config.id2label == names and config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert transformers.LlamaConfig(**config.to_dict()).label2id == config.label2id
    assert config.replace(num_labels=2).id2label == {0: "no", 1: "yes"} and LlamaConfig.from_dict(small()).id2label == {
        0: "LABEL_0",
        1: "LABEL_1",
    }
    with pytest.raises(ValueError, match="num_labels is 2, and id2label names 3"):
        AutoConfig.from_pretrained(TINY_PYTHON, id2label=names, num_labels=2)


def test_dtypes_as_options():
    key = jax.random.key(0)
    assert LlamaForCausalLM(LlamaConfig.from_dict(small()), dtype=read_dtype(torch.float16)).dtype == "float16"
    for dtype in ("bf16", "int8", torch.int8, None):
        with pytest.raises(ValueError, match=r"dtype is .*; expected float32"):
            AutoModelForCausalLM.from_config(LlamaConfig.from_dict(small()), key=key, dtype=dtype)
    with pytest.raises(ValueError, match="instead of torch_dtype pass dtype"):
        AutoConfig.from_pretrained(TINY_PYTHON, torch_dtype="float32")
