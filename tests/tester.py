"""The tester that every family shares: a tiny HF config in, every promise of the numbers checked against torch.

    class TestLlama(FamilyTester):
        hf_config = transformers.LlamaConfig(vocab_size=263, hidden_size=48, ...)
        full_size = ({"vocab_size": 128256, ...}, 8_030_261_248)

`VariantTester` holds the checks that every structural variant of a family goes through, `FamilyTester` all. What a check needs is in a
`Case`, made once per class. `JAXMODELS_RECORD=1 pytest tests/test_llama.py` writes the largest errors to jaxmodels/assets/parity/,
and `jaxmodels families` prints them.

Axis letters: B rows, T columns, R real tokens of all rows one after another, V vocabulary."""

import json
import os
import shutil
import warnings
import zlib
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import Case, Seq2SeqCase, close, compilations, stored_buffers, tensors, to_the_left
from heads import check_head
from presets import PRESET_MESHES, WAYS, OneDevice, cuttable
from safetensors.numpy import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from jaxmodels import auto
from jaxmodels.assets import PARITY
from jaxmodels.convert import parity
from jaxmodels.convert.load import unload
from jaxmodels.generation import generate
from jaxmodels.ops.precision import parity_mode
from jaxmodels.params import abstract_params, count_params, flatten, param_axes
from jaxmodels.sharding import Rules, make_mesh

MESHES = [
    ("fsdp+tensor", {"fsdp": 4, "tensor": 2}),
    ("tensor", {"data": 4, "tensor": 2}),
    ("fsdp", {"fsdp": 4, "tensor": 2}),
    ("sequence", {"fsdp": 2, "tensor": 2, "sequence": 2}),
]
EXPERTS = "expert", {"fsdp": 2, "tensor": 2, "expert": 2}
CHUNKS = [[7] * 4, [7, 0, 3, 1], [0, 7, 0, 2], [7, 5, 7, 7]]  # turns of 7 columns, for programs that are compiled for this alone


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
    way: dict = {}  # noqa: RUF012  # how a model over a mesh generates: beams are for one family per kind of cache
    own_heads: bool = False  # whether there are heads that are no other family's: then every loss of each is compared

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
        """Loaded in shards under one of the presets: experts over devices where there are any, else by the family's name."""
        number = zlib.crc32(self.hf_config.model_type.encode())
        has_experts = any("experts" in axes for axes in flatten(param_axes(case.scanned[0])).values())
        preset, mesh = EXPERTS if has_experts else MESHES[number % len(MESHES)]
        model, params = case.load(rules=Rules.preset(preset, make_mesh(**mesh)), scan_layers=True)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
        case.check(model, params)
        self.generates_alike(case, model, params)

    def generates_alike(self, case, model, params):
        """What a model over a mesh generates, if it does."""

    @pytest.fixture(scope="class")
    @classmethod
    def one_device(cls, tmp_path_factory):
        path = tmp_path_factory.mktemp("cuttable")
        return OneDevice(cls.case_class.make(cuttable(cls.hf_config), path, cls.greedy, cls.task, cls.others), cls.others)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PRESET_MESHES)
    def test_training_under_presets(self, one_device, name):
        one_device.check_training(name)

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
                check_head(self.hf_config, self.head_config, name, tmp_path / name, self.others, self.head_ids, self.own_heads)

    def test_full_size(self):
        if not self.full_size:
            pytest.skip("no published size given")
        values, count = self.full_size
        config = auto.AutoConfig.for_model(self.hf_config.model_type, **values)
        task = self.full_size_task or self.task
        cls = getattr(auto, task).class_for(config)
        model = cls(config, scan_layers=True)
        params = abstract_params(model)
        assert count_params(params) == count
        with torch.device("meta"):
            theirs = getattr(transformers, task).from_config(transformers.AutoConfig.for_model(self.hf_config.model_type, **values))
        rules, prefix = auto.conversion_of(model)
        tree = unload(flatten(params), rules=rules, base_prefix=prefix)
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

    def generates_alike(self, case, model, params):
        """The tokens of one device: greedy, by beams or drawn."""
        ids, mask = case.inputs.input_ids, case.inputs.attention_mask
        key = {"key": jax.random.key(0)} if "do_sample" in self.way else {}
        call = lambda *model: generate(*model, ids, mask, max_new_tokens=8, **parity.GREEDY | self.way, **key).sequences
        with parity_mode():
            np.testing.assert_array_equal(call(model, params), call(*case.loaded))

    @pytest.mark.slow
    @pytest.mark.parametrize("way", WAYS)
    def test_generation_under_presets(self, one_device, way):
        """Each way under another preset, and for another family under others."""
        one_device.check_generation(way, zlib.crc32(self.hf_config.model_type.encode()))

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
        case.check_turns(CHUNKS, [7] * 4, *case.scanned, fresh=False)

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
