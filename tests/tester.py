"""The tester that every family shares: a tiny HF config in, every promise of the numbers checked against torch.

    class TestLlama(FamilyTester):
        hf_config = transformers.LlamaConfig(vocab_size=263, hidden_size=48, ...)
        full_size = ({"vocab_size": 128256, ...}, 8_030_261_248)

`VariantTester` holds the checks that every structural variant of a family goes through, `FamilyTester` all. What a check needs is in a
`Case`, made once per class. `JAXMODELS_RECORD=1 pytest tests/test_llama.py` writes the largest errors to docs/parity/; `python
tests/tester.py` prints them as a table.

Axis letters: B rows, T columns, R real tokens of all rows one after another, V vocabulary."""

import copy
import dataclasses
import json
import os
import warnings
from contextlib import contextmanager
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

from jaxmodels import auto
from jaxmodels.cache import init_cache
from jaxmodels.convert import parity
from jaxmodels.generation import generate
from jaxmodels.params import abstract_params, count_params, flatten
from jaxmodels.sharding import Rules, make_mesh

RECORDS = Path(__file__).resolve().parent.parent / "docs" / "parity"
COMPILED = "/jax/core/compile/backend_compile_duration"


def sensitive(model, seed=0):
    """The torch model with every parameter perturbed: weights with a standard deviation of 0.15, norms and biases moved by 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
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

    @classmethod
    def make(cls, hf_config, path, auto_class="AutoModelForCausalLM"):
        config = copy.deepcopy(hf_config)
        hf = sensitive(getattr(transformers, auto_class).from_config(config, attn_implementation="eager"))
        hf.save_pretrained(path)
        return cls(hf, Path(path), parity.hostile_inputs(config.vocab_size, 300, new_tokens=8))

    @cached_property
    def loaded(self):
        return auto.from_pretrained(self.path, auto.AutoModelForCausalLM, dtype=jnp.float32)

    @cached_property
    def scanned(self):
        return auto.from_pretrained(self.path, auto.AutoModelForCausalLM, dtype=jnp.float32, scan_layers=True, remat="full")

    @cached_property
    def torch(self):
        return parity.torch_answers(self.hf, self.inputs)

    @cached_property
    def torch64(self):
        return parity.torch_answers(copy.deepcopy(self.hf).double(), self.inputs, greedy=False, gradients=False)

    @cached_property
    def ours(self):
        return parity.our_answers(*self.loaded, self.inputs)

    @cached_property
    def report(self):
        return parity.compare(self.ours, self.torch, self.torch64)

    @cached_property
    def forward(self):
        """Jitted: (params, keywords) -> output. Programs are shared by the checks of a case and by nothing else."""
        model = self.loaded[0]
        return jax.jit(lambda params, kwargs: model.apply({"params": params}, **kwargs))

    def run(self, **kwargs):
        return self.forward(self.loaded[1], kwargs)

    def torch_logits(self, row):
        """[n,V] of one row of tokens [n], by a fresh torch forward."""
        with torch.no_grad(), parity.fresh_rope(self.hf):
            return self.hf(torch.tensor(row[None], dtype=torch.long), use_cache=False).logits[0].numpy()

    def turns(self, ids, lengths, columns):
        """Logits of each row's tokens, fed in turns: turn t has `columns[t]` columns, of which row b fills the last `lengths[t][b]`."""
        model, params = self.loaded
        cache = init_cache(model, len(ids), sum(columns) + 3)
        logits, done = [[] for _ in ids], np.zeros(len(ids), int)
        for T, new in zip(columns, lengths):
            chunk, mask = np.ones((len(ids), T), np.int32), np.zeros((len(ids), T), np.int32)
            for b, n in enumerate(new):
                chunk[b, T - n :], mask[b, T - n :] = ids[b, done[b] : done[b] + n], 1
            out = self.forward(params, {"input_ids": chunk, "attention_mask": mask, "cache": cache})
            cache = out.cache
            for b, n in enumerate(new):
                logits[b].append(np.asarray(out.logits)[b, T - n :])
            done += new
        np.testing.assert_array_equal(cache.lengths, done)
        return [np.concatenate(parts) for parts in logits]


class VariantTester:
    """The checks of every variant."""

    hf_config: object

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory):
        return Case.make(cls.hf_config, tmp_path_factory.mktemp("case"))

    def test_hidden_states(self, case):
        assert all(row.passed for row in case.report.layers), str(case.report)

    def test_logits(self, case):
        """Left-padded with random tokens; every row as torch alone, unpadded."""
        assert case.report.logits.passed, str(case.report)

    def test_greedy(self, case):
        assert case.report.greedy_equal, str(case.report)

    def test_gradients(self, case):
        assert case.report.gradients and all(row.passed for row in case.report.gradients), str(case.report)

    def test_second_turn_of_ragged_rows(self, case):
        """130 columns, twice 37, then single steps: rows that skip a turn or a step, padding inside the history."""
        columns = [130, 37, 37, 1, 1, 1]
        lengths = [[130, 87, 41, 3], [37, 5, 0, 12], [37, 37, 1, 20], [1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
        ids = case.inputs.input_ids
        for row, ours in zip(ids, case.turns(ids, lengths, columns)):
            close(ours, case.torch_logits(row[: len(ours)]))

    def test_round_trip(self, case, tmp_path):
        """save(load(x)) has the bytes of x, also through the scanned form."""
        for n, (model, params) in enumerate((case.loaded, case.scanned)):
            auto.save_pretrained(tmp_path / str(n), model, params)
            assert tensors(tmp_path / str(n)) == tensors(case.path)


class FamilyTester(VariantTester):
    """All checks. `full_size`: fields of a published config and its number of parameters, counted without allocating them."""

    name: str = ""  # of the record; default: the model_type
    full_size: tuple = ()
    head_config: dict = {"num_labels": 3, "pad_token_id": 0}  # noqa: RUF012

    def test_right_padding(self, case):
        """The same rows at the other end."""
        ids, mask = np.full_like(case.inputs.input_ids, 1), np.zeros_like(case.inputs.attention_mask)
        for b, row in enumerate(case.inputs.rows()):
            ids[b, : len(row)], mask[b, : len(row)] = row, 1
        logits = np.asarray(case.run(input_ids=ids, attention_mask=mask).logits)
        close(np.concatenate([x[: m.sum()] for x, m in zip(logits, mask)]), case.torch.logits)

    def test_cached_equals_uncached(self, case):
        """The whole history at once, in chunks of 130, 37 and 1."""
        ids, columns = case.inputs.input_ids, [130, 37, 37, 1, 1, 1]
        for row, ours in zip(ids, case.turns(ids, [[n] * 4 for n in columns], columns)):
            close(ours, case.torch_logits(row[: len(ours)]))

    def test_heads_first_cache(self, case, monkeypatch):
        """The memory layout of accelerators."""
        monkeypatch.setattr("jaxmodels.cache.jax.default_backend", lambda: "tpu")
        ids = case.inputs.input_ids
        for row, ours in zip(ids, case.turns(ids, [[30, 7, 1, 19], [1, 1, 0, 1]], [30, 1])):
            close(ours, case.torch_logits(row[: len(ours)]))

    def test_generate_is_hfs(self, case):
        """Greedy decoding of the padded batch: torch's generate on each row alone."""
        ids, mask = case.inputs.input_ids, case.inputs.attention_mask
        res = generate(*case.loaded, ids, mask, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
        for b, row in enumerate(case.inputs.rows()):
            prompt = torch.tensor(row[None], dtype=torch.long)
            with parity.fresh_rope(case.hf):
                theirs = case.hf.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False
                )
            np.testing.assert_array_equal(res.sequences[b, ids.shape[1] :], theirs[0, len(row) :])

    def test_one_compilation_per_bucket(self, case):
        """A second call with other lengths, another eos id and another limit compiles nothing."""
        ids, mask = case.inputs.input_ids, case.inputs.attention_mask
        options = {"do_sample": False, "pad_token_id": 0}
        generate(*case.loaded, ids, mask, max_new_tokens=6, eos_token_id=-1, **options)
        with compilations() as found:
            generate(*case.loaded, ids[:, 9:], mask[:, 9:], max_new_tokens=5, eos_token_id=(3, 5), **options)
        assert not found

    def test_torch_loads_ours(self, case, tmp_path):
        """With no key missing or left over, and the very same logits."""
        auto.save_pretrained(tmp_path, *case.loaded, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        theirs, info = type(case.hf).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        ids = torch.tensor(case.inputs.input_ids[:1], dtype=torch.long)
        with torch.no_grad():
            assert torch.equal(theirs.eval()(ids).logits, case.hf(ids).logits)

    def test_scanned_equals_unrolled(self, case):
        """Logits of a prefill and a step through the cache, and gradients, recomputed in the backward pass."""
        model, params = case.scanned
        ids = case.inputs.input_ids
        step = jax.jit(lambda params, cache, ids: model.apply({"params": params}, ids, cache=cache))
        cache = init_cache(model, 4, 50)
        for a, b in ((0, 41), (41, 42)):
            out = step(params, cache, ids[:, a:b])
            cache = out.cache
            for row, ours in zip(ids, np.asarray(out.logits)):
                close(ours, case.torch_logits(row[:b])[a:])
        answers = parity.our_answers(model, params, case.inputs, greedy=False)
        report = parity.compare(answers, dataclasses.replace(case.torch, greedy=None))
        assert report.passed and len(report.gradients) == len(case.report.gradients), str(report)

    def test_eight_devices_equal_one(self, case):
        """Loaded in shards under fsdp+tensor rules: hidden states, logits and gradients of the padded batch."""
        mesh = make_mesh(fsdp=4, tensor=2)
        model, params = auto.from_pretrained(case.path, dtype=jnp.float32, rules=Rules.preset("fsdp+tensor", mesh), scan_layers=True)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
        report = parity.compare(parity.our_answers(model, params, case.inputs, greedy=False), dataclasses.replace(case.torch, greedy=None))
        assert report.passed, str(report)
        cache = init_cache(model, 4, 40)
        step = jax.jit(lambda params, cache, ids: model.apply({"params": params}, ids, cache=cache))
        out = step(params, step(params, cache, case.inputs.input_ids[:, :33]).cache, case.inputs.input_ids[:, 33:34])
        for row, ours in zip(case.inputs.input_ids, np.asarray(out.logits)):
            close(ours, case.torch_logits(row[:34])[33:])

    def test_bfloat16(self, case):
        """Against float32 torch with the same rounded weights: no further off than 1.5 times torch in bfloat16."""
        assert case_bfloat16(case) <= 1.5

    def test_inputs_embeds_and_position_ids(self, case):
        """Embeddings in place of ids, at positions that neither begin at 0 nor are dense."""
        ids = case.inputs.input_ids[:2, :50]
        positions = 17 + 2 * np.arange(50, dtype=np.int32)[None]
        with torch.no_grad():
            embeds = case.hf.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
            theirs = case.hf(inputs_embeds=embeds, position_ids=torch.tensor(positions, dtype=torch.long)).logits
        ours = case.run(inputs_embeds=jnp.asarray(embeds.numpy()), position_ids=positions).logits
        close(ours, theirs)
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            case.run(input_ids=ids, inputs_embeds=jnp.asarray(embeds.numpy()))

    def test_attentions(self, case):
        """Fused attention has no weights: it is replaced by eager, aloud."""
        model, params = case.loaded
        ids = case.inputs.input_ids[:2, :50]
        with torch.no_grad():
            theirs = case.hf(torch.tensor(ids, dtype=torch.long), output_attentions=True)
        call = jax.jit(lambda params: model.apply({"params": params}, ids, output_attentions=True))
        with pytest.warns(UserWarning, match="runs 'eager' for output_attentions"):
            out = call(params)
        close(out.logits, theirs.logits)
        assert len(out.attentions) == len(theirs.attentions)
        for mine, reference in zip(out.attentions, theirs.attentions):
            close(mine, reference)

    def test_labels(self, case):
        """The loss of a batch with labels left out, as HF counts it; inputs as plain ids, without a mask."""
        ids = case.inputs.input_ids[:, :50]
        labels = np.where(np.arange(50) % 7 == 3, -100, ids)
        with torch.no_grad():
            theirs = case.hf(torch.tensor(ids, dtype=torch.long), labels=torch.tensor(labels, dtype=torch.long))
        ours = case.run(input_ids=ids, labels=labels)
        close(ours.loss, theirs.loss)
        close(ours.logits, theirs.logits)

    def test_base_model(self, case):
        """AutoModel reads a causal LM's checkpoint, without its head."""
        if "AutoModel" not in self.classes():
            pytest.skip("no base model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the head was left out
            model, params = auto.AutoModel.from_pretrained(case.path, dtype=jnp.float32)
        ids = case.inputs.input_ids[:2, :50]
        with torch.no_grad():
            theirs = case.hf.base_model(torch.tensor(ids, dtype=torch.long)).last_hidden_state
        close(jax.jit(lambda params: model.apply({"params": params}, ids))(params).last_hidden_state, theirs)

    def test_heads(self, tmp_path):
        """Every other head of the family: logits and losses of a batch with padding on either side, against HF's class."""
        for name in self.classes():
            if name not in ("AutoModel", "AutoModelForCausalLM"):
                check_head(self.hf_config, self.head_config, name, tmp_path / name)

    def test_full_size(self):
        if not self.full_size:
            pytest.skip("no published size given")
        values, count = self.full_size
        config = auto.AutoConfig.for_model(self.hf_config.model_type, **values)
        cls = auto.AutoModelForCausalLM.class_for(config)
        for scan in (False, True):
            assert count_params(abstract_params(cls(config, scan_layers=scan))) == count
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(self.hf_config.model_type, **values))
        shapes = {key: leaf.shape for key, leaf in flatten(abstract_params(cls(config))).items()}
        assert shapes == {key: tuple(p.shape) for key, p in theirs.named_parameters()}

    def test_record(self, case):
        """The line of docs/parity, written when JAXMODELS_RECORD is set."""
        report = case.report
        line = {
            "logits": report.logits.error,
            "hidden states": max(row.error for row in report.layers),
            "gradients": max(row.error / row.tolerance for row in report.gradients) * 1e-4,
            "torch float32 against float64, logits": report.logits.torch_error,
            "torch float32 against float64, hidden states": max(row.torch_error for row in report.layers),
            "bfloat16 error over torch's": case_bfloat16(case),
            "greedy tokens": f"{sum(report.greedy)} of {report.new_tokens * len(report.greedy)}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "jax": jax.__version__,
        }
        assert all(value == value for value in line.values())
        if os.environ.get("JAXMODELS_RECORD"):
            RECORDS.mkdir(parents=True, exist_ok=True)
            file = RECORDS / f"{self.name or self.hf_config.model_type}.json"
            file.write_text(json.dumps({k: float(f"{v:.2g}") if isinstance(v, float) else v for k, v in line.items()}, indent=1) + "\n")

    def classes(self):
        return auto.find_family(self.hf_config.model_type).classes


def case_bfloat16(case):
    """Our root mean square error of the logits over torch's, both in bfloat16, against torch in float32 with the same rounded weights."""
    if not hasattr(case, "_bfloat16"):
        low = copy.deepcopy(case.hf).to(torch.bfloat16)
        truth = parity.torch_answers(copy.deepcopy(low).float(), case.inputs, greedy=False, gradients=False).logits
        theirs = parity.torch_answers(low, case.inputs, greedy=False, gradients=False).logits
        model, params = auto.from_pretrained(case.path, dtype=jnp.bfloat16)
        ours = parity.our_answers(model, params, case.inputs, greedy=False, gradients=False).logits
        rms = lambda x: float(np.sqrt(np.mean((x - truth) ** 2)))
        case._bfloat16 = rms(ours) / rms(theirs)
    return case._bfloat16


def head_labels(name, logits, rng):
    """Keywords that ask HF's class and ours for a loss."""
    B, C, T = len(logits), logits.shape[-1], logits.shape[1]
    if name == "AutoModelForSequenceClassification":
        yield {"labels": rng.integers(0, C, B)}
        yield {"labels": rng.integers(0, 2, (B, C)).astype(np.float32)}
    elif name == "AutoModelForTokenClassification":
        yield {"labels": np.where(rng.random((B, T)) < 0.3, -100, rng.integers(0, C, (B, T)))}
    elif name == "AutoModelForQuestionAnswering":
        yield {"start_positions": np.array([3, 20, 49]), "end_positions": np.array([5, 49, 60])}
    else:
        raise NotImplementedError(f"no labels are known for {name}")


def check_head(hf_config, changes, name, path):
    config = copy.deepcopy(hf_config)
    config.update(changes)
    hf = sensitive(getattr(transformers, name).from_config(config, attn_implementation="eager"))
    hf.save_pretrained(path)
    model, params = getattr(auto, name).from_pretrained(path, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    ids = rng.integers(1, config.vocab_size, (3, 50), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[1, :23], mask[2, 31:] = 0, 0
    ids = np.where(mask == 1, ids, config.pad_token_id)
    with torch.no_grad():
        rows = [hf(torch.tensor(row[m == 1][None], dtype=torch.long)) for row, m in zip(ids, mask)]
    forward = jax.jit(lambda params, ids, mask, labels: model.apply({"params": params}, ids, attention_mask=mask, **labels))
    out = forward(params, ids, mask, {})
    for key in [key for key in rows[0].keys() if "logits" in key]:  # noqa: SIM118
        for b, row in enumerate(rows):
            mine = np.asarray(out[key][b])
            close(mine[mask[b] == 1] if mine.shape[:1] == mask[b].shape else mine, row[key][0])
    whole = torch.tensor(rng.integers(1, config.vocab_size, ids.shape))
    with torch.no_grad():
        shapes = hf(whole)[0]
    for labels in head_labels(name, shapes, rng):
        with torch.no_grad():
            hf.config.problem_type = None  # HF infers it from the first labels it sees and keeps it
            theirs = hf(whole, **{k: torch.tensor(v) for k, v in labels.items()}).loss
        close(forward(params, whole.numpy().astype(np.int32), np.ones_like(ids), labels).loss, theirs)


def table():
    """The records as Markdown."""
    lines = [json.loads(file.read_text()) | {"model": file.stem} for file in sorted(RECORDS.glob("*.json"))]
    columns = [
        "model",
        "logits",
        "torch float32 against float64, logits",
        "hidden states",
        "torch float32 against float64, hidden states",
        "gradients",
        "bfloat16 error over torch's",
        "greedy tokens",
    ]
    rows = [columns, ["---"] * len(columns), *([str(line[c]) for c in columns] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
