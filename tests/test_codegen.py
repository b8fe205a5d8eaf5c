import numpy as np
import transformers
from tester import FamilyTester


class TestCodeGen(FamilyTester):
    hf_config = transformers.CodeGenConfig(
        vocab_size=263, n_embd=64, n_layer=2, n_head=8, n_positions=512, rotary_dim=6, bos_token_id=None, eos_token_id=None
    )
    full_size = ({"vocab_size": 51200, "n_embd": 1024, "n_layer": 20, "rotary_dim": 32}, 356_712_448)  # Salesforce/codegen-350M-mono
    other_keys = (lambda file: file | {"transformer.h.1.attn.causal_mask": np.ones((1, 1, 9, 9), bool)},)
