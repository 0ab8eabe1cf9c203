"""``write_adapter``: an adapter written in a chosen format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from lora_analysis.errors import InputError
from lora_analysis.formats.fused_parts import join_parts
from lora_analysis.formats.live import as_adapter
from lora_analysis.formats.merged import are_blocks
from lora_analysis.formats.registry import (
    FILE_SUFFIXES,
    IMAGE_FORMATS,
    WRITERS,
    contents_of,
    notes_of,
)
from lora_analysis.formats.side_tensors import source_format
from lora_analysis.formats.written import in_dtype
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.outputs import (
    OutputFolder,
    check_output_file,
    output_folder,
    write_output_file,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.atomic import Content

_KIND = "adapter"
_FILE_SUFFIXES = (".safetensors", ".gguf")


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    inputs: Sequence[Path] = (),
    verb: str = "write_adapter",
    **options: Any,
) -> Path:
    """Write an adapter as a whole or not at all.

    By default the file stays what it was: the source's format, the type of each tensor (float16
    and bfloat16 too; what was computed in float64 becomes float32), and within the format
    everything that is stored next to the factors: metadata, biases, norms, embeddings, fields of a
    config, a model card. What an edit changed (ranks, alphas, hashes) is brought up to date. In
    a different format, :func:`unwritten_findings` names what is left out.

    ``"peft"`` makes a folder with ``adapter_config.json`` and ``adapter_model.safetensors``
    that PEFT loads: factors in the shapes of their layers, the exact scale, DoRA's
    norms and trained modules. The parts of a fused weight are written as one update of the whole;
    from ``"peft"`` they are read as parts again, and in ``"loralib"`` equal blocks are
    ``MergedLinear``'s.
    ``"kohya"``, ``"flux"`` and ``"diffusers"`` make one file each, under the keys that programs for
    image models load: an alpha per module, ComfyUI's and ai-toolkit's names, or PEFT's config in
    the metadata. Layers of SDXL and FLUX get the names that each program looks up; FLUX's fused
    projections are split for diffusers, and joined for kohya, exactly.
    ``"mlx"`` makes the folder that mlx-lm loads, ``"gguf"`` one file for llama.cpp, ``"loralib"``
    a state dictionary as safetensors; :func:`writing_notes` names what each folds.

    Parameters
    ----------
    adapter
        An adapter, or anything that :func:`as_adapter` takes. Every module must be a low-rank
        update of known scale.
    path
        The folder, created if it does not exist. Files that this function wrote are replaced
        together; other files stay. For a format of one file it may also be the file, ending in
        ``.safetensors`` or ``.gguf``.
    format
        One of the formats that can be written; by default that of the source, or PEFT's if that
        one is not written.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``: type of all factors. By default each
        module's own; float32 if that cannot hold the numbers exactly.
    force
        Replace files at the names that are written, even those of others and edited ones.
    inputs
        Files and folders, in addition to the adapter's, that may not be written.
    verb
        The command that the folder's record names as its writer.
    **options
        Options of the format's writer: ``architecture`` and ``heads`` for ``"gguf"``.

    Returns
    -------
    Path
        The folder, or the one file.

    Raises
    ------
    ScaleError
        The scale of a module is not known, and the file must state one.
    UnsupportedMethodError
        More was trained than the format can store; or an update is part of a method that also
        changes the base (KaSA), or of an incomplete stack of experts.
    InputError
        The format cannot be written, or the adapter has no modules or one that does not fit it.
    OccupiedError
        A file of somebody else has a name that is written, or the output is an input.
    InUseError
        Another process writes there.
    OutputError
        The file could not be written, for example because the disk is full.
    MissingExtraError
        ``"gguf"`` was asked for, and the extra of that name is not installed.

    Notes
    -----
    One module at a time is in memory; each is read twice, for the header and for its numbers.
    """
    adapter = as_adapter(adapter)
    target = Path(path)
    # Modules of an edited adapter are computed here; their factors are thin, for which BLAS is
    # faster with one thread, and gives the bits that were measured.
    with threadpool_limits(1, user_api="blas"):
        files = adapter_files(adapter, target, format=format, dtype=dtype, **options)
        protected = [*adapter.provenance.inputs, *inputs]
        if list(files) == [target]:
            return write_output_file(target, files[target], inputs=protected, force=force)
        with output_folder(
            target, kind=_KIND, verb=verb, inputs=protected, force=force, shared=True
        ) as staging:
            for file, content in files.items():
                write_atomic(staging / file.relative_to(target), content)
    return target if len(files) > 1 else next(iter(files))


def check_adapter_place(path: Path, *, inputs: Sequence[Path], force: bool) -> None:
    """Raise if an adapter may not be written to a path; a folder must hold nothing of others.

    Raises
    ------
    OccupiedError
        See `OutputFolder.check` and `check_output_file`.
    """
    if path.suffix in _FILE_SUFFIXES and not path.is_dir():
        check_output_file(path, inputs=inputs, force=force)
    else:
        OutputFolder(path, kind=_KIND, verb="", inputs=inputs, force=force).check()


def write_adapter_files(adapter: Adapter, folder: Path) -> list[str]:
    """Write a PEFT adapter into a folder that nobody else uses; return the names of the files."""
    files = adapter_files(adapter, folder, format="peft")
    return [write_atomic(path, content).name for path, content in files.items()]


def adapter_files(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> dict[Path, Content]:
    """Return the files of an adapter by path, the one that makes the set readable last.

    Everything that can be refused from types, shapes and scales is refused here; the numbers are
    read, module by module, when a content is written. Parameters and errors are those of
    `write_adapter`.
    """
    if format is None:
        format = written_format(adapter)
    if format not in WRITERS:
        message = f"Format '{format}' is not written. Choose one of: {', '.join(WRITERS)}."
        raise InputError(message)
    target = Path(path)
    form = written_form(adapter, format)
    contents = contents_of(format)(in_dtype(form, dtype) if dtype else form, **options)
    first, content = next(iter(contents.items()))
    if len(contents) == 1 and target.suffix == Path(first).suffix:
        return {target: content}
    return {target / name.replace("*", target.name): data for name, data in contents.items()}


def writing_notes(adapter: Adapter, format: str) -> list[str]:
    """Return sentences on what a format cannot express and its writer folds into something else.

    Raises
    ------
    InputError, ScaleError, UnsupportedMethodError
        The adapter cannot be written in that format.
    """
    return notes_of(format)(written_form(adapter, format))


def written_names(adapter: Adapter, format: str) -> dict[str, str]:
    """Return the name under which each module of an adapter is read from a file of a format.

    Raises
    ------
    InputError
        A name cannot be written in the format.
    """
    if format == "kohya":
        from lora_analysis.formats.diffusion.kohya import flattened_names

        return flattened_names(adapter)
    if format == "flux":
        from lora_analysis.formats.diffusion.flux import authors_names

        return authors_names(adapter)
    return {name: name for name in adapter}


def written_format(adapter: Adapter) -> str:
    """Return the format in which an adapter is written by default: its source's, else PEFT's."""
    source = source_format(adapter)
    return source if source in WRITERS else "peft"


def written_form(adapter: Adapter, format: str) -> Adapter:
    """Return an adapter with the modules that a file of a format has.

    Parts of fused weights are joined (loralib stores equal blocks as parts), and layers of image
    models have the names that its loaders look up, split and joined as their models are. The scale
    is the one that loaders of a diffusers file without a stated scale take.
    """
    adapter = join_parts(adapter, but=are_blocks if format == "loralib" else None)
    if format not in IMAGE_FORMATS:
        return adapter
    from lora_analysis.formats.diffusion.diffusers import with_loaders_scale
    from lora_analysis.formats.diffusion.image_names import to_authors_names, to_diffusers_names

    adapter = with_loaders_scale(adapter)
    if format == "diffusers":
        return to_diffusers_names(adapter)
    return to_authors_names(adapter, dotted=format == "flux")


def file_suffix(adapter: Adapter, format: str) -> str | None:
    """Return the suffix of the one file of a format, None if its writer makes a folder."""
    if format == "peft":
        from lora_analysis.formats.peft.writer import is_bare

        return ".safetensors" if is_bare(adapter) else None
    return FILE_SUFFIXES.get(format)
