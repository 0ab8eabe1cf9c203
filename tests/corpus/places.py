"""Odd things on a disk: pipes, sockets, links, folders without end, shards that are not there."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus.files import WEIGHTS, A, B, Case, entries_of, factors, packed, peft

INDEX = "adapter_model.safetensors.index.json"
_PARTS = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")


def _pipe(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        place = peft(folder) / name
        place.unlink()
        os.mkfifo(place)
        return folder

    return make


def _the_pipe_itself(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


def _socket(folder: Path) -> Path:
    peft(folder)
    (folder / WEIGHTS).unlink()
    here = Path.cwd()
    os.chdir(folder)  # the name of a socket has at most a hundred letters
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(WEIGHTS)
    finally:
        os.chdir(here)
    return folder


def _link(name: str, target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (peft(folder) / name).unlink()
        (folder / name).symlink_to(target)
        return folder

    return make


def _linked(folder: Path) -> Path:
    """As in a hub's cache: the file is a link to a blob elsewhere."""
    peft(folder)
    (folder / "blobs").mkdir()
    (folder / "snapshot").mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (folder / name).rename(folder / "blobs" / name)
        (folder / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    return folder / "snapshot"


def _around(folder: Path) -> Path:
    own = folder / "own"
    own.mkdir()
    peft(own)
    (own / "again").symlink_to(folder)
    (folder / "loop").symlink_to("loop")
    return folder


def _folder_as_file(folder: Path) -> Path:
    (peft(folder) / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    return folder


def _deep(folder: Path) -> Path:
    place = folder
    for _ in range(40):
        place /= "d"
        place.mkdir()
    peft(place)
    return folder


def _fifty(folder: Path) -> Path:
    for at in range(50):
        (folder / f"run-{at}").mkdir()
        peft(folder / f"run-{at}")
    (folder / "run-7" / WEIGHTS).write_bytes(b"abc")
    (folder / "run-20" / "adapter_config.json").write_text("{")
    whole = (folder / "run-33" / WEIGHTS).read_bytes()
    (folder / "run-33" / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    return folder


def _sharded(weight_map: Any, *, cut: bool = False, raw: bytes | None = None) -> Any:
    def make(folder: Path) -> Path:
        peft(folder)
        (folder / WEIGHTS).unlink()
        for key, part in zip((A, B), _PARTS, strict=True):
            content = packed(*entries_of({key: factors()[key]}))
            (folder / part).write_bytes(content[: len(content) // 2] if cut else content)
        text = json.dumps({"weight_map": weight_map}).encode()
        (folder / INDEX).write_bytes(text if raw is None else raw)
        return folder

    return make


_WHOLE = dict(zip((A, B), _PARTS, strict=True))
_LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db\nsize 90868376\n"
)


def _config_pointer(folder: Path) -> Path:
    (peft(folder) / "adapter_config.json").write_bytes(_LFS)
    return folder


def _pickle_pointer(folder: Path) -> Path:
    (peft(folder) / WEIGHTS).unlink()
    _text(folder, "adapter_model.bin", _LFS)
    return folder


ON_DISK = [
    Case("an empty folder", lambda folder: folder, 3, "empty"),
    Case("nothing at all", lambda folder: folder / "nothing", 3, "no file or folder"),
    Case("a NUL in the source", lambda folder: folder / "a\0b", 3, "no file or folder"),
    Case("a name too long", lambda folder: folder / ("a" * 300), 3, "no file or folder"),
    Case("weights in a pipe", _pipe(WEIGHTS), 3, ""),
    Case("a config in a pipe", _pipe("adapter_config.json"), 3, ""),
    Case("a pipe", _the_pipe_itself, 3, "not a regular file"),
    Case("weights in a socket", _socket, 3, ""),
    Case("weights in a device", _link(WEIGHTS, "/dev/zero"), 3, ""),
    Case("a config in a device", _link("adapter_config.json", "/dev/zero"), 3, ""),
    Case("a device", lambda _: Path("/dev/zero"), 3, "not a regular file"),
    Case("weights behind a dead link", _link(WEIGHTS, "nowhere"), 3, ""),
    Case("weights that link to themselves", _link(WEIGHTS, WEIGHTS), 3, ""),
    Case("links into blobs", _linked, 0, ""),
    Case("folders in a circle", _around, 0, ""),
    Case("a folder as weights", _folder_as_file, 3, ""),
    Case("forty folders deep", _deep, 3, "no adapter was recognized"),
    Case("fifty with three broken", _fifty, 4, "run-33"),
    Case("text", lambda f: _text(f, "README.md", b"# LoRA\n"), 3, "not a safetensors file"),
    Case("a picture", lambda f: _text(f, "a.png", b"\x89PNG\r\n\x1a\n" * 9), 3, "safetensors file"),
    Case("text as safetensors", lambda f: _text(f, "a.safetensors", b"hello world" * 9), 3, ""),
    Case("a pointer of Git LFS", lambda f: _text(f, "a.safetensors", _LFS), 3, "Git LFS"),
    Case("a pointer in PEFT's folder", lambda f: peft(f, _LFS), 3, "Git LFS"),
    Case("a pointer as pickle", lambda f: _text(f, "a.pt", _LFS), 3, "Git LFS"),
    Case("a pointer as GGUF", lambda f: _text(f, "a.gguf", _LFS), 3, "Git LFS"),
    Case("a pointer as config", _config_pointer, 3, "config.json: this is a pointer of Git LFS"),
    Case("a pointer as PEFT's pickle", _pickle_pointer, 3, "Git LFS"),
    Case("a page of a web server", lambda f: peft(f, b"<!DOCTYPE html><html>" * 9), 3, ""),
]


def _text(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _missing_shard(folder: Path) -> Path:
    _sharded(_WHOLE)(folder)
    (folder / _PARTS[1]).unlink()
    return folder


def _outside(folder: Path) -> Path:
    inner = folder / "inner"
    inner.mkdir()
    _sharded({A: _PARTS[0], B: f"../{_PARTS[1]}"})(inner)
    shutil.move(inner / _PARTS[1], folder / _PARTS[1])
    return inner


SHARDS = [
    Case("two shards", _sharded(_WHOLE), 0, ""),
    Case("half-written shards", _sharded(_WHOLE, cut=True), 3, "cut short"),
    Case("a shard that is not there", _missing_shard, 3, "does not exist"),
    Case("a shard outside", _outside, 3, "inside the index's own folder"),
    Case("a shard by full path", _sharded({A: "/etc/passwd"}), 3, "index's own folder"),
    Case("a shard with a NUL", _sharded({A: "a\0.safetensors"}), 3, "index's own folder"),
    Case("a shard that is a number", _sharded({A: 3}), 3, "as the file of tensor"),
    Case("a shard that lacks it", _sharded({A: _PARTS[1], B: _PARTS[1]}), 3, "lacks it"),
    Case("a shard by another name", _sharded({A: "config.json"}), 3, "index's own folder"),
    Case("a tensor that is nowhere", _sharded({**_WHOLE, "x": _PARTS[0]}), 3, "lacks it"),
    Case("an index of nothing", _sharded({}), 3, "weight_map"),
    Case("an index that is a list", _sharded([1]), 3, "weight_map"),
    Case("an index that is cut", _sharded(None, raw=b'{"weight_map": {'), 3, "not valid JSON"),
]
CASES = [*ON_DISK, *SHARDS]
