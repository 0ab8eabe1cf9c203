"""The errors for a source that no format recognizes, and for one part of several; the next step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnknownFormatError, UnsupportedMethodError
from lora_analysis.formats.full_model import fine_tune_hint
from lora_analysis.formats.pairs import known_pair, pair_needed
from lora_analysis.formats.sources import tensors_at
from lora_analysis.storage.documents import (
    LOOK_BYTES,
    PICKLE_SUFFIXES,
    impostor,
    impostor_at,
    is_pickle,
    pickle_refused,
    regular_file_size,
)
from lora_analysis.storage.gguf import is_gguf, read_gguf
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

_READABLE: Final = (
    "Readable, as safetensors, GGUF, npz or torch files: PEFT folders, kohya-ss and LyCORIS LoCon, "
    "diffusers, FLUX trainers, cloneofsimo, loralib, MLX, GGUF, torchtune, litgpt, AdapterHub, "
    "OpenDelta, NeMo, dumps of PEFT models, and bare pairs of matrices in one file with pair=."
)

# Files of a folder whose first bytes are looked at, for the message.
_LOOKED_AT: Final = 50


def unknown_format(path: Path, options: ReadOptions) -> UnknownFormatError:
    """Return the error that describes ``path``; raise if opening it already fails."""
    hint = fine_tune_hint(path, options)
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
    if _is_closed_pickle(path, options):
        return pickle_refused(path)
    if path.suffix != ".safetensors" and start[8:] != b"{" and not is_pickle(path):
        kind = impostor_at(path) or "not a safetensors file, nor another file of tensors."
        return UnknownFormatError(f"{path}: this is {kind} {_READABLE}")
    tensors = open_tensors(path, allow_pickle=options.allow_pickle)
    if known_pair(tensors.infos):
        return pair_needed(path, tensors)
    return UnknownFormatError(f"{path}: {_described(tensors)} {_READABLE}{hint}")


def _is_closed_pickle(path: Path, options: ReadOptions) -> bool:
    """Return True if a file is, or is called, a pickle, and the caller has not allowed those."""
    if options.allow_pickle or path.suffix == ".npz" or tensors_at(path, options) is not None:
        return False
    return path.suffix.lower() in PICKLE_SUFFIXES or is_pickle(path)


def _unknown_folder(folder: Path, options: ReadOptions, hint: str) -> UnknownFormatError:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return UnknownFormatError(f"{folder}: the folder is empty.")
    first = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    text = f"{folder}: no adapter was recognized. The folder holds: {first}."
    stored = [folder / name for name in names if name.endswith(".safetensors")]
    kinds = [
        f" {name}: this is {kind}"
        for name in names[:_LOOKED_AT]
        if (kind := _impostor(folder / name))
    ]
    if kinds:
        text += "".join(kinds)
    elif stored:
        text += f" {stored[0].name}: {_described(open_tensors(stored[0]))}"
    elif any(name.endswith(tuple(PICKLE_SUFFIXES)) for name in names) and not options.allow_pickle:
        text += (
            " Pickles can run code when other programs open them, and are read only with "
            "allow_pickle=True (command line: --allow-pickle); or save as safetensors."
        )
    return UnknownFormatError(f"{text} {_READABLE}{hint}")


def _impostor(path: Path) -> str:
    """Return a description of a file that cannot be an adapter's; empty for all others."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return impostor(stream.read(LOOK_BYTES))


def _described(tensors: NamedTensors) -> str:
    """Return a sentence on the tensors of a file: how many, and the first ones."""
    infos = list(tensors.infos.values())
    first = ", ".join(f"'{info.name}' {info.shape}" for info in infos[:3])
    text = f"it holds {len(infos)} tensors ({first or 'none'})"
    if format := tensors.metadata.get("format"):
        text += f", metadata format '{format}'"
    return f"{text}; no known naming of LoRA factors."


# Megatron's and NeMo's folders, DeepSpeed's files.
_RANK: Final = re.compile(r"(?P<before>(?:.*_)?(?:mp|tp)_rank_)(?P<rank>\d{1,6})(?P<after>.*)")


def refuse_rank_part(path: Path) -> None:
    """Raise if a file, or its folder, is one of several ranks' parts.

    Each rank has some rows of B of a column-parallel layer and some columns of A of a row-parallel
    one: read alone, a part would pass for a smaller adapter.

    Raises
    ------
    UnsupportedMethodError
        Parts of further ranks are next to it.
    """
    for part in (path, path.absolute().parent):
        match = _RANK.fullmatch(part.name)
        if match is None:
            continue
        others = [
            sibling.name
            for sibling in part.absolute().parent.iterdir()
            if (other := _RANK.fullmatch(sibling.name))
            and other["before"] == match["before"]
            and other["rank"] != match["rank"]
        ]
        if others:
            message = (
                f"{path}: one of {len(others) + 1} parts of a tensor-parallel training (next to "
                f"it: {', '.join(sorted(others)[:3])}); the others hold rows of B or columns of A. "
                "Join them with the trainer's own tools, or export the adapter to PEFT."
            )
            raise UnsupportedMethodError(message)
