"""What a Trainer promises beside HF's numbers: places, checkpoints that fit or are refused, streams, padding, adapters, bad input."""

import dataclasses
import errno
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from transformers.trainer_pt_utils import LabelSmoother

from jaxmodels.auto import AutoModelForCausalLM
from jaxmodels.convert.errors import CheckpointError
from jaxmodels.models.bert import BertConfig, BertForMaskedLM, BertForQuestionAnswering
from jaxmodels.models.llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from jaxmodels.params import flatten, init_params
from jaxmodels.sharding import Rules, make_mesh
from jaxmodels.training import (
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    NonFiniteError,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from jaxmodels.training.callbacks import TrainerState, readable
from jaxmodels.training.checkpoints import Checkpoints, checkpoints_in
from jaxmodels.training.lora import LoraConfig, load_adapter, merge
from jaxmodels.training.meter import Meter, host_memory, trim_host_memory
from jaxmodels.training.objectives import dpo_loss, make_reference
from jaxmodels.training.step import LossScale

SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIG = LlamaConfig(**SHAPE, num_key_value_heads=2)
MODEL = LlamaForCausalLM(CONFIG)
QUIET = {"disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "per_device_train_batch_size": 4}


def params_of(model, seed=0):
    return init_params(model, jax.random.key(seed))


def data(number=22, length=12, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 96, (number, length))
    return [{"input_ids": row, "labels": np.where(rng.random(length) < 0.7, row, -100)} for row in ids]


def train(out, model=MODEL, params=None, examples=None, resume=None, trainer=Trainer, extra=(), **options):
    known = ("loss", "count", "peft_config", "eval_dataset", "optimizers", "compute_metrics", "preprocess_logits_for_metrics", "frozen")
    given = {name: options.pop(name) for name in known if name in options}
    args = TrainingArguments(str(out), **{"max_steps": 8} | QUIET | options)
    given["train_dataset"] = data() if examples is None else examples
    made = trainer(model, params or params_of(model), args, callbacks=extra, **given)
    made.train(resume_from_checkpoint=resume)
    return made


def losses(trainer):
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def close(one, other, rtol=1e-5):
    flat = flatten(other)
    for name, leaf in flatten(one).items():
        assert np.linalg.norm(leaf - flat[name]) <= rtol * np.linalg.norm(leaf), name


def test_tensorboard(tmp_path, monkeypatch):
    """Event files with HF's tags by a writer that is installed; without one an error that says which."""
    pytest.importorskip("tensorboardX")
    train(tmp_path, report_to="tensorboard", run_name="first", max_steps=2, eval_strategy="steps", eval_dataset=data(4))
    (events,) = (tmp_path / "runs" / "first").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert all(tag in content for tag in (b"train/loss", b"train/grad_norm", b"train/learning_rate", b"eval/loss", b"args/text_summary"))
    assert not (tmp_path / "log.jsonl").exists()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        train(tmp_path, report_to="tensorboard")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eight steps, with a checkpoint after every second."""
    out = tmp_path_factory.mktemp("whole")
    return train(out, save_strategy="steps", save_steps=2)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_given_back():
    """Every other one of many small arrays is freed: no more than a trim tells the system."""
    arrays = [np.ones(12_500) for _ in range(1000)]  # 0.1 MB each
    del arrays[::2]
    before = host_memory()
    trim_host_memory()
    assert host_memory() < before - 30e6


def test_what_a_meter_reads():
    """Tokens and FLOPs of the time that was not paused, their share of the peak, and what is left at that speed, in one line."""
    meter = Meter(MODEL, lambda parts: None)
    meter.peak, began = 1e10, time.perf_counter()
    meter.start()
    for _ in range(3):
        meter.add(1000, 2e7)
    time.sleep(0.1)
    meter.pause(0.04)
    found = meter.read(6)
    seconds = 3000 / found["tokens_per_second"]
    assert 0.06 <= seconds <= time.perf_counter() - began - 0.04
    assert found["model_flops_per_second"] == pytest.approx(6e7 / seconds) and found["mfu"] == pytest.approx(6e7 / seconds / 1e10)
    assert found["seconds_left"] == pytest.approx(2 * (seconds + 0.04), rel=1e-2)
    assert "tokens_per_second" not in meter.read(6)  # nothing since
    shown = found | {"tokens_per_second": 12345.6, "model_flops_per_second": 3.21e12, "mfu": 0.4123, "host_memory": 2e9}
    logs = {"loss": 2.34521, "learning_rate": 3e-5, "grad_norm": 1.2345, "epoch": 0.48, "device_memory": 12.1e9, "seconds_left": 754.0}
    assert readable(shown | logs, TrainerState(global_step=120, max_steps=1000)) == (
        "step 120/1000  epoch 0.48  loss 2.3452  lr 3e-05  grad 1.23  12,346 tokens/s  3.21 TFLOP/s  MFU 41.2 %  "
        "device 12.1 GB  host 2.0 GB  0:12:34 left"
    )


def test_one_program_and_every_row_once(whole, tmp_path):
    """22 rows in batches of 4: the epoch's last two rows are a batch of the same shape, and no padding counts."""
    seen = []

    class Watched(Trainer):
        def compute_loss(self, apply, params, inputs, num_items_in_batch):
            seen.append({name: array.shape for name, array in inputs.items()})
            return super().compute_loss(apply, params, inputs, num_items_in_batch)

    made = train(tmp_path, trainer=Watched)
    assert losses(made) == losses(whole)
    assert {shapes["input_ids"] for shapes in seen} == {(4, 12)}
    assert [record["epoch"] for record in made.state.log_history][5:7] == [1.0, 1 + 1 / 6]
    order = np.random.default_rng((42, 0)).permutation(22)
    rest = {"examples": [data()[i] for i in order[20:]], "max_steps": 1, "optim": "sgd", "train_sampling_strategy": "sequential"}
    padded, plain = train(tmp_path / "padded", **rest), train(tmp_path / "plain", **rest, per_device_train_batch_size=2)
    assert losses(padded) == pytest.approx(losses(plain), rel=1e-6)
    close(padded.params, plain.params)


class Stop(TrainerCallback):
    """Ends the run after that step, as early stopping would, with a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self.step
        return control


def test_saved_on_one_mesh_and_restored_on_another(whole, tmp_path):
    """A checkpoint of one device, then of 4 × 2, then of 2 × 4: the losses of the run that stayed."""
    options = {"save_strategy": "steps", "save_steps": 2}
    for number, (stop, mesh, preset) in enumerate([(4, {"fsdp": 4, "tensor": 2}, "fsdp+tensor"), (8, {"fsdp": 2, "tensor": 4}, "tensor")]):
        model = dataclasses.replace(MODEL, rules=Rules.preset(preset, make_mesh(**mesh)))
        rows = {"per_device_train_batch_size": 1 if stop == 4 else 2}
        before = whole.args.output_dir if number == 0 else str(tmp_path / "0")
        stopping = {"extra": [Stop(stop)]} if stop < 8 else {}
        made = train(tmp_path / str(number), model, resume=f"{before}/checkpoint-{2 * number + 2}", **options | rows | stopping)
        if number == 0:
            assert losses(made) == pytest.approx(losses(whole)[:4], rel=1e-5)
            assert not made.params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"].sharding.is_fully_replicated
    assert made.state.global_step == 8 and len(losses(made)) == 8
    assert losses(made) == pytest.approx(losses(whole), rel=1e-4)


def test_a_checkpoint_of_something_else_is_refused(whole, tmp_path):
    path = f"{whole.args.output_dir}/checkpoint-2"
    wider = LlamaForCausalLM(CONFIG.replace(intermediate_size=64, rms_norm_eps=1e-5))
    with pytest.raises(CheckpointError, match="another model or optimizer") as found:
        train(tmp_path, wider, resume=path)
    assert "config.intermediate_size: saved 48, now 64" in str(found.value) and "saved [[48, 32], 'float32'], now [[64, 32]" in str(
        found.value
    )
    assert "config.rms_norm_eps: saved 1e-06, now 1e-05" in str(found.value)
    with pytest.raises(CheckpointError, match=r"optimizer: saved adamw_torch_fused, now lion_32bit"):
        train(tmp_path, optim="lion_32bit", resume=path)
    with pytest.raises(CheckpointError, match=r"opt_state.*: saved \[\[.*now nothing"):
        train(tmp_path, optimizers=(optax.sgd(1e-3), None), resume=path)
    with pytest.raises(ValueError, match=r"seed: saved 42, now 1"):
        train(tmp_path, seed=1, resume=path)
    with pytest.raises(ValueError, match="data: saved '22 examples', now '8 examples'"):
        train(tmp_path, examples=data(8), resume=path)
    with pytest.raises(CheckpointError, match="no checkpoint of a Trainer"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-7"))
    with pytest.raises(CheckpointError, match="checkpoint-2 is older than checkpoint-4, checkpoint-6, checkpoint-8 in"):
        train(whole.args.output_dir, save_strategy="steps", resume=path)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        train(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="checkpoints of an earlier run, up to checkpoint-8"):
        train(whole.args.output_dir, save_strategy="steps")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.saver, "save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 could not be written: No space left on device\. The last good"):
        checkpoints.save(3, {}, {}, {})
    checkpoints.close()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    """The step, the examples of its batch and the last good checkpoint are named; nothing bad is saved."""

    class Poisoned(Trainer):
        def compute_loss(self, apply, params, inputs, num_items_in_batch):
            loss, extra = super().compute_loss(apply, params, inputs, num_items_in_batch)
            return jnp.where(jnp.any(inputs["input_ids"][:, 0] == 95), jnp.nan, loss), extra

    examples = [{"input_ids": np.r_[i % 90, row["input_ids"][1:]], "labels": row["labels"]} for i, row in enumerate(data())]
    examples[17]["input_ids"][0] = 95
    options = {"train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1}
    good = tmp_path / "checkpoint-4"
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step 5, of examples 16, 17, 18, 19\. The last good checkpoint: {good}"):
        train(tmp_path, trainer=Poisoned, examples=examples, **options)
    assert list(checkpoints_in(tmp_path)) == [1, 2, 3, 4]
    with pytest.raises(NonFiniteError, match=r"grad_norm is .* at step 1, of examples"):
        train(tmp_path / "again", loss=lambda apply, params, batch, items: (jnp.sqrt(0 * params["lm_head"]["weight"]).sum(), {}))


class Numbers:
    """An iterable of batches that knows where it is."""

    def __init__(self, stateful=True, stop=5):
        self.stateful, self.stop = stateful, stop

    def __iter__(self):
        return (Stateful if self.stateful else Plain)(self.stop)


class Plain:
    def __init__(self, stop):
        self.at, self.stop = 0, stop

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.stop:
            raise StopIteration
        self.at += 1
        rows = data(4 if self.at < self.stop else 3, seed=self.at)
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Stateful(Plain):
    def get_state(self):
        return str(self.at).encode()

    def set_state(self, state):
        self.at = int(state)


@pytest.mark.parametrize("stateful", [True, False])
def test_a_stream_goes_on_where_it_stopped(tmp_path, stateful):
    """Two passes over five batches, the last of each smaller and padded; stopped behind the last of a pass, or in the second."""
    straight = train(tmp_path / "straight", examples=Numbers(stateful))
    stopped = {"extra": [Stop(5 if stateful else 6)], "save_strategy": "steps"}
    train(tmp_path / "out", examples=Numbers(stateful), **stopped)
    again = train(tmp_path / "out", examples=Numbers(stateful), resume=True)
    assert losses(again) == losses(straight) and len(losses(again)) == 8
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(straight.params)))


def test_documents_in_one_row(tmp_path):
    """Flattened, the batches of an epoch's 10 examples have the losses of padded ones: the last, of 2, too, and whatever the parts."""
    examples = [{name: value[:length] for name, value in row.items()} for row, length in zip(data(10), [12, 3, 7, 9, 4, 12, 5, 6, 11, 8])]
    width = lambda row, fill: {name: np.pad(value, (0, 12 - len(value)), constant_values=fill[name]) for name, value in row.items()}
    padded = [width(row, {"input_ids": 0, "labels": -100}) for row in examples]
    options = {"max_steps": 5, "optim": "sgd", "train_sampling_strategy": "sequential"}
    wanted = losses(train(tmp_path / "padded", examples=padded, **options))
    for parts in (1, 2):
        args = TrainingArguments(
            str(tmp_path / str(parts)), gradient_accumulation_steps=parts, **QUIET | options | {"per_device_train_batch_size": 4 // parts}
        )
        collator = DataCollatorWithFlattening(pad_to_multiple_of=48)
        made = Trainer(MODEL, params_of(MODEL), args, collator, examples, examples)
        made.train()
        assert losses(made) == pytest.approx(wanted, rel=1e-5)
    again = Trainer(MODEL, made.params, args, eval_dataset=padded)
    assert made.evaluate()["eval_loss"] == pytest.approx(again.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_without_a_label_that_counts(tmp_path, parts):
    rows = [row | ({"labels": np.full(12, -100)} if i >= 4 else {}) for i, row in enumerate(data(8))]
    options = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 4 // parts, "train_sampling_strategy": "sequential"}
    with pytest.raises(NonFiniteError, match=r"no label that counts, .* at step 2, of examples 4, 5, 6, 7"):
        train(tmp_path, examples=rows, **options)


def test_labels_that_are_not_there(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in data(4)]
    with pytest.raises(ValueError, match="a batch of input_ids has no `labels`"):
        train(tmp_path, examples=rows)
    with pytest.raises(ValueError, match="an example has no labels, which the first of its batch has"):
        train(tmp_path, examples=[*data(1), *rows], train_sampling_strategy="sequential")


def test_stopping_early_by_one_of_several_datasets(tmp_path):
    """Evaluations of the other datasets say nothing."""
    sets = {"a": data(4), "b": data(4, seed=1)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": sets, "learning_rate": 0.0}
    stopping = EarlyStoppingCallback(2)
    made = train(tmp_path, extra=[stopping], metric_for_best_model="a_loss", **options)
    assert made.state.global_step == 3 and stopping.early_stopping_patience_counter == 2


def test_ended_between_the_last_step_and_the_end_of_its_epoch(tmp_path):
    class Crash(TrainerCallback):
        def on_epoch_end(self, *args, **kwargs):
            raise RuntimeError("power cut")

    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch", "eval_dataset": data(4), "max_steps": 6}
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, extra=[Crash()], **options)
    evaluated = lambda trainer: [record["step"] for record in trainer.state.log_history if "eval_loss" in record]
    assert evaluated(train(tmp_path, resume=True, **options)) == [6]


def test_a_stream_that_ends(tmp_path):
    with pytest.raises(ValueError, match="without a length needs max_steps"):
        train(tmp_path, examples=Numbers(), max_steps=-1)
    with pytest.raises(ValueError, match="nothing more after 5 steps"):
        train(tmp_path, examples=iter(Numbers()))


def test_events_arguments_and_what_is_kept(tmp_path):
    """Best checkpoint kept and loaded at the end, early stopping, metrics of preprocessed logits."""
    held, seen = data(6, seed=9), []
    correct = lambda logits, labels: (jnp.argmax(logits[:, :-1], -1) == labels[:, 1:]).sum(1)

    def metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape, prediction.inputs.shape, prediction.losses.shape))
        return {"correct": prediction.predictions.sum()}

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "save_total_limit": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "include_for_metrics": ["inputs", "loss"], "learning_rate": 0.3, "max_steps": 40}
    options |= {"compute_metrics": metrics, "preprocess_logits_for_metrics": correct}
    made = train(tmp_path, eval_dataset=held, extra=[EarlyStoppingCallback(3)], **options)
    evaluated = [(r["eval_loss"], r["step"]) for r in made.state.log_history if "eval_loss" in r]
    assert made.state.global_step == evaluated[-1][1] < 40
    best = min(evaluated)
    assert made.state.best_global_step == best[1] == evaluated[-4][1] and made.state.best_metric == best[0]
    assert list(checkpoints_in(tmp_path)) == [best[1]] and made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best[1]}")
    assert made.evaluate()["eval_loss"] == pytest.approx(best[0], rel=1e-6)
    assert set(seen) == {((6,), (6, 12), (6, 12), (6,))}
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records == made.state.log_history
    step = next(r for r in records if r["step"] == 3 and "loss" in r)
    assert {"loss", "grad_norm", "learning_rate", "epoch"} <= step.keys()
    assert {"tokens_per_second", "model_flops_per_second", "seconds_left", "host_memory"} <= step.keys()


def test_lora_trains_and_saves_the_adapter_alone(tmp_path):
    params, config = params_of(MODEL), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    options = {"params": params, "examples": data(4), "peft_config": config, "learning_rate": 0.05}
    made = train(tmp_path, **options, save_strategy="steps", save_steps=4)
    assert losses(made)[-1] < losses(made)[0] - 0.01
    frozen = flatten(params)
    assert all(np.array_equal(leaf, frozen[name]) for name, leaf in flatten(made.params).items() if name in frozen)
    made.save_model(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded, again = load_adapter(tmp_path / "adapter", MODEL, params)
    close(loaded, made.params)
    assert again.r == 2
    resumed = train(tmp_path, **options, resume=f"{tmp_path}/checkpoint-4")
    close(resumed.params, made.params, 0)


def test_what_is_trained_beside_an_adapter(tmp_path):
    """Frozen parameters are frozen besides; modules that are saved whole keep the dtype that was given, merged too; an adapter of another
    config, without one, or resumed under another is refused."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(MODEL))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    options = {"params": params, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    made = train(tmp_path / "a", **options, peft_config=config, frozen=[".*lora_A"])
    before = flatten(params)
    moved = {name for name, leaf in flatten(made.params).items() if name in before and not np.array_equal(leaf, before[name])}
    assert moved == {"lm_head.weight"} and np.abs(flatten(made.params)["model.layers.0.self_attn.q_proj.lora_B"]).max() > 0
    made.write(tmp_path / "hf", merge(made.params)[0])
    _, whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert {leaf.dtype.name for leaf in flatten(whole).values()} == {"bfloat16"}
    with pytest.raises(ValueError, match="frozen pattern 'lora' matches no parameter"):
        train(tmp_path / "a", **options, peft_config=config, frozen=["lora"])
    other = dataclasses.replace(config, lora_alpha=64)
    with pytest.raises(CheckpointError, match=r"adapter\.lora_alpha: saved 8, now 64"):
        train(tmp_path / "a", **options, peft_config=other, resume=True)
    options |= {"params": made.params, "save_strategy": "no"}
    with pytest.raises(ValueError, match=r"another LoraConfig:\n.*q_proj\.lora_scale: \[4\.0\], the config says \[32\.0\]"):
        train(tmp_path / "b", **options, peft_config=other)
    with pytest.raises(ValueError, match=r"v_proj\.lora_A: nothing, the config says \[2, 32\]"):
        train(tmp_path / "b", **options, peft_config=dataclasses.replace(config, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="its scale would be trained: a Trainer's peft_config"):
        train(tmp_path / "b", **options)


def test_preferences(tmp_path):
    """A loss and a count of the caller's; rows that labels cannot leave out are a smaller last batch."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(6):
        row = {f"{side}_{name}": rng.integers(0, 96, 10) for side in ("chosen", "rejected") for name in ("input_ids", "labels")}
        examples.append(row | {f"{side}_attention_mask": np.ones(10, np.int32) for side in ("chosen", "rejected")})
    whole = {name: jnp.asarray(np.stack([row[name] for row in examples])) for name in examples[0]}
    for name, values in make_reference(MODEL)(params_of(MODEL), whole).items():
        for row, value in zip(examples, np.asarray(values)):
            row[name] = value
    loss, count = dpo_loss(beta=0.5)
    made = train(tmp_path, examples=examples, loss=loss, count=count, eval_dataset=examples)
    assert losses(made)[0] == pytest.approx(np.log(2), rel=1e-4) and losses(made)[-1] < 0.6
    assert {"rewards/margins", "logps/chosen"} <= made.state.log_history[0].keys()
    assert {"eval_loss", "eval_rewards/accuracies"} <= made.evaluate().keys()


BERT = BertConfig(**SHAPE, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def untrained(out, model, **options):
    return Trainer(model, params_of(model), TrainingArguments(str(out), **QUIET | {"per_device_eval_batch_size": 4} | options))


def test_rows_that_do_not_count(tmp_path):
    """Answers and regressions: a last, smaller batch weighs what its rows weigh."""
    rng = np.random.default_rng(0)
    answers = [{"input_ids": row["input_ids"], "start_positions": rng.integers(12), "end_positions": rng.integers(12)} for row in data(6)]
    values = [{"input_ids": row["input_ids"], "labels": rng.normal()} for row in data(6)]
    scored = LlamaForSequenceClassification(CONFIG.replace(num_labels=1, pad_token_id=0))
    for model, examples in ((BertForQuestionAnswering(BERT), answers), (scored, values)):
        trainer = untrained(tmp_path, model)
        parts = [trainer.evaluate(some)["eval_loss"] for some in (examples[:4], examples[4:])]
        assert trainer.evaluate(examples)["eval_loss"] == pytest.approx(np.average(parts, weights=[4, 2]), rel=1e-5)
    options = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    made = train(tmp_path, scored, examples=values, max_steps=2, learning_rate=0.0, **options)
    assert losses(made) == pytest.approx(parts, rel=1e-5)


def test_smoothing_of_heads_of_any_kind(tmp_path):
    """As HF's label_smoothing_factor, for a masked language model."""
    examples = data(4)
    trainer = untrained(tmp_path, BertForMaskedLM(BERT), label_smoothing_factor=0.2)
    output = trainer.predict(examples)
    wanted = LabelSmoother(0.2)({"logits": torch.from_numpy(output.predictions)}, torch.from_numpy(output.label_ids).long())
    assert output.metrics["test_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_fp16_and_schedule_free(tmp_path):
    made = train(tmp_path / "half", fp16=True, gradient_checkpointing=True, fp16_full_eval=True, eval_dataset=data(6))
    assert made.model.dtype == jnp.float16 and made.model.remat == "full" and losses(made)[-1] < losses(made)[0]
    assert made.state.log_history[0]["loss_scale"] == 65536 and made.evaluate()["eval_loss"] > 0
    free = train(tmp_path / "free", optim="schedule_free_adamw", lr_scheduler_type="constant", eval_dataset=data(6))
    assert all(record["learning_rate"] == 1e-2 for record in free.state.log_history if "learning_rate" in record)
    assert free.evaluate()["eval_loss"] < losses(free)[0]
    assert free.state.total_flos == made.state.total_flos > 0  # what the first computes again does not count


def test_the_rate_of_a_step_that_float16_skips(tmp_path, monkeypatch):
    """The schedule stands still, as in HF, also where the run goes on from a checkpoint behind the skipped steps."""
    monkeypatch.setattr(LossScale, "initial", staticmethod(lambda: LossScale(jnp.float32(2.0**30), jnp.int32(0))))
    options = {"fp16": True, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 20, "max_steps": 40}
    train(tmp_path, extra=[Stop(20)], **options)
    records = [record for record in train(tmp_path, resume=True, **options).state.log_history if "loss" in record]
    done = np.isfinite([record["grad_norm"] for record in records])
    assert len(done) == 40 and 2 <= (~done[:20]).sum() < 20
    rates = [record["learning_rate"] for record in records]
    np.testing.assert_allclose(rates, 1e-2 * (1 - (np.cumsum(done) - done) / 40), rtol=1e-6)


def test_torch_loads_what_a_mesh_trained(tmp_path):
    torch.manual_seed(0)
    start = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_key_value_heads=2))
    start.save_pretrained(tmp_path / "start")
    model, params = AutoModelForCausalLM.from_pretrained(tmp_path / "start", mesh=make_mesh(fsdp=4, tensor=2), scan_layers=True)
    made = train(tmp_path / "run", model, params, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    made.save_model(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = np.stack([row["input_ids"] for row in data(3)])
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy()
    found = made.predict([{"input_ids": row} for row in ids]).predictions
    assert np.max(np.abs(found - wanted)) <= 1e-4 * max(1, wanted.std())
