"""One tiny Llama in torch and here, ragged prompts of up to 300 tokens, and a counter of compilations."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxmodels.convert.rules import stack
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM
from jaxmodels.params import abstract_params, flatten, unflatten

VOCAB = 211
EOS, PAD = 2, 0
LENGTHS = (300, 7, 123, 256)
T = max(LENGTHS)


@functools.cache
def torch_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + (weight.ndim == 1))
    return model


@functools.cache
def ours(scan_layers=False, dtype=jnp.float32):
    """(model, params) with torch's numbers."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(torch_model().config.to_dict()), dtype=dtype, scan_layers=scan_layers)
    flat = {name: jnp.asarray(weight.detach().numpy()).astype(dtype) for name, weight in torch_model().named_parameters()}
    if scan_layers:
        flat = stack(flat, list(flatten(abstract_params(model))))
    return model, unflatten(flat)


@functools.cache
def prompts():
    """input_ids and attention_mask [4,300], left-padded, of LENGTHS."""
    mask = np.stack([np.arange(T) >= T - n for n in LENGTHS]).astype(np.int64)
    return np.random.default_rng(0).integers(3, VOCAB, (len(LENGTHS), T)) * mask, mask


def torch_row(row, *, new, **options):
    """The tokens that torch adds to one unpadded row of ids."""
    ids = torch.tensor(np.asarray(row))[None]
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    with torch.no_grad():
        return torch_model().generate(ids, max_new_tokens=new, **options)[0, ids.shape[1] :].tolist()


@functools.cache
def torch_greedy(row, new=40):
    """What torch adds to row `row` of the prompts, never stopping."""
    ids, mask = prompts()
    return torch_row(ids[row][mask[row] == 1], new=new, eos_token_id=None)


@contextlib.contextmanager
def compilations():
    """A list that grows by one for each program XLA compiles."""
    found, on = [], [True]

    def listen(event, seconds, **_):
        if on[0] and event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    on[0] = False
