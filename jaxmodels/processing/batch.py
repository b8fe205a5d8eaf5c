"""What a tokenizer call returns: named arrays, plus the way back from tokens to words and characters.

Axis letters: B texts, T tokens."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding


class CharSpan(NamedTuple):
    """Characters [start, end) of the original text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens [start, end) of one row."""

    start: int
    end: int


def to_arrays(data: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Every value as an int32 array of numpy (`kind="np"`) or JAX (`"jax"`); rows must have one length.

    Raises ValueError for ragged rows and for an unknown kind."""
    if kind not in ("np", "jax"):
        raise ValueError(f"return_tensors={kind!r}: expected 'np' (numpy), 'jax', or None for Python lists")
    arrays: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, (list, tuple)) and len(lengths := {len(row) for row in value if isinstance(row, Sequence)}) > 1:
            raise ValueError(
                f"{key}: rows of {len(lengths)} different lengths ({min(lengths)} to {max(lengths)}) make no array; "
                "pass padding=True (and truncation=True with max_length=... to cut), or return_tensors=None for lists"
            )
        array = np.asarray(value)
        arrays[key] = array.astype(np.int32) if array.dtype.kind in "iub" or array.size == 0 else array
    if kind == "jax":
        import jax.numpy as jnp

        arrays = {key: jnp.asarray(value) for key, value in arrays.items()}
    return arrays


class BatchEncoding(UserDict):
    """A dictionary whose keys are also attributes: `batch.input_ids` is `batch["input_ids"]`, int32 [B, T].

    `batch[i]` with a number is the `tokenizers.Encoding` of row i. The methods below take `(batch_index, index)`, or
    only `index` for row 0, and exist where the batch came straight from a tokenizer call (not from `pad`)."""

    def __init__(self, data: Mapping[str, Any] | None = None, encodings: list[Encoding] | None = None, return_tensors: str | None = None):
        super().__init__(to_arrays(data or {}, return_tensors) if return_tensors else data)
        self.encodings = encodings

    def __getitem__(self, item: str | int | slice) -> Any:
        if isinstance(item, str):
            return self.data[item]
        if isinstance(item, slice):
            return {key: value[item] for key, value in self.data.items()}
        return self._row(item)

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # absent while unpickling
        if name in data:
            return data[name]
        raise AttributeError(f"BatchEncoding has no {name!r}; it holds {', '.join(data) or 'nothing'}")

    def convert(self, return_tensors: str | None) -> None:
        """Turn values that are still lists into arrays, in place; None leaves them."""
        if return_tensors:
            self.data |= to_arrays({key: value for key, value in self.data.items() if isinstance(value, list)}, return_tensors)

    @property
    def n_sequences(self) -> int | None:
        """1 for single texts, 2 for pairs, None if unknown."""
        return self.encodings[0].n_sequences if self.encodings else None

    def _row(self, index: int) -> Encoding:
        if self.encodings is None:
            raise ValueError("this batch does not remember its texts (it was padded or built by hand); use the tokenizer call's own result")
        return self.encodings[index]

    def _at(self, first: int, second: int | None) -> tuple[Encoding, int]:
        row, index = (0, first) if second is None else (first, second)
        return self._row(row), index

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The token strings of a row."""
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the number of its word; None for special tokens and padding."""
        return self._row(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token 0 (first text) or 1 (second text of a pair); None for special tokens and padding."""
        return self._row(batch_index).sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, index = self._at(batch_or_token_index, token_index)
        return encoding.token_to_sequence(index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, index = self._at(batch_or_token_index, token_index)
        return encoding.token_to_word(index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        encoding, index = self._at(batch_or_token_index, token_index)
        span = encoding.token_to_chars(index)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0) -> TokenSpan | None:
        encoding, index = self._at(batch_or_word_index, word_index)
        span = encoding.word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0) -> CharSpan | None:
        encoding, index = self._at(batch_or_word_index, word_index)
        span = encoding.word_to_chars(index, sequence_index)
        return None if span is None else CharSpan(*span)

    def char_to_token(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int | None:
        encoding, index = self._at(batch_or_char_index, char_index)
        return encoding.char_to_token(index, sequence_index)

    def char_to_word(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int | None:
        encoding, index = self._at(batch_or_char_index, char_index)
        return encoding.char_to_word(index, sequence_index)
