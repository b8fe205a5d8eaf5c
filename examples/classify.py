"""Fine-tune an encoder to tell which package of the standard library a function is from.

    python examples/prepare_data.py data
    python examples/classify.py --data data --out runs/classify

The encoder is a small BERT that is pretrained here, by masked language modelling, since nothing is downloaded; --model takes any checkpoint
of an encoder in its place. runs/classify/hf is a directory that torch loads."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxmodels import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from jaxmodels.training import DataCollatorForLanguageModeling, DataCollatorWithPadding, Examples, Trainer, TrainingArguments, read_rows
from jaxmodels.training.data import classification_example

LENGTH = 64


def pretrained(data: Path, out: Path, steps: int) -> Path:
    """A BERT of a million parameters that has seen the functions, without their labels."""
    options = {"mask_token": "<|mask|>", "add_bos_token": True, "padding_side": "right", "model_max_length": LENGTH}
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer", **options)
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), max_position_embeddings=LENGTH, pad_token_id=0, **shape)
    model, params = AutoModelForMaskedLM.from_config(config, key=jax.random.key(0))
    args = TrainingArguments(
        output_dir=str(out / "pretraining"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="no",
    )
    texts = [tokenizer(row["text"], truncation=True, return_tensors=None).data for row in read_rows(data / "functions.jsonl")]
    collator = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=LENGTH)
    trainer = Trainer(model, params, args, collator, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(out / "encoder")
    return out / "encoder"


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py has written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="checkpoint of an encoder; default: one that is pretrained here")
    parser.add_argument("--pretraining-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()

    path = options.model or pretrained(options.data, options.out, options.pretraining_steps)
    tokenizer = AutoTokenizer.from_pretrained(path)
    make = partial(classification_example, tokenizer=tokenizer, max_length=LENGTH)
    train, held = (Examples(read_rows(options.data / f"functions{name}.jsonl"), make) for name in ("", "_held_out"))
    labels = len({row["label"] for row in train.rows})
    model, params = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels, dtype="float32")
    args = TrainingArguments(
        output_dir=str(options.out / "fine-tuning"),
        max_steps=options.steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=LENGTH)
    trainer = Trainer(model, params, args, collator, train, held, tokenizer, compute_metrics=accuracy)
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model(options.out / "hf")


if __name__ == "__main__":
    main()
