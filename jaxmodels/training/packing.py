"""Documents of uneven lengths into rows of one length, for a model called with `segment_ids`.

Axis letters: R rows, T tokens of a row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from jaxmodels.ops.loss import IGNORE


def pack_documents(
    documents: Sequence[np.ndarray], length: int, *, labels: Sequence[np.ndarray] | None = None, pad_token_id: int = 0
) -> dict[str, np.ndarray]:
    """{"input_ids", "labels", "segment_ids"}, each [R, length] int32, of documents of token ids: whole documents only, each in the fullest
    row that still has room, the longest first (best fit decreasing), in an order that depends on the lengths alone.

    labels: as long as their documents, by default the ids. Padding has segment 0, label -100, `pad_token_id`. ValueError names a document
    that is longer than a row, empty, or not as long as its labels."""
    targets = documents if labels is None else labels
    for i, (document, target) in enumerate(zip(documents, targets, strict=True)):
        if not 0 < len(document) <= length or len(target) != len(document):
            raise ValueError(
                f"document {i} has {len(document)} tokens and {len(target)} labels; expected 1 to {length} of both: cut or drop it"
            )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), rising
    for i in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        place = bisect.bisect_left(room, (len(documents[i]), -1))
        left, row = room.pop(place) if place < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (left - len(documents[i]), row))
    out = {"input_ids": pad_token_id, "labels": IGNORE, "segment_ids": 0}
    packed = {name: np.full((len(rows), length), fill, np.int32) for name, fill in out.items()}
    for r, inside in enumerate(rows):
        start = 0
        for number, i in enumerate(inside, 1):
            stop = start + len(documents[i])
            packed["input_ids"][r, start:stop], packed["labels"][r, start:stop] = documents[i], targets[i]
            packed["segment_ids"][r, start:stop] = number
            start = stop
    return packed
