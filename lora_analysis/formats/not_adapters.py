"""Sources that are not adapters: whole models, and what no format recognizes.

A full fine-tune is read as its difference to a base. For any other source, the error describes the
content and names the next step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lora_analysis.adapter import FULL_FINE_TUNE
from lora_analysis.errors import InputError, UnknownFormatError
from lora_analysis.formats.pairs import known_pair, missing_pair_error
from lora_analysis.formats.registry import formats_for
from lora_analysis.formats.sources import AdapterFiles, Format, label_of, run_facts, tensors_at
from lora_analysis.storage.documents import (
    LOOK_BYTES,
    PICKLE_SUFFIXES,
    describe_impostor,
    describe_impostor_file,
    first_bytes,
    is_pickle,
    pickle_error,
    read_json_object,
    regular_file_size,
)
from lora_analysis.storage.gguf import is_gguf, read_gguf
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

_READABLE: Final = (
    "Readable, as safetensors, GGUF, npz or torch files: PEFT folders, kohya-ss and LyCORIS LoCon, "
    "diffusers, FLUX trainers, cloneofsimo, loralib, MLX, GGUF, torchtune, litgpt, AdapterHub, "
    "OpenDelta, NeMo, dumps of PEFT models, and bare pairs of matrices in one file with pair=."
)

# Files of a folder whose first bytes are looked at, for the message.
_LOOKED_AT: Final = 50
_INDEX: Final = ".index.json"


class FullModel(Format):
    """Models in the files that `open_base` opens; asked last, and only if a base is given."""

    __slots__ = ()

    name = FULL_FINE_TUNE

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        """Return the files of a model whose tensors no other format recognizes."""
        from lora_analysis.bases.opening import model_file

        try:
            weights = model_file(path) if path.is_dir() else path
        except InputError:
            return None
        if not _holds_model(weights, options):
            return None
        others = replace(options, base=None)
        if any(format.locate(weights, others) for format in formats_for(weights, others)):
            return None
        return AdapterFiles(path, weights)

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:
        """Read the difference of the model and the base."""
        from lora_analysis.bases import open_base, read_fine_tune

        if name is not None:
            message = f"{files.path} is a whole model and holds no adapter '{name}'."
            raise InputError(message)
        source = files.path if files.snapshot is None else files.snapshot.address(files.path)
        adapter = read_fine_tune(
            open_base(source, allow_pickle=options.allow_pickle),
            options.base,
            label=options.label or label_of(files.path),
            allow_pickle=options.allow_pickle,
        )
        folder = files.path if files.path.is_dir() else files.path.parent
        return adapter.with_provenance(**run_facts(folder))


FORMAT: Final = FullModel()


def _holds_model(weights: Path, options: ReadOptions) -> bool:
    """Return True if a file has a weight matrix, or cannot be opened although it is a model's."""
    if weights.name.endswith(_INDEX):
        try:
            names = read_json_object(weights).get("weight_map")
        except InputError:
            return True  # reading the model reports why
        return isinstance(names, dict) and any(str(name).endswith(".weight") for name in names)
    tensors = tensors_at(weights, options)
    if tensors is None:
        return False
    return any(
        info.name.endswith(".weight") and len(info.shape) > 1 for info in tensors.infos.values()
    )


def unknown_format(path: Path, options: ReadOptions) -> UnknownFormatError:
    """Return the error that describes ``path``; raise if opening it already fails."""
    hint = ""
    if FORMAT.locate(path, options) is not None:
        hint = (
            " A full fine-tune is read as its difference to the model that it was trained from: "
            "give that with base= (command line: --base)."
        )
    folder = path if path.is_dir() else path.parent
    if hint and (folder / "config.json").is_file():
        return UnknownFormatError(f"{path}: this is a model, not an adapter.{hint}")
    if path.is_dir():
        return _unknown_folder(path, options, hint)
    regular_file_size(path)
    if is_gguf(path):
        read_gguf(path)
        return UnknownFormatError(
            f"{path}: a GGUF file, but not of a LoRA adapter. {_READABLE}{hint}"
        )
    with path.open("rb") as stream:
        start = stream.read(9)
    is_called_pickle = path.suffix.lower() in PICKLE_SUFFIXES or is_pickle(path)
    if (
        is_called_pickle
        and not (options.allow_pickle or path.suffix == ".npz")
        and tensors_at(path, options) is None
    ):
        return pickle_error(path)
    if path.suffix != ".safetensors" and start[8:] != b"{" and not is_pickle(path):
        kind = (
            describe_impostor_file(path) or "not a safetensors file, nor another file of tensors."
        )
        return UnknownFormatError(f"{path}: this is {kind} {_READABLE}")
    tensors = open_tensors(path, allow_pickle=options.allow_pickle)
    if known_pair(tensors.infos):
        return missing_pair_error(path, tensors)
    return UnknownFormatError(f"{path}: {_describe_tensors(tensors)} {_READABLE}{hint}")


def _unknown_folder(folder: Path, options: ReadOptions, hint: str) -> UnknownFormatError:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return UnknownFormatError(f"{folder}: the folder is empty.")
    first = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    text = (
        f"{folder}: no adapter was recognized. The folder holds: {first}. If one of these holds "
        "the adapter, name the file itself."
    )
    stored = [folder / name for name in names if name.endswith(".safetensors")]
    kinds = ""
    for name in names[:_LOOKED_AT]:
        if kind := describe_impostor(first_bytes(folder / name, LOOK_BYTES)):
            kinds += f" {name}: this is {kind}"
    if kinds:
        text += kinds
    elif stored:
        text += f" {stored[0].name}: {_describe_tensors(open_tensors(stored[0]))}"
    elif any(name.endswith(tuple(PICKLE_SUFFIXES)) for name in names) and not options.allow_pickle:
        text += (
            " Pickles can run code when other programs open them, and are read only with "
            "allow_pickle=True (command line: --allow-pickle); or save as safetensors."
        )
    return UnknownFormatError(f"{text} {_READABLE}{hint}")


def _describe_tensors(tensors: NamedTensors) -> str:
    """Return a sentence on the tensors of a file: how many, and the first ones."""
    infos = list(tensors.infos.values())
    first = ", ".join(f"'{info.name}' {info.shape}" for info in infos[:3])
    text = f"it holds {len(infos)} tensors ({first or 'none'})"
    if format := tensors.metadata.get("format"):
        text += f", metadata format '{format}'"
    return f"{text}; no known naming of LoRA factors."
