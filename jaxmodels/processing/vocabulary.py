"""Special tokens, added tokens and the mapping between tokens and ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxmodels.processing.families import bos_eos_frame

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # today's name, the older name
Token = str | AddedToken


def id_list(ids: Any) -> list:
    """Token ids as (nested) Python lists, from lists, numpy or JAX arrays."""
    return ids.tolist() if hasattr(ids, "tolist") else [id_list(row) if hasattr(row, "tolist") else row for row in ids]


def _token(name: str) -> Any:
    def get(self: Vocabulary) -> str | None:
        token = self._named.get(name)
        return None if token is None else str(token)

    return property(
        get, lambda self, value: self._set_named(name, value), doc=f"The {name}, or None. Assigning does not add it to the vocabulary."
    )


def _token_id(name: str) -> Any:
    def get(self: Vocabulary) -> int | None:
        token = self._named.get(name)
        return None if token is None else self.convert_tokens_to_ids(str(token))

    def put(self: Vocabulary, value: int | None) -> None:
        self._set_named(name, None if value is None else self.convert_ids_to_tokens(value))

    return property(get, put, doc=f"The id of the {name}, or None.")


def _special(token: Token) -> AddedToken:
    return AddedToken(token, normalized=False, special=True) if isinstance(token, str) else token


class Vocabulary:
    """The part of a tokenizer that knows tokens; see `Tokenizer`."""

    _backend: Backend
    _named: dict[str, Token | None]
    _extra: list[Token]
    _add_bos: bool
    _add_eos: bool

    bos_token, bos_token_id = _token("bos_token"), _token_id("bos_token")
    eos_token, eos_token_id = _token("eos_token"), _token_id("eos_token")
    unk_token, unk_token_id = _token("unk_token"), _token_id("unk_token")
    sep_token, sep_token_id = _token("sep_token"), _token_id("sep_token")
    pad_token, pad_token_id = _token("pad_token"), _token_id("pad_token")
    cls_token, cls_token_id = _token("cls_token"), _token_id("cls_token")
    mask_token, mask_token_id = _token("mask_token"), _token_id("mask_token")

    def _set_named(self, name: str, value: Token | None) -> None:
        if value is not None and not isinstance(value, (str, AddedToken)):
            raise TypeError(f"{name}: expected a string or an AddedToken, found {type(value).__name__}")
        self._named[name] = value

    def __getattr__(self, name: str) -> Any:
        named = self.__dict__.get("_named", {})  # absent while unpickling
        if name in named:
            return _token(name).fget(self)
        if name.endswith("_token_id") and name.removesuffix("_id") in named:
            return _token_id(name.removesuffix("_id")).fget(self)
        raise AttributeError(f"Tokenizer has no attribute {name!r}")

    def _register(self, added: Mapping[int, AddedToken]) -> None:
        """Add `added` in the order of their ids, then the special tokens that the vocabulary does not mark as added."""
        tokens: list[Token] = [added[number] for number in sorted(added)]
        known = {*self.added_tokens_encoder, *map(str, tokens)}
        # A token named twice with different flags is added twice, and the last flags hold: transformers does so.
        for token in [*self._named.values(), *self._extra]:
            if token is not None and str(token) not in known and token not in tokens:
                tokens.append(token)
        named = {str(token) for token in self._named.values() if token is not None}
        new = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
        for token in new:
            token.special = token.special or str(token) in named
        if new:
            self._backend.add_tokens(new)

    def add_tokens(self, new_tokens: Token | Sequence[Token], special_tokens: bool = False) -> int:
        """Add tokens to the vocabulary; returns how many were new. The model's embedding must have as many rows as `len(tokenizer)`."""
        tokens = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        return self._backend.add_special_tokens(tokens) if special_tokens else self._backend.add_tokens(tokens)

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Set special tokens by name ("pad_token", ..., "extra_special_tokens": [...]) and add them; returns how many were new."""
        tokens: list[Token] = []
        for name, value in special_tokens_dict.items():
            if name in EXTRA:
                new: list[Token] = [_special(t) for t in value if replace_extra_special_tokens or str(t) not in self.extra_special_tokens]
                self._extra = new if replace_extra_special_tokens and new else self._extra + new
                tokens += new
            elif name in self._named:
                self._set_named(name, token := _special(value))
                tokens.append(token)
            else:
                raise ValueError(f"{name!r} is no special token; expected one of {', '.join(self._named)}, extra_special_tokens")
        return self.add_tokens(tokens, special_tokens=True)

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name."""
        return [str(token) for token in self._extra]

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Iterable[Token] | None) -> None:
        if isinstance(tokens, str):
            raise TypeError(f"extra_special_tokens: expected a list of tokens, found the string {tokens!r}")
        self._extra = list(tokens or ())

    additional_special_tokens = extra_special_tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set."""
        return {name: str(token) for name, token in self._named.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """id -> token, for the tokens that are matched before the text is cut."""
        return self._backend.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: number for number, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    @property
    def add_bos_token(self) -> bool:
        """Whether `bos_token` was asked for by argument or assignment. (A post-processor of the file may write it as well.)"""
        return self._add_bos

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos = bool(value)
        self._update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether `eos_token` was asked for by argument or assignment. (A post-processor of the file may write it as well.)"""
        return self._add_eos

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos = bool(value)
        self._update_post_processor()

    def _update_post_processor(self) -> None:
        self._add_bos, self._add_eos = self._add_bos and self.bos_token is not None, self._add_eos and self.eos_token is not None
        bos, eos = self.bos_token if self._add_bos else None, self.eos_token if self._add_eos else None
        self._backend.post_processor = bos_eos_frame(self._backend, bos, eos)

    @property
    def backend_tokenizer(self) -> Backend:
        """The `tokenizers.Tokenizer` underneath."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones; `len(tokenizer)` counts all."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """token -> id, with the added tokens."""
        return self._backend.get_vocab(with_added_tokens=True)

    vocab = property(get_vocab)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or a list for a sequence; unknown tokens give `unk_token_id`, which may be None."""
        if isinstance(tokens, str):
            number = self._backend.token_to_id(tokens)
            if number is None and self.unk_token is not None:
                number = self._backend.token_to_id(self.unk_token)
            return number
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or a list for a sequence; None for ids outside the vocabulary."""
        if isinstance(ids, (int, np.integer)):
            return self._backend.id_to_token(int(ids))
        skip = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._backend.id_to_token(number) for number in id_list(ids) if number not in skip]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return " ".join(tokens) if self._backend.decoder is None else self._backend.decoder.decode(list(tokens))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._backend.num_special_tokens_to_add(pair)
