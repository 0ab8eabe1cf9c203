"""``read_adapter`` and ``find_adapters``: from a source to the format that reads it."""

from __future__ import annotations

import glob
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.adapter import FULL_FINE_TUNE, Adapter, is_fine_tune
from lora_analysis.errors import (
    InputError,
    LoraAnalysisError,
    MalformedFileError,
    SourceError,
    named_error,
)
from lora_analysis.finding import Failure
from lora_analysis.formats.options import ReadOptions
from lora_analysis.formats.registry import formats_for
from lora_analysis.formats.sources import (
    CONTAINER_SUFFIXES,
    AdapterRef,
    ResolvedSource,
    label_of,
    resolve_source,
)
from lora_analysis.patterns import natural_key, pattern_budget
from lora_analysis.storage.gguf import read_gguf
from lora_analysis.storage.records import refuse_unfinished
from lora_analysis.storage.source_names import addresses_in_errors, existing_path, source_paths
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lora_analysis.adapter import Update
    from lora_analysis.formats.options import ExpertOrder, InitialFactorsSource
    from lora_analysis.storage.source_names import Snapshot

_UNPICKLED: Final = (".safetensors", ".gguf", ".npz")
# Files that a report and a sweep leave next to the adapters.
_REPORT_FILES: Final = frozenset({"grids.npz"})
_SWEEP_FILES: Final = frozenset({"sweep.json", "failed.json"})
_MAX_DEPTH: Final = 6
_MAX_LISTED: Final = 12


def read_adapter(
    source: str | os.PathLike[str] | AdapterRef,
    *,
    alpha: float | None = None,
    scale: float | None = None,
    base: Any = None,
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
        A folder, a file in it, or an element of the list that :func:`find_adapters` returned. If
        nothing local has that name, a repository on a hub (extra ``hf``):
        ``hf://owner/name[@revision][/path]`` or ``owner/name``. ``source#name`` chooses one of
        several adapters in a file. An adapter directly in the folder is chosen, whatever its
        sub-folders hold.
    alpha
        The hyper-parameter, overriding the file's: the scale is ``alpha/r`` with each module's own
        rank (``alpha/sqrt(r)`` if the file says rsLoRA).
    scale
        The multiplier itself, overriding the file's.
    base
        The model that a full fine-tune was trained from, as for :func:`open_base`: a source that is
        a whole model is then read as its difference to the base (:func:`read_fine_tune`).
        Adapters do not need it.
    pair
        Names of the A and of the B tensors, ``{name}`` standing for the module, for files of bare
        pairs: ``("w_a_{name}", "w_b_{name}")``.
    label
        Short name for tables and figures; by default that of the file or folder.
    allow_pickle
        Whether files of ``torch.save`` (``.bin``, ``.pt``) are read. Only their tensors and plain
        values are; a file that names anything else is refused, and no code of it is run.
    initial
        The adapter as it was before training, for methods that subtract its product from the base
        weight at the start (PiSSA, OLoRA, CorDA, LoRA-GA): the update is then the difference
        of the two products, of rank 2r. For PiSSA and OLoRA
        :func:`lora_analysis.initial_factors_from_base` computes the initial factors from the base.
    enable_lora
        Which blocks of a fused weight were adapted, if a file stores their factors in one and does
        not state it: ``(True, False, True)`` for q and v of loralib's ``MergedLinear``.
    kernel
        Width of the kernels of loralib's ``ConvLoRA``, if the file does not hold the weights.
    heads
        Number of attention heads and of key-value heads of the base, if a GGUF file's q and k have
        their rows permuted by head and it does not state them.
    expert_order
        Order of the columns of B if a file stores all experts in one (``target_parameters``):
        ``"expert-fastest"``, as PEFT packs them (``B.reshape(d_out, r, E)``), or
        ``"expert-slowest"``, as Unsloth did until September 2026 (``B.reshape(d_out, E, r)``).
        None follows the writer's mark in the config, else PEFT's order.
    experts
        Number of experts of the base, if the rank of one expert is not the config's; None
        divides the rows of A by the config's rank.

    Returns
    -------
    Adapter
        Its ``provenance`` holds the origin of the scale and the reader's findings.

    Raises
    ------
    SourceError
        There is no adapter, it cannot be fetched, or there are several; the message lists them.
    MissingExtraError
        An ``hf://`` address, and the extra ``hf`` is not installed.
    UnknownFormatError
        No format is recognized; the message describes the content.
    MalformedFileError
        A file does not hold what its format promises.
    UnsupportedMethodError
        The adapter's update is not ``s·B·A`` on matrices.
    """
    options = ReadOptions(
        alpha=alpha,
        scale=scale,
        base=base,
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
    return load_adapter(source, options)


def load_adapter(source: str | os.PathLike[str] | AdapterRef, options: ReadOptions) -> Adapter:
    """Return the one adapter at ``source``, as `read_adapter` does, for given options."""
    resolved = resolve_source(source, allow_pickle=options.allow_pickle)
    path, snapshot = resolved.path, resolved.snapshot
    with addresses_in_errors(snapshot), _system_errors(path), pattern_budget():
        refuse_unfinished(path)
        located = recognize(resolved, options)
        if located.format is None and path.is_dir():
            refs = list(_walk(path, options))
            if len(refs) > 1:
                message = f"{path} holds {len(refs)} adapters, one was asked for. Choose one"
                message = f"{message}: {_quote_sources(refs)}."
                raise SourceError(message)
            if refs:
                located = recognize(ResolvedSource(refs[0].path, refs[0].name), options)
        if located.format is None or located.files is None:
            raise _unknown_format_error(located.path, options)
        adapter = located.format.read(located.files, located.name, options)
    ref = AdapterRef(path.absolute(), "", "", resolved.name, snapshot)
    again = options.non_default()
    base = again.pop("base", None)
    if is_fine_tune(adapter):
        local = _base_path(base)
        address = getattr(base, "address", None)
        again["base"] = address or (base if local is None else local.absolute())
    facts: dict[str, Any] = {"source": ref.source, "read_options": again}
    initial = options.initial
    if isinstance(initial, str | os.PathLike):
        paths = source_paths(initial) or source_paths(os.fspath(initial).partition("#")[0])
        facts["also_read"] = (*adapter.provenance.also_read, *paths)
    if snapshot is None:
        return adapter.with_provenance(**facts)
    # The address on the hub stands in place of the path in its cache.
    findings = (
        finding.map_fields(snapshot.with_addresses) for finding in adapter.provenance.findings
    )
    return adapter.copy_with(
        updates={name: partial(_load_fetched, adapter, name, snapshot) for name in adapter},
        provenance=replace(
            adapter.provenance,
            **facts,
            address=snapshot.address(adapter.provenance.path or snapshot.path),
            revision=snapshot.commit,
            findings=tuple(findings),
        ),
    )


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raise what the system refuses to open or to list as an error of this library."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LoraAnalysisError):
            raise
        message = f"{error.filename or path}: cannot be read: {error.strerror or error}."
        raise SourceError(message) from error
    except (MemoryError, RecursionError) as error:
        raise named_error(error, str(path)) or error from error


def recognize(source: ResolvedSource, options: ReadOptions) -> ResolvedSource:
    """Return the source with the format that recognizes exactly its path, if there is one."""
    for format in formats_for(source.path, options):
        files = format.locate(source.path, options)
        if files is not None:
            files = replace(files, snapshot=source.snapshot)
            return replace(source, format=format, files=files)
    return source


def _load_fetched(adapter: Adapter, name: str, snapshot: Snapshot) -> Update:
    with addresses_in_errors(snapshot):
        return adapter[name]


def find_adapters(
    source: str | os.PathLike[str] | AdapterRef,
    *,
    base: Any = None,
    pair: tuple[str, str] | None = None,
    allow_pickle: bool = False,
) -> list[AdapterRef]:
    """Return every adapter at ``source`` and in its sub-folders, in natural order.

    Parameters
    ----------
    source
        A folder, a file, or a repository on a hub, as in :func:`read_adapter`.
    base
        As in :func:`read_adapter`; then folders with a whole model, other than the base itself, are
        listed too.
    pair
        As in :func:`read_adapter`; then the files whose names match it are listed.
    allow_pickle
        As in :func:`read_adapter`; without it a pickle is listed only if other files or its name
        mark it as an adapter.

    Returns
    -------
    list of AdapterRef
        At least one; each can be given to :func:`read_adapter`. Damaged adapters and safetensors
        files are listed too: reading them raises the error that describes the damage.

    Raises
    ------
    SourceError
        There is no such file, folder or repository.
    UnknownFormatError
        No format recognizes anything there.
    """
    resolved = resolve_source(source, allow_pickle=allow_pickle)
    options = ReadOptions(base=base, pair=pair, allow_pickle=allow_pickle)
    path, name = resolved.path, resolved.name
    with addresses_in_errors(resolved.snapshot), _system_errors(path):
        refs = list(_walk(path, options))
        if not refs:
            raise _unknown_format_error(path, options)
        if name is not None:
            # A file with one adapter is listed without its name: reading it compares the names.
            chosen = [replace(ref, name=name) for ref in refs if ref.name in (None, name)]
            if not chosen:
                message = f"{path} holds no adapter '{name}'. It holds: {_quote_sources(refs)}."
                raise SourceError(message)
            refs = chosen
    return [replace(ref, snapshot=resolved.snapshot) for ref in refs]


def _unknown_format_error(path: Path, options: ReadOptions) -> InputError:
    """Return the error for a source without an adapter, or for a run that is unfinished."""
    from lora_analysis.formats.not_adapters import unknown_format  # seldom needed

    refuse_unfinished(path)  # a run that has no adapter yet explains more than its files
    return unknown_format(path, options)


def _walk(path: Path, options: ReadOptions) -> Iterator[AdapterRef]:
    if path.is_dir():
        yield from _walk_folder(path, options, _MAX_DEPTH, set())
    else:
        yield from _refs_at(path, options)


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
        refs = _refs_at(folder, options)
    except OSError:  # reading it reports why
        yield AdapterRef(folder, "unreadable", label_of(folder))
        return
    base = _base_path(options.base)
    is_base = base is not None and real in (base.resolve(), base.resolve().parent)
    if is_base and depth < _MAX_DEPTH:
        refs = [ref for ref in refs if ref.format != FULL_FINE_TUNE]
    yield from refs
    # Loose files are never whole models: a model in several files without an index has such.
    adapters_only = replace(options, base=None)
    for entry in entries:
        if entry.is_dir():
            if depth > 1:
                yield from _walk_folder(entry, options, depth - 1, seen)
        elif not refs and entry.suffix in CONTAINER_SUFFIXES and entry.name not in _REPORT_FILES:
            yield from _refs_at(entry, adapters_only)


def _base_path(base: Any) -> Path | None:
    """Return the local path of a base, given by it or open; None if it has none."""
    if isinstance(base, str | os.PathLike):
        return existing_path(base)
    path: Path | None = getattr(base, "path", None)
    return path


def _refs_at(path: Path, options: ReadOptions) -> list[AdapterRef]:
    """Return the adapters at exactly this path, of the first format that finds any.

    A file of tensors whose header cannot be read is listed as damaged.
    """
    for format in formats_for(path, options):
        files = format.locate(path, options)
        if files is not None and (refs := format.find(files, options)):
            return refs
    if path.suffix in _UNPICKLED and path.is_file():
        try:
            read_gguf(path) if path.suffix == ".gguf" else open_tensors(path)
        except MalformedFileError:
            return [AdapterRef(path, "damaged", label_of(path))]
        except InputError:
            return []
    return []


def _quote_sources(refs: list[AdapterRef]) -> str:
    names = ", ".join(f"'{ref.source}'" for ref in refs[:_MAX_LISTED])
    return names + (f" and {len(refs) - _MAX_LISTED} more" if len(refs) > _MAX_LISTED else "")


def expand_glob(source: str) -> list[str]:
    """Return the paths that match a glob, in natural order; any other source as it is.

    ``**`` goes through folders. A path that exists as it is written is not a glob. The notes of a
    sweep among its runs are left out.

    Raises
    ------
    SourceError
        No path matches the glob.
    """
    if not glob.has_magic(source) or "://" in source or Path(source).exists():
        return [] if Path(source).name in _SWEEP_FILES else [source]
    paths = sorted(glob.glob(source, recursive=True), key=natural_key)  # noqa: PTH207 - any root
    paths = [path for path in paths if Path(path).name not in _SWEEP_FILES]
    if not paths:
        message = f"No file or folder fits '{source}'. Is the pattern right, and the folder?"
        raise SourceError(message)
    return paths


def skip_seen(
    refs: Iterable[AdapterRef], seen: set[tuple[str, str | None]]
) -> Iterator[AdapterRef]:
    """Yield the adapters that are not ``seen`` yet, and add them to it.

    A folder and one inside it may both be named.
    """
    for ref in refs:
        key = (os.path.abspath(ref.path), ref.name)  # noqa: PTH100 - a link has its own name
        if key not in seen:
            seen.add(key)
            yield ref


def find_sources(
    sources: Iterable[str],
    failures: list[Failure],
    *,
    pair: tuple[str, str] | None = None,
    allow_pickle: bool = False,
    base: Any = None,
) -> list[AdapterRef]:
    """Return every adapter found at the sources, once; a source without one joins the failures.

    The sources may be globs; the options are those of `find_adapters`.
    """
    refs: list[AdapterRef] = []
    seen: set[tuple[str, str | None]] = set()
    for source in sources:
        try:
            for path in expand_glob(source):
                there = find_adapters(path, pair=pair, allow_pickle=allow_pickle, base=base)
                refs += skip_seen(there, seen)
        except InputError as error:
            failures.append(Failure(source, str(error), error))
    return refs
