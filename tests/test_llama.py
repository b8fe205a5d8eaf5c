import transformers
from tester import FamilyTester


class TestLlama(FamilyTester):
    hf_config = transformers.LlamaConfig(
        vocab_size=263,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    full_size = (
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        8_030_261_248,
    )
