"""From rows of files to examples, {"input_ids", "labels"} and the like, by what a row holds: text, a chat, a completion, a preference.

    documents = Examples(read_rows("corpus/*.jsonl"), partial(text_example, tokenizer=tokenizer))

Axis letters: T tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import numpy as np

from jaxmodels.ops.loss import IGNORE
from jaxmodels.processing.tokenizer import NO_LIMIT
from jaxmodels.training.sources import Row, Rows

Example = dict[str, Any]


class Examples:
    """A sequence of examples: `make` of each row, when it is asked for. What `make`, or a chat template, finds wrong is a ValueError that
    names the row's file and place."""

    def __init__(self, rows: Rows, make: Callable[[Row], Example]):
        self.rows, self.make = rows, make

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        row = self.rows[i]
        try:
            return self.make(row)
        except (ValueError, TypeError, LookupError, jinja2.TemplateError) as error:
            kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
            raise ValueError(f"{self.rows.where(i)}: {kind}{error}") from error


def _field(row: Row, name: str, *kinds: type) -> Any:
    if name not in row:
        raise ValueError(f"has no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"field {name!r} is {str(row[name])[:40]!r} ({type(row[name]).__name__}); expected {expected}")
    return row[name]


def _example(tokens: Sequence[int], counts: Any = True, max_length: int | None = None) -> Example:
    """ids [T] and labels [T], -100 where `counts` [T] is 0, cut to max_length; ValueError when there was no label before the cut."""
    ids = np.asarray(tokens, np.int32)
    labels = np.where(np.broadcast_to(np.asarray(counts, bool), ids.shape), ids, IGNORE).astype(np.int32)
    if not (labels != IGNORE).any():
        raise ValueError("has no token to learn from")
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def text_example(row: Row, *, tokenizer: Any, field: str = "text", max_length: int | None = None) -> Example:
    """A document for language modelling, {"input_ids", "labels"} [T] int32: its tokens, and the end-of-text token if there is one."""
    # (a length without truncation: the tokenizer does not warn of long documents, which are cut later)
    out = tokenizer(_field(row, field, str), truncation=False, max_length=NO_LIMIT, return_tensors=None)
    return _example(_ended(out["input_ids"], tokenizer), max_length=max_length)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def chat_example(row: Row, *, tokenizer: Any, max_length: int | None = None) -> Example:
    """A conversation, {"input_ids", "labels"} [T] int32: labels are the assistant's tokens, as the chat template's {% generation %} tags
    tell. Fields: `messages`, and `tools` for templates that take them."""
    messages = _field(row, "messages", list)
    out = tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_assistant_tokens_mask=True, return_tensors=None)
    if not any(out["assistant_masks"]):
        raise ValueError(
            "has no token of the assistant's: there is no such message, or the chat template lacks {% generation %} tags; set "
            "tokenizer.chat_template to one with them, or give rows with `prompt` and `completion`"
        )
    return _example(out["input_ids"], out["assistant_masks"], max_length)


def completion_example(row: Row, *, tokenizer: Any, max_length: int | None = None) -> Example:
    """`prompt` and `completion`, both text or both messages; {"input_ids", "labels"} [T] int32, of which the completion's are labels, with
    the end-of-text token after text."""
    prompt, completion = (_field(row, name, str, list) for name in ("prompt", "completion"))
    return _continued(tokenizer, prompt, completion, max_length)


def _continued(tokenizer: Any, prompt: Any, completion: Any, max_length: int | None) -> Example:
    if isinstance(prompt, str) != isinstance(completion, str):
        raise TypeError("the prompt is text and its continuation messages, or the other way round; expected both alike")
    if isinstance(prompt, str):
        start, whole, chat = len(prompt), prompt + completion, False
    else:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole, start, chat = tokenizer.apply_chat_template(prompt + completion, tokenize=False), len(before), True
        if not whole.startswith(before):
            raise ValueError(
                "the chat template writes the prompt in another way once it is answered, so that no token is surely the answer's"
            )
    out = tokenizer(whole, return_tensors=None, return_offsets_mapping=True, add_special_tokens=not chat)
    ids, counts = out["input_ids"], [end > start for _, end in out["offset_mapping"]]
    if not chat:
        ended = _ended(ids, tokenizer)
        counts = [*counts[: len(ids)], *[True] * (len(ended) - len(ids))]
        counts[-1] |= ended[-1] == tokenizer.eos_token_id
        ids = ended
    return _example(ids, counts, max_length)


def sft_example(row: Row, *, tokenizer: Any, field: str = "text", max_length: int | None = None) -> Example:
    """By the row's fields: `messages` a chat, `completion` a prompt and its completion, else text, all of which is learnt."""
    if "messages" in row:
        return chat_example(row, tokenizer=tokenizer, max_length=max_length)
    if "completion" in row:
        return completion_example(row, tokenizer=tokenizer, max_length=max_length)
    return text_example(row, tokenizer=tokenizer, field=field, max_length=max_length)


def preference_example(row: Row, *, tokenizer: Any, max_length: int | None = None) -> Example:
    """A pair for DPO: `prompt`, `chosen` and `rejected`, text or messages; without a prompt the messages that both answers begin with.
    {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}, for DataCollatorForPreference."""
    chosen, rejected = (_field(row, name, str, list) for name in ("chosen", "rejected"))
    if "prompt" in row:
        prompt = _field(row, "prompt", str, list)
    else:
        if isinstance(chosen, str):
            raise ValueError("has no field 'prompt', which answers that are text need")
        shared = len(list(itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected))))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    sides = {"chosen": chosen, "rejected": rejected}
    made = {side: _continued(tokenizer, prompt, answer, max_length) for side, answer in sides.items()}
    for side, example in made.items():
        if (example["labels"] == IGNORE).all():
            raise ValueError(f"the prompt alone fills max_length = {max_length}: nothing is left of {side!r}")
    return {f"{side}_{name}": value for side, example in made.items() for name, value in example.items()}


def classification_example(
    row: Row, *, tokenizer: Any, fields: Sequence[str] = ("text",), label: str = "label", max_length: int | None = None
) -> Example:
    """The tokenizer's output for a text, or a pair of them, and `label`: int, float, or a list for several labels."""
    texts = [_field(row, name, str) for name in fields]
    out = tokenizer(*texts, truncation=max_length is not None, max_length=max_length, return_tensors=None)
    return {**out.data, "label": _field(row, label, int, float, list)}


def tokenized_example(row: Row, *, max_length: int | None = None) -> Example:
    """`input_ids` and, if there are, `labels`, as they stand in the row."""
    ids = np.asarray(_field(row, "input_ids", list, np.ndarray))
    labels = np.asarray(row.get("labels", ids))
    if not ids.size:
        raise ValueError("has no token to learn from")
    for name, value in (("input_ids", ids), ("labels", labels)):
        if value.dtype.kind not in "iu" or value.ndim != 1 or len(value) != len(ids):
            raise TypeError(f"field {name!r} is {value.dtype}{list(value.shape)}; expected {len(ids)} integers")
    return {"input_ids": ids[:max_length].astype(np.int32), "labels": labels[:max_length].astype(np.int32)}
