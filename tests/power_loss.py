"""A model of a disk that loses power: what was not flushed is dropped, reordered or zeros.

`recorded` logs the file operations of a block. From the log, `disks` makes the states that a disk
may show after the power fails behind any of them: an operation on a folder is certain only once
that folder was flushed, the content of a file only once the file was.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Operation:
    """One change of a folder (create, mkdir, rename, remove) or a flush (sync)."""

    kind: str
    path: Path
    other: Path | None = None
    inode: int = 0
    content: bytes = b""

    @property
    def folder(self) -> Path:
        return (self.other or self.path).parent


@dataclass
class Log:
    """The operations of a block, and what the files held before it and at its end."""

    root: Path
    before: dict[Path, bytes | None] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    last: dict[int, bytes] = field(default_factory=dict)


def snapshot(root: Path) -> dict[Path, bytes | None]:
    """Return every file of a tree with its content, and every folder with None."""
    return {p: None if p.is_dir() else p.read_bytes() for p in sorted(root.rglob("*"))}


@contextmanager
def recorded(root: Path) -> Iterator[Log]:
    """Log what a block does to the files below a folder."""
    log = Log(root, snapshot(root))
    real: dict[str, Callable[..., Any]] = {
        name: getattr(os, name)
        for name in ("open", "mkdir", "replace", "rename", "unlink", "rmdir", "fsync")
    }

    def located(path: Any, dir_fd: int | None) -> Path:
        text = os.fspath(path)
        if dir_fd is not None and not Path(text).is_absolute():
            return Path(f"/proc/self/fd/{dir_fd}").readlink() / text
        return Path(text)

    def note(kind: str, path: Path, **more: Any) -> None:
        if root in path.parents:
            log.operations.append(Operation(kind, path, **more))

    def keep(path: Path) -> None:
        if path.is_file():
            log.last[path.stat().st_ino] = path.read_bytes()

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = located(path, dir_fd)
        new = bool(flags & os.O_CREAT) and not place.exists()
        descriptor: int = real["open"](path, flags, mode, dir_fd=dir_fd)
        if new:
            note("create", place, inode=os.fstat(descriptor).st_ino)
        return descriptor

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real["mkdir"](path, mode, dir_fd=dir_fd)
        note("mkdir", located(path, dir_fd))

    def moved(source: Any, target: Any, **more: Any) -> None:
        keep(Path(source))
        real["replace"](source, target, **more)
        note("rename", Path(source), other=Path(target))

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        place = located(path, dir_fd)
        keep(place)
        real["unlink"](path, dir_fd=dir_fd)
        note("remove", place)

    def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
        place = located(path, dir_fd)
        real["rmdir"](path, dir_fd=dir_fd)
        note("remove", place)

    def fsync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            if place == root or root in place.parents:
                log.operations.append(Operation("sync folder", place))
        else:
            note("sync", place, inode=facts.st_ino, content=place.read_bytes())

    fakes = {"open": opened, "mkdir": mkdir, "replace": moved, "rename": moved}
    fakes |= {"unlink": unlink, "rmdir": rmdir, "fsync": fsync}
    for name, fake in fakes.items():
        setattr(os, name, fake)
    try:
        yield log
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        for path in root.rglob("*"):
            keep(path)


def disks(log: Log, seed: int = 0) -> Iterator[tuple[str, dict[Path, bytes | None]]]:
    """Yield the trees that a disk may hold after the power failed, with a name for each."""
    rng = random.Random(seed)
    for end in range(len(log.operations) + 1):
        done = log.operations[:end]
        open_ones = [i for i, one in enumerate(done) if _is_change(one) and not _is_sure(done, i)]
        choices = [set(), set(open_ones)]
        choices += [{i for i in open_ones if rng.random() < 0.5} for _ in range(3)]
        for number, chosen in enumerate(choices):
            tree, inodes = _tree(log, done, dropped=set(open_ones) - chosen)
            for lost in ("zeros", "nothing", "all"):
                yield f"{end}.{number}.{lost}", _filled(log, done, tree, inodes, lost)
            if not open_ones:
                break


def _is_change(operation: Operation) -> bool:
    return operation.kind not in ("sync", "sync folder")


def _is_sure(done: list[Operation], index: int) -> bool:
    folder = done[index].folder
    return any(one.kind == "sync folder" and one.path == folder for one in done[index + 1 :])


def _tree(
    log: Log, done: list[Operation], dropped: set[int]
) -> tuple[dict[Path, bytes | None], dict[Path, int]]:
    """Return the tree after the operations that reached the disk, and the files made meanwhile."""
    tree = dict(log.before)
    inodes: dict[Path, int] = {}
    for index, one in enumerate(done):
        if index in dropped or not _is_change(one):
            continue
        if one.kind in ("create", "mkdir"):
            tree[one.path] = None if one.kind == "mkdir" else b""
            if one.kind == "create":
                inodes[one.path] = one.inode
        elif one.kind == "remove":
            tree.pop(one.path, None)
            inodes.pop(one.path, None)
        elif one.path in tree and one.other is not None:
            tree[one.other] = tree.pop(one.path)
            inodes.pop(one.other, None)
            if one.path in inodes:
                inodes[one.other] = inodes.pop(one.path)
    return tree, inodes


def _filled(
    log: Log,
    done: list[Operation],
    tree: dict[Path, bytes | None],
    inodes: dict[Path, int],
    lost: str,
) -> dict[Path, bytes | None]:
    """Return the tree with what the files made meanwhile hold."""
    filled = dict(tree)
    for path, inode in inodes.items():
        flushed = [one.content for one in done if one.kind == "sync" and one.inode == inode]
        last = log.last.get(inode, b"")
        unsure = {"zeros": bytes(len(last)), "nothing": b"", "all": last}[lost]
        filled[path] = flushed[-1] if flushed else unsure
    return {p: c for p, c in filled.items() if all(q in filled for q in _between(log.root, p))}


def _between(root: Path, path: Path) -> list[Path]:
    return [place for place in path.parents if root in place.parents]


def put(tree: dict[Path, bytes | None], root: Path, copy: Path) -> None:
    """Write a tree that was below ``root`` into another folder."""
    copy.mkdir(parents=True, exist_ok=True)
    for path, content in sorted(tree.items()):
        place = copy / path.relative_to(root)
        if content is None:
            place.mkdir(exist_ok=True)
        else:
            place.write_bytes(content)
