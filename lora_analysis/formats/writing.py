"""``write_adapter``: the same value, in a format of choice."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis.errors import InputError
from lora_analysis.formats.fused_parts import joined
from lora_analysis.formats.merged import are_blocks
from lora_analysis.formats.registry import WRITERS, contents_of, notes_of
from lora_analysis.storage.atomic import write_together

if TYPE_CHECKING:
    import os

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.atomic import Content


def write_adapter(
    adapter: Adapter, path: str | os.PathLike[str], *, format: str = "peft", **options: Any
) -> Path:
    """Write an adapter, each file whole or not at all.

    ``"peft"`` makes a folder with ``adapter_config.json`` and ``adapter_model.safetensors``
    that PEFT loads: factors as float32 in the shapes of their layers, scale kept exactly, DoRA's
    norms and trained modules beside them. The parts of a fused weight are written as one update
    of the whole; from ``"peft"`` they are read as parts again, and in ``"loralib"`` equal blocks
    are ``MergedLinear``'s.
    ``"kohya"`` and ``"diffusers"`` make one file each, under the keys that programs for image
    models load, an alpha per module or PEFT's config in its metadata.
    ``"mlx"`` makes the folder that mlx-lm loads, ``"gguf"`` one file for llama.cpp, ``"loralib"``
    a state dictionary as safetensors; what each folds, :func:`writing_notes` says.

    Parameters
    ----------
    adapter
        Read or extracted; every module a low-rank update of known scale.
    path
        The folder; made where it does not exist, files of the same names are replaced. For a
        format of one file it may also be the file, ending in ``.safetensors``.
    format
        One of the formats that can be written.
    **options
        What the format's writer takes besides: ``architecture`` and ``heads`` for ``"gguf"``.

    Returns
    -------
    Path
        The folder, or the one file.

    Raises
    ------
    ScaleError
        The scale of a module is not known; a file would have to make one up.
    UnsupportedMethodError
        More was trained beside the factors than the format can hold, and would be lost; or an
        update is part of a method that also changes the base (KaSA), or one of a stack of experts.
    InputError
        The format is not written, or the adapter has no modules or one that it cannot say.
    OutputError
        The disk refused.
    """
    files = adapter_files(adapter, path, format=format, **options)
    first = next(iter(files))
    made = [folder for folder in first.parents if not folder.exists()]
    try:
        write_together(files)
    except BaseException:
        for folder in made:  # a refusal while the numbers are computed leaves nothing either
            with suppress(OSError):
                folder.rmdir()
        raise
    return Path(path) if len(files) > 1 else first


def adapter_files(
    adapter: Adapter, path: str | os.PathLike[str], *, format: str = "peft", **options: Any
) -> dict[Path, Content]:
    """Return the files of an adapter by path, the one that makes the set readable last.

    Everything that can be refused from types, shapes and scales is refused here; the numbers are
    read, module by module, when a content is written. Parameters and errors are those of
    `write_adapter`.
    """
    if format not in WRITERS:
        message = f"Format '{format}' is not written. Choose one of: {', '.join(WRITERS)}."
        raise InputError(message)
    target = Path(path)
    contents = contents_of(format)(_whole(adapter, format), **options)
    first, content = next(iter(contents.items()))
    if len(contents) == 1 and target.suffix == Path(first).suffix:
        return {target: content}
    return {target / name.replace("*", target.name): data for name, data in contents.items()}


def writing_notes(adapter: Adapter, format: str) -> list[str]:
    """Return what a format cannot say and its writer folds into something else, in sentences.

    Raises
    ------
    InputError, ScaleError, UnsupportedMethodError
        The adapter cannot be written in that format.
    """
    return notes_of(format)(_whole(adapter, format))


def _whole(adapter: Adapter, format: str) -> Adapter:
    """Return the adapter with parts of fused weights put together, where the format needs it."""
    return joined(adapter, but=are_blocks if format == "loralib" else None)
