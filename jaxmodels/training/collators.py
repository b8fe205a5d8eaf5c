"""HF's data collators by their names: a list of examples, each a dict, becomes a batch of numpy arrays (ids, masks and labels int32).

A collator holds no state. Those that draw take the number of the batch: the same seed, step and examples give the same batch, so a run that
is resumed sees what it would have seen. Tokenizers may be ours or HF's.

Axis letters: B examples, T tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodels.ops.loss import IGNORE

Example = Mapping[str, Any]
Batch = dict[str, np.ndarray]


def draws(collator: Callable[..., Any]) -> bool:
    """Whether a collator takes the number of the batch, `step`, from which its random numbers follow."""
    return "step" in inspect.signature(collator).parameters


def _array(name: str, values: Sequence[Any]) -> np.ndarray:
    if len(shapes := {np.shape(value) for value in values}) > 1:
        found = ", ".join(map(str, sorted(shapes)[:4]))
        raise ValueError(f"{name}: examples of shapes {found} make no array; a collator with padding, or truncation, makes them alike")
    array = np.asarray(values)
    return array.astype({"i": np.int32, "u": np.int32, "f": np.float32}.get(array.dtype.kind, array.dtype))


def _labels_named(batch: dict[str, Any]) -> dict[str, Any]:
    return {"labels" if name in ("label", "label_ids") else name: value for name, value in batch.items()}


def default_data_collator(features: Sequence[Example]) -> Batch:
    """Arrays of the examples' values, in which `label` or `label_ids` is called `labels`; strings and None are left out. The first
    example tells which names there are. ValueError when the values of a name differ in shape."""
    first = features[0]
    names = [name for name, value in first.items() if value is not None and not isinstance(value, str)]
    if "label" in names and "label_ids" in names:
        names.remove("label_ids")
    for feature in features:
        if missing := [name for name in names if name not in feature]:
            raise ValueError(f"an example has no {', '.join(missing)}, which the first of its batch has; it has {', '.join(feature)}")
    return _labels_named({name: _array(name, [feature[name] for feature in features]) for name in names})


def _on_side(rows: Sequence[Any], width: int, fill: Any, side: str) -> np.ndarray:
    """Rows of up to `width` values (each a number or an array) as one array int32 [B, width, …], the rest `fill`."""
    if len(longest := max(rows, key=len)) > width:
        raise ValueError(f"a row of {len(longest)} values does not fit into the {width} of its batch")
    out = np.full((len(rows), width, *np.shape(rows[0])[1:]), fill, np.int32)
    for place, row in zip(out, rows):
        if len(row):
            place[slice(len(row)) if side == "right" else slice(-len(row), None)] = row
    return out


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


@dataclass(frozen=True)
class DataCollatorWithPadding:
    """The tokenizer's `pad`: input_ids, attention_mask and token_type_ids [B,T] to the longest row (padding=True), to max_length
    ("max_length"), and up to a multiple: few lengths mean few compiled programs. Other values must be of one shape."""

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Example]) -> Batch:
        options = {"padding": self.padding, "max_length": self.max_length, "pad_to_multiple_of": self.pad_to_multiple_of}
        named = [dict(feature) for feature in features]
        padded = self.tokenizer.pad(named, **options, return_tensors="np")
        return _labels_named({name: _array(name, value) for name, value in padded.items()})


@dataclass(frozen=True)
class DataCollatorForTokenClassification(DataCollatorWithPadding):
    """With a label for every token, under `label` or `labels`: padded as the ids are, with label_pad_token_id."""

    label_pad_token_id: int = IGNORE

    def __call__(self, features: Sequence[Example]) -> Batch:
        batch, labels = self._without_labels(features)
        if labels is not None:
            batch["labels"] = _on_side(labels, batch["input_ids"].shape[1], self.label_pad_token_id, self.tokenizer.padding_side)
        return batch

    def _without_labels(self, features: Sequence[Example]) -> tuple[Batch, list[Any] | None]:
        names = ("label", "labels")
        batch = super().__call__([{k: v for k, v in feature.items() if k not in names} for feature in features])
        labels = [next((feature[name] for name in names if feature.get(name) is not None), None) for feature in features]
        return batch, None if all(label is None for label in labels) else labels


@dataclass(frozen=True)
class DataCollatorForSeq2Seq(DataCollatorForTokenClassification):
    """With `labels` of lengths of their own [B, T of the labels]; also for causal models whose prompts have labels of -100.

    model: an encoder-decoder; the batch then has its `decoder_input_ids`, the labels shifted right."""

    model: Any = None

    def __call__(self, features: Sequence[Example]) -> Batch:
        batch, labels = self._without_labels(features)
        if labels is None:
            return batch
        longest = max(map(len, labels))
        fixed = self.padding == "max_length" and self.max_length is not None
        width = _round_up(self.max_length if fixed else longest, self.pad_to_multiple_of)  # type: ignore[arg-type]
        batch["labels"] = _on_side(labels, width, self.label_pad_token_id, self.tokenizer.padding_side)
        if self.model is not None:
            batch["decoder_input_ids"] = np.asarray(self.model.shift_right(batch["labels"]), np.int32)
        return batch


@dataclass(frozen=True)
class DataCollatorForLanguageModeling:
    """Labels for language modelling, rows padded to the longest.

    mlm=False: the ids, with -100 for every token that is the padding token (also where that is the end-of-text token, as in HF).
    mlm=True: each token that is not special is chosen with mlm_probability; labels are the chosen tokens and -100; of the chosen,
        mask_replace_prob become the mask token, random_replace_prob any token, the rest stay.
    whole_word_mask: words are chosen, by their first tokens, and every token of them becomes the mask token; examples need
        `offset_mapping`.
    Examples with `special_tokens_mask` say themselves what is special."""

    tokenizer: Any
    mlm: bool = True
    whole_word_mask: bool = False
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("mlm_probability", "mask_replace_prob", "random_replace_prob")}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; expected a share from 0 to 1")
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(f"mask_replace_prob {self.mask_replace_prob} and random_replace_prob {self.random_replace_prob} exceed 1")
        if self.whole_word_mask and not self.mlm:
            raise ValueError("whole_word_mask is a way of masking: it needs mlm=True")
        if self.mlm:
            _mask_token(self.tokenizer)

    def __call__(self, features: Sequence[Example], step: int = 0) -> Batch:
        named = [{name: value for name, value in feature.items() if name != "offset_mapping"} for feature in features]
        batch = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)(named)
        ids, special = batch["input_ids"], batch.pop("special_tokens_mask", None)
        if not self.mlm:
            return batch | {"labels": np.where(ids == _pad_id(self.tokenizer), IGNORE, ids)}
        fixed = np.isin(ids, self.tokenizer.all_special_ids) if special is None else special.astype(bool)
        words = None
        if self.whole_word_mask:
            if "offset_mapping" not in features[0]:
                raise ValueError("whole_word_mask needs examples with offset_mapping: tokenizer(…, return_offsets_mapping=True)")
            rows = [feature["offset_mapping"] for feature in features]
            words = _words(_on_side(rows, ids.shape[1], 0, self.tokenizer.padding_side), fixed)
        masked, labels = self.masked(ids, fixed, np.random.default_rng((self.seed, step)), words)
        return batch | {"input_ids": masked, "labels": labels}

    def masked(self, ids: np.ndarray, fixed: np.ndarray, rng: Any, words: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels [B,T] of ids [B,T], of which those that are `fixed` [B,T] are never chosen; words: the number of each token's
        word in its row, -1 for none."""
        shares = np.where(fixed, 0.0, self.mlm_probability)
        if words is None:
            chosen = rng.binomial(1, shares).astype(bool)
        else:
            first = (words > 0) & (np.diff(words, axis=1, prepend=-1) != 0)
            hit = rng.binomial(1, np.where(first, self.mlm_probability, 0.0)).astype(bool)
            chosen = np.array([np.isin(row, row[h]) for row, h in zip(words, hit)])
        labels = np.where(chosen, ids, IGNORE)
        to_mask, to_random = (1.0, 0.0) if words is not None else (self.mask_replace_prob, self.random_replace_prob)
        replaced = rng.binomial(1, to_mask, ids.shape).astype(bool) & chosen
        inputs = np.where(replaced, self.tokenizer.mask_token_id, ids)
        if to_mask < 1 and to_random > 0:
            drawn = rng.binomial(1, to_random / (1 - to_mask), ids.shape).astype(bool) & chosen & ~replaced
            inputs[drawn] = rng.integers(0, len(self.tokenizer), drawn.sum())
        return inputs.astype(np.int32), labels.astype(np.int32)


def _mask_token(tokenizer: Any) -> None:
    if tokenizer.mask_token is None:
        raise ValueError("this tokenizer has no mask token: choose a causal objective (mlm=False), or set tokenizer.mask_token")


def _pad_id(tokenizer: Any) -> int:
    """An id that equals none where there is no padding token."""
    return -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _words(offsets: np.ndarray, special: np.ndarray) -> np.ndarray:
    """The number of each token's word in its row [B,T] from 1, -1 for special tokens: a word begins where characters lie between a
    token and the one before (offsets [B,T,2]), or that one is special."""
    before, after_special = np.roll(offsets[..., 1], 1, 1), np.roll(special, 1, 1)
    before[:, 0], after_special[:, 0] = -1, False
    begins = ~special & ((offsets[..., 0] != before) | after_special)
    return np.where(special, -1, np.cumsum(begins, 1))


@dataclass(frozen=True)
class DataCollatorForPermutationLanguageModeling:
    """XLNet's objective: spans of 1 to max_span_length tokens, one in each stretch of span / plm_probability, are masked and predicted in
    a random order of the tokens.

    The batch: `input_ids` [B,T], `perm_mask` [B,T,T] float32 (1: row may not see column), `target_mapping` [B,T,T] float32 (the
    identity: the i-th prediction is of the i-th token), `labels` [B,T]. T must be even, since XLNet's memory reuses half of it."""

    tokenizer: Any
    plm_probability: float = 1 / 6
    max_span_length: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        _mask_token(self.tokenizer)

    def __call__(self, features: Sequence[Example], step: int = 0) -> Batch:
        rows = [{"input_ids": feature["input_ids"]} for feature in features]
        return self.masked(DataCollatorWithPadding(self.tokenizer)(rows)["input_ids"], np.random.default_rng((self.seed, step)))

    def masked(self, ids: np.ndarray, rng: Any) -> Batch:
        """The batch of ids [B,T]; rng: integers(low, high) and permutation(n), as numpy's."""
        B, T = ids.shape
        if T % 2:
            raise ValueError(f"rows have {T} tokens; permutation language modelling needs an even number: cut or pad them")
        inside = ~np.isin(ids, self.tokenizer.all_special_ids) & (ids != _pad_id(self.tokenizer))
        chosen = np.zeros((B, T), bool)
        for row in chosen:
            start = 0
            while start < T:
                span = int(rng.integers(1, self.max_span_length + 1))
                stretch = int(span / self.plm_probability)
                first = start + int(rng.integers(0, stretch - span + 1))
                row[first : first + span] = True
                start += stretch
        chosen &= inside
        orders = np.array([rng.permutation(T // 2) for _ in range(B)])
        # Each half has an order of its own. Context comes before all, so that everything sees it and it sees no prediction.
        order = np.where(inside & ~chosen, -1, np.concatenate([orders, orders + T // 2], 1))  # [B, T]
        hidden = (order[:, :, None] <= order[:, None, :]) & chosen[:, None, :]
        return {
            "input_ids": np.where(chosen, self.tokenizer.mask_token_id, ids).astype(np.int32),
            "perm_mask": hidden.astype(np.float32),
            "target_mapping": np.broadcast_to(np.eye(T, dtype=np.float32), (B, T, T)).copy(),
            "labels": np.where(chosen, ids, IGNORE).astype(np.int32),
        }


@dataclass(frozen=True)
class DataCollatorWithFlattening:
    """The examples one after the other in one row [1,T], without padding between them, for a model called with `segment_ids`: 1, 2, … by
    example, where a model of ours keeps them apart. Labels are the examples' own or their ids, `separator_id` for each first token.

    pad_to_multiple_of: the row's end is padded (segment 0, label -100), so that few lengths are compiled; for rows of one length see
    jaxmodels.training.packing."""

    return_position_ids: bool = True
    separator_id: int = IGNORE
    position_ids_start: int = 0
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0

    def __call__(self, features: Sequence[Example]) -> Batch:
        labels = "labels" if "labels" in features[0] else "input_ids"
        lengths = [len(feature["input_ids"]) for feature in features]
        width = _round_up(sum(lengths), self.pad_to_multiple_of)
        row = lambda parts, fill: _on_side([np.concatenate(parts)], width, fill, "right")
        batch = {
            "input_ids": row([feature["input_ids"] for feature in features], self.pad_token_id),
            "labels": row([[self.separator_id, *feature[labels][1:]] for feature in features], IGNORE),
            "segment_ids": row([np.full(n, i) for i, n in enumerate(lengths, 1)], 0),
        }
        if self.return_position_ids:
            batch["position_ids"] = row([np.arange(n) + self.position_ids_start for n in lengths], 0)
        return batch


@dataclass(frozen=True)
class DataCollatorForPreference:
    """Pairs for `dpo_loss`: examples with `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`, `rejected_labels` of any lengths
    become these and `…_attention_mask` [B,T], padded on the right to one T. Reference log-probabilities in the examples stay."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Example]) -> Batch:
        sides = ("chosen", "rejected")
        width = _round_up(max(len(f[f"{side}_input_ids"]) for f in features for side in sides), self.pad_to_multiple_of)
        batch = {name: _array(name, [f[name] for f in features]) for name in features[0] if name.endswith("_logps")}
        for side in sides:
            rows = [feature[f"{side}_input_ids"] for feature in features]
            batch[f"{side}_input_ids"] = _on_side(rows, width, self.pad_token_id, "right")
            batch[f"{side}_attention_mask"] = _on_side([np.ones(len(row)) for row in rows], width, 0, "right")
            batch[f"{side}_labels"] = _on_side([feature[f"{side}_labels"] for feature in features], width, IGNORE, "right")
        return batch
