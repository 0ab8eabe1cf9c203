"""Type of a file by its first bytes, and bounded reading of JSON and TOML from untrusted files.

Downloads often leave something else under the name of a weights file: a pointer of Git LFS, an
error page, an archive. Errors then name it and the next step.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NoReturn

from lora_analysis.errors import MalformedFileError, SourceError, UnknownFormatError
from lora_analysis.storage.limits import (
    MAX_CONFIG_BYTES,
    MAX_DOCUMENT_NESTING,
    MAX_TOML_BYTES,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_ZIP: Final = b"PK\x03\x04"

LOOK_BYTES: Final = 1024
"""Bytes from the start of a file that are enough for `describe_impostor`."""

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
_TOO_DEEP: Final = f"it nests too deeply (limit {MAX_DOCUMENT_NESTING} levels)"
# Tokens that nest in TOML: brackets and dots outside strings and comments.
_TOML_TOKEN: Final = re.compile(
    r'''"""(?:\\.|[^\\])*?"""|\'{3}.*?\'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[][{}.,=\n]''',
    re.DOTALL,
)
_HALF_CHARACTER: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}|\\u[dD][c-fC-F][0-9a-fA-F]{2}")


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


def pickle_error(path: Path) -> UnknownFormatError:
    """Return the error for a pickle that the caller has not allowed, or for an impostor of one."""
    if not is_pickle(path) and (kind := describe_impostor_file(path)):
        return UnknownFormatError(f"{path}: this is {kind}")
    return UnknownFormatError(
        f"{path}: this is a pickle, which can run code when other programs open it, so it is not "
        "read unasked. Save it as safetensors; or pass allow_pickle=True (command line: "
        "--allow-pickle): then its tensors alone are read, and nothing it names is run."
    )


def describe_impostor(start: bytes) -> str:
    """Return a sentence that names a file and the next step, from its first bytes, else "".

    Recognized are pointers of Git LFS and Xet, HDF5 (Keras), HTML and XML pages, error messages
    that servers send in place of a file, and compressed archives.
    """
    for pattern, kind, advice in _KINDS:
        if pattern.match(start):
            return f"{kind}, not the file itself. {advice}"
    return ""


def describe_impostor_file(path: Path) -> str:
    """Return the same for a file on disk; plain text that is none of these is quoted."""
    start = first_bytes(path, LOOK_BYTES)
    return describe_impostor(start) or text_start(start)


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


def read_json_object(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file.

    Parameters
    ----------
    path
        The file.
    max_bytes
        Size above which the file is refused unread.

    Raises
    ------
    MalformedFileError
        It is larger than ``max_bytes``, not UTF-8, not JSON, not an object, or has a key twice.
    SourceError
        It is not a regular file.
    """
    return parse_json_object(_read_bounded(path, max_bytes), path, what="the file", constants=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Read the table in a TOML file.

    Raises
    ------
    MalformedFileError
        It is larger than `MAX_TOML_BYTES`, not UTF-8, not TOML, or nested too deeply.
    SourceError
        It is not a regular file.
    """
    raw = _read_bounded(path, MAX_TOML_BYTES)
    try:
        return parse_toml(raw.decode("utf-8"))
    except ValueError as error:
        message = f"{path} is not TOML: {error}."
        raise MalformedFileError(message) from error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a table from TOML.

    Raises
    ------
    ValueError
        It is not TOML, or nested too deeply. A key with many dots is refused before parsing, which
        would take quadratic time.
    """
    import tomllib

    depth = dots = 0
    for match in _TOML_TOKEN.finditer(text):
        token = match[0]
        depth += (token in "[{") - (token in "]}")
        if token == ".":
            dots += 1
        elif token in "=,\n":  # quoted names between the dots of one key do not reset the count
            dots = 0
        if max(depth, dots) > MAX_DOCUMENT_NESTING:
            line = text.count("\n", 0, match.start()) + 1
            message = f"line {line} nests more than {MAX_DOCUMENT_NESTING} deep"
            raise ValueError(message)
    try:
        return tomllib.loads(text)
    except (RecursionError, MemoryError) as error:
        raise ValueError(_TOO_DEEP) from error


def _read_bounded(path: Path, max_bytes: int) -> bytes:
    size = regular_file_size(path)
    if size > max_bytes:
        message = f"{path}: {size:,} bytes are too many for this file (limit {max_bytes:,})."
        raise MalformedFileError(message)
    return path.read_bytes()


def parse_json(text: str) -> Any:
    """Parse a value from JSON.

    Raises
    ------
    ValueError
        It is not JSON, has a key twice, or nests deeper than `MAX_DOCUMENT_NESTING`.
    """
    return _parse(text, None)


def _parse(text: str, parse_constant: Callable[[str], Any] | None) -> Any:
    try:
        document = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=parse_constant
        )
    except (RecursionError, MemoryError) as error:
        raise ValueError(_TOO_DEEP) from error
    level = [document]
    for _ in range(MAX_DOCUMENT_NESTING + 1):
        nested: list[Any] = [node for node in level if isinstance(node, dict | list)]
        if not nested:
            return document
        level = [
            child
            for node in nested
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    raise ValueError(_TOO_DEEP)


def parse_json_text(text: str, path: Path, *, what: str) -> dict[str, Any]:
    """Parse a JSON object from a string in a file, such as a value of its metadata.

    Raises
    ------
    MalformedFileError
        As for `read_json_object`.
    """
    raw = text.encode("utf-8", errors="surrogatepass")
    return parse_json_object(raw, path, what=what, constants=True)


def parse_json_object(raw: bytes, path: Path, *, what: str, constants: bool) -> dict[str, Any]:
    """Parse a JSON object from bytes; ``constants`` allows NaN and Infinity.

    ``what`` names the bytes in messages. Some model configurations contain ``Infinity``; a header
    of offsets has no use for it.
    """

    def refuse(name: str) -> NoReturn:
        message = f"{name} is not JSON"
        raise ValueError(message)

    try:
        document = _parse(raw.decode("utf-8"), None if constants else refuse)
    except UnicodeDecodeError as error:
        message = f"{path}: {what} is not UTF-8 (byte {error.start})."
        raise MalformedFileError(message) from error
    except ValueError as error:
        kind = describe_impostor(raw)
        message = f"{path}: {what} is {kind or f'not valid JSON: {error}.'}"
        raise MalformedFileError(message) from error
    if not isinstance(document, dict):
        message = f"{path}: {what} must be a JSON object, found {type(document).__name__}."
        raise MalformedFileError(message)
    if _HALF_CHARACTER.search(raw) and not is_text(json.dumps(document, ensure_ascii=False)):
        message = f"{path}: {what} holds half a character (a lone \\ud800 to \\udfff)."
        raise MalformedFileError(message)
    return document


def is_text(text: str) -> bool:
    """Return True if a string can be encoded: it contains no lone half of a character."""
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
        It is not a regular file, or cannot be accessed.
    MalformedFileError
        It is a pointer of Git LFS or Xet to a file that was not fetched.
    """
    try:
        regular = path.is_file()
        size = path.stat().st_size if regular else 0
        start = first_bytes(path, LOOK_BYTES) if size <= LOOK_BYTES else b""  # pointers are small
        kind = "does not exist" if not path.exists() else "is not a regular file"
    except (OSError, ValueError) as error:
        regular, start, kind = False, b"", f"cannot be accessed: {error}"
    if not regular:
        message = f"{path} {kind}."
        raise SourceError(message)
    if _POINTER.match(start):
        message = f"{path}: this is {describe_impostor(start)}"
        raise MalformedFileError(message)
    return size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        message = f"key {repeated!r} appears twice"
        raise ValueError(message)
    return document
