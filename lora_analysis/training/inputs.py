"""What a run reads, and hashes of it: the part of its key that the configuration cannot know."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import SourceError
from lora_analysis.storage.hub import fetch_pretrained
from lora_analysis.storage.places import existing_path
from lora_analysis.training.files import base_folder, file_sha256
from lora_analysis.training.options import DIGITS, DOCSTRINGS, MINILM

if TYPE_CHECKING:
    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.options import BaseOptions, DataOptions

_BUNDLED: Final = (DIGITS, DOCSTRINGS)
# Of what may lie beside a base's weights, what decides which model it is, and how text is cut.
_BASE_FILES: Final = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "vocab.txt")


def run_key(config: RunConfig) -> str:
    """Return the hash of all that determines a run: its configuration, and what it reads.

    Raises
    ------
    InputError
        The base or the data are not there.
    """
    return config.key(input_hashes(config))


def input_hashes(config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of a run's base and data by role; bundled data go by their name."""
    hashes = {"base": folder_sha256(base_place(config.base))}
    if config.data.source in _BUNDLED or config.data.format == "datasets":
        return hashes | {"data": config.data.source}
    paths = data_places(config.data)
    return hashes | {role: _file_sha256(path) for role, path in paths.items()}


def base_place(base: BaseOptions) -> Path:
    """Return the folder of a base model on this machine, fetched from a hub where it is there.

    Raises
    ------
    SourceError
        There is none, and none can be had.
    MissingExtraError
        The package it comes with is not installed.
    """
    if base.source == DIGITS:
        return base_folder()
    if base.source == MINILM:
        from lora_analysis.training.minilm import minilm_folder

        return minilm_folder()
    found = existing_path(base.source)
    if found is None:
        return fetch_pretrained(base.source, revision=base.revision).path
    if not (found / "config.json").is_file():
        message = f"{found} holds no config.json; the base is a folder as transformers saves it."
        raise SourceError(message)
    return found


def data_places(data: DataOptions) -> dict[str, Path]:
    """Return the data's files by role, ``data`` and ``test``; raise where one is not there."""
    named = {"data": data.source} | ({"test": data.test} if data.test else {})
    paths = {role: Path(name) for role, name in named.items()}
    for path in paths.values():
        if not path.is_file():
            message = f"There is no file of data at {path}."
            raise SourceError(message)
    return paths


def folder_sha256(folder: Path) -> str:
    """Return one hash over the names and contents of a base's files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _BASE_FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {_file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    """Return a file's hash; that of an unchanged file is worked out once."""
    state = path.stat()
    return _hash_of(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1024)
def _hash_of(path: Path, _time: int, _size: int) -> str:
    return file_sha256(path)
