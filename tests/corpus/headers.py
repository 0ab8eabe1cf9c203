"""Damage to the container: lengths, offsets, types, shapes, names."""

from __future__ import annotations

import json
import struct
from typing import Any

from corpus.files import A, B, Case, bytes_of, edited, entries_of, factors, many, packed, peft

_HEADER = 8 + len(json.dumps(entries_of(factors())[0]).encode())


def _set(name: str, **fields: Any) -> Any:
    return edited(lambda header: header[name].update(fields))


def _renamed(name: str) -> Any:
    """A further pair whose module is called something."""

    def change(header: dict[str, Any]) -> None:
        for key in (A, B):
            new = f"base_model.model.{name}.{key[key.index('lora_') :]}"
            header[new] = header.pop(key)

    return edited(change)


def _twice(raw: bytes) -> bytes:
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = raw[8 : 8 + length], raw[8 + length :]
    return packed(header[:-1] + b", " + header[1:], data)


def _claims(length: int) -> Any:
    return bytes_of(lambda raw: struct.pack("<Q", length) + raw[8:])


_FIRST = "tensor"
CUT = [
    Case(f"cut at {where}", bytes_of(lambda raw, at=at: raw[:at]), 3, said)
    for where, at, said in (
        ("0 bytes", 0, "cut short"),
        ("3 bytes", 3, "cut short"),
        ("the length", 8, "cut short"),
        ("one byte of header", 9, "cut short"),
        ("half the header", _HEADER // 2, "cut short"),
        ("the last byte of the header", _HEADER - 1, "cut short"),
        ("the header", _HEADER, "cut short"),
        ("the first tensor", _HEADER + 20, "cut short"),
        ("the last byte", -1, "cut short"),
    )
]
CONTAINER = [
    Case("trailing bytes", bytes_of(lambda raw: raw + b"\0\0"), 3, "trailing bytes"),
    Case("a header of 100 MB", _claims(100 * 2**20), 3, "claims 104,857,600"),
    Case("a header of 2^64 - 1 bytes", _claims(2**64 - 1), 3, "limit"),
    Case("zeros only", lambda f: peft(f, b"\0" * 4096), 3, "not valid JSON"),
    Case("a hole", _set(B, data_offsets=[49, 89]), 3, "hole"),
    Case("an overlap", _set(B, data_offsets=[40, 80]), 3, "overlaps"),
    Case("offsets backwards", _set(B, data_offsets=[88, 48]), 3, "data_offsets"),
    Case("offsets below zero", _set(A, data_offsets=[-48, 0]), 3, "data_offsets"),
    Case("offsets of floats", _set(A, data_offsets=[0.0, 48.0]), 3, "data_offsets"),
    Case("offsets beyond 64 bits", _set(A, data_offsets=[0, 2**70]), 3, "data_offsets"),
    Case("a tensor named twice", bytes_of(_twice), 3, "appears twice"),
    Case("an unknown type", _set(A, dtype="F33"), 3, "unknown type"),
    Case("a type that is a number", _set(A, dtype=32), 3, "unknown type"),
    Case("a type that is a list", _set(A, dtype=["F32"]), 3, "unknown type"),
    Case("whole numbers", _set(A, dtype="I32"), 3, "floating-point"),
    Case("a narrower type", _set(A, dtype="F16"), 3, "its offsets give"),
    Case("a shape of too many", _set(A, shape=[2**40, 2**40]), 3, "needs"),
    Case("a shape beyond 64 bits", _set(A, shape=[2**64, 1]), 3, "no valid shape"),
    Case("a shape below zero", _set(A, shape=[-2, -6]), 3, "no valid shape"),
    Case("a shape of truths", _set(A, shape=[True, 12]), 3, "no valid shape"),
    Case("a shape of floats", _set(A, shape=[2.0, 6.0]), 3, "no valid shape"),
    Case("a shape of 40 axes", _set(A, shape=[1] * 38 + [2, 6]), 3, "no valid shape"),
    Case("a shape that is text", _set(A, shape="2,6"), 3, "no valid shape"),
    Case("an entry that is null", edited(lambda h: h.update({A: None})), 3, "unknown type"),
    Case("an entry that is a list", edited(lambda h: h.update({A: [1, 2]})), 3, "unknown type"),
    Case("no tensors", lambda f: peft(f, packed({})), 3, "holds no tensors"),
    Case("a header that is a list", lambda f: peft(f, packed(b"[]")), 3, "JSON object"),
    Case("a header that is a number", lambda f: peft(f, packed(b"1")), 3, "JSON object"),
    Case("a header that is null", lambda f: peft(f, packed(b"null")), 3, "JSON object"),
    Case("a header of NaN", lambda f: peft(f, packed(b'{"a": NaN}')), 3, "not JSON"),
    Case("a header of 5000 digits", lambda f: peft(f, packed(b"9" * 5000)), 3, "not valid JSON"),
    Case("a deep header", lambda f: peft(f, packed(b"[" * 200_000)), 3, "too deeply"),
    Case(
        "a deep object",
        lambda f: peft(f, packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
        3,
        "too deeply",
    ),
    Case("bad UTF-8", lambda f: peft(f, packed(b'{"\xff\xfe": 1}')), 3, "not UTF-8"),
    Case("a byte order mark", lambda f: peft(f, packed(b"\xef\xbb\xbf{}")), 3, "JSON"),
    Case(
        "metadata that is a list",
        edited(lambda h: h.update({"__metadata__": ["pt"]})),
        3,
        "__metadata__",
    ),
    Case(
        "metadata of numbers",
        edited(lambda h: h.update({"__metadata__": {"format": 1}})),
        3,
        "__metadata__",
    ),
    Case(
        "300,000 names",
        many(f"a{at}.lora_A.weight" for at in range(300_000)),
        3,
        "limit",
    ),
    Case("110,000 short names", many(map(str, range(110_000))), 3, "too many"),
]
NAMES = [
    Case(f"a module called {what}", _renamed(name), 0, "")
    for what, name in (
        ("markup", "<script>alert(1)</script>"),
        ("an image", "<img src=x onerror=alert(1)>"),
        ("an escape", "a\x1b[31mb\x1b]0;title\x07"),
        ("NUL", "a\0b"),
        ("two lines", "a\nb\r\nc"),
        ("a way out", "../../../../etc/passwd"),
        ("mathtext", "$\\frac{$"),
        ("a formula", "=cmd()|' /C calc'!A0"),
        ("right to left", "a\u202eb\u2066c"),
        ("rich markup", "[bold red]a[/]"),
        ("10,000 letters", "x" * 10_000),
        ("a number without end", "layers." + "9" * 5000),
        ("digits of another script", "layers.٣.q"),
        ("a square", "layers.²"),
    )
]
ODD_NAMES = [
    Case("a module called half a character", _renamed("a\ud800b"), 3, "half a character"),
    Case("a module without a name", _renamed(""), 3, ""),
    Case("a module called dots", _renamed("..."), 0, ""),
    Case(
        "factors without a module",
        edited(
            lambda h: [
                h.update({f"lora_{role}.weight": h.pop(key)}) for role, key in (("A", A), ("B", B))
            ]
        ),
        3,
        "",
    ),
]
CASES = [*CUT, *CONTAINER, *NAMES, *ODD_NAMES]
