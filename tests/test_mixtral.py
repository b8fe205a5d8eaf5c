import re

import jax.numpy as jnp
import pytest
import transformers
from cases import Case
from moe_tester import MoeTester
from tester import VariantTester

from jaxmodels import auto
from jaxmodels.convert import parity
from jaxmodels.ops.precision import parity_mode
from jaxmodels.params import flatten
from jaxmodels.sharding import Rules, make_mesh

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestMixtral(MoeTester):
    hf_config = transformers.MixtralConfig(**SHAPE)
    full_size = ({}, 46_702_792_704)  # mistralai/Mixtral-8x7B-v0.1


class TestMixtralWithWindow(VariantTester):
    hf_config = transformers.MixtralConfig(
        **SHAPE | {"num_key_value_heads": 1, "num_experts_per_tok": 1}, head_dim=10, sliding_window=37, tie_word_embeddings=True
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case.make(transformers.MixtralConfig(**SHAPE | {"num_local_experts": 8}), tmp_path_factory.mktemp("case"), greedy=False)


@pytest.mark.parametrize("implementation", ["ragged_dot", "dense"])
def test_expert_parallel(case, monkeypatch, implementation):
    """Experts over 8 devices: torch's numbers, every device holds one expert's weights, and none is sent to another."""
    rules = Rules.preset("expert", make_mesh(expert=8))
    options = {"dtype": jnp.float32, "rules": rules, "experts_implementation": implementation}
    model, params = auto.from_pretrained(case.path, **options, scan_layers=True)
    experts = {key: leaf for key, leaf in flatten(params).items() if ".experts." in key}
    assert len(experts) == 3
    for leaf in experts.values():
        assert leaf.sharding.shard_shape(leaf.shape)[:2] == (2, 1)
    inputs = case.inputs
    with parity_mode():
        step = parity.program(model, True).lower(params, inputs.input_ids, inputs.attention_mask, inputs.labels, {}).compile()
    monkeypatch.setattr(parity, "program", lambda *_: step)
    case.check(model, params)
    text = step.as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    E, F, D = 8, SHAPE["intermediate_size"], SHAPE["hidden_size"]
    assert not {f"{E},{F},{D}", f"{E},{D},{F}", f"2,{E},{F},{D}", f"2,{E},{D},{F}"} & set(gathered), gathered
    assert re.search("all-(reduce|to-all)|reduce-scatter", text)
