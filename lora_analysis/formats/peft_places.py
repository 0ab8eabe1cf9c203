"""Which files make up an adapter in PEFT's layout, from any path that names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import InputError, MalformedFileError, SourceError, UnknownFormatError
from lora_analysis.formats.peft_config import CONFIG_NAME
from lora_analysis.formats.peft_keys import has_factors
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS_NAME: Final = "adapter_model.safetensors"
_INDEX_NAME: Final = "adapter_model.safetensors.index.json"
_PICKLE_NAME: Final = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class PeftPlace:
    """The two files of an adapter; ``shown`` is the path it goes by."""

    shown: Path
    weights: Path
    config: Path | None


def place_of(path: Path) -> PeftPlace | None:
    """Return the files of the adapter at ``path``: a folder, its config, weights or index."""
    if path.is_dir():
        return _place_in_folder(path)
    if path.name in (CONFIG_NAME, WEIGHTS_NAME, _INDEX_NAME) or _is_shard(path):
        return _place_in_folder(path.parent)
    if not path.is_file() or not _holds_factors(path):
        return None
    config = path.with_name(CONFIG_NAME)
    return PeftPlace(path, path, config if _names_peft(config) else None)


def _place_in_folder(folder: Path) -> PeftPlace | None:
    stored = [folder / name for name in (WEIGHTS_NAME, _INDEX_NAME) if (folder / name).is_file()]
    config = folder / CONFIG_NAME
    if _names_peft(config):
        return PeftPlace(folder, stored[0] if stored else folder / WEIGHTS_NAME, config)
    if stored and _holds_factors(stored[0]):
        return PeftPlace(folder, stored[0], config if config.is_file() else None)
    return None


def _is_shard(path: Path) -> bool:
    return path.match("adapter_model-*-of-*.safetensors") and path.with_name(_INDEX_NAME).is_file()


def _names_peft(config: Path) -> bool:
    """Say whether a config is PEFT's; a broken one is taken for it, so that reading says why."""
    if not config.is_file():
        return False
    try:
        return "peft_type" in read_json_object(config)
    except MalformedFileError:
        return True


def _holds_factors(weights: Path) -> bool:
    try:
        return has_factors(open_tensors(weights).infos)
    except InputError:
        return False


def check_weights(place: PeftPlace) -> None:
    """Raise where the weights are missing; say so where they are there as a pickle."""
    if place.weights.is_file():
        return
    folder = place.weights.parent
    if (folder / _PICKLE_NAME).is_file():
        message = (
            f"{folder / _PICKLE_NAME}: a pickle can run code when it is opened, so it is not read. "
            f"Save the adapter as safetensors: PEFT's save_pretrained writes {WEIGHTS_NAME}."
        )
        raise UnknownFormatError(message)
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6])
    message = f"{folder}: {CONFIG_NAME} has no {WEIGHTS_NAME} beside it. The folder holds: {held}."
    raise SourceError(message)
