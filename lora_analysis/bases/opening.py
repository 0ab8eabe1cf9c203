"""``open_base``: what the source is, and which family it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.bases.arrays import ArrayTensors, LiveTensors, is_live_model
from lora_analysis.bases.stored import StoredTensors
from lora_analysis.bases.weights import BaseWeights
from lora_analysis.errors import SourceError, UnknownFormatError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.hub import fetch_model
from lora_analysis.storage.hub_names import shown_errors
from lora_analysis.storage.places import existing_path
from lora_analysis.storage.tensors import INDEX_SUFFIX, open_tensors

if TYPE_CHECKING:
    import os
    from pathlib import Path

_NAMES: Final = ("model.safetensors", f"model{INDEX_SUFFIX}")


def open_base(source: str | os.PathLike[str] | Mapping[str, Any] | Any) -> BaseWeights:
    """Return the frozen weights a source holds; their values are read when asked for.

    Parameters
    ----------
    source
        A safetensors file, a folder with ``model.safetensors`` or
        ``model.safetensors.index.json``, a live ``torch.nn.Module`` (its frozen weights, also
        where adapters are attached), or a mapping of module names to arrays ``(d_out, d_in)``.
        A ``config.json`` beside the file names the family, which decides how matrices lie.
        Where nothing local has the name, a repository on a hub (extra ``hf``) as in
        :func:`lora_analysis.read_adapter`, of which one whole model is fetched.

    Raises
    ------
    SourceError
        Nothing lies at the path, it cannot be fetched, or a folder without one clear model.
    UnknownFormatError
        What lies there is not read.
    MalformedFileError
        A file is damaged.
    TypeError
        The source is none of these.
    """
    if is_live_model(source):
        return _open_live(source)
    if isinstance(source, Mapping):
        label = "the given arrays"
        return BaseWeights(ArrayTensors(source, label), label=label)
    if path := existing_path(source):
        return _open_stored(path)
    snapshot = fetch_model(source)
    with shown_errors(snapshot):
        base = _open_stored(snapshot.path, snapshot.name)
    base.snapshot = snapshot
    return base


def _open_stored(path: Path, label: str | None = None) -> BaseWeights:
    file = _file_in(path) if path.is_dir() else path
    label = label or (file.parent if file.name in _NAMES else file).absolute().name
    return BaseWeights(
        StoredTensors(open_tensors(_checked(file)), label),
        label=label,
        model_type=_model_type(file.with_name("config.json")),
    )


def _open_live(model: Any) -> BaseWeights:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    label = type(model).__name__
    return BaseWeights(
        LiveTensors(model, label),
        label=label,
        model_type=model_type if isinstance(model_type, str) else None,
    )


def _file_in(folder: Path) -> Path:
    """Return the file or index that holds the model of a folder."""
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    held = sorted(entry.name for entry in folder.iterdir())
    stored = [name for name in held if name.endswith(".safetensors")]
    indices = [name for name in held if name.endswith(INDEX_SUFFIX)]
    if "adapter_config.json" not in held and len(indices or stored) == 1:
        return folder / (indices or stored)[0]
    shown = ", ".join(held[:6]) or "nothing"
    hint = "It looks like an adapter's folder. " if "adapter_config.json" in held else ""
    message = (
        f"{folder}: no model.safetensors and no single other safetensors file. {hint}"
        f"The folder holds: {shown}. Other storages (.bin, GGUF) are not read."
    )
    raise SourceError(message)


def _checked(file: Path) -> Path:
    if file.name.endswith((".safetensors", INDEX_SUFFIX)):
        return file
    message = (
        f"{file}: base weights are read from safetensors files and their indices only. Save the "
        "model again with safe_serialization=True."
    )
    raise UnknownFormatError(message)


def _model_type(config: Path) -> str | None:
    """Return the family that a model's ``config.json`` states, or None."""
    if not config.is_file():
        return None
    stated = read_json_object(config).get("model_type")
    return stated if isinstance(stated, str) else None
