"""Token healing: the last token of a prompt may be the first part of a longer one that the model would rather write."""

from __future__ import annotations

from typing import Any

import numpy as np

FAVOUR, OWN = 10.0, 1.0  # of all tokens that begin as the last one does, and of the last one itself, in logits


def heal_tokens(generate: Any, input_ids: Any, tokenizer: Any, cache: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """HF's heal_tokens: ids [B,T'] and whether they are real. The prompts are read as text, stripped and tokenised again; the last token
    of each is written anew by `generate(input_ids [1,T], attention_mask, sequence_bias, max_new_tokens=1)`, among all that begin as it
    does. A prompt of a single token is continued from bos."""
    if cache is not None:
        raise ValueError("token_healing reads prompts from their beginning: leave it out, or pass the whole conversation without a cache")
    if tokenizer is None:
        raise ValueError("token_healing reads the prompt as text: pass tokenizer=, the model's tokenizer")
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    if pad is None:
        raise ValueError("token_healing pads prompts again: the tokenizer has no pad_token; set tokenizer.pad_token")
    texts = [text.strip() for text in tokenizer.batch_decode(np.asarray(input_ids), skip_special_tokens=True)]
    ids = np.asarray(tokenizer(texts, padding=True, padding_side="left")["input_ids"], np.int32)
    ids = np.where(ids == bos, pad, ids) if bos is not None else ids
    vocabulary = tokenizer.get_vocab()
    space = tokenizer.tokenize(" ")
    for row in ids:
        if len(row) < 2 or (row == pad).all():
            continue
        last, before = int(row[-1]), row[:-1].copy()
        begin = tokenizer.decode([last])
        begin = begin.replace(" ", space[0][0]) if space else begin
        bias = {(n,): FAVOUR for token, n in vocabulary.items() if token.startswith(begin)}
        if len(bias) <= 1:
            continue
        bias[(last,)] = bias.get((last,), FAVOUR) + OWN
        real = before != pad
        if not real.any():
            before[-1] = bos
            real[-1] = True
        row[-1] = generate(before[None], real[None], sequence_bias=bias, max_new_tokens=1).sequences[0, -1]
    return ids, ids != pad
