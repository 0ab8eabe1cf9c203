"""What a source calls a repository on a hub, and what is said of one in place of its cache."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from lora_analysis.errors import LoraAnalysisError, SourceError
from lora_analysis.storage.containers import PICKLE_SUFFIXES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

PREFIX: Final = "hf://"
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_BARE: Final = re.compile(rf"{_PART}/{_PART}")
# A revision is one segment, in which %2F stands for a slash; the hub's own refs have three.
_ADDRESS: Final = re.compile(
    rf"hf://(?P<repo>{_PART}/{_PART})"
    r"(@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.%-]+))?(/(?P<inside>.*))?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, a revision of it (None for the default one), and a path inside it."""

    repo: str
    revision: str | None = None
    inside: str = ""
    spelled: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}" + (f"/{self.inside}" if self.inside else "")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was fetched of one commit of a repository; ``folder`` lies in the hub's cache."""

    repo: str
    commit: str
    folder: Path
    inside: str = ""

    @property
    def path(self) -> Path:
        """Where the thing lies that was asked for."""
        return self.folder / self.inside

    @property
    def name(self) -> str:
        """The repository's name, without its owner."""
        return self.repo.partition("/")[2]

    def address(self, path: Path) -> str:
        """Return what anyone may call a path in the snapshot: ``hf://owner/name@commit/…``."""
        return self.shown(str(path))

    def shown(self, text: str) -> str:
        """Return a text in which the snapshot has its address in place of its cache folder."""
        return text.replace(str(self.folder), f"{PREFIX}{self.repo}@{self.commit}")


def hub_name(source: str | os.PathLike[str]) -> HubName | None:
    """Return the repository that a source names where nothing local has its name, or None.

    ``hf://owner/name[@revision][/path]``, or ``owner/name`` alone.

    Raises
    ------
    SourceError
        It begins as an address and is none.
    """
    text = source if isinstance(source, str) else ""  # a Path means a local one
    if text.startswith(PREFIX):
        match = _ADDRESS.fullmatch(text)
        inside = (match["inside"] or "").strip("/") if match else ""
        if match is None or ".." in PurePosixPath(inside).parts or "\0" in text:
            message = f"{text!r} is no address of the form hf://owner/name[@revision][/path]."
            raise SourceError(message)
        revision = unquote(match["revision"]) if match["revision"] else None
        return HubName(match["repo"], revision, inside, text)
    return HubName(text, spelled=text) if _BARE.fullmatch(text) and not names_a_file(text) else None


def names_a_file(text: str) -> bool:
    """Say whether a path ends as files of tensors do."""
    suffix = PurePosixPath(text).suffix
    return suffix in (".safetensors", ".json", ".gguf", ".npz") or suffix in PICKLE_SUFFIXES


@contextmanager
def shown_errors(snapshot: Snapshot | None) -> Iterator[None]:
    """Name the address in errors, where a snapshot's files lie in someone's cache folder."""
    try:
        yield
    except LoraAnalysisError as error:
        if snapshot is None:
            raise
        raise type(error)(snapshot.shown(str(error))) from error
