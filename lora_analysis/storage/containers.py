"""Which kind of file holds tensors, by its first bytes; what reads the rarer kinds comes later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnknownFormatError
from lora_analysis.storage.impostors import impostor_at

if TYPE_CHECKING:
    from pathlib import Path

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_ZIP: Final = b"PK\x03\x04"


def is_zip(path: Path) -> bool:
    """Say whether a regular file begins as a zip archive does."""
    return _start(path)[:4] == _ZIP


def is_pickle(path: Path) -> bool:
    """Say whether a file begins as those of ``torch.save`` do, in either format."""
    start = _start(path)
    # Any pickle since protocol 2 begins with b"\x80" and a small number; so does a safetensors
    # file whose header has 640 bytes, but that goes on with the rest of the count and a brace.
    if start[8:] == b"{" and not any(start[4:8]):
        return False
    row = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return row or start[:4] == _ZIP


def _start(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(9)


def pickle_refused(path: Path) -> UnknownFormatError:
    """Return the error for a pickle that the caller has not allowed, or for what poses as one."""
    if not is_pickle(path) and (kind := impostor_at(path)):
        return UnknownFormatError(f"{path}: this is {kind}")
    return UnknownFormatError(
        f"{path}: this is a pickle, which can run code when other programs open it, so it is not "
        "read unasked. Save it as safetensors; or pass allow_pickle=True (command line: "
        "--allow-pickle): then its tensors alone are read, and nothing it names is run."
    )
