import transformers
from tester import FamilyTester, VariantTester

SHAPE = {
    "vocab_size": 263,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class TestOPT(FamilyTester):
    hf_config = transformers.OPTConfig(**SHAPE)
    full_size = ({}, 125_239_296)  # facebook/opt-125m
    other_keys = (
        lambda file: {k.removeprefix("model."): v for k, v in file.items()},
        lambda file: file | {"lm_head.weight": file["model.decoder.embed_tokens.weight"]},
    )


class TestOPT350m(VariantTester):
    hf_config = transformers.OPTConfig(**SHAPE, do_layer_norm_before=False, word_embed_proj_dim=24)


class TestOPTPlain(VariantTester):
    hf_config = transformers.OPTConfig(
        **SHAPE,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        tie_word_embeddings=False,
        activation_function="gelu",
        _remove_final_layer_norm=True,
    )
