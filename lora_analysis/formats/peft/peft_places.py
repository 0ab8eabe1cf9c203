"""Which files make up an adapter in PEFT's layout, from any path that names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.formats.peft.adapter_config import CONFIG_NAME, names_a_method
from lora_analysis.formats.peft.tensor_keys import has_factors
from lora_analysis.formats.sources import CONTAINER_SUFFIXES, tensors_at
from lora_analysis.storage.documents import read_json_object, regular_file_size
from lora_analysis.storage.file_signatures import pickle_refused

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.formats.sources import ReadOptions

WEIGHTS_NAME: Final = "adapter_model.safetensors"
_INDEX_NAME: Final = "adapter_model.safetensors.index.json"
PICKLE_NAME: Final = "adapter_model.bin"
# The projector and other modules trained in full: non_lora_trainables.bin, non_lora_state_dict.bin.
_SIDE_FILES: Final = "non_lora_*"
_STORED: Final = (WEIGHTS_NAME, _INDEX_NAME, PICKLE_NAME)


@dataclass(frozen=True, slots=True)
class PeftPlace:
    """The two files of an adapter; ``shown`` is the path it goes by."""

    shown: Path
    weights: Path
    config: Path | None


def locate_peft_files(path: Path, options: ReadOptions) -> PeftPlace | None:
    """Return the files of the adapter at ``path``: a folder, its config, weights or index."""
    if path.is_dir():
        return _place_in_folder(path, options)
    if path.name in _STORED and path.is_file():
        return _place_in_folder(path.parent, options, named=path)
    if path.name in (CONFIG_NAME, *_STORED) or _is_shard(path):
        return _place_in_folder(path.parent, options)
    if not path.is_file() or not _holds_factors(path, options):
        return None
    config = path.with_name(CONFIG_NAME)
    return PeftPlace(path, path, config if _names_peft(config) else None)


def _place_in_folder(
    folder: Path, options: ReadOptions, *, named: Path | None = None
) -> PeftPlace | None:
    """Return the files in a folder: the weights ``named``, else safetensors first, as PEFT does."""
    stored = [folder / name for name in _STORED if (folder / name).is_file()]
    weights = named or (stored[0] if stored else folder / WEIGHTS_NAME)
    shown = folder if not stored or weights == stored[0] else weights
    config = folder / CONFIG_NAME
    if _names_peft(config):
        return PeftPlace(shown, weights, config)
    if stored and _holds_factors(weights, options):
        return PeftPlace(shown, weights, config if config.is_file() else None)
    return None


def _is_shard(path: Path) -> bool:
    return path.match("adapter_model-*-of-*.safetensors") and path.with_name(_INDEX_NAME).is_file()


def _names_peft(config: Path) -> bool:
    """Say whether a config is PEFT's; a broken one is taken for it, so that reading says why."""
    if not config.exists():
        return False
    try:
        return names_a_method(read_json_object(config))
    except (MalformedFileError, SourceError):  # a pipe is not opened
        return True


def _holds_factors(weights: Path, options: ReadOptions) -> bool:
    tensors = tensors_at(weights, options)
    return tensors is not None and has_factors(tensors.infos)


def check_weights(place: PeftPlace, options: ReadOptions) -> None:
    """Raise where the weights are missing, or are a pickle that the caller has not allowed."""
    if place.weights.is_file():
        if place.weights.name == PICKLE_NAME and not options.allow_pickle:
            regular_file_size(place.weights)  # a pointer is no pickle
            raise pickle_refused(place.weights)
        return
    folder = place.weights.parent
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6])
    message = f"{folder}: {CONFIG_NAME} has no {WEIGHTS_NAME} beside it. The folder holds: {held}."
    raise SourceError(message)


def side_files(folder: Path) -> list[Path]:
    """Return the files beside an adapter that hold what LLaVA and its kin train in full."""
    return sorted(path for path in folder.glob(_SIDE_FILES) if path.suffix in CONTAINER_SUFFIXES)
