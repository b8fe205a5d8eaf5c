import numpy as np
import transformers
from tester import FamilyTester, VariantTester

from jaxmodels.auto import AutoConfig

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestGPTNeoX(FamilyTester):
    hf_config = transformers.GPTNeoXConfig(**SHAPE, rotary_pct=0.5, rotary_emb_base=5000)
    full_size = ({}, 20_554_567_680)  # EleutherAI/gpt-neox-20b
    file_names = {"lm_head.weight": "embed_out.weight"}  # noqa: RUF012
    other_keys = (
        lambda file: (
            file | {f"gpt_neox.layers.1.attention.{k}": np.ones(3, np.float32) for k in ("bias", "masked_bias", "rotary_emb.inv_freq")}
        ),
    )

    def test_published_config(self):
        config = AutoConfig.for_model("gpt_neox", rotary_pct=0.5, rotary_emb_base=5000)
        assert (config.rope_parameters.partial_rotary_factor, config.rope_parameters.rope_theta) == (0.5, 5000)
        assert AutoConfig.for_model("gpt_neox").rope_parameters.partial_rotary_factor == 0.25
        written = config.to_dict()
        assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.5, 5000)


class TestGPTNeoXSequential(VariantTester):
    hf_config = transformers.GPTNeoXConfig(
        **SHAPE,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
