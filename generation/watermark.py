"""Watermarks in generated text: favoured "green" tokens (arXiv:2301.10226) with their detector, and SynthID's tournament sampling
(doi:10.1038/s41586-024-08025-4).

The green lists are those of transformers with a CPU generator, number by number; see torch_random.

Axis letters: B rows, C candidates, W columns of tokens, L tokens of a context, V vocabulary, D keys, S the table's size,
T tokens of a text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxmodels.generation.processors_base import Sequences, kind
from jaxmodels.generation.processors_filter import largest
from jaxmodels.generation.torch_random import bits, chosen, is_chosen, permutation
from jaxmodels.generation.wide import Wide, add, least, multiply, remainder, wide

CANDIDATES = 40  # of selfhash: so many of the likeliest tokens can be green
TABLE = 1_000_003
SCHEMES = ("lefthash", "selfhash")
MULTIPLIER = wide(6364136223846793005)
CHUNK = 256


@dataclasses.dataclass(frozen=True)
class WatermarkingConfig:
    """HF's. The greenlist_ratio of the vocabulary that a context's hash chooses gets `bias` more. The hash is of the last token
    (lefthash) or of the last context_width tokens, the candidate among them (selfhash). All but bias and hashing_key is structure."""

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        if self.seeding_scheme not in SCHEMES:
            raise ValueError(f"seeding_scheme is {self.seeding_scheme!r}; expected one of {', '.join(SCHEMES)}")
        if not 0 < self.greenlist_ratio < 1:
            raise ValueError(f"greenlist_ratio is {self.greenlist_ratio}; expected a number between 0 and 1")
        if self.context_width < 1:
            raise ValueError(f"context_width is {self.context_width}; expected an integer above 0")
        if not 0 <= self.hashing_key < 1 << 63:
            raise ValueError(f"hashing_key is {self.hashing_key}; expected an integer from 0, below 2^63")

    def construct_processor(self, vocab_size: int) -> LeftHashWatermark | SelfHashWatermark:
        green = int(vocab_size * self.greenlist_ratio)
        if green < 1:
            raise ValueError(f"greenlist_ratio={self.greenlist_ratio} of {vocab_size} tokens is none")
        if self.seeding_scheme == "lefthash":
            return LeftHashWatermark(np.float32(self.bias), _seeds(self.hashing_key, vocab_size), self.context_width, green)
        return SelfHashWatermark(np.float32(self.bias), wide(self.hashing_key), _table(self.hashing_key), self.context_width, green)


@dataclasses.dataclass(frozen=True)
class SynthIDTextWatermarkingConfig:
    """HF's. `keys`: one for each layer of the tournament, secret; ngram_len: tokens that are hashed, the new one among them. A context
    is not marked again within context_history_size tokens; with skip_first_ngram_calls the first ngram_len - 1 tokens are not marked;
    debug_mode takes all tokens for equally likely. Keys and seed are values, the rest is structure."""

    ngram_len: int
    keys: tuple[int, ...]
    context_history_size: int = 1024
    sampling_table_seed: int = 0
    sampling_table_size: int = 2**16
    skip_first_ngram_calls: bool = False
    debug_mode: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(int(key) for key in self.keys))
        if self.ngram_len < 2:
            raise ValueError(f"ngram_len is {self.ngram_len}; expected an integer above 1")
        if not self.keys or not all(-(1 << 63) <= key < 1 << 63 for key in self.keys):
            raise ValueError(f"keys are {self.keys}; expected at least one integer of 64 bits")
        if not 0 < self.sampling_table_size <= 2**24:
            raise ValueError(f"sampling_table_size is {self.sampling_table_size}; expected an integer above 0, up to 2^24")

    def construct_processor(self, vocab_size: int) -> SynthIDWatermark:
        keys = np.array([wide(key) for key in self.keys], np.uint32)
        return SynthIDWatermark(
            keys, _bits(self.sampling_table_size, self.sampling_table_seed), self.ngram_len, self.context_history_size,
            self.skip_first_ngram_calls, self.debug_mode,
        )  # fmt: skip


def as_watermarking_config(value: Any) -> Any:
    """A configuration of this module's from one, from a dictionary such as a file holds, or from one of transformers'."""
    if value is None or isinstance(value, WatermarkingConfig | SynthIDTextWatermarkingConfig):
        return value
    values = value.to_dict() if hasattr(value, "to_dict") else value
    if not isinstance(values, Mapping):
        raise ValueError(f"watermarking_config is {value!r}; expected a WatermarkingConfig or a SynthIDTextWatermarkingConfig")
    made = SynthIDTextWatermarkingConfig if "ngram_len" in values else WatermarkingConfig
    known = [f.name for f in dataclasses.fields(made)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"watermarking_config has {', '.join(unknown)}; {made.__name__} knows {', '.join(known)}")
    return made(**values)


@struct.dataclass
class LeftHashWatermark:
    """`bias` more for the green tokens after a row's last token, whose seed is in `seeds` [V] uint32."""

    bias: Any
    seeds: Any
    context_width: int = struct.field(pytree_node=False)
    green: int = struct.field(pytree_node=False)
    kind: str = kind("LeftHashWatermark")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        tokens, _ = sequences.last()
        marked = chosen(jnp.asarray(self.seeds)[tokens[:, 0]], logits.shape[1], self.green)
        return logits + jnp.where(marked & _ready(sequences, self.context_width), self.bias, 0)


@struct.dataclass
class SelfHashWatermark:
    """`bias` more for those of the likeliest tokens that are green by a seed of themselves and the tokens before."""

    bias: Any
    key: Any
    table: Any
    context_width: int = struct.field(pytree_node=False)
    green: int = struct.field(pytree_node=False)
    kind: str = kind("SelfHashWatermark")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        B, V = logits.shape
        _, ids = largest(logits, min(CANDIDATES, V))
        before = sequences.tail(self.context_width - 1)[0] if self.context_width > 1 else jnp.zeros((B, 0), jnp.int32)
        windows = jnp.concatenate([jnp.broadcast_to(before[:, None], (*ids.shape, before.shape[1])), ids[..., None]], -1)
        seeds = self.seeds(windows)  # [B,C]
        marked = is_chosen(seeds.reshape(-1), ids.reshape(-1), V, self.green).reshape(ids.shape) & _ready(sequences, self.context_width)
        return logits.at[jnp.arange(B)[:, None], ids].add(jnp.where(marked, self.bias, 0))

    def seeds(self, windows: jax.Array) -> jax.Array:
        """uint32 [...] of windows [...,L]: the smallest product of the key and two table entries, as overflowing signed integers."""
        entries = jnp.asarray(self.table)[windows % TABLE].astype(jnp.uint32) + 1
        zero = jnp.zeros_like(entries)
        product = multiply(multiply(self.key, (zero, entries)), (zero[..., -1:], entries[..., -1:]))
        high, low = least(product, -1)
        return low - (high >> 31)  # torch is given the seed modulo 2^64 - 1


@struct.dataclass
class SynthIDWatermark:
    """Tournament sampling: probabilities after D rounds in which pairs of tokens compete by a hash of the context, themselves and a key.

    `keys` [D,2] uint32: high and low halves; `table` [S] of bits. `compute_g_values` and `compute_context_repetition_mask` are what a
    detector scores."""

    keys: Any
    table: Any
    ngram_len: int = struct.field(pytree_node=False)
    context_history_size: int = struct.field(pytree_node=False)
    skip_first_ngram_calls: bool = struct.field(pytree_node=False, default=False)
    debug_mode: bool = struct.field(pytree_node=False, default=False)
    kind: str = kind("SynthIDWatermark")

    def __call__(self, sequences: Sequences, logits: jax.Array) -> jax.Array:
        scores = jnp.ones_like(logits) if self.debug_mode else logits
        now, repeated = self._context(sequences)
        ids = jnp.arange(logits.shape[1], dtype=jnp.uint32)[None]
        grams = _hash((now[0][:, None], now[1][:, None]), (jnp.zeros_like(ids), ids))  # [B,V]

        def round(i: jax.Array, p: jax.Array) -> jax.Array:
            g = self._g(grams, (jnp.asarray(self.keys)[i, 0], jnp.asarray(self.keys)[i, 1]))
            return p * (1 + g - (g * p).sum(1, keepdims=True))

        p = lax.fori_loop(0, len(self.keys), round, jax.nn.softmax(scores))
        log_p = jnp.log(p)
        marked = jnp.where(jnp.isfinite(log_p), log_p, jnp.finfo(jnp.float32).min)
        skipped = self.skip_first_ngram_calls & (sequences.new + 1 < self.ngram_len)
        return jnp.where(repeated[:, None] | jnp.reshape(skipped, (-1, 1)), scores, marked)

    def _context(self, sequences: Sequences) -> tuple[Wide, jax.Array]:
        """The hash of each row's last ngram_len - 1 generated tokens [B], zeros before them, and whether it was one of a step before."""
        W = sequences.tokens.shape[1] + 1
        column, first = jnp.arange(W), jnp.reshape(sequences.width - sequences.new, (-1, 1))
        tokens = jnp.pad(sequences.tokens, ((0, 0), (0, 1)))
        tokens = jnp.where(column >= first, tokens, 0)
        high, low = self._hashes(tokens)
        at = lambda x: lax.dynamic_index_in_dim(x, sequences.width, 1, keepdims=False)
        now = at(high), at(low)
        calls = column - first  # steps before this one
        counted = (calls >= (self.ngram_len - 1 if self.skip_first_ngram_calls else 0)) & (column < sequences.width)
        seen = counted & (column >= sequences.width - self.context_history_size)
        repeated = (seen & (high == now[0][:, None]) & (low == now[1][:, None])).any(1)
        empty = (counted.sum(1) < self.context_history_size) & (now[0] == 0) & (now[1] == 0)  # the reference's history begins as zeros
        return now, repeated | empty

    def _hashes(self, tokens: jax.Array) -> Wide:
        """For each column of tokens [B,W] the hash of the ngram_len - 1 columns before it, zeros before the first."""
        L = self.ngram_len - 1
        before = jnp.pad(tokens, ((0, 0), (L, 0))).astype(jnp.uint32)
        value: Wide = (jnp.zeros(tokens.shape, jnp.uint32), jnp.ones(tokens.shape, jnp.uint32))
        for i in range(L):
            part = before[:, i : i + tokens.shape[1]]
            value = _hash(value, (jnp.zeros_like(part), part))
        return value

    def _g(self, grams: Wide, key: Wide) -> jax.Array:
        """float32 [...]: the bits of n-gram hashes [...] under a key."""
        size = len(self.table)
        if size & (size - 1) == 0:  # the low half decides alone
            place = ((grams[1] + key[1]) * MULTIPLIER[1] + 1) & jnp.uint32(size - 1)
        else:
            place = remainder(_hash(grams, key), size)
        return jnp.asarray(self.table)[place].astype(jnp.float32)

    def compute_g_values(self, input_ids: Any) -> jax.Array:
        """[B, T - ngram_len + 1, D] of 0 and 1, for each n-gram of input_ids [B,T]."""
        ids = jnp.asarray(input_ids)
        high, low = self._hashes(ids)
        ids = ids[:, self.ngram_len - 1 :].astype(jnp.uint32)
        grams = _hash((high[:, self.ngram_len - 1 :], low[:, self.ngram_len - 1 :]), (jnp.zeros_like(ids), ids))
        keys = jnp.asarray(self.keys)
        return self._g((grams[0][..., None], grams[1][..., None]), (keys[:, 0], keys[:, 1])).astype(jnp.int32)

    def compute_context_repetition_mask(self, input_ids: Any) -> jax.Array:
        """bool [B, T - ngram_len + 1]: the n-gram's context is a new one within context_history_size."""
        L = self.ngram_len - 1
        high, low = (x[:, L:] for x in self._hashes(jnp.asarray(input_ids)))
        steps = jnp.arange(high.shape[1])
        back = steps[:, None] - steps
        seen = (back > 0) & (back <= self.context_history_size)
        equal = (high[:, :, None] == high[:, None]) & (low[:, :, None] == low[:, None])
        empty = (high == 0) & (low == 0) & (steps < self.context_history_size)
        return ~((equal & seen).any(-1) | empty)


@struct.dataclass
class WatermarkDetectorOutput:
    """Of each row [B]: tokens scored and green ones, their fraction, the standard score, its one-sided p-value, whether it exceeds the
    threshold, and 1 - p_value."""

    num_tokens_scored: np.ndarray
    num_green_tokens: np.ndarray
    green_fraction: np.ndarray
    z_score: np.ndarray
    p_value: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray


class WatermarkDetector:
    """Counts green tokens, as HF's detector does: `detector(input_ids [B,T], z_threshold=3.0, return_dict=False)`.

    ignore_repeated_ngrams: every n-gram counts once a row. A leading bos_token_id of the model is left out."""

    def __init__(self, model_config: Any, watermarking_config: Any, ignore_repeated_ngrams: bool = False) -> None:
        self.config: WatermarkingConfig = as_watermarking_config(watermarking_config)
        encodes = getattr(model_config, "is_encoder_decoder", False)
        self.bos_token_id = model_config.decoder_start_token_id if encodes else model_config.bos_token_id
        self.vocab_size = model_config.vocab_size
        self.ignore_repeated_ngrams = ignore_repeated_ngrams
        self.processor = self.config.construct_processor(self.vocab_size)

    def __call__(self, input_ids: Any, z_threshold: float = 3.0, return_dict: bool = False) -> WatermarkDetectorOutput | np.ndarray:
        ids = np.asarray(input_ids)
        begins = ids[:, 0] == self.bos_token_id
        if begins.any() != begins.all():
            raise ValueError(f"rows {np.flatnonzero(begins).tolist()} begin with bos_token_id={self.bos_token_id} and the others do not")
        ids = ids[:, 1:] if begins.any() else ids
        if ids.shape[1] <= self.config.context_width:
            raise ValueError(f"{ids.shape[1]} tokens: the first context_width={self.config.context_width} of a text cannot be scored")
        scored, green = self._count(ids)
        ratio = self.config.greenlist_ratio
        z = (green - ratio * scored) / np.sqrt(scored * ratio * (1 - ratio))
        if not return_dict:
            return z > z_threshold
        p = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in z])
        return WatermarkDetectorOutput(scored, green, green / scored, z, p, z > z_threshold, 1 - p)

    def _count(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """N-grams and green ones of each row, float64 [B]."""
        width = self.config.context_width + (self.config.seeding_scheme == "lefthash")
        windows = np.lib.stride_tricks.sliding_window_view(ids, width, axis=1)  # [B,n,width]
        each, which = np.unique(windows.reshape(-1, width), axis=0, return_inverse=True)
        green = np.zeros(len(each), bool)
        for start in range(0, len(each), CHUNK):
            part = each[start : start + CHUNK]
            padded = np.pad(part, ((0, CHUNK - len(part)), (0, 0)))
            green[start : start + CHUNK] = np.asarray(_green(self.processor, padded, self.vocab_size))[: len(part)]
        rows = which.reshape(windows.shape[:2])
        if self.ignore_repeated_ngrams:
            found = [np.unique(row) for row in rows]
            return np.array([float(len(row)) for row in found]), np.array([float(green[row].sum()) for row in found])
        return np.full(len(ids), float(windows.shape[1])), green[rows].sum(1).astype(float)


@functools.partial(jax.jit, static_argnums=2)
def _green(processor: Any, windows: jax.Array, vocab_size: int) -> jax.Array:
    """Whether the last token of windows [n,L] is green after the others, bool [n]."""
    left = isinstance(processor, LeftHashWatermark)
    seeds = jnp.asarray(processor.seeds)[windows[:, -2]] if left else processor.seeds(windows)
    return is_chosen(seeds, windows[:, -1], vocab_size, processor.green)


def _hash(value: Wide, data: Wide) -> Wide:
    return add(multiply(add(value, data), MULTIPLIER), (jnp.uint32(0), jnp.uint32(1)))


def _ready(sequences: Sequences, width: int) -> jax.Array:
    """[B,1]: the row has at least `width` tokens."""
    return (sequences.real.sum(1) >= width)[:, None]


@functools.lru_cache(maxsize=8)
def _seeds(key: int, vocab_size: int) -> np.ndarray:
    return np.array([key * token % ((1 << 64) - 1) & 0xFFFFFFFF for token in range(vocab_size)], np.uint32)


@functools.lru_cache(maxsize=8)
def _table(key: int) -> jax.Array:
    with jax.ensure_compile_time_eval():  # what is kept must not belong to a trace
        return jnp.asarray(permutation(TABLE, key).astype(np.int32))


@functools.lru_cache(maxsize=8)
def _bits(size: int, seed: int) -> np.ndarray:
    return bits(size, seed)
