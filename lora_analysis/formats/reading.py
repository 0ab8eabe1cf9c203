"""``read_adapter`` and ``find_adapters``: which format lies where, and how many adapters."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_analysis.errors import (
    InputError,
    LoraAnalysisError,
    MalformedFileError,
    SourceError,
    named_error,
)
from lora_analysis.formats.fetched import fetched
from lora_analysis.formats.registry import readers
from lora_analysis.formats.sources import (
    CONTAINER_SUFFIXES,
    AdapterRef,
    ExpertOrder,
    ReadOptions,
    ResolvedSource,
    label_of,
    resolve_source,
)
from lora_analysis.patterns import natural_key, pattern_budget
from lora_analysis.storage.gguf import read_gguf
from lora_analysis.storage.hub_names import shown_errors
from lora_analysis.storage.paths import source_paths
from lora_analysis.storage.records import refuse_unfinished
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.initial import InitialFactorsSource

_UNPICKLED = (".safetensors", ".gguf", ".npz")
# What a report leaves beside the adapters that it was made of.
_OUTPUTS = frozenset({"grids.npz"})
_MAX_DEPTH = 6
_LISTED = 12


def read_adapter(
    source: str | os.PathLike[str] | AdapterRef,
    *,
    alpha: float | None = None,
    scale: float | None = None,
    pair: tuple[str, str] | None = None,
    label: str | None = None,
    allow_pickle: bool = False,
    initial: str | os.PathLike[str] | InitialFactorsSource | None = None,
    enable_lora: Sequence[bool] | None = None,
    kernel: int | None = None,
    heads: tuple[int, int] | None = None,
    expert_order: ExpertOrder | None = None,
    experts: int | None = None,
) -> Adapter:
    """Return the one adapter at ``source``; its factors are read when a module is asked for.

    Parameters
    ----------
    source
        A folder, a file in it, or what :func:`find_adapters` returned. Where nothing local has
        that name, a repository on a hub (extra ``hf``): ``hf://owner/name[@revision][/path]`` or
        ``owner/name``. ``source#name`` chooses one of several adapters in a file. An adapter that
        lies directly in the folder is the one that is meant, whatever its sub-folders hold.
    alpha
        The hyper-parameter, overriding the file's: the scale is ``alpha/r`` with each module's own
        rank (``alpha/sqrt(r)`` where the file says rsLoRA).
    scale
        The multiplier itself, overriding the file's.
    pair
        Names of the A and of the B tensors, ``{name}`` standing for the module, for files of bare
        pairs: ``("w_a_{name}", "w_b_{name}")``.
    label
        Short name for tables and figures; by default that of the file or folder.
    allow_pickle
        Whether files of ``torch.save`` (``.bin``, ``.pt``) are read. Only their tensors and plain
        values are; one that names anything else is refused, and nothing it names is run.
    initial
        The adapter as it was before training, for methods that take its product out of the base
        weight at the start (PiSSA, OLoRA, CorDA, LoRA-GA): the update is then the difference
        of the two products, of rank 2r. For PiSSA and OLoRA
        :func:`lora_analysis.initial_factors_from_base` computes the initial factors from the base.
    enable_lora
        Which blocks of a fused weight were adapted, where a file stores their factors in one and
        does not say: ``(True, False, True)`` for q and v of loralib's ``MergedLinear``.
    kernel
        Width of the kernels of loralib's ``ConvLoRA``, where the file does not hold the weights.
    heads
        The base's number of attention heads and of key-value heads, where a GGUF file's q and k
        have their rows permuted by head and it does not state them.
    expert_order
        Order of the columns of B where a file stores all experts in one (``target_parameters``):
        ``"expert-fastest"``, as PEFT packs them (``B.reshape(d_out, r, E)``), or
        ``"expert-slowest"``, as Unsloth did until September 2026 (``B.reshape(d_out, E, r)``).
        None follows the writer's mark in the config, else PEFT's order.
    experts
        Number of experts of the base, where the rank of one expert is not the config's; None
        divides the rows of A by the config's rank.

    Returns
    -------
    Adapter
        Where the scale came from, and what the reader noticed, is in its ``provenance``.

    Raises
    ------
    SourceError
        Nothing lies there, it cannot be fetched, or several adapters lie there; the message lists
        them.
    MissingExtraError
        An ``hf://`` address, and the extra ``hf`` is not installed.
    UnknownFormatError
        No format is recognized; the message says what was found.
    MalformedFileError
        A file does not hold what its format promises.
    UnsupportedMethodError
        The adapter's update is not ``s·B·A`` on matrices.
    """
    options = ReadOptions(
        alpha=alpha,
        scale=scale,
        pair=pair,
        label=label,
        allow_pickle=allow_pickle,
        initial=initial,
        enable_lora=None if enable_lora is None else tuple(map(bool, enable_lora)),
        kernel=kernel,
        heads=heads,
        expert_order=expert_order,
        experts=experts,
    )
    place = resolve_source(source, allow_pickle=allow_pickle)
    with shown_errors(place.snapshot), _refusals_of(place.path), pattern_budget():
        refuse_unfinished(place.path)
        adapter = _read(place, options)
    if isinstance(initial, str | os.PathLike):
        paths = source_paths(initial) or source_paths(os.fspath(initial).partition("#")[0])
        adapter = adapter.with_provenance(also_read=(*adapter.provenance.also_read, *paths))
    ref = AdapterRef(place.path.absolute(), "", "", place.name, place.snapshot)
    adapter = adapter.with_provenance(source=ref.source, read_options=options.given())
    return adapter if place.snapshot is None else fetched(adapter, place.snapshot)


@contextmanager
def _refusals_of(path: Path) -> Iterator[None]:
    """Name the file that the system refuses to open or to list, as any other bad input."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LoraAnalysisError):
            raise
        message = f"{error.filename or path}: cannot be read: {error.strerror or error}."
        raise SourceError(message) from error
    except (MemoryError, RecursionError) as error:
        raise named_error(error, str(path)) or error from error


def _read(place: ResolvedSource, options: ReadOptions) -> Adapter:
    path, name, _ = place
    for reader in readers(path, options):
        if reader.recognizes(path, options):
            return reader.read(path, name, options)
    found = list(_walk(path, options)) if path.is_dir() else []
    if not found:
        raise _unknown(path, options)
    if len(found) > 1:
        raise _several(path, found)
    return _read(ResolvedSource(found[0].path, found[0].name), options)


def find_adapters(
    source: str | os.PathLike[str] | AdapterRef,
    *,
    pair: tuple[str, str] | None = None,
    allow_pickle: bool = False,
) -> list[AdapterRef]:
    """Return every adapter at ``source`` and in its sub-folders, in natural order.

    Parameters
    ----------
    source
        A folder, a file, or a repository on a hub, as in :func:`read_adapter`.
    pair
        As in :func:`read_adapter`; then the files whose names match it are listed.
    allow_pickle
        As in :func:`read_adapter`; without it a pickle is listed only where other files or its
        name say that it is an adapter.

    Returns
    -------
    list of AdapterRef
        At least one; each can be given to :func:`read_adapter`. Damaged adapters and safetensors
        files are listed too: reading them says what is wrong.

    Raises
    ------
    SourceError
        Nothing lies at the source.
    UnknownFormatError
        Nothing that lies there is recognized.
    """
    place = resolve_source(source, allow_pickle=allow_pickle)
    with shown_errors(place.snapshot), _refusals_of(place.path):
        found = _find(place, ReadOptions(pair=pair, allow_pickle=allow_pickle))
    return [replace(ref, snapshot=place.snapshot) for ref in found]


def _find(place: ResolvedSource, options: ReadOptions) -> list[AdapterRef]:
    path, name, _ = place
    found = list(_walk(path, options))
    if not found:
        raise _unknown(path, options)
    if name is None:
        return found
    # A file with one adapter is found without a name: whether it is the one, reading it will say.
    chosen = [replace(ref, name=name) for ref in found if ref.name in (None, name)]
    if not chosen:
        message = f"{path} holds no adapter '{name}'. It holds: {_listed(found)}."
        raise SourceError(message)
    return chosen


def _unknown(path: Path, options: ReadOptions) -> InputError:
    from lora_analysis.formats.unknown import unknown_format  # seldom needed

    refuse_unfinished(path)  # a run that has no adapter yet says more than its files
    return unknown_format(path, options)


def _walk(path: Path, options: ReadOptions) -> Iterator[AdapterRef]:
    if path.is_dir():
        yield from _walk_folder(path, options, _MAX_DEPTH, set())
    else:
        yield from _find_here(path, options)


def _walk_folder(
    folder: Path, options: ReadOptions, depth: int, seen: set[Path]
) -> Iterator[AdapterRef]:
    """Yield the adapters of a folder, then those below it; each real folder is entered once."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(
            (entry for entry in folder.iterdir() if not entry.name.startswith(".")),
            key=lambda entry: natural_key(entry.name),
        )
        here = _find_here(folder, options)
    except OSError:  # reading it says why
        yield AdapterRef(folder, "unreadable", label_of(folder))
        return
    yield from here
    for entry in entries:
        if entry.is_dir():
            if depth > 1:
                yield from _walk_folder(entry, options, depth - 1, seen)
        elif not here and entry.suffix in CONTAINER_SUFFIXES and entry.name not in _OUTPUTS:
            yield from _find_here(entry, options)


def _find_here(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return what the first format that recognizes exactly this path finds there."""
    for reader in readers(path, options):
        if found := reader.find(path, options):
            return found
    return _damaged(path)


def _damaged(path: Path) -> list[AdapterRef]:
    """Return a file of tensors whose header cannot be read: what it was, nobody can say."""
    if path.suffix in _UNPICKLED and path.is_file():
        try:
            read_gguf(path) if path.suffix == ".gguf" else open_tensors(path)
        except MalformedFileError:
            return [AdapterRef(path, "damaged", label_of(path))]
        except InputError:
            return []
    return []


def _several(path: Path, found: list[AdapterRef]) -> SourceError:
    message = f"{path} holds {len(found)} adapters, one was asked for. Choose one"
    return SourceError(f"{message}: {_listed(found)}.")


def _listed(found: list[AdapterRef]) -> str:
    shown = ", ".join(f"'{ref.source}'" for ref in found[:_LISTED])
    return shown + (f" and {len(found) - _LISTED} more" if len(found) > _LISTED else "")
