"""Our Trainer and HF's on the same weights, data and arguments: the same losses, norms, rates, epochs and fields, step by step."""

import jax
import numpy as np
import pytest
import torch
import transformers
from cases import sensitive
from transformers.trainer_pt_utils import get_length_grouped_indices

from jaxmodels.auto import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from jaxmodels.training import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments
from jaxmodels.training.batches import length_groups
from jaxmodels.training.callbacks import EVENTS

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2)
BERT = transformers.BertConfig(**SHAPE, max_position_embeddings=40, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0}
COMMON = {"learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1, "max_grad_norm": 1.0, "train_sampling_strategy": "sequential"}
COMMON |= {"max_steps": 10, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
COMMON |= {"lr_scheduler_type": "cosine", "warmup_steps": 3, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 5}


def rows(number, length, labels):
    rng = np.random.default_rng(number)
    made = []
    for _ in range(number):
        ids, kept = rng.integers(1, 97, length), rng.integers(length // 2, length + 1)
        mask = (np.arange(length) < kept).astype(np.int64)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels(rng, ids, mask)})
    return made


def pair(tmp_path, cls, config, auto):
    theirs = sensitive(cls(config))
    theirs.save_pretrained(tmp_path / "start")
    return theirs, *auto.from_pretrained(tmp_path / "start")


def recorder(base, events):
    """A callback that notes HF's events, those within a step apart, and what the control asks for by then."""
    note = lambda event: lambda self, args, state, control, **kwargs: events.append((event, state.global_step, *vars(control).values()))
    return type("Recorder", (base,), {event: note(event) for event in EVENTS})()


def run_theirs(model, tmp_path, data, held, kind="", events=None, compute_metrics=None, **options):
    arguments = getattr(transformers, f"{kind}TrainingArguments")
    options = COMMON | {"report_to": "none", "use_cpu": True, "disable_tqdm": True} | options
    trainer = getattr(transformers, f"{kind}Trainer")(
        model, arguments(str(tmp_path / "theirs"), **options), train_dataset=data, eval_dataset=held, compute_metrics=compute_metrics
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if events is not None:
        trainer.add_callback(recorder(transformers.TrainerCallback, events))
    trainer.train()
    return trainer


def compared(ours, theirs, steps=COMMON["max_steps"]):
    """Every record of HF's log has its like in ours."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert other.keys() <= mine.keys()
        for name in other.keys() - {n for n in other if "runtime" in n or "second" in n or n == "total_flos"}:
            assert abs(mine[name] - other[name]) <= 1e-4 * max(1, abs(other[name])), (mine["step"], name, mine[name], other[name])
    assert sum("grad_norm" in record for record in ours) == steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_llama(tmp_path, accumulation):
    """37 rows: an epoch ends in a batch of one row, in a last step of fewer parts."""
    theirs, model, params = pair(tmp_path, transformers.LlamaForCausalLM, LLAMA, AutoModelForCausalLM)
    data = rows(37, 13, lambda rng, ids, mask: np.where(mask & (rng.random(ids.shape) < 0.8), ids, -100))
    held = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data[:8]]  # HF means over rows: as many labels in each
    options = {"gradient_accumulation_steps": accumulation}
    reference = run_theirs(theirs, tmp_path, data, held, **options)
    trainer = Trainer(model, params, TrainingArguments(str(tmp_path / "ours"), **COMMON, **options), train_dataset=data, eval_dataset=held)
    trainer.train()
    compared(trainer.state.log_history, reference.state.log_history)
    predicted, label_ids, metrics = reference.predict(held)
    mine = trainer.predict(held)
    assert np.max(np.abs(mine.predictions - predicted)) <= 1e-3 * np.std(predicted)
    assert np.array_equal(mine.label_ids, label_ids)
    assert metrics.keys() - {"test_model_preparation_time"} == mine.metrics.keys()


def test_bert(tmp_path):
    """Without accumulation, in which HF adds up the parts' means for BERT."""
    theirs, model, params = pair(tmp_path, transformers.BertForMaskedLM, BERT, AutoModelForMaskedLM)
    chosen = np.isin(np.arange(12), [1, 4])
    data = rows(24, 12, lambda rng, ids, mask: np.where(chosen, ids, -100))
    reference = run_theirs(theirs, tmp_path, data, data[:6])
    trainer = Trainer(model, params, TrainingArguments(str(tmp_path / "ours"), **COMMON), train_dataset=data, eval_dataset=data[:6])
    trainer.train()
    compared(trainer.state.log_history, reference.state.log_history)


def test_classifier_and_its_metrics(tmp_path):
    theirs, model, params = pair(tmp_path, transformers.BertForSequenceClassification, BERT, AutoModelForSequenceClassification)
    data = rows(18, 12, lambda rng, ids, mask: rng.integers(3))
    accuracy = lambda prediction: {"accuracy": float(np.mean(np.argmax(prediction[0], -1) == prediction[1]))}
    reference = run_theirs(theirs, tmp_path, data, data[:6])
    reference.compute_metrics = accuracy
    args = TrainingArguments(str(tmp_path / "ours"), **COMMON)
    trainer = Trainer(model, params, args, train_dataset=data, eval_dataset=data[:6], compute_metrics=accuracy)
    trainer.train()
    compared(trainer.state.log_history, reference.state.log_history)
    wanted, found = reference.evaluate(), trainer.evaluate()
    assert found["eval_accuracy"] == wanted["eval_accuracy"] and wanted.keys() - {"eval_model_preparation_time"} == found.keys()
    reference.args.eval_do_concat_batches = trainer.args.eval_do_concat_batches = False  # a list, an array for every batch
    reference.compute_metrics = trainer.compute_metrics = None
    wanted, found = reference.predict(data[:6]), trainer.predict(data[:6])
    for mine, other in zip((*found.predictions, *found.label_ids), (*wanted.predictions, *wanted.label_ids), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)
    reference.args.prediction_loss_only = trainer.args.prediction_loss_only = True
    wanted, found = reference.predict(data[:6]), trainer.predict(data[:6])
    assert found.predictions is wanted.predictions is None
    assert found.metrics["test_loss"] == pytest.approx(wanted.metrics["test_loss"], rel=1e-4)


class Rows:
    """Metrics batch by batch: so many rows, so many labels."""

    def __init__(self):
        self.seen = [0, 0]

    def __call__(self, prediction, compute_result):
        self.seen = [self.seen[0] + len(prediction.predictions), self.seen[1] + int((np.asarray(prediction.label_ids) != -100).sum())]
        rows, labels = self.seen
        self.seen = [0, 0] if compute_result else self.seen
        return {"rows": rows, "labels": labels}


def test_what_else_the_arguments_ask_for(tmp_path):
    """Adam's numbers, tokens that were seen, what is left of an epoch dropped, metrics by batch, a column that the model does not take."""
    theirs, model, params = pair(tmp_path, transformers.LlamaForCausalLM, LLAMA, AutoModelForCausalLM)
    data = [row | {"source": "a book"} for row in rows(22, 13, lambda rng, ids, mask: np.where(mask, ids, -100))]
    held = [{"input_ids": row["input_ids"], "labels": row["input_ids"], "source": "a book"} for row in data[:8]]
    options = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-4, "include_num_input_tokens_seen": "non_padding"}
    options |= {"dataloader_drop_last": True, "batch_eval_metrics": True, "gradient_accumulation_steps": 2, "logging_strategy": "epoch"}
    metrics = Rows()
    reference = run_theirs(theirs, tmp_path, data, held, compute_metrics=metrics, **options)
    args = TrainingArguments(str(tmp_path / "ours"), **COMMON | options)
    trainer = Trainer(model, params, args, train_dataset=data, eval_dataset=held, compute_metrics=metrics)
    trainer.train()
    assert any("eval_rows" in record for record in reference.state.log_history)
    clock = ("train_runtime", "train_tokens_per_second")  # beside the tokens; ours is tokens_per_second, in every run
    wanted = [{name: value for name, value in record.items() if name not in clock} for record in reference.state.log_history]
    compared(trainer.state.log_history, wanted, steps=4)
    assert trainer.state.num_input_tokens_seen == int(reference.state.num_input_tokens_seen) > 0


def test_seq2seq_generates(tmp_path):
    theirs, model, params = pair(tmp_path, transformers.T5ForConditionalGeneration, transformers.T5Config(**T5), AutoModelForSeq2SeqLM)
    data = rows(8, 9, lambda rng, ids, mask: rng.integers(2, 97, 7))
    options = {"predict_with_generate": True, "generation_max_length": 8, "generation_num_beams": 2}
    reference = run_theirs(theirs, tmp_path, data, data, "Seq2Seq", **options)
    args = Seq2SeqTrainingArguments(str(tmp_path / "ours"), **COMMON, **options)
    trainer = Seq2SeqTrainer(model, params, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    compared(trainer.state.log_history, reference.state.log_history)
    wanted, found = reference.predict(data), trainer.predict(data)
    assert np.array_equal(found.predictions, wanted.predictions[:, : found.predictions.shape[1]])
    assert np.array_equal(found.label_ids, wanted.label_ids[:, : found.label_ids.shape[1]])
    assert abs(found.metrics["test_loss"] - wanted.metrics["test_loss"]) <= 1e-4 * wanted.metrics["test_loss"]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_order_of_events(tmp_path, strategy):
    """Through steps, epochs, evaluations, checkpoints and a share of an epoch at the end."""
    theirs, model, params = pair(tmp_path, transformers.LlamaForCausalLM, LLAMA, AutoModelForCausalLM)
    data, wanted, found = rows(10, 9, lambda rng, ids, mask: ids), [], []
    options = {f"{kind}_strategy": strategy for kind in ("eval", "save", "logging")} | {"max_steps": -1, "num_train_epochs": 2.5}
    options |= {"eval_steps": 2, "save_steps": 3, "logging_steps": 0.2, "eval_on_start": True, "eval_delay": 1, "logging_first_step": True}
    run_theirs(theirs, tmp_path, data, data[:5], events=wanted, **options)
    args = TrainingArguments(str(tmp_path / "ours"), **COMMON | options | {"disable_tqdm": True})
    Trainer(model, params, args, train_dataset=data, eval_dataset=data[:5], callbacks=[recorder(TrainerCallback, found)]).train()
    assert found[1:] == wanted and found[0][:2] == ("on_init_end", 0)  # HF's was added after that


@pytest.mark.parametrize(("number", "batch"), [(5, 2), (97, 4), (1000, 3)])
def test_groups_of_length(number, batch):
    lengths = np.random.default_rng(number).integers(3, 40, number).tolist()
    wanted = get_length_grouped_indices(lengths, batch, generator=torch.Generator().manual_seed(1))
    permutation = torch.randperm(number, generator=torch.Generator().manual_seed(1)).numpy()
    assert length_groups(lengths, batch, permutation).tolist() == wanted


def test_masters_are_saved_as_they_were_given(tmp_path):
    """bfloat16 parameters train in float32 and come back as bfloat16, where torch loads them."""
    _, model, params = pair(tmp_path, transformers.LlamaForCausalLM, LLAMA, AutoModelForCausalLM)
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    options = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2}
    args = TrainingArguments(str(tmp_path / "run"), bf16=True, gradient_checkpointing=True, **options)
    trainer = Trainer(model, half, args, train_dataset=rows(8, 9, lambda rng, ids, mask: ids))
    trainer.train()
    trainer.save_model(tmp_path / "hf")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    moved = np.asarray(trainer.params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"])
    assert np.array_equal(weight.float().detach().numpy(), moved.astype("bfloat16").astype("float32"))
    assert not np.array_equal(weight.float().detach().numpy(), np.asarray(params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]))
