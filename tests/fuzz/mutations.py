"""What happens to files on their way: flipped bits, cuts, holes, and edits that mean well."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

_NUMBERS = (0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, 1e308, "", "x", "q_proj", [], {}, [1],
    {"a": 1}, [[0, 2], [0, 2]], ["lora_A"], "(a+)+$", "[", "\x1b[2J", "LORA", "pissa", "../x",
)  # fmt: skip
_TYPES = ("F32", "F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "Q")


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Return a file that is nearly the given one."""
    if not raw:
        return draw.randbytes(8)
    length = int.from_bytes(raw[:8], "little")
    is_safetensors = raw[8:9] == b"{" and length < len(raw)
    is_json = raw[:1] == b"{"
    if is_json and draw.random() < 0.7:
        return _edited_text(raw, draw)
    if is_safetensors and draw.random() < 0.6:
        header = _edited_text(raw[8 : 8 + length], draw)
        size = length if draw.random() < 0.1 else len(header)
        return struct.pack("<Q", size) + header + raw[8 + length :]
    return draw.choice((_flipped, _flipped, _flipped_early, _cut, _cut_out, _grown, _number))(
        raw, draw
    )


def _flipped(raw: bytes, draw: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _flipped_early(raw: bytes, draw: random.Random) -> bytes:
    """Headers and descriptions lie at the start, or at the very end."""
    span = min(len(raw), draw.choice((16, 64, 256, 1024)))
    part = raw[:span] if draw.random() < 0.6 else raw[-span:]
    changed = _flipped(part, draw)
    return (
        changed + raw[span:]
        if part is not raw[-span:] and raw.startswith(part)
        else (raw[:-span] + changed)
    )


def _cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def _cut_out(raw: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw))
    return raw[:start] + raw[start + draw.choice((1, 2, 4, 8, 64)) :]


def _grown(raw: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw) + 1)
    more = draw.choice((draw.randbytes(draw.choice((1, 4, 8))), raw[start : start + 64], b"\0" * 8))
    return raw[:start] + more + raw[start:]


def _number(raw: bytes, draw: random.Random) -> bytes:
    """Write a number at the edge of its type over some bytes."""
    width = draw.choice((1, 2, 4, 8))
    value = draw.choice(_NUMBERS) % 2 ** (8 * width)
    start = draw.randrange(max(len(raw) - width, 1))
    return raw[:start] + value.to_bytes(width, "little") + raw[start + width :]


def _edited_text(raw: bytes, draw: random.Random) -> bytes:
    """Return a JSON object with something else in one place."""
    try:
        document = json.loads(raw)
    except ValueError:
        return _flipped(raw, draw)
    if draw.random() < 0.15:
        return _flipped(raw, draw)
    for _ in range(draw.choice((1, 1, 2))):
        _edit(document, draw)
    return json.dumps(document).encode()


def _edit(document: Any, draw: random.Random) -> None:
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = draw.choice(keys)
        below = place[key]
        if isinstance(below, dict | list) and below and draw.random() < 0.8:
            place = below
            continue
        break
    if isinstance(place, dict) and draw.random() < 0.25:
        _renamed(place, key, draw)
    elif draw.random() < 0.1:
        del place[key]
    else:
        place[key] = _other(key, place[key], draw)


def _renamed(place: dict[str, Any], key: str, draw: random.Random) -> None:
    value = place.pop(key)
    parts = [key[: draw.randrange(len(key) + 1)], key + "x", key.replace("A", "B", 1)]
    parts += [key.replace("lora_", "hada_"), key.replace(".weight", ""), draw.choice("\0\n./\x1b")]
    place[draw.choice(parts)] = value


def _other(key: Any, value: Any, draw: random.Random) -> Any:
    if key == "dtype":
        return draw.choice(_TYPES)
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.6:
        return draw.choice((value + 1, value - 1, value * 2, value // 2, -value, *_NUMBERS))
    if isinstance(value, str) and value and draw.random() < 0.3:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice(("", "\0", "9", "é", '"')) + value[at + 1 :]
    return copy.deepcopy(draw.choice(_VALUES))  # what is put in may be edited next
