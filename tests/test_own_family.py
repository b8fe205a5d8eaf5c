"""The page docs/adding-a-family.md, as a reader would try it."""

import re
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open

import jaxmodels as jm
from jaxmodels import auto

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-family.md"
IMPORTS = """
import dataclasses
from typing import ClassVar
import jax
import jaxmodels
from flax import linen as nn
from jaxmodels.config import Config
from jaxmodels.convert.rules import Split
from jaxmodels.family import Family
from jaxmodels.layers import Linear, RMSNorm, attend
from jaxmodels.model import CausalLM
from jaxmodels.models.llama import LlamaModel
from jaxmodels.ops.rope import RopeParameters
"""


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(auto, "FAMILIES", dict(auto.FAMILIES))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {"__name__": "own_family"}
    exec(IMPORTS + "".join(block for block in blocks if "FamilyTester" not in block), names)
    with safe_open(tmp_path / "tiny" / "model.safetensors", "numpy") as file:
        assert "model.layers.1.wqkv.weight" in set(file.keys())
    ids = np.arange(14, dtype=np.int32).reshape(2, 7)
    scanned = names["model"].apply({"params": names["params"]}, ids).logits
    model, params = jm.AutoModelForCausalLM.from_pretrained("tiny")
    np.testing.assert_allclose(model.apply({"params": params}, ids).logits, scanned, atol=1e-5)
    out = jm.generate(model, params, ids, max_new_tokens=5)
    again = jm.generate(names["model"], names["params"], ids, max_new_tokens=5)
    np.testing.assert_array_equal(out.sequences, again.sequences)
    fresh, _ = jax.tree.flatten(params)
    assert jm.count_params(fresh) == sum(leaf.size for leaf in fresh)
