"""Type of a file, recognized by its first bytes: zip, pickle, or not a file of tensors at all.

Downloads often leave something else under the name of a weights file: a pointer of Git LFS, an
error page, an archive. Errors then name it and the next step.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lora_analysis.errors import UnknownFormatError

if TYPE_CHECKING:
    from pathlib import Path

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_ZIP: Final = b"PK\x03\x04"

LOOK_BYTES: Final = 1024
"""Bytes from the start of a file that are enough for `impostor`."""

_POINTER_ADVICE: Final = (
    "The file itself was not fetched. Fetch it with 'git lfs pull' or 'hf download', or download "
    "it from its page."
)
_PAGE_ADVICE: Final = (
    "An error or login page was saved in place of the file. Download it with 'hf download', or "
    "from its 'resolve' address (not 'blob'), logged in where the repository is gated."
)
_KERAS_ADVICE: Final = (
    "Keras' HDF5 (save_lora_weights, .lora.h5) is not read. Open it with h5py and save "
    "lora_kernel_a, transposed, as <module>.lora_A.weight (r, d_in) and lora_kernel_b, transposed, "
    "as <module>.lora_B.weight (d_out, r) with safetensors; the scale is alpha/rank, 1 by default."
)
_POINTER: Final = re.compile(rb"version https://(git-lfs|hawser)\b|# xet version \d")
# First bytes, what such a file is, and the next step. The first pattern that matches names it.
_KINDS: Final[tuple[tuple[re.Pattern[bytes], str, str], ...]] = (
    (re.compile(rb"version https://(git-lfs|hawser)\b"), "a pointer of Git LFS", _POINTER_ADVICE),
    (re.compile(rb"# xet version \d"), "a pointer of Xet", _POINTER_ADVICE),
    (re.compile(rb"\x89HDF\r\n\x1a\n"), "an HDF5 file", _KERAS_ADVICE),
    (
        re.compile(rb"(\xef\xbb\xbf)?\s*(<!--.{0,400}?-->\s*)?<(!doctype\s+html|html|head|body)\b",
                   re.I | re.S),
        "an HTML page", _PAGE_ADVICE,
    ),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|Error>)", re.I), "an XML document", _PAGE_ADVICE),
    (re.compile(rb'\s*\{\s*"(error|message|detail)s?"\s*:', re.I), "a JSON error message",
     _PAGE_ADVICE),
    (
        re.compile(rb"(Entry not found|Repository not found|Invalid (username|credentials)|"
                   rb"Access to model .{1,200} is restricted|Not Found\s*$)", re.S),
        "an error message of a server", _PAGE_ADVICE,
    ),
    (re.compile(rb"\x1f\x8b"), "a gzip archive", "Unpack it first."),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7-Zip archive", "Unpack it first."),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "a Zstandard archive", "Unpack it first."),
)  # fmt: skip
_TEXT: Final = re.compile(rb"[\t\n\r\x20-\x7e]{8,}")


def is_zip(path: Path) -> bool:
    """Return True if a regular file begins as a zip archive does."""
    return first_bytes(path, 4) == _ZIP


def is_pickle(path: Path) -> bool:
    """Return True if a file begins as those of ``torch.save`` do, in either format."""
    start = first_bytes(path, 9)
    # Any pickle since protocol 2 begins with b"\x80" and a small number; so does a safetensors
    # file whose header has 640 bytes, but that goes on with the rest of the count and a brace.
    if start[8:] == b"{" and not any(start[4:8]):
        return False
    sequence = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return sequence or start[:4] == _ZIP


def pickle_refused(path: Path) -> UnknownFormatError:
    """Return the error for a pickle that the caller has not allowed, or for an impostor of one."""
    if not is_pickle(path) and (kind := impostor_at(path)):
        return UnknownFormatError(f"{path}: this is {kind}")
    return UnknownFormatError(
        f"{path}: this is a pickle, which can run code when other programs open it, so it is not "
        "read unasked. Save it as safetensors; or pass allow_pickle=True (command line: "
        "--allow-pickle): then its tensors alone are read, and nothing it names is run."
    )


def impostor(start: bytes) -> str:
    """Return a sentence that names a file and the next step, from its first bytes, else "".

    Recognized are pointers of Git LFS and Xet, HDF5 (Keras), HTML and XML pages, error messages
    that servers send in place of a file, and compressed archives.
    """
    for pattern, kind, advice in _KINDS:
        if pattern.match(start):
            return f"{kind}, not the file itself. {advice}"
    return ""


def impostor_at(path: Path) -> str:
    """Return the same for a file on disk; plain text that is none of these is quoted."""
    start = first_bytes(path, LOOK_BYTES)
    return impostor(start) or text_start(start)


def is_pointer(start: bytes) -> bool:
    """Return True if a file is what Git LFS or Xet leave in place of one that was not fetched."""
    return _POINTER.match(start) is not None


def text_start(start: bytes) -> str:
    """Return a sentence that quotes the first line of a file that is plain text, else ""."""
    if not start or not _TEXT.fullmatch(start):
        return ""
    line = start.decode("ascii").strip().splitlines()[0][:80] if start.strip() else ""
    return f"plain text, not a file of tensors. It begins: {line!r}."


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a regular file, none of other paths."""
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(count)
