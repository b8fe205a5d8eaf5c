"""GenerationConfig files against transformers', validation; the compilation cache's settings."""

import json
import os
import subprocess
import sys

import pytest
import transformers

from jaxmodels.generation import GenerationConfig
from jaxmodels.models.llama import LlamaConfig

OPTIONS = {
    "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 4096, "repetition_penalty": 1.05,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "num_beams": 2, "suppress_tokens": [1, 2], "stop_strings": ["\n\n"],
}  # fmt: skip


def test_reads_and_writes_transformers_files(tmp_path):
    transformers.GenerationConfig(**OPTIONS, house_option={"a": [1]}).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.temperature == 0.6 and config.eos_token_id == (128001, 128008, 128009) and config.max_new_tokens is None
    assert config.extra["house_option"] == {"a": [1]}
    assert config.save_pretrained(tmp_path / "again").read_bytes() == (tmp_path / "generation_config.json").read_bytes()
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "again")
    assert {k: getattr(theirs, k) for k in OPTIONS} == OPTIONS


def test_named_files_and_overrides(tmp_path):
    config = GenerationConfig(max_new_tokens=7, do_sample=False)
    path = config.save_pretrained(tmp_path, "short.json")
    assert path.name == "short.json" and json.loads(path.read_text()) == {"do_sample": False, "max_new_tokens": 7}
    assert GenerationConfig.from_pretrained(tmp_path, "short.json") == config
    assert GenerationConfig.from_pretrained(tmp_path, "short.json", top_k=3).top_k == 3
    with pytest.raises(ValueError, match=r"generation_config\.json does not exist; the directory holds short\.json"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not readable JSON"):
        GenerationConfig.from_pretrained(tmp_path, "broken.json")


def test_every_option_of_transformers_is_known():
    theirs = set(transformers.GenerationConfig().to_dict()) - {"transformers_version", "_from_model_config"}
    missing = theirs - set(GenerationConfig.__dataclass_fields__)
    assert missing <= {"low_memory", "continuous_batching_config"}


def test_is_a_hashable_value():
    assert hash(GenerationConfig(eos_token_id=[1, 2])) == hash(GenerationConfig(eos_token_id=(1, 2)))
    assert repr(GenerationConfig(top_k=3)) == "GenerationConfig(top_k=3)"
    assert GenerationConfig(top_k=3).replace(top_k=4).top_k == 4


def test_defaults_and_the_models_own_tokens():
    full = GenerationConfig(eos_token_id=9).filled(LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3))
    assert (full.eos_token_id, full.pad_token_id, full.bos_token_id) == (9, 3, 1)
    theirs = transformers.GenerationConfig._get_default_generation_params()
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_return_sequences"):
        assert getattr(full, name) == theirs[name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a number above 0"),
        ({"top_k": 2.5}, "top_k is 2.5; expected an integer"),
        ({"eos_token_id": ["a"]}, "eos_token_id is"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"do_sample": 1}, "do_sample is 1"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
    ],
    ids=str,
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        GenerationConfig(**options)


CACHE_SCRIPT = """
import os, sys, jax, jax.numpy as jnp
from jaxmodels.generation.compilation_cache import enable_compilation_cache
enable, folder = enable_compilation_cache.__wrapped__, sys.argv[1]
os.environ["JAXMODELS_COMPILATION_CACHE"] = "off"
assert enable() is None and jax.config.jax_compilation_cache_dir is None
os.environ["JAXMODELS_COMPILATION_CACHE"] = "/proc/no/such/folder"
assert enable() is None and jax.config.jax_compilation_cache_dir is None
jax.config.update("jax_compilation_cache_dir", folder + "/mine")
os.environ["JAXMODELS_COMPILATION_CACHE"] = folder + "/ours"
assert enable() is None and jax.config.jax_compilation_cache_dir == folder + "/mine" and not os.path.exists(folder + "/ours")
jax.config.update("jax_compilation_cache_dir", None)
jax.jit(lambda x: x + 1)(1)
assert enable() == folder + "/ours" and 0 < jax.config.jax_compilation_cache_max_size < 1 << 33
def heavy(x):
    for i in range(60):
        x = jnp.sin(x @ x.T) + jnp.sort(x, 0)[::-1] * i
    return x
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name == "/jax/compilation_cache/cache_hits" else None)
x = jnp.ones((9, 9))
before = jax.jit(heavy)(x).block_until_ready()
assert os.listdir(folder + "/ours") and not hits
jax.clear_caches()
jax.jit(heavy)(x).block_until_ready()
assert hits
"""


def test_compilation_cache(tmp_path):
    """Off by the variable, in a folder that cannot be written, over a user's own setting; on, bounded and hit otherwise."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", CACHE_SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_checkpoints_options_come_before_the_defaults():
    config = LlamaConfig(eos_token_id=2, generation_config={"eos_token_id": (5, 7), "temperature": 0.5, "do_sample": True, "mystery": 1})
    full = GenerationConfig(top_p=0.5, temperature=0.9).filled(config)
    assert (full.eos_token_id, full.temperature, full.top_p, full.do_sample, full.top_k) == ((5, 7), 0.9, 0.5, True, 50)
    assert GenerationConfig().filled(LlamaConfig(eos_token_id=2)).eos_token_id == 2


def test_temperature_0_is_for_greedy_decoding():
    """Many a file and many a call says so."""
    config = LlamaConfig(generation_config={"temperature": 0.0, "do_sample": False})
    assert GenerationConfig().filled(config).temperature == 0
    with pytest.raises(ValueError, match=r"temperature is 0\.0; expected a number above 0"):
        GenerationConfig(do_sample=True).filled(config)
    assert GenerationConfig(do_sample=True, temperature=0.5).filled(config).temperature == 0.5
    with pytest.warns(UserWarning, match="temperature: without effect"):
        assert not GenerationConfig(temperature=0).filled(LlamaConfig()).do_sample


def test_a_call_overrides_what_is_wrong_in_the_file():
    config = LlamaConfig(generation_config={"top_k": -1})
    with pytest.raises(ValueError, match="top_k is -1"):
        GenerationConfig().filled(config)
    assert GenerationConfig(top_k=0, do_sample=True).filled(config).top_k == 0


def test_unknown_arguments_are_kept_or_returned(tmp_path):
    """As transformers documents them: from_dict and from_pretrained keep what they do not know, or hand it back when asked."""
    config, unused = GenerationConfig.from_dict({"top_k": 3, "house": 1}, return_unused_kwargs=True, top_k=5, foo="bar")
    assert (config.top_k, config.extra, unused) == (5, {"house": 1}, {"foo": "bar"})
    assert GenerationConfig.from_dict({}, foo="bar").extra == {"foo": "bar"}
    config.save_pretrained(tmp_path)
    again, unused = GenerationConfig.from_pretrained(tmp_path, return_unused_kwargs=True, min_p=0.1, foo="bar")
    assert (again.min_p, again.top_k, unused) == (0.1, 5, {"foo": "bar"})
    for argument in ("logits_processor", "streamer"):  # of generate, not of its configuration
        with pytest.raises(TypeError, match=argument):
            GenerationConfig(**{argument: []})


def test_biases_and_ids_survive_a_file(tmp_path):
    options = {"sequence_bias": {(5, 6): -1.5, (7,): 2.0}, "bad_words_ids": [[3], [4, 5]], "exponential_decay_length_penalty": (3, 1.1)}
    config = GenerationConfig(**options)
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config and hash(config)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert theirs.sequence_bias == [[[5, 6], -1.5], [[7], 2.0]] and theirs.bad_words_ids == options["bad_words_ids"]
    text = transformers.GenerationConfig(sequence_bias=options["sequence_bias"]).to_json_string()  # its keys are text
    assert GenerationConfig.from_dict(json.loads(text)).sequence_bias == config.sequence_bias
