"""The README's way into NNX."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels as jm
from jaxmodels.models.llama import LlamaConfig

CONFIG = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_bridge(scan_layers):
    model, params = jm.AutoModelForCausalLM.from_config(CONFIG, key=jax.random.key(0), scan_layers=scan_layers)
    ids = np.arange(12, dtype=np.int32)[None]
    shard_variables = flax.config.flax_always_shard_variable
    flax.config.update("flax_always_shard_variable", False)
    try:
        module = nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), ids)
        nnx.update(module, jax.tree.map(jnp.asarray, params))
        got = module(ids).logits
    finally:
        flax.config.update("flax_always_shard_variable", shard_variables)
    np.testing.assert_array_equal(got, model.apply({"params": params}, ids).logits)
