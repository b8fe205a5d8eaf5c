"""Streamers: objects with `put(tokens)` and `end()` that `generate` hands the prompt [B,T] and then each new token [B]."""

from __future__ import annotations

from queue import Queue
from typing import Any, Self

import numpy as np

from jaxmodels.processing.stream import IncrementalDecoder


class TextStreamer:
    """Prints the text of one sequence as it comes, never half a character. Subclasses override `on_finalized_text`.

    skip_prompt: leave the prompt out; skip_special_tokens: as in `tokenizer.decode`."""

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, *, skip_special_tokens: bool = False) -> None:
        self.skip_prompt = skip_prompt
        self.decoder = IncrementalDecoder(tokenizer, skip_special_tokens)
        self.at_prompt = True

    def put(self, value: Any) -> None:
        """Tokens: a prompt [1,T] or [T] first, then [1] each. ValueError for more than one row."""
        value = np.asarray(value)
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"a text streamer follows one sequence; found a batch of {value.shape[0]}")
        skipped = self.skip_prompt and self.at_prompt
        self.at_prompt = False
        if not skipped:
            self.on_finalized_text("".join(self.decoder.add(int(token)) for token in value.reshape(-1)))

    def end(self) -> None:
        """Hand out what is left and be ready for another prompt."""
        self.at_prompt = True
        self.on_finalized_text(self.decoder.flush(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Iterate over the text in one thread while `generate` runs in another. timeout: seconds to wait for the next piece, queue.Empty
    after that; None waits as long as it takes."""

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, *, skip_special_tokens: bool = False
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens)
        self.timeout = timeout
        self.queue: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.queue.put(text)
        if stream_end:
            self.queue.put(None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        text = self.queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text
