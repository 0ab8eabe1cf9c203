"""What a source string names: a local path, a file shipped with the package, or a hub's repository.

Messages about fetched files state their address on the hub instead of the cache folder.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from lora_analysis.errors import LoraAnalysisError, SourceError
from lora_analysis.storage.documents import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONFIGS = ("config.json", "adapter_config.json")
_PACKAGE = Path(__file__).resolve().parents[1]

PREFIX: Final = "hf://"
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_BARE: Final = re.compile(rf"{_PART}/{_PART}")
# A revision is one segment, with %2F for a slash; the hub's refs have three segments.
_ADDRESS: Final = re.compile(
    rf"hf://(?P<repo>{_PART}/{_PART})"
    r"(@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.%-]+))?(/(?P<inside>.*))?",
    re.DOTALL,
)


def existing_path(source: str | os.PathLike[str]) -> Path | None:
    """Return the local path that ``source`` names, None if it does not exist."""
    try:
        path = Path(source)
        return path if path.exists() else None
    except (OSError, ValueError):  # a name too long, or with a null character in it
        return None


def source_paths(source: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the local files and folders of a model or adapter, which no output may touch.

    A file next to its config is part of that folder. ``()`` if nothing local has the name.
    """
    path = existing_path(source)
    if path is None or not os.fspath(source):
        return ()
    configured = path.is_file() and any(path.with_name(name).is_file() for name in _CONFIGS)
    return (path, path.parent) if configured else (path,)


def not_found_error(source: str | os.PathLike[str]) -> SourceError:
    """Return the error for a source that names no file or folder."""
    try:
        link = Path(source).readlink()
    except PermissionError as error:
        return SourceError(
            f"{str(source)!r} cannot be looked at: {error.strerror}. Reading it takes permission "
            "to enter every folder above it."
        )
    except (OSError, ValueError):
        return SourceError(f"There is no file or folder {str(source)!r}.")
    return SourceError(f"{str(source)!r} is a link to '{link}', which does not exist.")


def bundled_data(name: str) -> Path:
    """Return the path of a shipped file or folder.

    An installed package has them in ``lora_analysis/data``; a checkout has them in ``data/`` at its
    root.

    Parameters
    ----------
    name
        Name inside the data folder, for example ``"digits-vit"``.

    Raises
    ------
    SourceError
        Nothing of that name is shipped.
    """
    folders = [_PACKAGE / "data", _PACKAGE.parent / "data"]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    searched = " or ".join(str(folder) for folder in folders)
    message = f"No bundled data named '{name}' in {searched}. Is the installation complete?"
    raise SourceError(message)


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
    """Fetched files of one commit of a repository; ``folder`` is in the hub's cache."""

    repo: str
    commit: str
    folder: Path
    inside: str = ""

    @property
    def path(self) -> Path:
        """Local path of the file or folder that was requested."""
        return self.folder / self.inside

    @property
    def name(self) -> str:
        """The repository's name, without its owner."""
        return self.repo.partition("/")[2]

    def address(self, path: Path) -> str:
        """Return the address of a path in the snapshot: ``hf://owner/name@commit/…``."""
        return self.with_addresses(str(path))

    def with_addresses(self, text: str) -> str:
        """Return a text with the cache folder replaced by the snapshot's address."""
        return text.replace(str(self.folder), f"{PREFIX}{self.repo}@{self.commit}")


def hub_name(source: str | os.PathLike[str]) -> HubName | None:
    """Return the repository that a source names, None if it names none.

    ``hf://owner/name[@revision][/path]``, or ``owner/name`` alone.

    Raises
    ------
    SourceError
        It begins as an address and is not a valid one.
    """
    text = source if isinstance(source, str) else ""  # a Path means a local one
    if text.startswith(PREFIX):
        match = _ADDRESS.fullmatch(text)
        inside = (match["inside"] or "").strip("/") if match else ""
        if match is None or ".." in PurePosixPath(inside).parts or "\0" in text:
            message = f"{text!r} is not an address of the form hf://owner/name[@revision][/path]."
            raise SourceError(message)
        revision = unquote(match["revision"]) if match["revision"] else None
        return HubName(match["repo"], revision, inside, text)
    return HubName(text, spelled=text) if _BARE.fullmatch(text) and not names_a_file(text) else None


def names_a_file(text: str) -> bool:
    """Return True if a path has the suffix of a file of tensors."""
    suffix = PurePosixPath(text).suffix
    return suffix in (".safetensors", ".json", ".gguf", ".npz") or suffix in PICKLE_SUFFIXES


@contextmanager
def addresses_in_errors(snapshot: Snapshot | None) -> Iterator[None]:
    """Replace cache folders in error messages by the address of the snapshot."""
    try:
        yield
    except LoraAnalysisError as error:
        if snapshot is None:
            raise
        raise type(error)(snapshot.with_addresses(str(error))) from error
