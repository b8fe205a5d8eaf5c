import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import Case
from tester import FamilyTester, VariantTester
from transformers.models.xglm.modeling_xglm import XGLMSinusoidalPositionalEmbedding

from jaxmodels.models.xglm import sinusoids

SHAPE = {
    "vocab_size": 263,
    "d_model": 48,
    "ffn_dim": 80,
    "num_layers": 2,
    "attention_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class XGLMCase:
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory):
        """HF takes float64's lowest number for a constant of the default type, so in float64 it runs where that is the default."""
        case = Case.make(cls.hf_config, tmp_path_factory.mktemp("case"), cls.greedy)
        torch.set_default_dtype(torch.float64)
        try:
            case.torch64  # noqa: B018
        finally:
            torch.set_default_dtype(torch.float32)
        return case


class TestXGLM(XGLMCase, FamilyTester):
    hf_config = transformers.XGLMConfig(**SHAPE)
    full_size = ({}, 564_463_616)  # facebook/xglm-564M
    other_keys = (
        lambda file: (
            file | {"lm_head.weight": file["model.embed_tokens.weight"], "model.embed_positions.weights": np.ones((9, 48), np.float32)}
        ),
    )

    def test_sinusoids(self):
        """Odd sizes, and the row of zeros at the padding id."""
        for features, blank in ((48, 1), (9, 5), (10, None)):
            theirs = XGLMSinusoidalPositionalEmbedding.get_embedding(300, features, blank)
            np.testing.assert_allclose(sinusoids(jnp.arange(300)[None], features, blank)[0], theirs, atol=1e-5)


class TestXGLMUnscaled(XGLMCase, VariantTester):
    hf_config = transformers.XGLMConfig(**SHAPE, scale_embedding=False, activation_function="relu", tie_word_embeddings=False)
