"""The check of a head other than the language head, against HF's class."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from cases import close, random_others, sensitive

from jaxmodels import auto


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


def check_head(hf_config, changes, name, path, others=(), head_ids=lambda ids: ids, every_loss=True):
    """The loss, or `every_loss`, of three whole rows, and logits of the same rows padded on either side, against HF's class on each row
    alone. For multiple choice they are the choices of one row."""
    config = copy.deepcopy(hf_config)
    config.update({k: v for k, v in changes.items() if k != "num_labels" or name != "AutoModelForQuestionAnswering"})
    torch.manual_seed(0)
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
        kinds = list(head_labels(name, 3, config.num_labels, 50, rng))
        for labels in kinds if every_loss else kinds[:1]:
            hf.config.problem_type = None  # HF infers it from the first labels it sees and keeps it
            theirs = hf(**as_torch(whole), **{k: torch.tensor(v) for k, v in labels.items()}).loss
            close(forward(params, wrap(whole | {"attention_mask": np.ones_like(mask)}), labels).loss, theirs)
            out = forward(params, wrap(padded | {"attention_mask": mask}), labels)
            for key in [key for key in rows[0].keys() if "logits" in key]:  # noqa: SIM118
                logits = np.asarray(out[key])
                for mine, m, row in zip(logits.reshape(3, 1) if choices else logits, mask, rows):
                    close(mine[m == 1] if mine.shape[:1] == m.shape else mine, row[key][0])
