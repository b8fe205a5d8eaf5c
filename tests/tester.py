"""The tester that every family shares: a tiny HF config in, every promise of the numbers checked against torch.

    class TestLlama(FamilyTester):
        hf_config = transformers.LlamaConfig(vocab_size=263, hidden_size=48, ...)
        full_size = ({"vocab_size": 128256, ...}, 8_030_261_248)

`VariantTester` holds the checks that every structural variant of a family goes through, `FamilyTester` all. What a check needs is in a
`Case`, made once per class. `JAXMODELS_RECORD=1 pytest tests/test_llama.py` writes the largest errors to jaxmodels/assets/parity/,
and `jaxmodels families` prints them.

Axis letters: B rows, T columns, R real tokens of all rows one after another, V vocabulary."""

import copy
import dataclasses
import json
import os
import shutil
import warnings
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax import monitoring
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from jaxmodels import auto
from jaxmodels.assets import PARITY
from jaxmodels.cache import init_cache
from jaxmodels.convert import parity
from jaxmodels.convert.load import unload
from jaxmodels.generation import generate
from jaxmodels.ops.precision import parity_mode
from jaxmodels.params import abstract_params, count_params, flatten
from jaxmodels.sharding import Rules, make_mesh

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

    def check(self, model, params, inputs=None):
        """Hidden states, logits and gradients of another form of the model or of the inputs."""
        ours = parity.our_answers(model, params, inputs or self.inputs, greedy=False)
        report = parity.compare(ours, dataclasses.replace(self.torch, greedy=None))
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
        ours = parity.our_answers(*self.load(dtype=jnp.bfloat16), self.inputs, **forward).logits
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


CHUNKS = [[7] * 4, [7, 0, 3, 1], [0, 7, 0, 2], [7, 5, 7, 7]]  # turns of 7 columns, for programs that are compiled for this alone


def to_the_left(inputs):
    """The rows with their padding at the right."""
    order = np.argsort(1 - inputs.attention_mask, 1, kind="stable")
    moved = lambda x: np.take_along_axis(x, order, 1)
    fields = {"input_ids": moved(inputs.input_ids), "attention_mask": moved(inputs.attention_mask)}
    fields |= {"others": {name: moved(x) for name, x in inputs.others.items()}}
    fields |= {"decoder": inputs.decoder and to_the_left(inputs.decoder)}
    return dataclasses.replace(inputs, **fields)


class VariantChecks:
    """The checks of every variant of every model with a language head, `task`."""

    hf_config: object
    greedy = False
    task = "AutoModelForCausalLM"
    case_class = Case
    others: dict = {}  # noqa: RUF012  # further inputs by name, and how many values each has

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory):
        return cls.case_class.make(cls.hf_config, tmp_path_factory.mktemp("case"), cls.greedy, cls.task, cls.others)

    def test_hidden_states(self, case):
        assert all(row.passed for row in case.report.layers), str(case.report)

    def test_logits(self, case):
        """Left-padded with random tokens; every row as torch alone, unpadded."""
        assert case.report.logits.passed, str(case.report)

    def test_gradients(self, case):
        assert case.report.gradients and all(row.passed for row in case.report.gradients), str(case.report)

    def test_round_trip(self, case, tmp_path):
        """save(load(x)) has the bytes of x, also through the scanned form."""
        for n, (model, params) in enumerate((case.loaded, case.scanned)):
            auto.save_pretrained(tmp_path / str(n), model, params)
            assert tensors(tmp_path / str(n)) == tensors(case.path)


class FamilyChecks(VariantChecks):
    """All that decoders and encoders have in common. `full_size`: fields of a published config and its number of parameters, counted
    without allocating them."""

    name: str = ""  # of the record; default: the model_type
    full_size: tuple = ()
    full_size_task: str = ""  # the class that the number is published for; default: the task
    file_names: dict = {}  # noqa: RUF012  # HF's parameters that its files call otherwise
    other_keys: tuple = ()  # functions from a file's {key: tensor} to one as found in the wild, which loads to the same parameters
    head_config: dict = {"num_labels": 3, "pad_token_id": 0}  # noqa: RUF012
    attentions: bool = True  # whether there are layers of attention, whose weights output_attentions returns

    def head_ids(self, ids):
        """Token ids [3,50] as every head can read them, cut to columns 23 to 49 and 0 to 30 too."""
        return ids

    def also(self, case, model, params):
        """More to check of another form of the model."""

    def test_right_padding(self, case):
        """The same rows at the other end."""
        case.check(*case.loaded, to_the_left(case.inputs))

    def test_scanned_equals_unrolled(self, case):
        """Hidden states, logits, gradients (recomputed in the backward pass)."""
        case.check(*case.scanned)
        self.also(case, *case.scanned)

    def test_eight_devices_equal_one(self, case):
        """Loaded in shards under fsdp+tensor rules."""
        rules = Rules.preset("fsdp+tensor", make_mesh(fsdp=4, tensor=2))
        model, params = case.load(rules=rules, scan_layers=True)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
        case.check(model, params)
        self.also(case, model, params)

    def test_torch_loads_ours(self, case, tmp_path):
        """From shards, with no key missing or left over, and the very same logits."""
        auto.save_pretrained(tmp_path, *case.loaded, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        theirs, info = type(case.hf).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        row = {name: torch.tensor(x[None], dtype=torch.long) for name, x in case.inputs.alone(0).items()}
        with torch.no_grad():
            assert torch.equal(theirs.eval()(**row).logits, case.hf(**row).logits)

    def test_other_keys(self, case, tmp_path):
        for n, change in enumerate(self.other_keys):
            directory = tmp_path / str(n)
            directory.mkdir()
            shutil.copy(case.path / "config.json", directory)
            save_file(change(load_file(case.path / "model.safetensors")), directory / "model.safetensors")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that buffers were left out
                _, params = case.load(directory)
            jax.tree.map(np.testing.assert_array_equal, params, case.loaded[1])

    def test_bfloat16(self, case):
        """Against float32 torch with the same rounded weights: no further off than 1.5 times torch in bfloat16."""
        assert case.bfloat16 <= 1.5

    def test_inputs_embeds_and_position_ids(self, case):
        """Embeddings in place of ids, at positions that neither begin at 0 nor are dense, and no mask."""
        ids = case.inputs.input_ids[:2, :50]
        positions = 17 + 2 * np.arange(50, dtype=np.int32)[None]
        with torch.no_grad():
            embeds = case.hf.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
            theirs = case.hf(inputs_embeds=embeds, position_ids=torch.tensor(positions, dtype=torch.long)).logits
        model, params = case.scanned
        call = jax.jit(lambda params, embeds: model.apply({"params": params}, inputs_embeds=embeds, position_ids=positions).logits)
        close(call(params, embeds.numpy()), theirs)
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model.apply({"params": params}, ids, inputs_embeds=embeds.numpy())

    def test_attentions_and_loss(self, case):
        """Fused attention has no weights: it is replaced by eager, aloud. The loss is HF's, with labels left out and no mask."""
        model, params = case.scanned
        ids = case.inputs.input_ids[:2, :50]
        labels = np.where(np.arange(50) % 7 == 3, -100, ids)
        with torch.no_grad():
            as_long = lambda x: torch.tensor(x, dtype=torch.long)
            theirs = case.hf(as_long(ids), labels=as_long(labels), output_attentions=True)
        call = jax.jit(lambda params: model.apply({"params": params}, ids, labels=labels, output_attentions=True))
        with pytest.warns(UserWarning, match="'eager'") if self.attentions else nullcontext():
            out = call(params)
        close(out.loss, theirs.loss)
        close(out.logits, theirs.logits)
        ours, theirs = out.attentions or (), getattr(theirs, "attentions", None) or ()
        assert len(ours) == len(theirs) and bool(theirs) == self.attentions
        for mine, reference in zip(ours, theirs):
            close(mine, reference)

    def test_base_model(self, case):
        """AutoModel reads a causal LM's checkpoint, without its head."""
        if "AutoModel" not in self.classes():
            pytest.skip("no base model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the head was left out
            model, params = auto.AutoModel.from_pretrained(case.path, dtype=jnp.float32, scan_layers=True)
        ids = case.inputs.input_ids[:2, :50]
        with torch.no_grad():
            base = getattr(case.hf, self.classes()[self.task].base_name)  # llama4's base_model is another
            theirs = base(torch.tensor(ids, dtype=torch.long)).last_hidden_state
        close(jax.jit(lambda params: model.apply({"params": params}, ids))(params).last_hidden_state, theirs)

    def test_heads(self, tmp_path):
        """Every other head of the family: logits and losses of a batch with padding on either side, against HF's class."""
        for name in self.classes():
            if name not in ("AutoModel", "AutoModelForCausalLM", "AutoModelForTextEncoding", self.task):
                check_head(self.hf_config, self.head_config, name, tmp_path / name, self.others, self.head_ids)

    def test_full_size(self):
        if not self.full_size:
            pytest.skip("no published size given")
        values, count = self.full_size
        config = auto.AutoConfig.for_model(self.hf_config.model_type, **values)
        task = self.full_size_task or self.task
        cls = getattr(auto, task).class_for(config)
        assert count_params(abstract_params(cls(config, scan_layers=True))) == count
        with torch.device("meta"):
            theirs = getattr(transformers, task).from_config(transformers.AutoConfig.for_model(self.hf_config.model_type, **values))
        rules, prefix = auto.conversion_of(cls(config))
        tree = unload(flatten(abstract_params(cls(config))), rules=rules, base_prefix=prefix)
        shapes = {key: tensor.shape for key, tensor in tree.items()}
        # transformers 5 fuses and renames in memory
        files = revert_weight_conversion(theirs, dict(theirs.named_parameters()) | stored_buffers(theirs))
        assert shapes == {self.file_names.get(key, key): tuple(p.shape) for key, p in files.items()}

    def test_record(self, case):
        """The family's record, written when JAXMODELS_RECORD is set."""
        report = case.report
        line = {
            "logits": report.logits.error,
            "hidden states": max(row.error for row in report.layers),
            "gradients": max(row.error / row.tolerance for row in report.gradients) * 1e-4,
            "torch float32 against float64, logits": report.logits.torch_error,
            "torch float32 against float64, hidden states": max(row.torch_error for row in report.layers),
            "bfloat16 error over torch's": case.bfloat16,
            "greedy tokens": f"{sum(report.greedy)} of {report.new_tokens * len(report.greedy)}" if report.greedy else "encoder",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "jax": jax.__version__,
        }
        assert all(value == value for value in line.values())
        if os.environ.get("JAXMODELS_RECORD"):
            PARITY.mkdir(parents=True, exist_ok=True)
            file = PARITY / f"{self.name or self.hf_config.model_type}.json"
            file.write_text(json.dumps({k: float(f"{v:.2g}") if isinstance(v, float) else v for k, v in line.items()}, indent=1) + "\n")

    def classes(self):
        return auto.find_family(self.hf_config.model_type).classes


class VariantTester(VariantChecks):
    """The checks of every variant of a decoder."""

    def test_second_turn_of_ragged_rows(self, case):
        """Turns of 130 and of 37 columns: rows of very different lengths, a row that skips a turn, padding inside the history."""
        case.check_turns([[130, 87, 41, 3], [37, 5, 0, 12], [37, 37, 1, 20]], [130, 37, 37])


class FamilyTester(FamilyChecks, VariantTester):
    """All checks of a decoder."""

    greedy = True

    def also(self, case, model, params):
        """Turns through the cache."""
        case.check_turns(CHUNKS, [7] * 4, model, params, fresh=False)

    def test_greedy(self, case):
        """jaxmodels.generate on the padded batch and torch's on each row alone."""
        assert case.report.greedy and case.report.greedy_equal, str(case.report)

    def test_cached_equals_uncached(self, case):
        """In chunks of 130, 37 and 1, without padding and with single steps that some rows skip."""
        case.check_turns([[n] * 4 for n in (130, 37, 37, 1)] + [[1, 0, 1, 1], [0, 1, 1, 1]], [130, 37, 37, 1, 1, 1])

    def test_heads_first_cache(self, case, monkeypatch):
        """The memory layout of accelerators."""
        monkeypatch.setattr("jaxmodels.cache.jax.default_backend", lambda: "tpu")
        case.check_turns(CHUNKS, [7] * 4, fresh=False)

    def test_one_compilation_per_bucket(self, case):
        """A second call with other lengths, another eos id and another limit compiles nothing."""
        ids, mask = case.inputs.input_ids, case.inputs.attention_mask
        with parity_mode():  # part of what a program is, and the report's generate ran so
            generate(*case.loaded, ids, mask, max_new_tokens=8, **parity.GREEDY)
            with compilations() as found:
                generate(*case.loaded, ids[:, 9:], mask[:, 9:], max_new_tokens=5, **parity.GREEDY | {"eos_token_id": (3, 5)})
        assert not found


class Seq2SeqVariantTester(VariantTester):
    """The checks of every variant of an encoder-decoder model."""

    task = "AutoModelForSeq2SeqLM"
    case_class = Seq2SeqCase


class Seq2SeqTester(FamilyTester, Seq2SeqVariantTester):
    """All checks of an encoder-decoder model."""

    def test_inputs_embeds_and_position_ids(self, case):
        """Embeddings in place of ids on both sides, and no mask; an encoder's output in place of what it reads, masked."""
        model, params = case.scanned
        ids, read, mask = case.inputs.input_ids[:2, :50], case.inputs.input_ids[:2, 60:97], np.arange(50) >= np.array([[0], [13]])
        as_long = lambda x: torch.tensor(x, dtype=torch.long)
        with torch.no_grad():
            embed = case.hf.get_input_embeddings()
            embeds = {"inputs_embeds": embed(as_long(ids)), "decoder_inputs_embeds": embed(as_long(read))}
            theirs = case.hf(**embeds).logits
            encoded = case.hf.get_encoder()(as_long(ids), attention_mask=as_long(mask))
            masked = case.hf(encoder_outputs=encoded, attention_mask=as_long(mask), decoder_input_ids=as_long(read)).logits
        call = jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs).logits)
        close(call(params, {name: x.numpy() for name, x in embeds.items()}), theirs)
        given = {"encoder_outputs": (encoded.last_hidden_state.numpy(),), "attention_mask": mask, "decoder_input_ids": read}
        close(call(params, given), masked)
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model.apply({"params": params}, ids, inputs_embeds=embeds["inputs_embeds"].numpy(), decoder_input_ids=read)
        with pytest.raises(ValueError, match=r"decoder_input_ids .* are needed"):
            model.apply({"params": params}, ids)

    def test_attentions_and_loss(self, case):
        """Labels alone are shifted for the decoder, some left out. Fused attention has no weights: it is replaced by eager, aloud."""
        model, params = case.scanned
        ids = case.inputs.input_ids[:2, :50]
        labels = np.where(np.arange(37) % 7 == 3, -100, case.inputs.input_ids[:2, 60:97])
        with torch.no_grad():
            as_long = lambda x: torch.tensor(x, dtype=torch.long)
            theirs = case.hf(as_long(ids), labels=as_long(labels), output_attentions=True)
        call = jax.jit(lambda params: model.apply({"params": params}, ids, labels=labels, output_attentions=True))
        with pytest.warns(UserWarning, match="'eager'"):
            out = call(params)
        close(out.loss, theirs.loss)
        close(out.logits, theirs.logits)
        for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
            assert len(out[name]) == len(theirs[name])
            for mine, reference in zip(out[name], theirs[name]):
                close(mine, reference)

    def test_base_model(self, case):
        """AutoModel and the encoder's class read the checkpoint, without the rest of it."""
        ids, read = case.inputs.input_ids[:2, :50], case.inputs.input_ids[:2, 60:97]
        as_long = lambda x: torch.tensor(x, dtype=torch.long)
        with torch.no_grad():
            theirs = case.hf.get_encoder()(as_long(ids)).last_hidden_state
            decoded = case.hf.get_decoder()(as_long(read), encoder_hidden_states=theirs).last_hidden_state
        for cls, inputs, expected in (
            (auto.AutoModelForTextEncoding, {}, {"last_hidden_state": theirs}),
            (auto.AutoModel, {"decoder_input_ids": read}, {"encoder_last_hidden_state": theirs, "last_hidden_state": decoded}),
        ):
            model, params = cls.from_pretrained(case.path, dtype=jnp.float32, scan_layers=True)
            out = jax.jit(lambda params: model.apply({"params": params}, ids, **inputs))(params)  # noqa: B023
            for name, value in expected.items():
                close(out[name], value)


class EncoderVariantTester(VariantChecks):
    """The checks of every variant of an encoder, by its masked language model."""

    task = "AutoModelForMaskedLM"
    others = {"token_type_ids": 2}  # noqa: RUF012


class EncoderTester(FamilyChecks, EncoderVariantTester):
    """All checks of an encoder."""


def head_labels(name, B, C, T, rng):
    """Keywords that ask HF's class and ours for a loss."""
    words = np.where(rng.random((B, T)) < 0.3, -100, rng.integers(0, C, (B, T)))
    if name == "AutoModelForNextSentencePrediction":
        yield {"labels": rng.integers(0, 2, B)}
    elif name == "AutoModelForPreTraining":
        yield {"labels": words, "next_sentence_label": rng.integers(0, 2, B)}
    elif name == "AutoModelForMultipleChoice":
        yield {"labels": rng.integers(0, B, 1)}
    elif name == "AutoModelForSequenceClassification":
        yield {"labels": rng.integers(0, C, B)}
        yield {"labels": rng.integers(0, 2, (B, C)).astype(np.float32)}
    elif name == "AutoModelForTokenClassification":
        yield {"labels": words}
    elif name == "AutoModelForQuestionAnswering":
        yield {"start_positions": np.array([3, 20, 49]), "end_positions": np.array([5, 49, 60])}
    else:
        raise NotImplementedError(f"no labels are known for {name}")


def check_head(hf_config, changes, name, path, others=(), head_ids=lambda ids: ids):
    """Losses of three whole rows, and logits of the same rows padded on either side, against HF's class on each row alone. For multiple
    choice they are the choices of one row."""
    config = copy.deepcopy(hf_config)
    config.update({k: v for k, v in changes.items() if k != "num_labels" or name != "AutoModelForQuestionAnswering"})
    hf = sensitive(getattr(transformers, name).from_config(config, attn_implementation="eager"))
    hf.save_pretrained(path)
    model, params = getattr(auto, name).from_pretrained(path, dtype=jnp.float32, scan_layers=True)
    rng = np.random.default_rng(1)
    ids = head_ids(rng.integers(1, config.vocab_size, (3, 50), dtype=np.int32))
    mask = np.ones_like(ids)
    mask[1, :23], mask[2, 31:] = 0, 0
    whole = {"input_ids": ids, **random_others(dict(others), ids.shape)}
    padded = whole | {"input_ids": np.where(mask == 1, ids, config.pad_token_id)}
    choices = name == "AutoModelForMultipleChoice"
    wrap = lambda inputs: {k: x[None] if choices else x for k, x in inputs.items()}
    as_torch = lambda inputs: {k: torch.tensor(x, dtype=torch.long) for k, x in wrap(inputs).items()}
    forward = jax.jit(lambda params, inputs, labels: model.apply({"params": params}, **inputs, **labels))
    with torch.no_grad():
        rows = [hf(**as_torch({k: x[b][m == 1][None] for k, x in whole.items()})) for b, m in enumerate(mask)]
        for labels in head_labels(name, 3, config.num_labels, 50, rng):
            hf.config.problem_type = None  # HF infers it from the first labels it sees and keeps it
            theirs = hf(**as_torch(whole), **{k: torch.tensor(v) for k, v in labels.items()}).loss
            close(forward(params, wrap(whole | {"attention_mask": np.ones_like(mask)}), labels).loss, theirs)
            out = forward(params, wrap(padded | {"attention_mask": mask}), labels)
            for key in [key for key in rows[0].keys() if "logits" in key]:  # noqa: SIM118
                logits = np.asarray(out[key])
                for mine, m, row in zip(logits.reshape(3, 1) if choices else logits, mask, rows):
                    close(mine[m == 1] if mine.shape[:1] == m.shape else mine, row[key][0])
