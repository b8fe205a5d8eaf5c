"""Text to token ids and back, over the `tokenizers` library, with Hugging Face's names and files.

Axis letters: B texts, T tokens."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from jaxmodels.processing.batch import BatchEncoding
from jaxmodels.processing.chat import ChatTemplates
from jaxmodels.processing.texts import at_least_0, one_of, read_texts, refused
from jaxmodels.processing.vocabulary import SPECIAL_TOKENS, Token, Vocabulary, id_list

NO_LIMIT = int(1e30)  # model_max_length where the checkpoint names none
PLAIN_CLASS = "PreTrainedTokenizerFast"  # the class name under which every transformers version reads tokenizer.json as it stands
TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
PADDING = ("longest", "max_length", "do_not_pad")
PAD_VALUES = {"attention_mask": 0, "special_tokens_mask": 1, "token_type_ids": 0}

logger = logging.getLogger(__name__)


class Tokenizer(Vocabulary, ChatTemplates):
    """A tokenizer. `AutoTokenizer.from_pretrained(path)` loads one; `Tokenizer(tokenizer_file="tokenizer.json")` makes one.

    Calling it gives int32 numpy arrays `input_ids` and `attention_mask`, [B, T], that go straight into a model:

        batch = tokenizer(["one text", "another, longer text"], padding=True)

    Args:
        tokenizer_object: a `tokenizers.Tokenizer` (copied unless `copy=False`); or
        tokenizer_file: a tokenizer.json.
        bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token: special tokens, added if new; any other
            `<name>_token` becomes an attribute too.
        extra_special_tokens: more special tokens, or a dictionary of named ones (`additional_special_tokens` is the older name).
        padding_side: "left" unless given. Generation continues a row at its end, so padding belongs at its start. Encoder
            classes (Bert, Roberta, T5, ...) come from `from_pretrained` with "right", as in transformers.
        truncation_side: "right" unless given.
        model_max_length: the length that truncation=True cuts to.
        add_bos_token, add_eos_token: write the token before/after every text, in place of the file's post-processor.
        Everything else is kept and written back by `save_pretrained`.

    One tokenizer may be called from several threads."""

    is_fast = True
    pad_token_type_id = 0

    def __init__(
        self,
        tokenizer_object: Backend | None = None,
        tokenizer_file: str | os.PathLike | None = None,
        *,
        tokenizer_class: str = PLAIN_CLASS,
        added_tokens: Mapping[int, AddedToken] | None = None,
        copy: bool = True,
        **options: Any,
    ):
        if (tokenizer_object is None) == (tokenizer_file is None):
            raise ValueError("give tokenizer_object or tokenizer_file (one of them); AutoTokenizer.from_pretrained(path) loads a directory")
        if tokenizer_object is None:
            self._backend = read_backend(Path(tokenizer_file or ""))
        else:
            self._backend = deepcopy(tokenizer_object) if copy else tokenizer_object
        self._lock = threading.Lock()
        self._warned_length = False
        self.tokenizer_class = tokenizer_class
        # Truncation and padding are set per call; what the file holds is remembered for its defaults and for saving.
        self._file_truncation, self._file_padding = self._backend.truncation, self._backend.padding
        self._backend.no_truncation()
        self._backend.no_padding()
        truncation, padding = self._file_truncation or {}, self._file_padding or {}
        if padding:
            options.setdefault("pad_token", padding["pad_token"])

        self._named: dict[str, Token | None] = dict.fromkeys(SPECIAL_TOKENS)
        self._extra: list[Token] = []
        extra = options.pop("additional_special_tokens", None)
        extra = options.pop("extra_special_tokens", None) or extra or []
        if isinstance(extra, Mapping):
            options, extra = {**options, **extra}, []
        self.extra_special_tokens = extra
        for name in list(options):
            if name in SPECIAL_TOKENS or (name.endswith("_token") and isinstance(options[name], (str, AddedToken))):
                self._set_named(name, options.pop(name))

        self.name_or_path: str = options.pop("name_or_path", "")
        self.model_max_length: int = options.pop("model_max_length", None) or NO_LIMIT
        self.padding_side: str = options.pop("padding_side", None) or padding.get("direction", "left")
        self.truncation_side: str = options.pop("truncation_side", None) or truncation.get("direction", "right")
        for name in ("padding_side", "truncation_side"):
            one_of(name, getattr(self, name), ("left", "right"))
        self.model_input_names: list[str] = list(options.pop("model_input_names", ("input_ids", "attention_mask")))
        self.clean_up_tokenization_spaces: bool = bool(options.pop("clean_up_tokenization_spaces", False))
        self.split_special_tokens: bool = bool(options.pop("split_special_tokens", False))
        self.chat_control_tokens: list[str] | None = options.pop("chat_control_tokens", None)
        self.chat_template = options.pop("chat_template", None)
        frame = {name: bool(options.pop(name)) for name in ("add_bos_token", "add_eos_token") if name in options}
        self._add_bos, self._add_eos = frame.get("add_bos_token", False), frame.get("add_eos_token", False)
        self._options = options

        self._register(added_tokens or {})
        if frame or self._backend.post_processor is None:
            self._update_post_processor()

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike, **kwargs: Any) -> Tokenizer:
        """See `AutoTokenizer.from_pretrained`."""
        return AutoTokenizer.from_pretrained(path_or_id, **kwargs)

    # ---- encoding --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        text_pair: str | Sequence[Any] | None = None,
        *,
        text_target: str | Sequence[Any] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = "np",
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_overflowing_tokens: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Encode one text or a batch.

        Args:
            text: a string, or a list of strings (or of pairs of strings). With `is_split_into_words` a text is a list of words.
            text_pair: the second text, or one for each text of the batch.
            text_target: what is to be said of `text`, whose ids become `labels`, encoded by the same options; alone, as `text`.
            add_special_tokens: write the special tokens that the model expects around a text.
            padding: True or "longest" (to the longest row), "max_length" (to `max_length`, else model_max_length), False.
            truncation: True or "longest_first", "only_first", "only_second" (which text of a pair is cut); cuts to `max_length`,
                else model_max_length. `max_length` alone, without padding, cuts too.
            stride: with `return_overflowing_tokens`, how many tokens a row repeats of the row before.
            return_tensors: "np" (int32 numpy, [B, T] also for one text), "jax", or None for Python lists, unbatched for one text.
            return_overflowing_tokens: what truncation cut off follows as further rows; `overflow_to_sample_mapping` [B] names their text.
            return_offsets_mapping: `offset_mapping` [B, T, 2], the characters [start, end) of each token.
            split_special_tokens: True takes special tokens in the text as ordinary text.

        Raises ValueError if rows of different lengths should make an array, or if there is no padding token to pad with."""
        if text_target is not None:
            options = {name: value for name, value in locals().items() if name not in ("self", "text", "text_pair", "text_target")}
            targets = self(text_target, **options)
            if text is None:
                return targets
            batch = self(text, text_pair, **options)
            batch["labels"] = targets["input_ids"]
            return batch
        batched = isinstance(text, (list, tuple)) and (not is_split_into_words or (len(text) > 0 and not isinstance(text[0], str)))
        inputs = read_texts(text, text_pair, batched, is_split_into_words)
        at_least_0(stride=stride)
        strategy, cut, max_length = self._strategies(padding, truncation, max_length, pad_to_multiple_of)
        options = {"max_length": max_length, "stride": stride, "strategy": cut, "direction": self.truncation_side}
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        rows = self._encode(inputs, options if cut else None, split, add_special_tokens, is_split_into_words)
        samples = list(range(len(rows)))
        if return_overflowing_tokens:
            samples = [i for i, row in enumerate(rows) for _ in range(1 + len(row.overflowing))]
            rows = [part for row in rows for part in (row, *row.overflowing)]
        self._warn_too_long(rows, max_length)
        if strategy:
            self._pad_rows(rows, max_length if strategy == "max_length" else None, pad_to_multiple_of, padding_side)

        wanted = {
            "input_ids": True,
            "token_type_ids": return_token_type_ids if return_token_type_ids is not None else "token_type_ids" in self.model_input_names,
            "attention_mask": return_attention_mask if return_attention_mask is not None else "attention_mask" in self.model_input_names,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        read = {"input_ids": "ids", "token_type_ids": "type_ids", "offset_mapping": "offsets"}
        data: dict[str, Any] = {key: [getattr(row, read.get(key, key)) for row in rows] for key, want in wanted.items() if want}
        if return_length:
            data["length"] = [len(row.ids) for row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = samples
        elif not batched and return_tensors is None:
            data = {key: value[0] if isinstance(value[0], list) else value for key, value in data.items()}
        return BatchEncoding(data, rows, return_tensors)

    def _encode(self, inputs: list, truncation: dict | None, split: bool, add_special_tokens: bool, words: bool) -> list[Encoding]:
        with self._lock:  # truncation and the handling of special tokens are state of the backend
            self._backend.encode_special_tokens = split
            if truncation:
                self._backend.enable_truncation(**truncation)
            try:
                return self._backend.encode_batch(inputs, is_pretokenized=words, add_special_tokens=add_special_tokens)
            except Exception as error:  # the library raises the bare Exception, and TypeErrors about strings
                raise refused(inputs, error) from error
            finally:
                self._backend.no_truncation()

    def _strategies(
        self, padding: bool | str, truncation: bool | str | None, max_length: int | None, multiple: int | None
    ) -> tuple[str | None, str | None, int | None]:
        """(padding strategy or None, truncation strategy or None, the length both use)."""
        at_least_0(max_length=max_length, pad_to_multiple_of=multiple)
        if truncation is None and max_length is not None and padding is False:
            truncation = True
        pad = padding if isinstance(padding, str) else "longest" if padding else "do_not_pad"
        cut: str | None = truncation if isinstance(truncation, str) else "longest_first" if truncation else "do_not_truncate"
        strategy: str | None = None if one_of("padding", pad, PADDING) == "do_not_pad" else pad
        cut = None if one_of("truncation", cut, TRUNCATION) == "do_not_truncate" else cut
        if strategy == "longest" and cut is None and max_length is not None:
            how = "pass padding='max_length' or truncation=True"
            warnings.warn(f"max_length={max_length} has no effect with padding={padding!r}; {how}", stacklevel=3)
        if max_length is None and (strategy == "max_length" or cut):
            if self.model_max_length >= NO_LIMIT:
                strategy, cut = None if strategy == "max_length" else strategy, None
            else:
                max_length = self.model_max_length
        if strategy and cut and multiple and max_length and max_length % multiple:
            raise ValueError(f"max_length={max_length}, to which rows are cut, is no multiple of pad_to_multiple_of={multiple}")
        if strategy and self.pad_token_id is None:
            raise ValueError(
                "padding needs a padding token and this tokenizer has none; set one: tokenizer.pad_token = tokenizer.eos_token, "
                "or tokenizer.add_special_tokens({'pad_token': '<pad>'}) and a row more in the model's embedding"
            )
        return strategy, cut, max_length

    def _pad_rows(self, rows: list[Encoding], length: int | None, multiple: int | None, side: str | None) -> None:
        side = one_of("padding_side", side or self.padding_side, ("left", "right"))
        width = _round_up(max((len(row.ids) for row in rows), default=0) if length is None else length, multiple)
        for row in rows:
            row.pad(width, direction=side, pad_id=self.pad_token_id, pad_type_id=self.pad_token_type_id, pad_token=self.pad_token)

    def _warn_too_long(self, rows: list[Encoding], max_length: int | None) -> None:
        longest = max((len(row.ids) for row in rows), default=0)
        if max_length is None and longest > self.model_max_length and not self._warned_length:
            self._warned_length = True
            logger.warning("%d tokens where the model takes %d; truncation=True cuts them", longest, self.model_max_length)

    def encode(self, text: Any, text_pair: Any = None, *, return_tensors: str | None = None, **options: Any) -> Any:
        """The token ids of a text as a list; options as for calling."""
        return self(text, text_pair, return_tensors=return_tensors, **options)["input_ids"]

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any) -> list[str]:
        """The token strings of a text."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = "np",
    ) -> BatchEncoding:
        """Pad what was encoded before: a dictionary of rows, or a list of dictionaries (a data loader's batch).

        input_ids, attention_mask, token_type_ids and special_tokens_mask are padded; other keys must be of one length."""
        many = not isinstance(encoded_inputs, Mapping)
        if many and not encoded_inputs:
            raise ValueError("nothing to pad: an empty list")
        given: Any = encoded_inputs
        data = {key: [row[key] for row in given] for key in given[0]} if many else dict(given)
        if "input_ids" not in data:
            raise ValueError(f"pad needs 'input_ids', found {', '.join(map(repr, data)) or 'nothing'}")
        data = {key: id_list(value) for key, value in data.items()}
        single = not many and not (data["input_ids"] and isinstance(data["input_ids"][0], list))
        if single:
            data = {key: [value] for key, value in data.items()}
        rows = data["input_ids"]
        want_mask = "attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask
        if want_mask and "attention_mask" not in data:
            data["attention_mask"] = [[1] * len(row) for row in rows]
        strategy, _, max_length = self._strategies(padding, False, max_length, pad_to_multiple_of)
        if strategy:
            side = one_of("padding_side", padding_side or self.padding_side, ("left", "right"))
            longest = max(map(len, rows))
            width = _round_up(max_length if strategy == "max_length" and max_length else longest, pad_to_multiple_of)
            for key, value in {"input_ids": self.pad_token_id, **PAD_VALUES}.items():
                if key in data:
                    fill = [[value] * (width - len(row)) for row in data[key]]
                    data[key] = [f + row if side == "left" else row + f for f, row in zip(fill, data[key], strict=True)]
        if single and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(data, None, return_tensors)

    # ---- decoding --------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None) -> Any:
        """The text of a sequence of ids (list, numpy or JAX array), or a list of texts for a batch.

        `clean_up_tokenization_spaces` (default: the tokenizer's) removes the spaces before punctuation that WordPiece leaves;
        BPE tokenizers keep their spaces, as in transformers 5. Ids outside the vocabulary decode to nothing."""
        ids = id_list(token_ids) if not isinstance(token_ids, int) else [token_ids]
        if not isinstance(ids, list):
            ids = [ids]
        batched = bool(ids) and isinstance(ids[0], (list, tuple))
        rows = ids if batched else [ids]
        if (lowest := min((number for row in rows for number in row), default=0)) < 0:
            raise ValueError(f"decode: found id {lowest}; ids start at 0 (leave out the -100 that masks labels)")
        texts = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        if self.cleans_up(clean_up_tokenization_spaces):
            texts = [clean_up(text) for text in texts]
        return texts if batched else texts[0]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """The texts of a batch of sequences of ids, [B, T]; see `decode`."""
        texts = self.decode(sequences, skip_special_tokens, **options)
        return [texts] if isinstance(texts, str) else texts

    def cleans_up(self, asked: bool | None = None) -> bool:
        """Whether `decode` removes the spaces before punctuation."""
        return (self.clean_up_tokenization_spaces if asked is None else asked) and type(self._backend.model).__name__ != "BPE"

    # ---- files and training ----------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The text of tokenizer.json, with the truncation and padding that the loaded file had."""
        with self._lock:
            if self._file_truncation:
                self._backend.enable_truncation(**self._file_truncation)
            if self._file_padding:
                self._backend.enable_padding(**self._file_padding)
            try:
                return self._backend.to_str(pretty=True)
            finally:
                self._backend.no_truncation()
                self._backend.no_padding()

    def options_to_save(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, except the chat templates."""
        saved = {**self._options, **self.special_tokens_map}
        for name in ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "tokenizer_class"):
            saved[name] = getattr(self, name)
        optional = {name: getattr(self, name) for name in ("extra_special_tokens", "chat_control_tokens", "split_special_tokens")}
        if self.model_input_names != ["input_ids", "attention_mask"]:
            saved["model_input_names"] = self.model_input_names
        return saved | {name: value for name, value in optional.items() if value}

    def save_pretrained(self, save_directory: str | os.PathLike) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and the chat templates, each atomically; returns their paths.

        `transformers` loads the directory and gives the same ids."""
        from jaxmodels.convert.hub import local_directory
        from jaxmodels.processing.files import write_pretrained

        return write_pretrained(self, local_directory(save_directory))

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[Token] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **trainer_options: Any,
    ) -> Tokenizer:
        """A tokenizer that cuts text by the same rules, with a vocabulary learnt from `text_iterator`.

        Args:
            text_iterator: texts, or batches of texts.
            vocab_size: tokens of the new vocabulary, special tokens included.
            length: how many texts there are, for the progress bar.
            new_special_tokens: further special tokens.
            special_tokens_map: old special token -> new one.
            trainer_options: for the trainer of the `tokenizers` library (min_frequency, show_progress, ...)."""
        from jaxmodels.processing.train import retrain

        return retrain(self, text_iterator, vocab_size, length, new_special_tokens or (), special_tokens_map or {}, trainer_options)

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.name_or_path!r}, {self.tokenizer_class}, {len(self)} tokens, padding_side={self.padding_side!r}, "
            f"special tokens {self.special_tokens_map})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def clean_up(text: str) -> str:
    """Join punctuation and English contractions to the word before."""
    for spaced in CLEAN_UP:
        text = text.replace(spaced, spaced.replace(" ", ""))
    return text


CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def _round_up(length: int, multiple: int | None) -> int:
    return length if not multiple else -(-length // multiple) * multiple


def read_backend(path: Path) -> Backend:
    """A `tokenizers.Tokenizer` from a tokenizer.json. Raises ValueError naming the file if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises the bare Exception
        raise ValueError(f"{path}: not a tokenizer.json that tokenizers can read ({error})") from error


class AutoTokenizer:
    """Loads the tokenizer of a checkpoint: `AutoTokenizer.from_pretrained(path_or_id)`."""

    @staticmethod
    def from_pretrained(
        path_or_id: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Tokenizer:
        """The tokenizer of a directory or of a model on the Hugging Face hub.

        Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja and
        additional_chat_templates/*.jinja; without tokenizer.json the older vocab.json + merges.txt, vocab.txt, or a
        sentencepiece model. Where the tokenizer class fixes more than tokenizer.json says, the class wins, as in transformers 5.

        Args:
            path_or_id: a directory or a hub id.
            revision, token, cache_dir, subfolder, local_files_only: as in the hub's own functions; `variant` concerns weights.
            options: override tokenizer_config.json: padding_side, pad_token, chat_template, add_bos_token, ... (see `Tokenizer`).

        No code of the checkpoint is run, whatever `trust_remote_code` says; `use_fast` has no effect either."""
        from jaxmodels.convert.hub import resolve
        from jaxmodels.processing.files import load_pretrained

        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir, "subfolder": subfolder, "variant": variant}
        path = resolve(path_or_id, local_files_only=local_files_only, weights=False, **hub)
        options = {key: value for key, value in options.items() if key not in ("trust_remote_code", "use_fast")}
        return load_pretrained(path, {"name_or_path": str(path_or_id), **options})


PreTrainedTokenizerFast = Tokenizer
