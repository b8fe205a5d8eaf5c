"""A local directory for a path, a URL or a hub id: `resolve("org/name", revision=…)`. Hub files come through huggingface_hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxmodels.convert.errors import CheckpointError

TEXT_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.model"),  # some by name: not every server lists a directory
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::).*", re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is for fsspec: s3://bucket/model, https://host/model, memory://model."""
    return isinstance(path, str) and _URL.fullmatch(path) is not None


def local_directory(path: str | os.PathLike[str]) -> Path:
    """A directory to write to. CheckpointError for a URL, which would become a directory named `s3:` here."""
    if is_url(path):
        raise CheckpointError(f"{path}: is written to a local directory; copy it to its URL from there")
    return Path(path)


def weights_at(path: str | os.PathLike[str], directory: Path, subfolder: str | None = None) -> str | Path:
    """Where `read_checkpoint` finds the weights of what `resolve` gave `directory` for: there, or still at the URL."""
    return _join(os.fspath(path), subfolder) if is_url(path) else directory


def _join(url: str, subfolder: str | None) -> str:
    return "/".join([url.rstrip("/"), *filter(None, [(subfolder or "").strip("/")])])


def _patterns(subfolder: str, variant: str | None, weights: bool) -> list[str]:
    part = f".{variant}" if variant else ""
    shards = [f"model{part}-?????-of-?????.safetensors", f"model-?????-of-?????{part}.safetensors"]
    names = [*TEXT_FILES, *([f"model{part}.safetensors", *shards, f"model.safetensors.index{part}.json"] if weights else [])]
    return [f"{subfolder}/{name}" if subfolder else name for name in names]


def resolve(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The directory of a checkpoint: a local one as it is, a hub id's from the cache after fetching what is missing. Of a URL only the
    configs, tokenizer and chat template files are fetched, into a directory that lasts as long as the process: weights are read from where
    they are.

    Fetched from the hub are the same files and, with `weights`, the safetensors of `variant`; never pickles or code.
    HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT hold as everywhere. A name that exists as a directory is that directory.

    Raises CheckpointError that says how to get what is missing."""
    if is_url(path_or_id):
        from jaxmodels.convert.remote import fetch

        return fetch(_join(os.fspath(path_or_id), subfolder), TEXT_FILES)
    name, inner = os.fspath(path_or_id), (subfolder or "").strip("/")
    local = Path(name).expanduser()
    if local.is_dir():
        return _inside(local, inner, name)
    if local.exists():
        raise CheckpointError(f"{name}: a file, expected a directory with config.json and model.safetensors")
    if not _ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: no such directory; expected one with config.json and model.safetensors, or a hub id like 'org/name'"
        )

    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    what, command = (
        name + (f" (revision {revision})" if revision else ""),
        f"hf download {name}" + (f" --revision {revision}" * bool(revision)),
    )
    try:
        found = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=_patterns(inner, variant, weights),
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{what}: access needs its terms accepted at {constants.ENDPOINT}/{name}, then `hf auth login`, HF_TOKEN or token=…"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{what}: no such directory here and no such repository at {constants.ENDPOINT}: check the spelling; "
            "for a private one `hf auth login`, HF_TOKEN or token=…"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name}: has no revision {revision!r}; see {constants.ENDPOINT}/{name}/tree/main") from None
    except LocalEntryNotFoundError:
        offline = constants.HF_HUB_OFFLINE or local_files_only
        why = "HF_HUB_OFFLINE or local_files_only is set" if offline else f"{constants.ENDPOINT} cannot be reached"
        raise CheckpointError(
            f"{what}: no such directory here, not (wholly) in the cache {cache_dir or constants.HF_HUB_CACHE}, and {why}. "
            f"Fetch it where there is a network with `{command}`, or pass a local directory"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: cannot be fetched: {error}") from error
    return _inside(Path(found), inner, what)


def _inside(directory: Path, subfolder: str, name: str) -> Path:
    if not (directory / subfolder).is_dir():
        raise CheckpointError(f"{name}: has no folder {subfolder!r}; it has {sorted(entry.name for entry in directory.iterdir())[:20]}")
    return directory / subfolder
