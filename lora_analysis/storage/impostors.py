"""Files that are not what their name promises: pointers, web pages, other programs' containers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

LOOK_BYTES: Final = 1024
"""Bytes from the start of a file that are enough to recognize one of these."""

_POINTER_WAY: Final = (
    "The file itself was not fetched. Fetch it with 'git lfs pull' or 'hf download', or download "
    "it from its page."
)
_PAGE_WAY: Final = (
    "An error or login page was saved in place of the file. Download it with 'hf download', or "
    "from its 'resolve' address (not 'blob'), logged in where the repository is gated."
)
_KERAS_WAY: Final = (
    "Keras' HDF5 (save_lora_weights, .lora.h5) is not read. Open it with h5py and save "
    "lora_kernel_a, transposed, as <module>.lora_A.weight (r, d_in) and lora_kernel_b, transposed, "
    "as <module>.lora_B.weight (d_out, r) with safetensors; the scale is alpha/rank, 1 by default."
)
_POINTER: Final = re.compile(rb"version https://(git-lfs|hawser)\b|# xet version \d")
# First bytes, what such a file is, and the way on. The first pattern that matches names it.
_KINDS: Final[tuple[tuple[re.Pattern[bytes], str, str], ...]] = (
    (re.compile(rb"version https://(git-lfs|hawser)\b"), "a pointer of Git LFS", _POINTER_WAY),
    (re.compile(rb"# xet version \d"), "a pointer of Xet", _POINTER_WAY),
    (re.compile(rb"\x89HDF\r\n\x1a\n"), "an HDF5 file", _KERAS_WAY),
    (
        re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.{0,400}?-->\s*)?<(!doctype\s+html|html|head|body)\b",
                   re.I | re.S),
        "an HTML page", _PAGE_WAY,
    ),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|Error>)", re.I), "an XML document", _PAGE_WAY),
    (re.compile(rb'\s*\{\s*"(error|message|detail)s?"\s*:', re.I), "a JSON error message",
     _PAGE_WAY),
    (
        re.compile(rb"(Entry not found|Repository not found|Invalid (username|credentials)|"
                   rb"Access to model .{1,200} is restricted|Not Found\s*$)", re.S),
        "an error message of a server", _PAGE_WAY,
    ),
    (re.compile(rb"\x1f\x8b"), "a gzip archive", "Unpack it first."),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7-Zip archive", "Unpack it first."),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "a Zstandard archive", "Unpack it first."),
)  # fmt: skip
_TEXT: Final = re.compile(rb"[\t\n\r\x20-\x7e]{8,}")


def impostor(start: bytes) -> str:
    """Return what a file is and what to do, from its first bytes; "" if it is none of these.

    Recognized are pointers of Git LFS and Xet, HDF5 (Keras), HTML and XML pages, error messages
    that servers send in place of a file, and compressed archives.
    """
    for pattern, kind, way in _KINDS:
        if pattern.match(start):
            return f"{kind}, not the file itself. {way}"
    return ""


def is_pointer(start: bytes) -> bool:
    """Return True if a file is what Git LFS or Xet leave in place of one that was not fetched."""
    return _POINTER.match(start) is not None


def impostor_at(path: Path) -> str:
    """Return the same of a file on disk; plain text that is none of these is quoted."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        start = stream.read(LOOK_BYTES)
    return impostor(start) or text_start(start)


def text_start(start: bytes) -> str:
    """Return a sentence that quotes the first line of a file that is plain text, else ""."""
    if not start or not _TEXT.fullmatch(start):
        return ""
    line = start.decode("ascii").strip().splitlines()[0][:80] if start.strip() else ""
    return f"plain text, not a file of tensors. It begins: {line!r}."
