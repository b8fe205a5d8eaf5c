import transformers
from test_mamba import SHAPE
from tester import FamilyTester, VariantTester


class TestFalconMamba(FamilyTester):
    hf_config = transformers.FalconMambaConfig(**SHAPE, mixer_rms_eps=1e-3)
    attentions = False
    full_size = (  # tiiuae/falcon-mamba-7b
        {"vocab_size": 65024, "hidden_size": 4096, "num_hidden_layers": 64, "time_step_rank": 256, "tie_word_embeddings": False}
        | {"expand": 16, "intermediate_size": 8192},  # the second counts
        7_272_665_088,
    )
    other_keys = (lambda file: file | {"lm_head.weight": file["backbone.embeddings.weight"]},)


class TestFalconMambaOfAnotherWidth(VariantTester):
    hf_config = transformers.FalconMambaConfig(**SHAPE | {"expand": 16}, intermediate_size=72)
