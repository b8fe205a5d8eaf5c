"""From examples to mixtures and batches, on grain: every iterator has grain's `get_state()` and `set_state()`, and goes on exactly
where a state was taken. States are dicts for json, and know the names and sizes of their files.
What makes examples of rows, jaxmodels.training.examples, is imported from here too.

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
import numpy as np
from safetensors.numpy import save

from jaxmodels.convert.atomic import replacing
from jaxmodels.training.collators import draws
from jaxmodels.training.examples import Example
from jaxmodels.training.examples import Examples as Examples
from jaxmodels.training.examples import chat_example as chat_example
from jaxmodels.training.examples import classification_example as classification_example
from jaxmodels.training.examples import completion_example as completion_example
from jaxmodels.training.examples import preference_example as preference_example
from jaxmodels.training.examples import sft_example as sft_example
from jaxmodels.training.examples import text_example as text_example
from jaxmodels.training.examples import tokenized_example as tokenized_example
from jaxmodels.training.identity import described, differences, identity, recipe
from jaxmodels.training.packing import pack_documents

try:
    import grain
except ImportError as error:
    raise ImportError("training data needs grain, which is not installed: pip install 'jaxmodels[train]'") from error

WINDOW = 1024  # documents that are packed together


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
