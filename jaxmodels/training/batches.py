"""Where a Trainer's batches come from: datasets by a seeded order, or iterables that make batches themselves; both know their position.

Axis letters: B rows, T tokens."""

from __future__ import annotations

import dataclasses
import inspect
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.ops.loss import IGNORE
from jaxmodels.sharding.processes import from_all, global_batch, process_share
from jaxmodels.sharding.rules import Rules
from jaxmodels.training.collators import draws
from jaxmodels.training.identity import differences, identity, recipe

Arrays = dict[str, np.ndarray]
Collator = Callable[..., Mapping[str, Any]]  # of a list of examples and, where it draws, `step`
POSITIONS = ("start_positions", "end_positions")


@dataclasses.dataclass
class Batch:
    """This process's rows of a batch. rows: of the whole batch over all processes, padding included; real: how many of those, the first,
    are no padding; own: how many of this process's; name: this process's rows in words, for an error."""

    arrays: Arrays
    rows: int
    real: int
    own: int
    name: str


def label_names_of(model: Any) -> list[str]:
    """HF's: the arguments of the model that are labels."""
    names = inspect.signature(type(model).__call__).parameters
    answers = POSITIONS if "QuestionAnswering" in type(model).__name__ else ()
    found = [name for name in names if "label" in name or name in answers]
    return found or ["labels"]


def inputs_of(model: Any) -> set[str]:
    """Every name that the model takes, its base model's too where it hands them on."""
    parameters = inspect.signature(type(model).__call__).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if hasattr(model, "base"):
        names |= set(inspect.signature(model.base.__call__).parameters)
    return names | set(label_names_of(model))


def can_mask(arrays: Mapping[str, np.ndarray], labels: Sequence[str]) -> bool:
    """Whether a row can be left out of the loss by its labels alone."""
    found = [arrays[name] for name in labels if name in arrays]
    return bool(found) and all(np.issubdtype(array.dtype, np.integer) for array in found)


def mask_rows(arrays: Arrays, real: np.ndarray, labels: Sequence[str]) -> Arrays:
    """`arrays` where rows that are not `real` [B] have no label that counts."""
    width = arrays["input_ids"].shape[1] if "input_ids" in arrays else np.iinfo(np.int32).max
    fill = {name: width if name in POSITIONS else IGNORE for name in labels if name in arrays}
    row = lambda array: real.reshape(-1, *[1] * (array.ndim - 1))
    return arrays | {name: np.where(row(arrays[name]), arrays[name], value).astype(arrays[name].dtype) for name, value in fill.items()}


def length_groups(lengths: Sequence[int], rows: int, permutation: np.ndarray) -> np.ndarray:
    """A permutation in which batches of `rows` have rows of similar lengths, as HF's group_by_length makes it of a random one: sorted,
    longest first, within stretches of up to 50 batches, and the longest example of all in the very first place."""
    stretch = rows * max(1, min(len(lengths) // (rows * 4), 50))
    length = np.asarray(lengths)
    groups = [permutation[i : i + stretch] for i in range(0, len(lengths), stretch)]
    groups = [group[np.argsort(-length[group], kind="stable")] for group in groups]
    longest = int(np.argmax([length[group[0]] for group in groups]))
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return np.concatenate(groups)


def example_lengths(dataset: Any, column: str) -> list[int]:
    """By the column of that name where examples have it, else of their input_ids."""
    examples = (dataset[i] for i in range(len(dataset)))
    try:
        return [int(example[column]) if column in example else len(example["input_ids"]) for example in examples]
    except (KeyError, TypeError):
        raise ValueError(f"group_by_length needs examples with {column!r} or input_ids") from None


class Dataset:
    """Batches of `rows` of a dataset with a length, epoch by epoch: an order that depends on the seed and the epoch alone.

    Over several processes each collates the whole batch, so that all pad it to one length and draw the same, and keeps the rows that its
    devices hold under the rules. What an epoch leaves over is a batch of the same shape whose other rows do not count, where labels can say
    so, else a smaller batch. part: rows of one part of an accumulated batch."""

    def __init__(
        self,
        dataset: Any,
        rows: int,
        *,
        collator: Collator,
        labels: Sequence[str],
        rules: Rules | None = None,
        columns: set[str] | None = None,
        strategy: str = "sequential",
        seed: int = 0,
        length_column: str = "length",
        part: int | None = None,
        drop_last: bool = False,
        pad: bool = True,
    ):
        if not len(dataset):
            raise ValueError("the dataset is empty")
        self.piece, self.pieces = process_share(rules)  # which of how many pieces of a batch this process makes
        if rows % self.pieces:
            raise ValueError(f"a batch of {rows} rows cannot be cut into {self.pieces} equal shares for the processes")
        self.row_pieces = 1 if rules is None else int(rules.row_pieces)
        self.dataset, self.rows, self.labels, self.columns, self.pad = dataset, rows, labels, columns, pad
        self.collator, self.strategy, self.seed = collator, strategy, seed
        self.lengths = example_lengths(dataset, length_column) if strategy == "group_by_length" else None
        self.part = part or rows
        self.examples = len(dataset) // self.part * self.part if drop_last else len(dataset)
        self.steps = -(-self.examples // rows)
        if not self.steps:
            raise ValueError(f"dataloader_drop_last leaves nothing of {len(dataset)} examples in batches of {self.part}")
        self.row = self.number = 0
        self.about = {"data": identity(dataset), "examples": recipe(dataset), "seed": seed, "order": strategy}

    def order(self, epoch: int) -> np.ndarray:
        if self.strategy == "sequential":
            return np.arange(len(self.dataset))
        random = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return random if self.lengths is None else length_groups(self.lengths, self.rows, random)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """From where `position` says to the end."""
        order = self.order(epoch)[: self.examples]
        while self.row < self.examples:
            self.number = epoch * self.steps + self.row // self.rows
            numbers = order[self.row : self.row + self.rows]
            self.row += len(numbers)
            yield self.make(numbers)

    def make(self, numbers: np.ndarray) -> Batch:
        padded = np.concatenate([numbers, np.repeat(numbers[:1], self.rows - len(numbers))])
        if len(numbers) < self.rows and jax.process_count() == 1 and not self.pad:
            padded = numbers
        whole = self.collate(padded)
        if len(next(iter(whole.values()))) != len(padded):
            return self._joined(whole if len(numbers) == len(padded) else self.collate(numbers), numbers)
        if len(numbers) < len(padded) and not can_mask(whole, self.labels):
            whole, padded = self.collate(numbers), numbers
        per = len(padded) // (1 if len(padded) % self.row_pieces else self.pieces)  # every process has all rows of what does not divide
        first = self.piece * per if per < len(padded) else 0
        mine = padded[first : first + per]
        real = max(0, min(per, len(numbers) - first))
        arrays = {name: array[first : first + per] for name, array in whole.items()}
        if real < per:
            arrays = mask_rows(arrays, np.arange(per) < real, self.labels)
        return Batch(arrays, len(padded), len(numbers), real, _examples(mine[:real]))

    def _joined(self, arrays: Arrays, numbers: np.ndarray) -> Batch:
        """Of a collator that puts several examples into a row, as flattening does: nothing is filled up."""
        rows = len(next(iter(arrays.values())))
        if self.pieces > 1:
            raise ValueError(f"the collator makes {rows} rows of {len(numbers)} examples, which several processes cannot share; pack them")
        return Batch(arrays, rows, rows, rows, _examples(numbers))

    def collate(self, numbers: np.ndarray) -> Arrays:
        examples = [self.dataset[int(number)] for number in numbers]
        if self.columns is not None:
            keep = self.columns | {"label", "label_ids"}
            examples = [{name: value for name, value in example.items() if name in keep} for example in examples]
            if not examples[0]:
                raise ValueError(
                    f"an example has {', '.join(self.dataset[int(numbers[0])])}, nothing of which the model takes; "
                    "remove_unused_columns=False keeps them for the collator"
                )
        step = {"step": self.number} if draws(self.collator) else {}
        return {name: np.asarray(value) for name, value in self.collator(examples, **step).items()}

    def share(self, max_steps: int) -> float:
        """How much of the epoch is done, counted in parts as HF does."""
        return -(-self.row // self.part) / -(-self.examples // self.part)

    def at_end(self) -> bool:
        return self.row >= self.examples

    def restart(self) -> None:
        self.row = 0

    def position(self) -> dict[str, Any]:
        return {"row": self.row, **self.about}

    def set_position(self, saved: Mapping[str, Any]) -> None:
        """ValueError when what was saved is of another dataset or order."""
        if "row" not in saved:
            raise ValueError("the checkpoint stopped in an iterable, and this is a dataset with a length")
        differing = differences({name: value for name, value in saved.items() if name != "row"}, self.about)
        if differing:
            raise ValueError(f"the train dataset is not the one that the checkpoint stopped in: {differing}")
        self.row = int(saved["row"])


def _examples(numbers: np.ndarray) -> str:
    return f"examples {', '.join(str(number) for number in numbers[:32])}{', …' if len(numbers) > 32 else ''}"


class Stream:
    """Batches that an iterable makes: this process's share (process_share) of each step's rows. Its iterator's get_state and set_state are
    the position; without them resuming skips the batches that were read."""

    examples: int | None = None

    def __init__(self, iterable: Any, *, labels: Sequence[str], rules: Rules | None = None):
        self.iterable, self.labels = iterable, labels
        self.piece, self.pieces = process_share(rules)
        self.steps = len(iterable) if hasattr(iterable, "__len__") else None
        self.iterator: Any = None
        self.read = self.rows = 0

    def epoch(self, epoch: int) -> Iterator[Batch]:
        if self.iterator is None:
            self.iterator = iter(self.iterable)
        for arrays in self.iterator:
            self.read += 1
            yield self.make({name: np.asarray(value) for name, value in arrays.items()})

    def share(self, max_steps: int) -> float:
        return self.read / (self.steps or max_steps)

    def at_end(self) -> bool:
        return self.steps is not None and self.read >= self.steps

    def restart(self) -> None:
        self.iterator, self.read = None, 0

    def make(self, arrays: Arrays) -> Batch:
        real = len(next(iter(arrays.values())))
        self.rows = self.rows or real
        if real < self.rows and can_mask(arrays, self.labels):
            arrays = {name: np.concatenate([a, np.repeat(a[:1], self.rows - real, 0)]) for name, a in arrays.items()}
            arrays = mask_rows(arrays, np.arange(self.rows) < real, self.labels)
        rows = len(next(iter(arrays.values()))) * self.pieces
        return Batch(arrays, rows, real * self.pieces, real, f"batch {self.read} of the iterable's pass")

    def position(self) -> dict[str, Any]:
        """Of every share: processes that pack stand at different places after as many batches. All of them make this call."""
        state = self.iterator.get_state() if hasattr(self.iterator, "get_state") else None
        coded = {"bytes": b64encode(state).decode()} if isinstance(state, bytes) else {"value": state}
        mine = {"read": self.read, "rows": self.rows, "state": coded}
        if self.pieces == 1:
            return {"shares": [mine]}
        shares = dict(json.loads(text) for text in from_all("the position in the data", json.dumps([self.piece, mine])))
        return {"shares": [shares[piece] for piece in range(self.pieces)]}

    def set_position(self, saved: Mapping[str, Any]) -> None:
        """ValueError when what was saved is of a dataset, or of other shares."""
        if "state" in saved and self.pieces == 1:  # as the first version noted it
            saved = {"shares": [saved]}
        if "shares" not in saved:
            found = "an iterable of one process's rows" if "state" in saved else "a dataset with a length"
            raise ValueError(f"the checkpoint stopped in {found}, and this is an iterable in {self.pieces} shares")
        if len(saved["shares"]) != self.pieces:
            raise ValueError(
                f"the checkpoint stopped in a stream that came in {len(saved['shares'])} processes' shares; now there are {self.pieces}, "
                "which would read some rows twice and others never"
            )
        mine = saved["shares"][self.piece]
        self.read, self.rows, self.iterator = int(mine["read"]), int(mine["rows"]), iter(self.iterable)
        coded = mine["state"]
        state = b64decode(coded["bytes"]) if "bytes" in coded else coded["value"]
        if state is not None and hasattr(self.iterator, "set_state"):
            self.iterator.set_state(state)
        else:
            for _ in range(self.read):
                next(self.iterator)


def batch_devices(model: Any) -> int:
    """Over how many devices the rows of a batch are spread."""
    return 1 if model.rules is None else int(model.rules.row_pieces)


def put(model: Any, batch: Batch) -> dict[str, jax.Array]:
    """The whole batch on the model's devices, as global_batch puts it there; on every one what does not divide, at the end of an epoch."""
    rules, arrays = model.rules, {name: array.astype(jax.dtypes.canonicalize_dtype(array.dtype)) for name, array in batch.arrays.items()}
    if rules is None:
        return jax.device_put(arrays)
    if batch.rows % rules.row_pieces and all(len(array) == batch.rows for array in arrays.values()):
        here = rules.sharding((), ())
        return {name: jax.make_array_from_process_local_data(here, array, array.shape) for name, array in arrays.items()}
    return global_batch(rules, arrays)
