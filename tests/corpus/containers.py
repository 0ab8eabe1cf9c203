"""Other containers and formats: GGUF, ``.npz``, torch files, kohya's, diffusers', MLX's."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from corpus.files import Case, entries_of, packed

_PAIR = ("q.lora_a", "q.lora_b")
_A, _B = np.ones((6, 2), np.float32), np.ones((2, 5), np.float32)


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _gguf(*, version: int = 3, tensors: int = 2, pairs: int = 0, after: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + after


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_value(key: str, kind: int, raw: bytes) -> bytes:
    return _gguf_text(key) + struct.pack("<I", kind) + raw


def _gguf_tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", one) for one in shape)
    return (
        _gguf_text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)
    )


_KIND = _gguf_value("general.type", 8, _gguf_text("adapter"))
_LORA = _gguf_value("adapter.type", 8, _gguf_text("lora"))
GGUF = [
    Case(f"GGUF: {what}", _file("a.gguf", raw), 3, said)
    for what, raw, said in (
        ("its magic alone", b"GGUF", "cut short"),
        ("version 1", _gguf(version=1), "version 1"),
        ("big-endian", _gguf(version=3 << 24), "is not read"),
        ("2^63 tensors", _gguf(tensors=2**63), "claims"),
        ("2^63 pairs", _gguf(pairs=2**63), "claims"),
        ("a key without end", _gguf(pairs=1, after=struct.pack("<Q", 2**62)), "claims"),
        ("an unknown value", _gguf(pairs=1, after=_gguf_value("a", 99, b"")), "unknown type 99"),
        (
            "an array of 2^60",
            _gguf(pairs=1, after=_gguf_value("a", 9, struct.pack("<IQ", 4, 2**60))),
            "claims",
        ),
        (
            "an array in an array",
            _gguf(pairs=1, after=_gguf_value("a", 9, struct.pack("<IQ", 9, 1))),
            "unknown type 9",
        ),
        ("a tensor of 99 axes", _gguf(tensors=1, after=_gguf_tensor("a", (1,) * 99)), "claims 99"),
        ("a tensor too large", _gguf(tensors=1, after=_gguf_tensor("a", (2**40, 2**40))), "fit"),
        ("an unknown type", _gguf(tensors=1, after=_gguf_tensor("a", (4,), 77)), "type 77"),
        ("an offset too far", _gguf(tensors=1, after=_gguf_tensor("a", (4,), 0, 2**62)), "fit"),
        (
            "the same name twice",
            _gguf(after=_gguf_tensor("a", (0,)) * 2 + b"\0" * 64),
            "same name",
        ),
        (
            "alignment 0",
            _gguf(
                tensors=0, pairs=1, after=_gguf_value("general.alignment", 4, struct.pack("<I", 0))
            ),
            "alignment",
        ),
        ("an adapter of nothing", _gguf(tensors=0, pairs=2, after=_KIND + _LORA + b"\0" * 64), ""),
        (
            "alpha NaN",
            _gguf(
                tensors=0,
                pairs=3,
                after=_KIND
                + _LORA
                + _gguf_value("adapter.lora.alpha", 6, struct.pack("<f", float("nan"))),
            ),
            "",
        ),
    )
]


def _npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _npy(array: np.ndarray | None = None, *, header: bytes = b"") -> bytes:
    stream = io.BytesIO()
    if array is None:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def _both(a: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    return _npz({f"{_PAIR[0]}.npy": a, f"{_PAIR[1]}.npy": _npy(_B)}, method)


NPZ = [
    Case("npz: in order", _file("a.npz", _both(_npy(_A))), 0, "not known"),
    *(
        Case(f"npz: {what}", _file("a.npz", raw), 3, said)
        for what, raw, said in (
            ("cut in half", _both(_npy(_A))[:200], "zip"),
            ("its first bytes", b"PK\x03\x04", "zip"),
            ("compressed", _both(_npy(_A), zipfile.ZIP_DEFLATED), "compressed"),
            (
                "a bomb",
                _both(_npy(np.zeros((2**20, 16), np.float32)), zipfile.ZIP_DEFLATED),
                "compressed",
            ),
            ("objects", _both(_npy(np.array([[None]], object))), "plain little-endian"),
            ("text", _both(_npy(np.array([["a"]]))), "plain little-endian"),
            ("big-endian", _both(_npy(_A.astype(">f4"))), "plain little-endian"),
            ("an empty header", _both(_npy(header=b"")), "damaged"),
            ("a header that is code", _both(_npy(header=b"__import__('os')\n")), "damaged"),
            ("a deep header", _both(_npy(header=b"(" * 3000 + b"\n")), "damaged"),
            (
                "a shape too large",
                _both(
                    _npy(
                        header=b"{'descr': '<f4', 'fortran_order': False, "
                        b"'shape': (1099511627776, 1099511627776), }\n"
                    )
                ),
                "plain little-endian",
            ),
            (
                "a shape below zero",
                _both(
                    _npy(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -6), }\n")
                    + _A.tobytes()
                ),
                "",
            ),
        )
    ),
]


class _Runs:
    """What ``pickle`` would run."""

    def __reduce__(self) -> Any:
        return print, ("this must never be printed",)


def _torch_archive(content: bytes, **members: bytes) -> bytes:
    return _npz({"a/data.pkl": content, **{f"a/{k}": v for k, v in members.items()}})


PICKLES = [
    Case("a pickle, not allowed", _file("a.pt", _torch_archive(pickle.dumps({}, 2))), 3, "--allow"),
    *(
        Case(f"a pickle: {what}", _file("a.pt", raw), 3, said, ("--allow-pickle",))
        for what, raw, said in (
            ("that runs", _torch_archive(pickle.dumps(_Runs(), 2)), "could run code"),
            ("that runs, in a row", pickle.dumps(_Runs(), 2), "could run code"),
            ("of numbers", _torch_archive(pickle.dumps({"a": 1}, 2)), ""),
            ("cut short", _torch_archive(pickle.dumps({"a": 1}, 2)[:-3]), "damaged"),
            ("that is no archive", b"PK\x03\x04" + b"\0" * 90, "zip"),
            ("without a description", _npz({"a/data/0": b"1234"}), "data.pkl"),
            ("nested", _torch_archive(b"\x80\x02" + b"]" * 100_000 + b"."), ""),
            (
                "of a large number",
                _torch_archive(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1)),
                "",
            ),
            ("of a large string", _torch_archive(b"\x80\x04\x8e" + struct.pack("<Q", 2**60)), ""),
            ("in a frame without end", _torch_archive(b"\x80\x04\x95" + b"\xff" * 8), ""),
            ("with a place in memory of 2^31", _torch_archive(b"\x80\x02}r\xff\xff\xff\x7f."), ""),
        )
    ),
]


def _stored(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    header, data = entries_of(tensors)
    return packed({**header, **({"__metadata__": metadata} if metadata else {})}, data)


_KOHYA = "lora_unet_down_blocks_0_attentions_0_to_q"


def _kohya(alpha: Any) -> bytes:
    return _stored(
        {
            f"{_KOHYA}.lora_down.weight": _A.T.copy(),
            f"{_KOHYA}.lora_up.weight": _B.T.copy(),
            f"{_KOHYA}.alpha": alpha,
        }
    )


def _diffusers(text: str) -> bytes:
    key = "unet.down_blocks.0.attn1.to_q.lora_{}.weight"
    tensors = {key.format("A"): _A.T.copy(), key.format("B"): _B.T.copy()}
    return _stored(tensors, {"lora_adapter_metadata": text})


def _mlx(config: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tensors = dict(zip(_PAIR, (_A, _B), strict=True))
        (folder / "adapters.safetensors").write_bytes(_stored(tensors))
        (folder / "adapter_config.json").write_bytes(config)
        return folder

    return make


IMAGE = [
    *(
        Case(f"kohya: alpha {what}", _file("a.safetensors", _kohya(alpha)), code, said)
        for what, alpha, code, said in (
            ("2", np.array(2, np.float32), 0, ""),
            ("NaN", np.array(np.nan, np.float32), 3, "alpha"),
            ("infinite", np.array(np.inf, np.float32), 3, "alpha"),
            ("0", np.array(0, np.float32), 0, ""),
            ("of two numbers", np.ones(2, np.float32), 3, "alpha"),
            ("of none", np.ones(0, np.float32), 3, "alpha"),
            ("1e300", np.array(1e300), 3, "the limits are"),
        )
    ),
    *(
        Case(f"diffusers: metadata {what}", _file("a.safetensors", _diffusers(text)), code, said)
        for what, text, code, said in (
            ("cut", "{", 3, "not valid JSON"),
            ("a list", "[]", 3, "JSON object"),
            ("deep", "[" * 100_000, 3, "not valid JSON"),
            ("of 5000 digits", '{"unet.lora_alpha": ' + "9" * 5000 + "}", 3, "not valid JSON"),
            ("alpha 1e999", '{"unet.lora_alpha": 1e999}', 3, "as an alpha"),
            ("alpha true", '{"unet.lora_alpha": true}', 3, "as an alpha"),
            ("alpha null", '{"unet.lora_alpha": null}', 3, "as an alpha"),
            ("alpha_pattern text", '{"unet.alpha_pattern": "x"}', 3, "must be a JSON object"),
            (
                "an endless pattern",
                '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"[": 1}}',
                3,
                "regular expression",
            ),
            ("pissa", '{"unet.lora_alpha": 1, "unet.init_lora_weights": "pissa"}', 3, "PiSSA"),
        )
    ),
]
MLX = [
    Case(f"mlx: {what}", _mlx(json.dumps(config).encode() if what != "cut" else config), code, said)
    for what, config, code, said in (
        ("in order", {"lora_parameters": {"scale": 2.0}, "num_layers": 4}, 0, ""),
        ("scale text", {"lora_parameters": {"scale": "2"}}, 0, "not known"),
        ("scale of 400 digits", {"lora_parameters": {"scale": 10**400}}, 0, "not known"),
        ("scale 1e999", {"lora_parameters": {"scale": float("inf")}}, 0, "not known"),
        ("parameters that are a list", {"lora_parameters": [1]}, 0, "not known"),
        (
            "alpha of 400 digits",
            {"lora_parameters": {"scale": 1, "alpha": 10**400, "rank": 2}},
            0,
            "",
        ),
        ("rank 0", {"lora_parameters": {"scale": 1, "alpha": 8, "rank": 0}}, 0, ""),
        ("full", {"fine_tune_type": "full"}, 3, "full fine-tune"),
        ("cut", b'{"lora_parameters": ', 3, "not valid JSON"),
    )
]
CASES = [*GGUF, *NPZ, *PICKLES, *IMAGE, *MLX]
