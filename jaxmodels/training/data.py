"""From rows of files to examples and batches, on grain: every iterator has grain's `get_state()` and `set_state()`, and goes on exactly
where a state was taken. States are dicts for json, and know the names and sizes of their files.

    rows = read_rows("corpus/*.jsonl")
    documents = mixture([Examples(rows, partial(text_example, tokenizer=tokenizer))], seed=0)
    for batch in packed_batches(documents, batch_size=8, length=1024): ...

Axis letters: B rows of a batch, T tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from safetensors.numpy import save

from jaxmodels.convert.atomic import replacing
from jaxmodels.ops.loss import IGNORE
from jaxmodels.processing.tokenizer import NO_LIMIT
from jaxmodels.training.collators import draws
from jaxmodels.training.identity import described, differences, identity, recipe
from jaxmodels.training.packing import pack_documents
from jaxmodels.training.sources import Row, Rows

try:
    import grain
except ImportError as error:
    raise ImportError("training data needs grain, which is not installed: pip install 'jaxmodels[train]'") from error

Example = dict[str, Any]
WINDOW = 1024  # documents that are packed together


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


def mixture(
    datasets: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.MapDataset:
    """The examples of several sequences, each in a new order every epoch, drawn in proportion to `weights` (to one part in a hundred of the
    smallest). The order is a function of the seed alone.

    epochs: None goes on without end; else the mixture ends where the first sequence does.
    process_index, process_count: this process sees its share of every sequence; by default jax's.
    ValueError when a sequence has less than an example for each process."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if weights is not None and (len(weights) != len(datasets) or not all(weight > 0 for weight in weights)):
        raise ValueError(f"weights {list(weights)} must be {len(datasets)} numbers above 0, one for each dataset")
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} must be in [0, process_count = {count})")
    parts = []
    for number, dataset in enumerate(datasets):
        if len(dataset) < count:
            raise ValueError(f"dataset {number} has {len(dataset)} examples for {count} processes; each needs one at least")
        part = grain.MapDataset.source(dataset)
        if shuffle:
            part = part.shuffle(seed=int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
        parts.append(part[index::count].repeat(epochs))
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
    shares = [weight / sum(weights) for weight in weights] if weights is not None else [1 / len(parts)] * len(parts)
    return Mixed(mixed, weights=shares, order=seed if shuffle else "as it stands", share=f"{index} of {count}")


class Mixed(grain.MapDataset):
    """The examples of another, and `about`: the settings that they depend on."""

    def __init__(self, parent: grain.MapDataset, **about: Any):
        super().__init__(parent)
        self.about = about

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._parent[index]


def batches(
    dataset: grain.MapDataset, batch_size: int, collator: Callable[..., Any], *, drop_remainder: bool = True, prefetch: int = 8
) -> grain.IterDataset:
    """Batches that `collator` makes of the examples; one that draws is given the batch's number as `step`. `prefetch` batches are made
    ahead, in as many threads."""
    make = (lambda i, rows: collator(rows, step=i)) if draws(collator) else (lambda i, rows: collator(rows))
    rows = dataset.batch(batch_size, drop_remainder=drop_remainder, batch_fn=list)
    read = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    return Known(rows.map_with_index(make).to_iter_dataset(read), batch_size=batch_size, collator=described(collator))


def packed_batches(
    dataset: grain.MapDataset, batch_size: int, length: int, *, window: int = WINDOW, seed: int = 0, pad_token_id: int = 0
) -> grain.IterDataset:
    """Batches {"input_ids", "labels", "segment_ids"} [B,T] int32 with T = `length`, of examples with input_ids and labels.

    Documents longer than a row are cut into rows; `window` documents at a time are packed by `pack_documents`, and their rows
    shuffled. What does not fill a batch at the end is dropped."""
    rows = Packed(dataset.to_iter_dataset(), length, window, seed, pad_token_id)
    return Known(rows.batch(batch_size, drop_remainder=True), length=length, window=window, seed=seed, pad_token_id=int(pad_token_id))


class Known(grain.IterDataset):
    """A stream whose states say what they were taken in: the files of its sources, how examples are made of their rows, the settings of
    its mixtures and what else `about` has; ValueError where one is set in another."""

    def __init__(self, parent: grain.IterDataset, **about: Any):
        super().__init__(parent)
        stages = list(_stages(parent))
        sources = [stage._source for stage in stages if hasattr(stage, "_source")]
        self.about = {"data": [line for source in sources for line in identity(source)], "examples": list(map(recipe, sources)), **about}
        for mixed in (stage for stage in stages if isinstance(stage, Mixed)):
            self.about |= mixed.about

    def __iter__(self) -> grain.DatasetIterator:
        return _KnownIterator(iter(self._parent), self.about)


def _stages(dataset: Any) -> Iterator[Any]:
    """The dataset and all that it is made of."""
    yield dataset
    for parent in dataset.parents:
        yield from _stages(parent)


class _KnownIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, about: dict[str, Any]):
        super().__init__(parent)
        self.about = about

    def __next__(self) -> Example:
        return next(self._parent)  # type: ignore[no-any-return]

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "of": self.about}

    def set_state(self, state: dict[str, Any]) -> None:
        state = state if "of" in state else {"parent": state, "of": {}}  # as the first version noted it
        differing = differences(state["of"], self.about)
        if differing:
            raise ValueError(f"the stream's state was taken in another stream: {differing}")
        self._parent.set_state(state["parent"])


class Packed(grain.IterDataset):
    """Packed rows [T] of a dataset of documents; see `packed_batches`."""

    def __init__(self, parent: grain.IterDataset, length: int, window: int = WINDOW, seed: int = 0, pad_token_id: int = 0):
        super().__init__(parent)
        if length < 1 or window < 1:
            raise ValueError(f"length {length} and window {window} must be above 0")
        self.window, self.pack = window, partial(_pack, length=length, seed=seed, pad_token_id=pad_token_id)

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), self)


def _pack(documents: Sequence[Example], number: int, *, length: int, seed: int, pad_token_id: int) -> list[Example]:
    """The rows of window `number`, in the order of the seed."""
    cuts = [(document, slice(i, i + length)) for document in documents for i in range(0, len(document["input_ids"]), length)]
    pieces = {name: [np.asarray(document[name])[cut] for document, cut in cuts] for name in ("input_ids", "labels")}
    rows = pack_documents(pieces["input_ids"], length, labels=pieces["labels"], pad_token_id=pad_token_id)
    order = np.random.default_rng((seed, number)).permutation(len(rows["input_ids"]))
    return [{name: value[i] for name, value in rows.items()} for i in order]


class _PackedIterator(grain.DatasetIterator):
    """Its state is the parent's before the window, and how many of the window's rows have been given."""

    def __init__(self, parent: grain.DatasetIterator, dataset: Packed):
        super().__init__(parent)
        self.dataset, self.number, self.given = dataset, 0, 0
        self.before: Any = None
        self.rows: list[Example] | None = None

    def __next__(self) -> Example:
        if self.rows is None:
            self.before = self._parent.get_state()
            documents = list(itertools.islice(self._parent, self.dataset.window))
            if not documents:
                raise StopIteration
            self.rows = self.dataset.pack(documents, self.number)
        row = self.rows[self.given]
        self.given += 1
        if self.given == len(self.rows):
            self.number, self.given, self.rows = self.number + 1, 0, None
        return row

    def get_state(self) -> dict[str, Any]:
        before = self._parent.get_state() if self.rows is None else self.before
        return {"parent": before, "window": self.number, "row": self.given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self.number, self.given, self.rows = state["window"], state["row"], None


def write_packed(
    directory: str | Path,
    examples: Iterable[Example],
    length: int,
    *,
    format: str = "array_record",
    window: int = WINDOW,
    seed: int = 0,
    pad_token_id: int = 0,
    rows_per_file: int = 1 << 16,
) -> dict[str, int]:
    """Pack documents ahead of time, as `packed_batches` would, into files rows-00000.array_record (or .npy), …; `read_rows(directory)`
    reads them, and its rows are ready examples. How many documents, rows and tokens there are is returned.

    The directory is written whole or not at all; files of an earlier call leave it."""
    if format not in WRITERS:
        raise ValueError(f"format {format!r} cannot be written; {' and '.join(WRITERS)} can")
    count = {"documents": 0, "rows": 0, "tokens": 0}
    source = iter(examples)

    def packed() -> Iterator[Example]:
        for number in itertools.count():
            documents = list(itertools.islice(source, window))
            if not documents:
                return
            count["documents"] += len(documents)
            yield from _pack(documents, number, length=length, seed=seed, pad_token_id=pad_token_id)

    rows = packed()
    with replacing(directory, drop=re.compile(r"rows-\d{5}\.(npy|array_record)").fullmatch) as path:  # type: ignore[arg-type]
        for number in itertools.count():
            part = list(itertools.islice(rows, rows_per_file))
            if not part:
                break
            WRITERS[format](path / f"rows-{number:05}.{format}", part)
            count["rows"] += len(part)
            count["tokens"] += sum(int((row["segment_ids"] > 0).sum()) for row in part)
        if not count["rows"]:
            raise ValueError(f"{directory}: there are no documents to pack")
    return count


def _write_npy(path: Path, rows: Sequence[Example]) -> None:
    out = np.empty(len(rows), [(name, np.int32, value.shape) for name, value in rows[0].items()])
    for name in rows[0]:
        out[name] = [row[name] for row in rows]
    np.save(path, out)


def _write_records(path: Path, rows: Sequence[Example]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(save(row))
    writer.close()


WRITERS: dict[str, Callable[[Path, Sequence[Example]], None]] = {"array_record": _write_records, "npy": _write_npy}
