import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 40,
    "state_size": 5,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestMamba(FamilyTester):
    hf_config = transformers.MambaConfig(**SHAPE)
    attentions = False
    way = {"num_beams": 3}  # noqa: RUF012
    full_size = ({"num_hidden_layers": 24}, 129_135_360)  # state-spaces/mamba-130m-hf
    other_keys = (
        # as first published: embedding, and the tied head a second time
        lambda file: (
            {k.replace("embeddings", "embedding"): v for k, v in file.items()} | {"lm_head.weight": file["backbone.embeddings.weight"]}
        ),
    )


class TestMambaVariant(VariantTester):
    hf_config = transformers.MambaConfig(
        **SHAPE,
        expand=3,
        conv_kernel=2,
        use_bias=True,
        use_conv_bias=False,
        time_step_rank=7,
        hidden_act="gelu",
        residual_in_fp32=False,
        tie_word_embeddings=False,
    )
