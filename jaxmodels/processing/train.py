"""New vocabularies from text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from jaxmodels.processing.families import GPT4_SPLIT
from jaxmodels.processing.tokenizer import Tokenizer
from jaxmodels.processing.vocabulary import EXTRA, Token

TRAINERS: dict[str, Any] = {
    "BPE": trainers.BpeTrainer,
    "Unigram": trainers.UnigramTrainer,
    "WordLevel": trainers.WordLevelTrainer,
    "WordPiece": trainers.WordPieceTrainer,
}


def train_bpe(
    texts: Iterable[str] | Iterable[list[str]],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    min_frequency: int = 2,
    split: str = GPT4_SPLIT % "{1,3}",
    show_progress: bool = False,
    **options: Any,
) -> Tokenizer:
    """A byte-level BPE learnt from text: any text can be encoded, and decoding gives it back exactly.

    Args:
        texts: texts, or batches of texts.
        vocab_size: tokens in all; at least 256 bytes and the special tokens.
        special_tokens: get the first ids, in this order. The first is bos_token, eos_token and pad_token unless `options` say otherwise.
        min_frequency: how often a pair must occur to be merged.
        split: the pattern of words, across which nothing is merged (GPT-4's: digits in threes, newlines apart).
        options: for `Tokenizer` (eos_token, chat_template, model_max_length, ...)."""
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and {len(special_tokens)} special tokens take more")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    if special_tokens:
        options = {**dict.fromkeys(("bos_token", "eos_token", "pad_token"), special_tokens[0]), **options}
    return Tokenizer(backend, copy=False, **options)


def retrain(
    tokenizer: Tokenizer,
    texts: Iterable[str] | Iterable[list[str]],
    vocab_size: int,
    length: int | None,
    new_special_tokens: Sequence[Token],
    renamed: Mapping[str, str],
    options: dict[str, Any],
) -> Tokenizer:
    """`Tokenizer.train_new_from_iterator`."""
    spec = json.loads(tokenizer.to_json())
    added, frame, model = spec.pop("added_tokens"), spec.pop("post_processor"), spec["model"]
    kind = model["type"]
    if kind == "Unigram":
        if model["unk_id"] is not None:
            unk = model["vocab"][model["unk_id"]][0]
            options.setdefault("unk_token", renamed.get(unk, unk))
            model |= {"unk_id": 0, "vocab": [[options["unk_token"], 0.0]]}
    else:
        model |= {"vocab": {}} | ({"merges": []} if kind == "BPE" else {})
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
    if kind == "BPE":
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name) is not None:
                options.setdefault(name, model[name])
    steps = spec["pre_tokenizer"] or {}
    if any(step["type"] == "ByteLevel" for step in steps.get("pretokenizers", [steps]) if step):
        options.setdefault("initial_alphabet", pre_tokenizers.ByteLevel.alphabet())

    special: list[Token] = []
    ordinary: dict[int, AddedToken] = {}
    for token in added:
        number, is_special = token.pop("id"), token.pop("special")
        new = AddedToken(**{**token, "content": renamed.get(token["content"], token["content"])})
        if is_special or kind == "Unigram":
            special.append(new)
        else:
            ordinary[number] = new  # not learnt, added after the training
    backend = Backend.from_str(json.dumps(spec))
    trainer = TRAINERS[kind](vocab_size=vocab_size, special_tokens=[*special, *new_special_tokens], **options)
    backend.train_from_iterator(texts, length=length, trainer=trainer)
    if frame is not None:
        trained = json.loads(backend.to_str())
        backend = Backend.from_str(json.dumps({**trained, "post_processor": _renumber(frame, renamed, backend)}))

    saved = tokenizer.options_to_save() | {"tokenizer_class": tokenizer.tokenizer_class, "chat_template": tokenizer.chat_template}
    saved |= {name: renamed.get(token, token) for name, token in tokenizer.special_tokens_map.items()}
    saved[EXTRA[0]] = [*(renamed.get(token, token) for token in tokenizer.extra_special_tokens), *new_special_tokens]
    return Tokenizer(backend, copy=False, added_tokens=ordinary, **saved)


def _renumber(frame: Any, renamed: Mapping[str, str], backend: Backend) -> Any:
    """The post-processor with new names and ids of its special tokens."""

    def number(token: str) -> int:
        if (found := backend.token_to_id(token)) is None:
            raise ValueError(f"the post-processor writes {token!r}, which the new vocabulary lacks; name it in new_special_tokens")
        return found

    if isinstance(frame, list):
        return [_renumber(item, renamed, backend) for item in frame]
    if not isinstance(frame, dict):
        return frame
    frame = {key: _renumber(value, renamed, backend) for key, value in frame.items()}
    if frame.get("type") == "TemplateProcessing":
        for entry in frame["special_tokens"].values():
            entry["tokens"] = [renamed.get(token, token) for token in entry["tokens"]]
            entry["ids"] = [number(token) for token in entry["tokens"]]
    for end in ("cls", "sep"):
        if isinstance(frame.get(end), list):
            token = renamed.get(frame[end][0], frame[end][0])
            frame[end] = [token, number(token)]
    return frame
