"""What a run reads, and hashes of it: the part of its key that the configuration cannot know."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, SourceError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.hub import fetch_pretrained
from lora_analysis.storage.paths import existing_path
from lora_analysis.training.files import base_folder, file_sha256
from lora_analysis.training.options import DIGITS, DOCSTRINGS, MINILM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.options import BaseOptions, DataOptions

_BUNDLED: Final = (DIGITS, DOCSTRINGS)
# The base lies on this machine, and no file of it is run or sends transformers elsewhere.
LOCAL: Final[Mapping[str, Any]] = {"trust_remote_code": False, "local_files_only": True}
# Fields of a configuration that choose an implementation, which may be a hub's; and our answer.
_KERNELS: Final = ("attn_implementation", "experts_implementation", "attn_implementation_internal")
_OWN_KERNELS: Final = (None, "eager", "sdpa")
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
        There is none, and none can be had; or something lies beside it that would be loaded too.
    InputError
        Its configuration names code from elsewhere.
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
        found = fetch_pretrained(base.source, revision=base.revision).path
    if not (found / "config.json").is_file():
        message = f"{found} holds no config.json; the base is a folder as transformers saves it."
        raise SourceError(message)
    _refuse_what_is_no_model(found, base)
    return found


def _refuse_what_is_no_model(folder: Path, base: BaseOptions) -> None:
    """Refuse files beside a model that would make transformers run, fetch or add something."""
    if (folder / "adapter_config.json").exists():
        message = (
            f"{folder} holds an adapter beside the model (adapter_config.json), which would be "
            "loaded with it. Name a folder with the model alone."
        )
        raise SourceError(message)
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled and not base.allow_pickle and not any(folder.glob("*.safetensors")):
        message = (
            f"{pickled}: the weights are a pickle, which is not read unasked. Save the model as "
            "safetensors; or set base.allow_pickle (command line: --allow-pickle): then "
            "transformers reads its tensors alone."
        )
        raise SourceError(message)
    _refuse_kernels(folder / "config.json", read_json_object(folder / "config.json"))


def _refuse_kernels(path: Path, fields: Mapping[str, object]) -> None:
    """Refuse a configuration that names code on a hub for a part of the model."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _refuse_kernels(path, value)
        elif name.endswith(_KERNELS) and value not in _OWN_KERNELS:
            message = (
                f"{path}: {name} is {value!r}; a base may ask for 'eager' or 'sdpa', not "
                "for code from elsewhere. Take the field out."
            )
            raise InputError(message)


def data_places(data: DataOptions) -> dict[str, Path]:
    """Return the data's files by role, ``data`` and ``test``; raise where one is not there."""
    named = {"data": data.source} | ({"test": data.test} if data.test else {})
    paths = {role: Path(name) for role, name in named.items()}
    for path in paths.values():
        if not path.is_file():
            message = f"There is no file of data at {path}."
            raise SourceError(message)
    return paths


def input_paths(config: RunConfig) -> list[Path]:
    """Return the files and folders of a run's base and data, which no output may touch."""
    paths = [base_place(config.base)]
    if config.data.source not in _BUNDLED and config.data.format != "datasets":
        paths += data_places(config.data).values()
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
