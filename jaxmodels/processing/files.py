"""Reading and writing the files of a tokenizer directory."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxmodels.convert.atomic import replace_text
from jaxmodels.processing.chat import read_template
from jaxmodels.processing.families import FAMILIES, REGISTERED, Family, choose_family
from jaxmodels.processing.sentencepiece import BPE, merges_of, read_sentencepiece, to_tokenizer
from jaxmodels.processing.tokenizer import Tokenizer, read_backend
from jaxmodels.processing.vocabulary import EXTRA, SPECIAL_TOKENS

TEMPLATE, TEMPLATE_DIR = "chat_template.jinja", "additional_chat_templates"
GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")  # class names that say nothing
# What a tokenizer_config.json says about other things than the tokenizer, or must not decide.
_NOT_OPTIONS = (
    "tokenizer_class auto_map added_tokens added_tokens_decoder init_inputs backend is_local local_files_only fast_tokenizer_files "
    "name_or_path tokenizer_object tokenizer_file copy vocab_file merges_file special_tokens_map_file"
)
NOT_OPTIONS = frozenset(_NOT_OPTIONS.split())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file. Raises ValueError naming the file if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _text(file: Path) -> str:
    """A text file as it stands. Raises ValueError naming it if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}); fetch or write it again") from error


def load_pretrained(path: Path, overrides: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a directory; `overrides` win over tokenizer_config.json."""
    config, model_config = read_json(path / "tokenizer_config.json"), read_json(path / "config.json")
    declared = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    model_type = model_config.get("model_type")
    file = path / "tokenizer.json"
    text = _text(file) if file.is_file() else None
    if text is not None:  # its post-processor says what is written around a text
        config.pop("add_bos_token", None)
        config.pop("add_eos_token", None)
    options = {key: value for key, value in config.items() if key not in NOT_OPTIONS}
    inline = read_template(config.get("chat_template"), f"{path / 'tokenizer_config.json'}: chat_template")
    options["chat_template"] = inline if (templates := _read_templates(path, inline)) is None else templates
    options |= overrides
    added = _added_tokens(path, config, text, options, overrides)

    name = choose_family(declared, model_type, text is not None and '"ByteLevel"' in text)
    if text is None:
        plain = (declared or "").removesuffix("Fast") in GENERIC or REGISTERED.get(model_type or "") == ""
        name, backend = _from_old_files(path, name, plain, declared, options)
    else:
        spec = _spec(file, text) if name else {}
        if name and spec["model"].get("type", FAMILIES[name].model) != FAMILIES[name].model:
            name = None  # the class cannot hold this vocabulary
        backend = _rebuild(spec, FAMILIES[name], options) if name else read_backend(file)
    return _assemble(name, backend, options, added)


def _assemble(name: str | None, backend: Backend, options: dict[str, Any], added: dict[int, AddedToken]) -> Tokenizer:
    if name is None:
        return Tokenizer(backend, added_tokens=added, copy=False, **options)
    family = FAMILIES[name]
    options = {**family.defaults, **options}
    if not options.get("padding_side") and backend.padding is None:
        options["padding_side"] = family.padding_side
    if family.type_ids:
        options.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    if family.extra:
        options = {**options, EXTRA[0]: [*_extra(options), *(t for t in family.extra(options) if t not in map(str, _extra(options)))]}
    tokenizer = Tokenizer(backend, tokenizer_class=name, added_tokens=added, copy=False, **options)
    if family.respecial:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokenizer.all_special_tokens])
    if family.frame:
        tokenizer.backend_tokenizer.post_processor = family.frame({**options, **tokenizer.special_tokens_map}, tokenizer.backend_tokenizer)
    return tokenizer


def _extra(options: Mapping[str, Any]) -> list:
    extra = options.get(EXTRA[0]) or options.get(EXTRA[1]) or []
    return [] if isinstance(extra, Mapping) else list(extra)


def _spec(file: Path, text: str) -> dict[str, Any]:
    try:
        spec = json.loads(text)
        if not isinstance(spec["model"]["vocab"], (dict, list)):
            raise TypeError("model.vocab is no vocabulary")
        return spec
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a tokenizer.json that tokenizers can read ({type(error).__name__}: {error})") from error


def _rebuild(spec: dict[str, Any], family: Family, options: Mapping[str, Any]) -> Backend:
    """The class's tokenizer around the vocabulary, merges and post-processor of a tokenizer.json."""
    vocab, merges = spec["model"]["vocab"], spec["model"].get("merges") or []
    if family.model == "Unigram":
        vocab = [(text, score) for text, score in vocab]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    steps = spec.get("normalizer") or {}
    charsmap = next((n["precompiled_charsmap"] for n in steps.get("normalizers", [steps]) if n.get("type") == "Precompiled"), None)
    options = {**family.defaults, **options, "charsmap": base64.b64decode(charsmap) if charsmap else None}
    backend = family.build(vocab, merges, options)
    shell = Backend.from_str(json.dumps({**spec, "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}))
    if shell.post_processor is not None:
        backend.post_processor = shell.post_processor
    if shell.truncation:
        backend.enable_truncation(**shell.truncation)
    if shell.padding:
        backend.enable_padding(**shell.padding)
    return backend


def _from_old_files(path: Path, name: str | None, plain: bool, declared: str | None, options: dict[str, Any]) -> tuple[str | None, Backend]:
    """A tokenizer from vocab.json + merges.txt, vocab.txt or a sentencepiece model; `options` gain what the files say."""
    model = next((f for f in (path / "tokenizer.model", *sorted(path.glob("*.model"))) if f.is_file()), None)
    found = {"vocab.json": (path / "vocab.json").is_file() and (path / "merges.txt").is_file(), "vocab.txt": (path / "vocab.txt").is_file()}
    if not model and not any(found.values()):
        here = sorted(f.name for f in path.glob("*") if f.is_file())[:12] if path.is_dir() else []
        raise FileNotFoundError(
            f"{path}: no tokenizer here; looked for tokenizer.json, vocab.json with merges.txt, vocab.txt and *.model, found "
            f"{', '.join(here) or 'no files'}. Copy the tokenizer's files beside the weights, or name the directory that has them"
        )
    if name is None and not plain:
        raise ValueError(
            f"{path}: there is no tokenizer.json, and {declared} cannot be built from its older files (these can: {', '.join(FAMILIES)}). "
            "Convert it once where transformers is installed: AutoTokenizer.from_pretrained(path).save_pretrained(path)"
        )
    if name is None and not model:
        name = "GPT2Tokenizer" if found["vocab.json"] else "BertTokenizer"
    kind = FAMILIES[name].model if name else None
    if kind == "WordPiece" and found["vocab.txt"]:
        return name, FAMILIES[str(name)].build(_read_vocab_txt(path / "vocab.txt"), None, {**FAMILIES[str(name)].defaults, **options})
    if kind == "BPE" and found["vocab.json"]:
        vocab, merges = read_json(path / "vocab.json"), _read_merges(path / "merges.txt")
        return name, FAMILIES[str(name)].build(vocab, merges, {**FAMILIES[str(name)].defaults, **options})
    if kind == "WordPiece" or not model:
        raise FileNotFoundError(
            f"{path}: {name} needs {'vocab.txt' if kind == 'WordPiece' else 'a sentencepiece .model file'} or a tokenizer.json"
        )
    return name, _from_sentencepiece(model, name, options)


def _from_sentencepiece(file: Path, name: str | None, options: dict[str, Any]) -> Backend:
    model = read_sentencepiece(file)
    options.setdefault(EXTRA[0], _extra(options) or model.added_tokens)
    if name is None:
        for key, token in model.special_tokens.items():
            options.setdefault(key, token)
        return to_tokenizer(model)
    family = FAMILIES[name]
    if family.model == "BPE":
        if model.model_type != BPE:
            raise ValueError(f"{file}: a unigram model, where {name} is a BPE tokenizer; correct tokenizer_class in tokenizer_config.json")
        vocab: Any = {text: i for i, (text, _) in enumerate(model.scored)}
        return family.build(vocab, merges_of(vocab), {**family.defaults, **options})
    options = {**family.defaults, **options, "charsmap": model.charsmap}
    vocab = family.from_sentencepiece(model.scored, options) if family.from_sentencepiece else model.scored
    return family.build(vocab, None, options)


def _read_vocab_txt(file: Path) -> dict[str, int]:
    lines = _text(file).removesuffix("\n").split("\n")
    return {line.rstrip(): i for i, line in enumerate(lines)}


def _read_merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.startswith("#version") or not line.rstrip("\r"):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise ValueError(f"{file}, line {number}: expected two tokens with a space between, found {line[:80]!r}")
        merges.append((parts[0], parts[1]))
    return merges


# ---- special tokens and templates ------------------------------------------------------------------------------------


def _as_token(value: Any, **flags: Any) -> Any:
    """A token written as a JSON object becomes an AddedToken."""
    if isinstance(value, dict) and "content" in value:
        return AddedToken(**{**{k: v for k, v in value.items() if k != "__type"}, **flags})
    return [_as_token(item, **flags) for item in value] if isinstance(value, list) else value


def _added_tokens(
    path: Path, config: dict[str, Any], text: str | None, options: dict[str, Any], overrides: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """The added tokens by id; the special tokens in `options` become AddedTokens where a file says how they match."""
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        added = {int(number): _as_token(token) for number, token in config["added_tokens_decoder"].items()}
    else:
        for key, value in read_json(path / "special_tokens_map.json").items():
            if not overrides.get(key):
                options[key] = _as_token(value, special=True)
        special = {str(options[name]) for name in SPECIAL_TOKENS if options.get(name)} | {str(token) for token in _extra(options)}
        for content, number in read_json(path / "added_tokens.json").items():
            added[number] = AddedToken(content, normalized=content not in special, special=content in special)
        if text is not None:
            for token in _spec(path / "tokenizer.json", text).get("added_tokens") or ():
                added[token["id"]] = _as_token({key: value for key, value in token.items() if key != "id"})
    for key, value in options.items():
        if key in EXTRA or key.endswith("_token"):
            options[key] = _as_token(value)
    by_content = {str(token): token for token in added.values()}
    for name in SPECIAL_TOKENS:
        if options.get(name):
            options[name] = by_content.get(str(options[name]), options[name])
    return added


def _read_templates(path: Path, inline: Any) -> Any:
    """chat_template.jinja, with additional_chat_templates/*.jinja by name; None if there are none."""
    found = {file.stem: _text(file) for file in sorted((path / TEMPLATE_DIR).glob("*.jinja"))}
    if (path / TEMPLATE).is_file():
        found.setdefault("default", _text(path / TEMPLATE))
    elif found and isinstance(inline, str):
        found.setdefault("default", inline)
    return found["default"] if list(found) == ["default"] else found or None


# ---- writing ---------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, AddedToken):
        return {"__type": "AddedToken", **value.__getstate__()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_pretrained(tokenizer: Tokenizer, path: Path) -> tuple[str, ...]:
    """Write the directory that `load_pretrained` and transformers read."""
    if path.is_file():
        raise NotADirectoryError(f"{path}: a file; save_pretrained needs a directory")
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"default": tokenizer.chat_template}
    for name in templates:
        if Path(name).name != name:
            raise ValueError(f"chat template {name!r}: a name becomes a file's name and cannot hold a path")
    config = {key: _plain(value) for key, value in tokenizer.options_to_save().items()}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"  # fails before anything is written
    path.mkdir(parents=True, exist_ok=True)
    files = {path / "tokenizer.json": tokenizer.to_json(), path / "tokenizer_config.json": text}
    for name, template in templates.items():
        if template is not None:
            (path / TEMPLATE_DIR).mkdir(exist_ok=True) if name != "default" else None
            files[path / TEMPLATE if name == "default" else path / TEMPLATE_DIR / f"{name}.jinja"] = template
    for file, content in files.items():
        replace_text(file, content)
    return tuple(map(str, files))
