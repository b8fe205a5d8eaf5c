"""What the tests compare: a torch model with every parameter perturbed, the directory it was saved to, ours as loaded from there.

Axis letters: B rows, T columns, V vocabulary."""

import copy
import dataclasses
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jax import monitoring
from safetensors import safe_open

from jaxmodels import auto
from jaxmodels.cache import init_cache
from jaxmodels.convert import parity

COMPILED = "/jax/core/compile/backend_compile_duration"


def stored_buffers(model):
    """{name: tensor} of the buffers with numbers that a file holds beside the parameters: ours are parameters too."""
    names = {f"{path}.{name}" for path, module in model.named_modules() for name in module._non_persistent_buffers_set}
    return {name: b for name, b in model.named_buffers() if name not in names and b.is_floating_point()}


def sensitive(model, seed=0):
    """The torch model with every parameter perturbed: weights with a standard deviation of 0.15, norms and biases moved by 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*model.parameters(), *stored_buffers(model).values()):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.15 * noise if p.ndim > 1 else p + 0.3 * noise)
    model.tie_weights()
    return model.eval()


def tensors(directory):
    """{key: (dtype, shape, bytes)} of every tensor in a checkpoint directory, read with the safetensors library."""
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, framework="pt") as source:
            for key in source.keys():  # noqa: SIM118
                tensor = source.get_tensor(key)
                found[key] = (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found


@contextmanager
def compilations():
    """A list that holds one entry per program compiled inside."""
    found = []

    def listen(name, seconds, **_):
        if name == COMPILED:
            found.append(seconds)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(listen)


def random_others(counts, shape, seed=2):
    """{name: ids below its count} of that shape."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, count, shape, dtype=np.int32) for name, count in counts.items()}


def close(ours, theirs):
    """float32's tolerance: 1e-4 of the standard deviation where that is above 1."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max()
    assert error <= parity.tolerance(theirs), f"max error {error:.2e}, tolerance {parity.tolerance(theirs):.2e}"


@dataclasses.dataclass
class Case:
    """A sensitive torch model, the directory it was saved to, and ours as loaded from there."""

    hf: object
    path: Path
    inputs: parity.Inputs
    greedy: bool  # whether greedy tokens are compared
    task: str = "AutoModelForCausalLM"

    @classmethod
    def make(cls, hf_config, path, greedy=True, task="AutoModelForCausalLM", others=()):
        """others: names of further inputs and how many values each has."""
        torch.manual_seed(0)  # vectors keep what they begin with, which may be drawn
        hf = cls.perturbed(getattr(transformers, task).from_config(copy.deepcopy(hf_config), attn_implementation="eager"))
        hf.save_pretrained(path)
        inputs = parity.hostile_inputs(hf_config.vocab_size, 300, new_tokens=8)
        values = random_others(dict(others), inputs.input_ids.shape)
        inputs = dataclasses.replace(inputs, others=values, masked=task == "AutoModelForMaskedLM")
        if hf_config.is_encoder_decoder:
            inputs = parity.with_decoder(inputs, hf_config.vocab_size)
        return cls(hf, Path(path), inputs, greedy, task)

    @staticmethod
    def perturbed(hf):
        return sensitive(hf)

    def load(self, path=None, **options):
        return auto.from_pretrained(path or self.path, getattr(auto, self.task), **{"dtype": jnp.float32, **options})

    @cached_property
    def loaded(self):
        return self.load()

    @cached_property
    def scanned(self):
        return self.load(scan_layers=True, remat="full")

    @cached_property
    def torch(self):
        return parity.torch_answers(self.hf, self.inputs, greedy=self.greedy)

    @cached_property
    def torch64(self):
        return parity.torch_answers(parity.in_double(copy.deepcopy(self.hf)), self.inputs, greedy=False, gradients=False)

    @cached_property
    def report(self):
        return parity.compare(parity.our_answers(*self.loaded, self.inputs, greedy=self.greedy), self.torch, self.torch64)

    def check(self, model, params, inputs=None, gradients=True):
        """Hidden states, logits and gradients of another form of the model or of the inputs."""
        ours = parity.our_answers(model, params, inputs or self.inputs, greedy=False, gradients=gradients)
        theirs = dataclasses.replace(self.torch, greedy=None)
        report = parity.compare(ours, theirs if gradients else dataclasses.replace(theirs, gradients={}))
        assert report.passed, str(report)

    @cached_property
    def forward(self):
        """Jitted: (params, keywords) -> output, shared by the checks of a case and by nothing else."""
        return jax.jit(lambda params, kwargs: self.loaded[0].apply({"params": params}, **kwargs))

    @cached_property
    def bfloat16(self):
        """Our root mean square error of the logits over torch's, both in bfloat16: truth is torch in float32 with the rounded weights."""
        # from the file: `.to(torch.bfloat16)` would round the rotary frequencies too
        low = type(self.hf).from_pretrained(self.path, dtype=torch.bfloat16, attn_implementation="eager").eval()
        forward = {"greedy": False, "gradients": False}
        truth = parity.torch_answers(copy.deepcopy(low).float(), self.inputs, **forward).logits
        theirs = parity.torch_answers(low, self.inputs, **forward).logits
        ours = parity.our_answers(*self.load(dtype=jnp.bfloat16, scan_layers=True), self.inputs, **forward).logits
        error = lambda x: float(np.sqrt(np.mean((x - truth) ** 2)))
        return error(ours) / error(theirs)

    def turn(self, tokens, mask):
        """The model's keywords for new tokens [B,T] in a cache."""
        return {"input_ids": tokens, "attention_mask": mask}

    def torch_logits(self, row, b=0):
        """[n,V] of one row of tokens [n], row b of the batch, by a fresh torch forward."""
        with torch.no_grad(), parity.fresh_rope(self.hf):
            return self.hf(torch.tensor(row[None], dtype=torch.long), use_cache=False).logits[0].numpy()

    def check_turns(self, lengths, columns, model=None, params=None, fresh=True):
        """Feed the rows in turns through a cache: turn t has `columns[t]` columns, of which row b fills the last `lengths[t][b]`. Every
        token's logits are those of torch on the row's whole history at once. `fresh` False: the first turn is as a later one."""
        forward = self.forward if model is None else jax.jit(lambda params, kwargs: model.apply({"params": params}, **kwargs))
        model, params = (model, params) if model is not None else self.loaded
        ids = self.inputs.input_ids
        slots = 219 if sum(columns) > 28 else 31  # few sizes, few programs
        cache = init_cache(model, len(ids), slots).replace(fresh=fresh)
        logits, done = [[] for _ in ids], np.zeros(len(ids), int)
        for T, new in zip(columns, lengths):
            chunk, mask = np.ones((len(ids), T), np.int32), np.zeros((len(ids), T), np.int32)
            for b, n in enumerate(new):
                chunk[b, T - n :], mask[b, T - n :] = ids[b, done[b] : done[b] + n], 1
            out = forward(params, {**self.turn(chunk, mask), "cache": cache})
            cache = out.cache
            for b, n in enumerate(new):
                logits[b].append(np.asarray(out.logits)[b, T - n :])
            done += new
        np.testing.assert_array_equal(cache.lengths, done)
        for b, (row, n, ours) in enumerate(zip(ids, done, logits)):
            close(np.concatenate(ours), self.torch_logits(row[:n], b))


class Seq2SeqCase(Case):
    """Of an encoder-decoder model: its decoder reads turns of the encoder's tokens."""

    @staticmethod
    def perturbed(hf):
        """The embeddings have a standard deviation of 1, as these models have: their head divides."""
        hf = sensitive(hf)
        with torch.no_grad():
            hf.get_input_embeddings().weight.div_(0.15)
        return hf

    def turn(self, tokens, mask):
        """The encoder's tokens in every turn: those of a later one are not looked at."""
        inputs = self.inputs
        return {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "decoder_input_ids": tokens,
            "decoder_attention_mask": mask,
        }

    def torch_logits(self, row, b=0):
        read = {"input_ids": self.inputs.alone(b)["input_ids"], "decoder_input_ids": row}
        with torch.no_grad():
            return self.hf(**{name: torch.tensor(x[None], dtype=torch.long) for name, x in read.items()}, use_cache=False).logits[0].numpy()


def to_the_left(inputs):
    """The rows with their padding at the right."""
    order = np.argsort(1 - inputs.attention_mask, 1, kind="stable")
    moved = lambda x: np.take_along_axis(x, order, 1)
    fields = {"input_ids": moved(inputs.input_ids), "attention_mask": moved(inputs.attention_mask)}
    fields |= {"others": {name: moved(x) for name, x in inputs.others.items()}}
    fields |= {"decoder": inputs.decoder and to_the_left(inputs.decoder)}
    return dataclasses.replace(inputs, **fields)
