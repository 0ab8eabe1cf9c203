"""Output policy: which files and folders may be written, the same for every verb.

Free to write are paths that are absent, empty, or ours by a record or mark (`records`).
Anything else needs ``force``, which replaces files at the names that must be written and touches
nothing else. No input is written, and nothing is deleted before its replacement is on the disk. New
files are complete in a staging folder before the first one is moved, and a journal of the moves
makes an interrupted replacement either complete or refused by readers, never a mixture.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lora_analysis.errors import OccupiedError, OutputError
from lora_analysis.storage.atomic import (
    Content,
    is_leftover,
    lock_folder,
    remove_leftovers,
    sync_folder,
    write_atomic,
)
from lora_analysis.storage.records import (
    RECORD_FOLDER,
    FileMark,
    Record,
    file_state,
    is_marked,
    mark_of,
    read_record,
    read_records,
    record_path,
)

_UNTOUCHED: Final = "What was there before is untouched; make room, or name another place with -o."
_FORCE: Final = "pass --force (force=True in Python)"
# Files from which a program may load weights; one that is not ours might be loaded instead of ours.
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
_NOT_WEIGHTS: Final = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")


class OutputFolder:
    """A folder that one run writes or replaces, for `output_folder` and for training.

    Parameters
    ----------
    folder
        The folder; created if it does not exist.
    kind
        Kind of its files, see `Record`.
    verb, run
        The verb that writes them, and its settings.
    inputs
        Files and folders that the run reads; none of them is written.
    force
        Replace files that are not ours, or that were edited, at the names that the run writes.
    shared
        Allow a folder with files that are not ours, as long as no name collides.
    ignored
        Names in the folder that do not count as files of others.
    names
        See `Record.names`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        verb: str,
        run: Mapping[str, Any] | None = None,
        inputs: Iterable[Path] = (),
        force: bool = False,
        shared: bool = False,
        ignored: Collection[str] = (),
        names: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.force = force
        self.shared = shared
        self.ignored = frozenset(ignored)
        self.inputs = [path.resolve() for path in inputs if path.exists()]
        self.record = Record(kind, verb, dict(run or {}), names=tuple(names))
        self.earlier = read_record(folder, kind) or self.record
        self.staging = folder / RECORD_FOLDER / f"{kind}.new"
        self.made: list[Path] = []

    def check(self) -> None:
        """Raise if the folder may not be written, before anything is.

        Raises
        ------
        OccupiedError
            It contains files of others or edited files of ours and ``force`` is not given; it is an
            input or inside one; or it is a symbolic link.
        """
        _refuse_special(self.folder)
        for name in (".", *self.record.names):
            _refuse_inputs(self.folder / name, self.inputs)
        if self.folder.exists() and not self.folder.is_dir():
            message = f"{self.folder} is a file, and the output is a folder. Choose another name."
            raise OccupiedError(message)
        if (self.folder / RECORD_FOLDER).is_symlink():
            message = (
                f"{self.folder / RECORD_FOLDER} is a symbolic link, and records are not written "
                "through one. Remove the link, or choose another folder."
            )
            raise OccupiedError(message)
        if self.force or not self.folder.is_dir():
            return
        earlier = read_record(self.folder, self.kind)
        if earlier is None:
            self._refuse_others()
            return
        edited = [
            name
            for name, mark in earlier.files.items()
            if file_state(self.folder / name, mark) == "edited" and earlier.state != "replacing"
        ]
        if edited:
            message = (
                f"{self.folder / edited[0]} was edited after 'lora-analysis {earlier.verb}' wrote "
                f"it. Keep a copy and {_FORCE} to replace it, or choose another folder."
            )
            raise OccupiedError(message)

    def _refuse_others(self) -> None:
        if self.shared:
            return
        ours = {
            name.partition("/")[0] for record in read_records(self.folder) for name in record.files
        }
        others = [
            path
            for path in sorted(self.folder.iterdir())
            if not is_bookkeeping(path)
            and path.name not in ours | self.ignored
            and not any(path.resolve() in (source, *source.parents) for source in self.inputs)
        ]
        if others:
            message = (
                f"{self.folder} is not empty (it holds '{others[0].name}') and is not a result of "
                f"this command. Choose another folder, or {_FORCE} to write into it."
            )
            raise OccupiedError(message)

    def begin(self) -> None:
        """Write the record; complete an interrupted replacement first."""
        self.make_folders()
        remove_leftovers(self.folder / RECORD_FOLDER)
        earlier = read_record(self.folder, self.kind)
        if earlier is not None and earlier.state == "replacing":
            self._complete(earlier)
            earlier = earlier.as_finished()
            self.check()
        if earlier is None or not earlier.files:
            for name in () if earlier is None else earlier.names:
                if name not in self.record.names:  # from an unfinished run that this one replaces
                    (self.folder / name).unlink(missing_ok=True)
            self.record.write(self.folder)
            self.earlier = self.record
        else:
            self.earlier = earlier

    def clear_staging(self) -> None:
        """Empty the staging folder, which an interrupted run may have left."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True, exist_ok=True)

    def commit(self, in_place: Iterable[str] = ()) -> None:
        """Move the staged files to their names and finish the record.

        Parameters
        ----------
        in_place
            Names of files of this run that are in the folder already.

        Raises
        ------
        OccupiedError
            A name is taken by a file that may not be replaced, or a program might load a file that
            remains instead of one of these.
        """
        staged = sorted(
            path.relative_to(self.staging).as_posix()
            for path in self.staging.rglob("*")
            if path.is_file()
        )
        unmoved = {name: _synced_mark(self.folder / name) for name in in_place}
        for name in (*staged, *unmoved):
            self._check_target(name, in_place=name in unmoved)
        self._refuse_misleading({*staged, *unmoved})
        new = {name: _synced_mark(self.staging / name) for name in staged} | unmoved
        for folder in (self.staging, *(p for p in self.staging.rglob("*") if p.is_dir())):
            sync_folder(folder)
        sync_folder(self.staging.parent)
        removed = tuple(
            name
            for name, mark in self.earlier.files.items()
            if name not in new and file_state(self.folder / name, mark) == "whole"
        )
        journal = replace(
            self.record,
            state="replacing",
            files=self.earlier.files,
            new=new,
            removed=removed,
            names=self.earlier.names,
        )
        journal.write(self.folder)
        self._complete(journal)

    def discard(self) -> None:
        """Remove the staged files; earlier files remain as they were.

        Nothing is removed after files have begun to move: the next run completes the move.
        """
        record = read_record(self.folder, self.kind)
        if record is not None and record.state == "replacing":
            return
        shutil.rmtree(self.staging, ignore_errors=True)
        if record is not None and record.state == "writing" and not record.files:
            record_path(self.folder, self.kind).unlink(missing_ok=True)
        with suppress(OSError):
            (self.folder / RECORD_FOLDER).rmdir()  # if it is empty

    def state_sentence(self) -> str:
        """Return a sentence on the state of the folder after an error."""
        record = read_record(self.folder, self.kind)
        if record is not None and record.state == "replacing":
            return (
                f"Only some of the new files of {self.folder} are in place. The folder cannot be "
                "read until the same command is run again and completes it."
            )
        if record is not None and record.state == "finished" and record.files != self.earlier.files:
            return f"The new files of {self.folder} are in place, but the disk did not confirm it."
        return _UNTOUCHED

    def make_folders(self) -> None:
        """Make the folder, its missing parents, and the folder of records."""
        candidates = [self.folder, *self.folder.parents]
        self.made += [folder for folder in reversed(candidates) if not folder.exists()]
        (self.folder / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
        for folder in (*self.made, self.folder / RECORD_FOLDER):
            sync_folder(folder.parent)

    def _check_target(self, name: str, *, in_place: bool) -> None:
        """Raise if a file may not be written under its name."""
        target = self.folder / name
        for path in (target, *target.parents):
            if path == self.folder:
                break
            _refuse_special(path)
        if target.is_dir():
            message = f"{target} is a folder, and the output is a file of that name. Move it away."
            raise OccupiedError(message)
        _refuse_inputs(target, self.inputs)
        if in_place or self.force or not os.path.lexists(target) or name in self.earlier.names:
            return
        mark = self.earlier.files.get(name)
        if mark is None or file_state(target, mark) == "edited":
            message = f"{target} exists and is not from this run. Move it away, or {_FORCE}."
            raise OccupiedError(message)

    def _refuse_misleading(self, names: set[str]) -> None:
        """Raise if weights that are not ours would remain next to weights of ours."""
        if not any(name.endswith((".safetensors", ".gguf")) and "/" not in name for name in names):
            return
        for path in sorted(self.folder.iterdir()):
            weights = path.suffix in _WEIGHT_SUFFIXES and not path.name.startswith(_NOT_WEIGHTS)
            if not path.is_file() or not (weights or path.name.endswith(".index.json")):
                continue
            ours = names.union(self.earlier.files, self.earlier.names)
            if path.name not in ours:
                message = (
                    f"{path} would stay next to the new weights, and a program that loads the "
                    "folder might load it instead. Move it away, or choose another folder."
                )
                raise OccupiedError(message)

    def _complete(self, journal: Record) -> None:
        """Carry out a journal: move staged files to their names, then remove obsolete ones."""
        folders = {(self.folder / name).parent for name in journal.new}
        for folder in sorted(folders):
            # On the disk before anything moves into it, or a power loss could lose the file.
            for missing in [p for p in reversed([folder, *folder.parents]) if not p.exists()]:
                missing.mkdir()
                sync_folder(missing.parent)
        for name in journal.new:
            source = self.staging / name
            if source.is_file():
                source.replace(self.folder / name)
        for folder in folders:
            sync_folder(folder)
        emptied = set()
        for name in journal.removed:
            target = self.folder / name
            mark = journal.files.get(name)
            if mark is not None and file_state(target, mark) == "whole":
                target.unlink()
                emptied.add(target.parent)
        for name in journal.names:
            if name not in journal.new:
                (self.folder / name).unlink(missing_ok=True)
                emptied.add((self.folder / name).parent)
        deepest_first = sorted(emptied - {self.folder}, key=lambda p: len(p.parts), reverse=True)
        for folder in deepest_first:
            with suppress(OSError):
                folder.rmdir()  # if nothing else is in it
        for folder in (self.folder, *emptied):
            if folder.is_dir():
                sync_folder(folder)
        journal.as_finished().write(self.folder)
        shutil.rmtree(self.staging, ignore_errors=True)


@contextmanager
def output_folder(
    folder: Path,
    *,
    kind: str,
    verb: str,
    run: Mapping[str, Any] | None = None,
    inputs: Iterable[Path] = (),
    force: bool = False,
    shared: bool = False,
) -> Iterator[Path]:
    """Yield a staging folder; its files replace the folder's when the block ends without error.

    The parameters are those of `OutputFolder`. If the block raises, the folder is unchanged.

    Raises
    ------
    OccupiedError
        See `OutputFolder.check` and `OutputFolder.commit`; nothing has been replaced.
    InUseError
        Another process writes there.
    OutputError
        The disk refused.
    """
    target = OutputFolder(
        folder, kind=kind, verb=verb, run=run, inputs=inputs, force=force, shared=shared
    )
    target.check()
    with _disk_errors(folder, target.state_sentence):
        target.make_folders()
        try:
            with lock_folder(folder, f"{RECORD_FOLDER}/{kind}.lock", target=folder):
                try:
                    target.begin()
                    target.clear_staging()
                    yield target.staging
                    target.commit()
                except BaseException:
                    target.discard()
                    raise
        finally:
            with suppress(OSError):
                (folder / RECORD_FOLDER).rmdir()
            for made in reversed(target.made):  # if they are empty
                with suppress(OSError):
                    made.rmdir()


@contextmanager
def output_file(path: Path, *, inputs: Iterable[Path] = (), force: bool = False) -> Iterator[None]:
    """Lock one file for writing if it is absent, empty, marked as ours, or ``force`` is given.

    Raises
    ------
    OccupiedError
        The path is a file or folder that is not ours, a symbolic link, a device, a pipe, or an
        input.
    InUseError
        Another process writes it.
    """
    with _disk_errors(path):
        check_output_file(path, inputs=inputs, force=force)
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with lock_folder(path.parent, f".{path.name[:100]}.lock", target=path):
                check_output_file(path, inputs=inputs, force=force)
                yield
        except BaseException:
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()
            raise


def check_output_file(path: Path, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Raise if a file may not be written; see `output_file`."""
    _refuse_special(path)
    _refuse_inputs(path, [source.resolve() for source in inputs if source.exists()])
    if path.is_dir():
        message = f"{path} is a folder, and the output is a file. Choose another name."
        raise OccupiedError(message)
    if force or not path.exists() or path.stat().st_size == 0 or is_marked(path):
        return
    message = (
        f"{path} exists and was not written by this program. Choose another name, or {_FORCE} to "
        "replace it."
    )
    raise OccupiedError(message)


def write_output_file(
    path: Path, content: Content, *, inputs: Iterable[Path] = (), force: bool = False
) -> Path:
    """Write one file under the policy of `output_file`; return its path."""
    with output_file(path, inputs=inputs, force=force):
        return write_atomic(path, content)


def _refuse_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Raise if an output is an input or inside one.

    Parameters
    ----------
    output
        Path that is to be written.
    inputs
        Resolved paths of files and folders that are read.
    """
    target = output.resolve()
    for path in inputs:
        same = target == path or (
            output.exists() and path.exists() and output.samefile(path) and not output.is_dir()
        )
        if same or (path.is_dir() and path in target.parents):
            how = "is" if same else "is inside"
            message = (
                f"{output} {how} the input {path}, and inputs are never written. Choose another "
                "place with -o."
            )
            raise OccupiedError(message)


def _refuse_special(path: Path) -> None:
    """Raise if a path is a symbolic link, a device or a pipe."""
    if path.is_symlink():
        message = (
            f"{path} is a symbolic link, and no output is written through one. Name its target."
        )
        raise OccupiedError(message)
    if path.exists() and not (path.is_file() or path.is_dir()):
        message = f"{path} is a device or a pipe, which is never replaced. Choose another name."
        raise OccupiedError(message)


def holds_output(folder: Path, kind: str) -> bool:
    """Return True if a folder has a record of one kind of output."""
    return any(record.kind == kind for record in read_records(folder))


@contextmanager
def _disk_errors(target: Path, state: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn errors of the system into one sentence with the state of the target."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if not isinstance(cause, OSError) or cause.errno in (None, errno.EPIPE, errno.EINTR):
            raise
        if state is None and cause is not error:
            raise  # for single files, the error of `write_atomic` states what remains
        reason = cause.strerror or str(cause)
        path = cause.filename or target
        message = (
            f"{path} could not be written: {reason}. {_UNTOUCHED if state is None else state()}"
        )
        raise OutputError(message) from error


def _synced_mark(path: Path) -> FileMark:
    """Flush a file to the disk and return its mark."""
    mark = mark_of(path)
    descriptor = os.open(path, os.O_RDWR if os.name != "posix" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return mark


def is_bookkeeping(path: Path) -> bool:
    """Return True for records, locks and temporary files that writers leave next to results."""
    return path.name == RECORD_FOLDER or path.name.endswith(".lock") or is_leftover(path)
