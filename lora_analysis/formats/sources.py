"""Sources: the files of one adapter, the format that recognizes them, settings and label."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.storage.documents import PICKLE_SUFFIXES, read_json_object
from lora_analysis.storage.limits import MAX_CONFIG_BYTES
from lora_analysis.storage.source_names import Snapshot, existing_path
from lora_analysis.storage.tensors import open_tensors
from lora_analysis.text import whole_characters

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors

# Names of folders and files that many adapters have; the name of the folder above is added.
_GENERIC_WORDS = (
    "adapters?|lora|peft|final|best|last|latest|checkpoints?|outputs?|results?|models?|weights"
    "|trainer|trained|default|epoch|step|pytorch"
)
_GENERIC = re.compile(
    rf"(\d+[-_])?({_GENERIC_WORDS})([-_]({_GENERIC_WORDS}))*([-_]?\d+)?", re.IGNORECASE
)
_CHECKPOINT = re.compile(r"(?:checkpoint|ckpt|step|global_step)[-_]?(\d{1,12})", re.IGNORECASE)

# Megatron's and NeMo's folders, DeepSpeed's files.
_RANK = re.compile(r"(?P<before>(?:.*_)?(?:mp|tp)_rank_)(?P<rank>\d{1,6})(?P<after>.*)")

# Files that may hold tensors, in a folder that is searched; their content decides.
CONTAINER_SUFFIXES = frozenset({".safetensors", ".npz", ".gguf", *PICKLE_SUFFIXES})


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of an adapter, as the format that recognized them found them.

    Parameters
    ----------
    path
        The path the adapter goes by: its folder, or a file.
    weights
        The file of tensors, or the index of a sharded one.
    config_path
        The configuration of the format next to it, if there is one.
    config
        Its content; None if it cannot be read, which reading the adapter reports.
    tensors
        The tensors, if they are in memory: there are no files then, and the paths are names for
        messages.
    scales
        The scale that a live layer applies, by the name of its tensor of A.
    snapshot
        The repository they were fetched from, if they were.
    """

    path: Path
    weights: Path
    config_path: Path | None = None
    config: Mapping[str, Any] | None = None
    tensors: NamedTensors | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    snapshot: Snapshot | None = None

    def open(self, options: ReadOptions) -> NamedTensors:
        """Return the adapter's tensors."""
        if self.tensors is not None:
            return self.tensors
        return open_tensors(self.weights, allow_pickle=options.allow_pickle)


class Format:
    """A format that adapters are read from; `KeyScheme` is the common case.

    Attributes
    ----------
    name
        Name in ``Provenance.format``.
    """

    __slots__ = ()

    name: str

    def locate(self, path: Path, options: ReadOptions) -> AdapterFiles | None:
        """Return the files of the adapter at exactly this file or folder, None if there is none."""
        raise NotImplementedError

    def recognizes(self, tensors: NamedTensors, options: ReadOptions) -> bool:  # noqa: ARG002
        """Return True if tensors in memory, a state dictionary, are an adapter of this format."""
        return False

    def find(self, files: AdapterFiles, options: ReadOptions) -> list[AdapterRef]:  # noqa: ARG002
        """Return the adapters in files that this format located."""
        return [AdapterRef(files.path, self.name, label_of(files.path))]

    def read(self, files: AdapterFiles, name: str | None, options: ReadOptions) -> Adapter:
        """Read the one adapter in the files, or the one called ``name``."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter that was found and not yet read.

    Parameters
    ----------
    path
        Its folder or file.
    format
        Name of the format that recognized it.
    label
        Short name for tables and figures.
    name
        Its name inside the file, if one file holds several; else None.
    snapshot
        The repository it was fetched from, if it was.
    """

    path: Path
    format: str
    label: str
    name: str | None = None
    snapshot: Snapshot | None = None

    @property
    def source(self) -> str:
        """The string that reads exactly this adapter: the path (or address), ``#name`` added."""
        address = str(self.path) if self.snapshot is None else self.snapshot.address(self.path)
        return address if self.name is None else f"{address}#{self.name}"

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """A source as a local path, and the format that recognizes it.

    Parameters
    ----------
    path
        A file or folder.
    name
        Name of the adapter in it, if the source states one.
    snapshot
        The repository it was fetched from, if it was.
    format, files
        The format that recognizes the path, and the adapter's files; None for a folder that is
        searched for adapters.
    """

    path: Path
    name: str | None = None
    snapshot: Snapshot | None = None
    format: Format | None = None
    files: AdapterFiles | None = None


def resolve_source(
    source: str | os.PathLike[str] | AdapterRef, *, allow_pickle: bool = False
) -> ResolvedSource:
    """Return the local path of a source; a repository on a hub is fetched.

    ``source#name`` chooses one of the adapters in a file. A path that exists as it is written
    wins, then one that exists before the ``#``, then a repository.

    Raises
    ------
    SourceError
        There is no such file, folder or repository, or it cannot be fetched.
    """
    if isinstance(source, AdapterRef):
        return ResolvedSource(source.path, source.name, source.snapshot)
    if path := existing_path(source):
        return ResolvedSource(path)
    stem, _, name = str(source).rpartition("#")
    if stem and name and (path := existing_path(stem)):
        return ResolvedSource(path, name)
    from lora_analysis.storage.hub import fetch_adapter  # most sources are local

    address, chosen = (stem, name) if stem and name else (source, None)
    snapshot = fetch_adapter(address, allow_pickle=allow_pickle)
    return ResolvedSource(snapshot.path, chosen, snapshot)


def tensors_at(path: Path, options: ReadOptions) -> NamedTensors | None:
    """Return the tensors of a file to look at their names, None if it cannot be opened.

    A pickle without ``allow_pickle`` and a damaged file cannot; reading the adapter reports why.
    The last few files are cached, since each format looks.
    """
    try:
        status = path.stat()
        if not path.is_file():
            return None
        key = (status.st_mtime_ns, status.st_size, status.st_ino)
        return _open_cached(path, options.allow_pickle, key)
    except (InputError, OSError, ValueError):
        return None


@lru_cache(maxsize=8)
def _open_cached(path: Path, allow_pickle: bool, _state: tuple[int, ...]) -> NamedTensors:
    return open_tensors(path, allow_pickle=allow_pickle)


def config_at(path: Path) -> dict[str, Any]:
    """Return a JSON configuration, empty if there is none or it cannot be read."""
    try:
        return read_json_object(path) if path.is_file() else {}
    except InputError:
        return {}


def trainer_settings(path: Path) -> dict[str, Any]:
    """Return the plain values of a trainer's YAML file by key, empty if it cannot be read.

    Keys count wherever in the tree they are. One that has two different values in the file is left
    out: its path in the tree, which differs between versions of a trainer, would decide between
    them.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Takes the tags of Python objects, which some trainers write, for null."""

    Loader.add_multi_constructor("", lambda _loader, _suffix, _node: None)
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        pending = [yaml.load(path.read_bytes(), Loader)]
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    values: dict[str, Any] = {}
    ambiguous = set()
    seen = set()  # an anchor may be used any number of times
    while pending:
        node = pending.pop()
        if not isinstance(node, dict | list) or id(node) in seen:
            continue
        seen.add(id(node))
        pending += node.values() if isinstance(node, dict) else node
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, str | int | float):
                first = values.setdefault(str(key), value)
                if first != value or type(first) is not type(value):
                    ambiguous.add(str(key))
    return {key: value for key, value in values.items() if key not in ambiguous}


def setting_number(value: object) -> float | None:
    """Return a setting as a finite number, None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def setting_count(value: object) -> int | None:
    """Return a setting as a positive whole number, None if it is not one."""
    value = int(value) if isinstance(value, str) and value.isdecimal() else value
    return value if type(value) is int and 0 < value < 10**9 else None


def is_uninformative(name: str) -> bool:
    """Return True if many files or folders have this name, as ``final`` or ``model``."""
    return _GENERIC.fullmatch(name) is not None


def label_of(path: Path, name: str | None = None) -> str:
    """Return a short name: the file's stem or the folder's name, after those above if generic.

    ``final``, ``checkpoint-23`` and the like get the name of their folder in front; at most two
    folders are added.
    """
    path = path.absolute()
    first = label = path.stem if path.suffix in CONTAINER_SUFFIXES else _name_of(path)
    for folder in islice(path.parents, 2):
        if not is_uninformative(first) or not folder.name:
            break
        first = _name_of(folder)
        label = f"{first}/{label}"
    return whole_characters(label if name is None else f"{label}#{name}")


def _name_of(folder: Path) -> str:
    """Return a folder's name; for a commit in a hub's cache, the repository's."""
    cached = folder.parent.parent.name.split("--", 2)
    if folder.parent.name == "snapshots" and len(cached) == 3:
        return cached[2]
    return folder.name


class RunFacts(TypedDict, total=False):
    """Facts about the training run of an adapter."""

    seed: int
    task: str
    step: int
    metrics: dict[str, float]


def run_facts(folder: Path) -> RunFacts:
    """Return seed, task, step and final metrics that a run's ``manifest.json`` states, if any.

    The manifest is next to the adapter's files, or one level up. If it has no step, the step of
    the Trainer's ``trainer_state.json`` in the same folder counts, else the number in the folder's
    name (``checkpoint-500``). A file that is not a JSON object and values of a wrong type are left
    out: any program may write that name.
    """
    folder = folder.absolute()
    facts: RunFacts = {}
    for manifest in (folder / "manifest.json", folder.parent / "manifest.json"):
        if manifest.is_file():
            if fields := config_at(manifest):
                for key, kind in (("seed", int), ("task", str), ("step", int)):
                    if type(fields.get(key)) is kind:
                        facts[key] = fields[key]  # type: ignore[literal-required]
                metrics = fields.get("metrics")
                facts["metrics"] = {
                    str(name): float(value)
                    for name, value in (metrics.items() if isinstance(metrics, dict) else ())
                    if type(value) in (int, float) and abs(value) <= sys.float_info.max
                }
            break
    if "step" not in facts:
        step = config_at(folder / "trainer_state.json").get("global_step")
        named = _CHECKPOINT.fullmatch(folder.name)
        if type(step) is int:
            facts["step"] = step
        elif named:
            facts["step"] = int(named[1])
    return facts


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
