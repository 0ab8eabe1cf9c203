"""Zip archives whose members lie in the file as they are: where each begins and ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.documents import regular_file_size
from lora_analysis.storage.limits import MAX_TENSORS

if TYPE_CHECKING:
    import zipfile
    from pathlib import Path

_LOCAL_HEADER_BYTES = 30
_STORED = 0


@dataclass(frozen=True, slots=True)
class ZipMember:
    """The bytes of one member in its archive."""

    name: str
    start: int
    stop: int


def zip_members(path: Path) -> dict[str, ZipMember]:
    """Return the members of an archive, every range checked against the file's size.

    Raises
    ------
    MalformedFileError
        It is damaged, or a member is compressed or encrypted: a few bytes could then stand for
        any number of them.
    SourceError
        It is not a regular file.
    """
    import zipfile  # most adapters are no archives

    size = regular_file_size(path)
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if len(entries) > 2 * MAX_TENSORS:
                message = f"{path}: {len(entries):,} members are too many for an archive."
                raise MalformedFileError(message)
            return {entry.filename: _member(path, size, stream, entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        if isinstance(error, MalformedFileError):
            raise
        message = f"{path}: not a readable zip archive: {error}. Is it cut short?"
        raise MalformedFileError(message) from error


def _member(path: Path, size: int, stream: BinaryIO, entry: zipfile.ZipInfo) -> ZipMember:
    if entry.compress_type != _STORED or entry.flag_bits & 1:
        message = (
            f"{path}: member '{entry.filename}' is compressed or encrypted. Only archives that "
            "store their members as they are can be read; save it again uncompressed."
        )
        raise MalformedFileError(message)
    stream.seek(entry.header_offset)
    local = stream.read(_LOCAL_HEADER_BYTES)
    name, extra = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    start = entry.header_offset + _LOCAL_HEADER_BYTES + name + extra
    if local[:4] != b"PK\x03\x04" or start + entry.file_size > size:
        message = f"{path}: member '{entry.filename}' leads out of the archive. Is it cut short?"
        raise MalformedFileError(message)
    return ZipMember(entry.filename, start, start + entry.file_size)
