"""What a generation's scores say about its tokens.

Axis letters: R rows of the result, M rows that were decoded (beams), N new tokens, V vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np


def compute_transition_scores(sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False) -> np.ndarray:
    """The score of every generated token, float32 [R,N]: HF's compute_transition_scores.

    sequences [R,T+N], scores [N,M,V] and, of beams, beam_indices [R,N] as `generate` returns them; 0 after the end of a beam.
    normalize_logits: log-probabilities over the vocabulary instead of the scores as they are."""
    sequences, scores = np.asarray(sequences), np.asarray(scores, np.float32)
    steps, rows, _ = scores.shape
    beams = np.broadcast_to(np.arange(rows)[:, None], (rows, steps)) if beam_indices is None else np.asarray(beam_indices)
    if beam_indices is None and len(sequences) != rows:
        raise ValueError(f"{len(sequences)} sequences and scores of {rows} rows: beam search needs its beam_indices")
    longest = int((beams >= 0).sum(1).max())
    beams = beams[:, :longest]
    tokens = sequences[:, sequences.shape[1] - longest :]
    at = np.arange(longest), np.maximum(beams, 0)
    found = scores[*at, tokens]
    if normalize_logits:
        top = scores.max(-1)
        total = np.log(np.exp(scores - top[..., None]).sum(-1)) + top
        found = found - total[at]
    return np.where(beams >= 0, found, 0).astype(np.float32)
