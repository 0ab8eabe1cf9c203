"""The files of an adapter that PEFT saved, from any path that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME, names_a_method
from lora_analysis.formats.peft.tensor_keys import has_factors
from lora_analysis.formats.sources import CONTAINER_SUFFIXES, AdapterFiles, tensors_at
from lora_analysis.storage.documents import pickle_refused, read_json_object, regular_file_size

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.formats.options import ReadOptions

WEIGHTS_NAME: Final = "adapter_model.safetensors"
_INDEX_NAME: Final = "adapter_model.safetensors.index.json"
PICKLE_NAME: Final = "adapter_model.bin"
# The projector and other modules trained in full: non_lora_trainables.bin, non_lora_state_dict.bin.
_SIDE_FILES: Final = "non_lora_*"
_STORED: Final = (WEIGHTS_NAME, _INDEX_NAME, PICKLE_NAME)


def locate_peft_files(path: Path, options: ReadOptions) -> AdapterFiles | None:
    """Return the files of the adapter at ``path``: a folder, its config, weights or index."""
    if path.is_dir():
        return _in_folder(path, options)
    if path.name in _STORED and path.is_file():
        return _in_folder(path.parent, options, named=path)
    is_shard = (
        path.match("adapter_model-*-of-*.safetensors") and path.with_name(_INDEX_NAME).is_file()
    )
    if is_shard or path.name in (CONFIG_NAME, *_STORED):
        return _in_folder(path.parent, options)
    if not path.is_file() or not _holds_factors(path, options):
        return None
    return _with_config(path, path, path.with_name(CONFIG_NAME)) or AdapterFiles(path, path)


def _in_folder(
    folder: Path, options: ReadOptions, *, named: Path | None = None
) -> AdapterFiles | None:
    """Return the files in a folder: the weights ``named``, else safetensors first, as PEFT does."""
    stored = [folder / name for name in _STORED if (folder / name).is_file()]
    weights = named or (stored[0] if stored else folder / WEIGHTS_NAME)
    path = folder if not stored or weights == stored[0] else weights
    config_path = folder / CONFIG_NAME
    if files := _with_config(path, weights, config_path):
        return files
    if stored and _holds_factors(weights, options):
        return AdapterFiles(path, weights, config_path if config_path.is_file() else None)
    return None


def _with_config(path: Path, weights: Path, config_path: Path) -> AdapterFiles | None:
    """Return the files with a config of PEFT's, None for another one.

    A broken config is taken for PEFT's, so that reading the adapter reports what is wrong.
    """
    if not config_path.exists():
        return None
    try:
        config = read_json_object(config_path)
    except (MalformedFileError, SourceError):  # a pipe is not opened
        return AdapterFiles(path, weights, config_path)
    return AdapterFiles(path, weights, config_path, config) if names_a_method(config) else None


def _holds_factors(weights: Path, options: ReadOptions) -> bool:
    tensors = tensors_at(weights, options)
    return tensors is not None and has_factors(tensors.infos)


def check_weights(files: AdapterFiles, options: ReadOptions) -> None:
    """Raise if the weights are missing, or are a pickle that the caller has not allowed."""
    if files.weights.is_file():
        if files.weights.name == PICKLE_NAME and not options.allow_pickle:
            regular_file_size(files.weights)  # a Git LFS pointer is not a pickle
            raise pickle_refused(files.weights)
        return
    folder = files.weights.parent
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6])
    message = f"{folder}: {CONFIG_NAME} has no {WEIGHTS_NAME} beside it. The folder holds: {names}."
    raise SourceError(message)


def side_files(folder: Path) -> list[Path]:
    """Return the files next to an adapter that hold modules LLaVA and others train in full."""
    return sorted(path for path in folder.glob(_SIDE_FILES) if path.suffix in CONTAINER_SUFFIXES)
