"""JSON and TOML from files that nobody vouches for."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NoReturn

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.storage.limits import MAX_CONFIG_BYTES

if TYPE_CHECKING:
    from pathlib import Path


# What Git leaves in place of a large file that was not fetched: below 1,024 bytes, begun so.
_POINTER: Final = b"version https://git-lfs"
_POINTER_BYTES: Final = 1024
_HALF: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}|\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def read_json_object(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object a file holds.

    Parameters
    ----------
    path
        The file.
    max_bytes
        Size above which it is refused unread.

    Raises
    ------
    MalformedFileError
        It is larger than ``max_bytes``, not UTF-8, not JSON, not an object, or names a key twice.
    SourceError
        It is not a regular file.
    """
    return parse_json_object(_bounded(path, max_bytes), path, what="the file", constants=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table that a TOML file holds.

    Raises
    ------
    MalformedFileError
        It is larger than a configuration may be, not UTF-8, or not TOML.
    SourceError
        It is not a regular file.
    """
    import tomllib

    try:
        return tomllib.loads(_bounded(path, MAX_CONFIG_BYTES).decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        message = f"{path} is not TOML: {error}."
        raise MalformedFileError(message) from error


def _bounded(path: Path, max_bytes: int) -> bytes:
    size = regular_file_size(path)
    if size > max_bytes:
        message = f"{path}: {size:,} bytes are too many for this file (limit {max_bytes:,})."
        raise MalformedFileError(message)
    return path.read_bytes()


def parse_json_object(raw: bytes, path: Path, *, what: str, constants: bool) -> dict[str, Any]:
    """Return the object that ``raw`` spells; ``constants`` admits NaN and Infinity.

    Some model configurations hold ``Infinity``; a header of offsets has no use for it.
    """

    def refuse(name: str) -> NoReturn:
        message = f"{name} is not JSON"
        raise ValueError(message)

    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=None if constants else refuse,
        )
    except UnicodeDecodeError as error:
        message = f"{path}: {what} is not UTF-8 (byte {error.start})."
        raise MalformedFileError(message) from error
    except ValueError as error:
        message = f"{path}: {what} is not valid JSON: {error}."
        raise MalformedFileError(message) from error
    except RecursionError as error:
        message = f"{path}: {what} nests JSON too deeply."
        raise MalformedFileError(message) from error
    if not isinstance(document, dict):
        message = f"{path}: {what} must be a JSON object, found {type(document).__name__}."
        raise MalformedFileError(message)
    if _HALF.search(raw) and not is_text(json.dumps(document, ensure_ascii=False)):
        message = f"{path}: {what} holds half a character (a lone \\ud800 to \\udfff)."
        raise MalformedFileError(message)
    return document


def is_text(text: str) -> bool:
    """Say whether a string can be written anywhere: it holds no lone half of a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def regular_file_size(path: Path) -> int:
    """Return the size of a regular file; refuse folders, pipes, devices and sockets unopened.

    Raises
    ------
    SourceError
        It is none of those, or cannot be looked at.
    MalformedFileError
        It is what Git LFS leaves in place of a file that was not fetched.
    """
    try:
        regular = path.is_file()
        size = path.stat().st_size if regular else 0
        pointer = regular and _is_pointer(path, size)
        kind = "does not exist" if not path.exists() else "is not a regular file"
    except (OSError, ValueError) as error:
        regular, kind = False, f"cannot be looked at: {error}"
    if not regular:
        message = f"{path} {kind}."
        raise SourceError(message)
    if pointer:
        message = (
            f"{path}: a pointer of Git LFS, not the file itself. Fetch it with 'git lfs pull', or "
            "download it from its page."
        )
        raise MalformedFileError(message)
    return size


def _is_pointer(path: Path, size: int) -> bool:
    if not len(_POINTER) < size < _POINTER_BYTES:
        return False
    with path.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        message = f"key {twice!r} appears twice"
        raise ValueError(message)
    return document
