"""What a reader is pointed at: a place, the caller's options, and a name for what lies there."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypedDict, get_args

from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.file_signatures import PICKLE_SUFFIXES
from lora_analysis.storage.hub_names import Snapshot
from lora_analysis.storage.paths import existing_path
from lora_analysis.storage.tensors import open_tensors
from lora_analysis.text import whole_characters

if TYPE_CHECKING:
    import os

    from lora_analysis.formats.initial import InitialFactorsSource
    from lora_analysis.storage.tensors import NamedTensors

# Names of folders and files that say nothing of what was trained: the folder above does.
_SAYS_NOTHING = (
    "adapters?|lora|peft|final|best|last|latest|checkpoints?|outputs?|results?|models?|weights"
    "|trainer|trained|default|epoch|step|pytorch"
)
_GENERIC = re.compile(
    rf"(\d+[-_])?({_SAYS_NOTHING})([-_]({_SAYS_NOTHING}))*([-_]?\d+)?", re.IGNORECASE
)

_CHECKPOINT = re.compile(r"(?:checkpoint|ckpt|step|global_step)[-_]?(\d{1,12})", re.IGNORECASE)

# Files that may hold tensors, where a folder is searched; what they hold decides.
CONTAINER_SUFFIXES = frozenset({".safetensors", ".npz", ".gguf", *PICKLE_SUFFIXES})


ExpertOrder = Literal["expert-fastest", "expert-slowest"]
EXPERT_ORDERS: Final = get_args(ExpertOrder)


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
        Its name inside the file, where one file holds several; else None.
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
        place = str(self.path) if self.snapshot is None else self.snapshot.address(self.path)
        return place if self.name is None else f"{place}#{self.name}"

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the caller of a reader knows better than the file, and what he allows.

    ``initial`` is where the factors lie that the training started from, or what works them out.
    ``enable_lora`` says which blocks of a fused weight grouped factors belong to, ``kernel`` how
    wide a convolution's is, ``heads`` how many heads of queries and of keys the base has.
    ``expert_order`` is the order in which B of a stack of experts holds its columns, ``experts``
    the number of experts of the base.
    """

    alpha: float | None = None
    scale: float | None = None
    pair: tuple[str, str] | None = None
    label: str | None = None
    allow_pickle: bool = False
    initial: str | os.PathLike[str] | InitialFactorsSource | None = None
    enable_lora: tuple[bool, ...] | None = None
    kernel: int | None = None
    heads: tuple[int, int] | None = None
    expert_order: ExpertOrder | None = None
    experts: int | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and self.scale is not None:
            message = (
                f"Both alpha={self.alpha} and scale={self.scale} are given. The scale is the "
                "multiplier itself, alpha gives alpha/r: pass one of them."
            )
            raise InputError(message)
        for role, number in (("alpha", self.alpha), ("scale", self.scale)):
            if number is not None and not abs(number) <= sys.float_info.max:
                message = f"{role} must be a finite number, found {number!r}."
                raise InputError(message)
            if number == 0:
                message = f"{role} = 0 would make every update zero. Leave it out if it is unknown."
                raise InputError(message)
        self._check_structure()

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, by name."""
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def _check_structure(self) -> None:
        if self.enable_lora is not None and not any(self.enable_lora):
            message = f"enable_lora={self.enable_lora!r} enables no block of the fused weight."
            raise InputError(message)
        if self.kernel is not None and self.kernel < 1:
            message = f"kernel must be the width of a kernel, found {self.kernel}."
            raise InputError(message)
        if self.heads is not None and (len(self.heads) != 2 or min(self.heads) < 1):
            message = (
                f"heads must be two numbers, heads of queries and of keys, found {self.heads!r}."
            )
            raise InputError(message)
        if self.expert_order is not None and self.expert_order not in EXPERT_ORDERS:
            orders = " or ".join(repr(order) for order in EXPERT_ORDERS)
            message = f"expert_order must be {orders}, found {self.expert_order!r}."
            raise InputError(message)
        if self.experts is not None and self.experts < 1:
            message = f"experts must be the number of experts of the base, found {self.experts}."
            raise InputError(message)


def tensors_at(path: Path, options: ReadOptions) -> NamedTensors | None:
    """Return the tensors of a file for a look at their names, None where it cannot be opened.

    That is so of a pickle that the caller has not allowed, and of damaged files: reading the
    adapter says what is wrong. The last few files are remembered, since each format looks.
    """
    try:
        status = path.stat()
        if not path.is_file():
            return None
        key = (status.st_mtime_ns, status.st_size, status.st_ino)
        return _opened(path, options.allow_pickle, key)
    except (InputError, OSError, ValueError):
        return None


@lru_cache(maxsize=8)
def _opened(path: Path, allow_pickle: bool, _state: tuple[int, ...]) -> NamedTensors:
    return open_tensors(path, allow_pickle=allow_pickle)


class ResolvedSource(NamedTuple):
    """Where a source leads: a local path, the adapter chosen in it, where it was fetched from."""

    path: Path
    name: str | None = None
    snapshot: Snapshot | None = None


def resolve_source(
    source: str | os.PathLike[str] | AdapterRef, *, allow_pickle: bool = False
) -> ResolvedSource:
    """Return where a source leads; a repository on a hub is fetched.

    ``source#name`` chooses one of the adapters in a file. A path that exists as it is written
    wins, then one that exists before the ``#``, then a repository.

    Raises
    ------
    SourceError
        Nothing lies there, or it cannot be fetched.
    """
    if isinstance(source, AdapterRef):
        return ResolvedSource(source.path, source.name, source.snapshot)
    if path := existing_path(source):
        return ResolvedSource(path)
    stem, _, name = str(source).rpartition("#")
    if stem and name and (path := existing_path(stem)):
        return ResolvedSource(path, name)
    chosen = (stem, name) if stem and name else (source, None)
    from lora_analysis.storage.hub import fetch_adapter  # most sources lie on this disk

    snapshot = fetch_adapter(chosen[0], allow_pickle=allow_pickle)
    return ResolvedSource(snapshot.path, chosen[1], snapshot)


def says_nothing(name: str) -> bool:
    """Say whether a file's or folder's name is one that many have, as ``final`` or ``model``."""
    return _GENERIC.fullmatch(name) is not None


def label_of(path: Path, name: str | None = None) -> str:
    """Return a short name: the file's stem or the folder's name, with those above where generic.

    ``final``, ``checkpoint-23`` and their like say nothing without the folder they lie in; at
    most two are added.
    """
    place = path.absolute()
    first = own = place.stem if place.suffix in CONTAINER_SUFFIXES else _name_of(place)
    for folder in islice(place.parents, 2):
        if not says_nothing(first) or not folder.name:
            break
        first = _name_of(folder)
        own = f"{first}/{own}"
    return whole_characters(own if name is None else f"{own}#{name}")


def _name_of(folder: Path) -> str:
    """Return a folder's name; of a commit in a hub's cache, the repository's."""
    cached = folder.parent.parent.name.split("--", 2)
    if folder.parent.name == "snapshots" and len(cached) == 3:
        return cached[2]
    return folder.name


class RunFacts(TypedDict, total=False):
    """What a training run's manifest says about the adapter beside it."""

    seed: int
    task: str
    step: int
    metrics: dict[str, float]


def run_facts(folder: Path) -> RunFacts:
    """Return seed, task, step and final metrics that a run's ``manifest.json`` states, if any.

    Without a step in it, that of the Trainer's ``trainer_state.json`` in the same folder counts,
    else the number in the folder's name (``checkpoint-500``).

    It lies beside the adapter's files, or one level up, beside the adapter's folder. A file that
    is no JSON object and values of a wrong type are left out: any program may write that name.
    """
    facts: RunFacts = {}
    for place in (folder, folder.absolute().parent):
        manifest = place / "manifest.json"
        if manifest.is_file():
            try:
                found = read_json_object(manifest)
            except InputError:
                break
            if type(found.get("seed")) is int:
                facts["seed"] = found["seed"]
            if type(found.get("task")) is str:
                facts["task"] = found["task"]
            if type(found.get("step")) is int:
                facts["step"] = found["step"]
            facts["metrics"] = _finite_numbers(found.get("metrics"))
            break
    if "step" not in facts and (step := _step_of(folder.absolute())) is not None:
        facts["step"] = step
    return facts


def _step_of(folder: Path) -> int | None:
    """Return the step a checkpoint was saved at, by its trainer's state or its folder's name."""
    state = folder / "trainer_state.json"
    if state.is_file():
        try:
            found = read_json_object(state).get("global_step")
        except InputError:
            found = None
        if type(found) is int:
            return found
    named = _CHECKPOINT.fullmatch(folder.name)
    return int(named[1]) if named else None


def _finite_numbers(found: object) -> dict[str, float]:
    """Return the entries of a JSON object that are numbers a float can hold."""
    entries = found.items() if isinstance(found, dict) else ()
    return {
        str(name): float(value)
        for name, value in entries
        if type(value) in (int, float) and abs(value) <= sys.float_info.max
    }
