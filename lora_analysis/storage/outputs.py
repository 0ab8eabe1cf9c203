"""Where results are written: one policy for every verb, for folders and for single files.

Free to write is what is absent, empty, or ours by a record or mark (`records`, `marks`). Anything
else needs ``force``, which replaces files at the names that must be written and touches nothing
else. No input is written, and nothing is deleted before its replacement is on the disk. New files
are complete in a staging folder before the first takes its place, and a journal of the places
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
    remove_leftovers,
    sync_folder,
    write_atomic,
)
from lora_analysis.storage.locks import locked
from lora_analysis.storage.marks import is_marked
from lora_analysis.storage.records import (
    RECORD_FOLDER,
    FileMark,
    Record,
    file_state,
    mark_of,
    read_record,
    read_records,
    record_path,
)

_UNTOUCHED: Final = "What was there before is untouched; make room, or name another place with -o."
_FORCE: Final = "pass --force (force=True in Python)"
# Files from which a program may load weights; a stranger's next to ours would be read for ours.
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")
_NOT_WEIGHTS: Final = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")


class OutputFolder:
    """A folder that one run fills or replaces, for `output_folder` and for training.

    Parameters
    ----------
    folder
        The folder; made if it does not exist.
    kind
        What its files are, see `Record`.
    verb, run
        What writes them, and with which settings.
    inputs
        Files and folders that the run reads; none of them is written or written into.
    force
        Whether files of others, and edited ones of ours, may be replaced at the names that the
        run writes.
    shared
        Whether the folder may hold other things already, as long as no name collides.
    ignored
        Names in the folder that do not count as somebody else's.
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
        self._made: list[Path] = []

    def check(self) -> None:
        """Raise if the folder may not be written, before anything is.

        Raises
        ------
        OccupiedError
            It holds things of others or edited files of ours and ``force`` is not given; it is,
            or lies inside, an input; or it is a symbolic link.
        """
        refuse_link(self.folder)
        for name in (".", *self.record.names):
            refuse_inputs(self.folder / name, self.inputs)
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
        known = {name.partition("/")[0] for one in read_records(self.folder) for name in one.files}
        others = [
            path
            for path in sorted(self.folder.iterdir())
            if not is_bookkeeping(path)
            and path.name not in known | self.ignored
            and not self._leads_to_input(path.resolve())
        ]
        if others:
            message = (
                f"{self.folder} is not empty (it holds '{others[0].name}') and is not a result of "
                f"this command. Choose another folder, or {_FORCE} to write into it."
            )
            raise OccupiedError(message)

    def _leads_to_input(self, path: Path) -> bool:
        """Return True if a path is an input or contains one."""
        return any(path == one or path in one.parents for one in self.inputs)

    def begin(self) -> None:
        """Put the record in place; complete what an interrupted run left."""
        self.make_folders()
        remove_leftovers(self.folder / RECORD_FOLDER)
        earlier = read_record(self.folder, self.kind)
        if earlier is not None and earlier.state == "replacing":
            self._complete(earlier)
            earlier = earlier.finished()
            self.check()
        if earlier is None or not earlier.files:
            for name in () if earlier is None else earlier.names:
                if name not in self.record.names:  # of an unfinished run that this one replaces
                    (self.folder / name).unlink(missing_ok=True)
            self.record.write(self.folder)
            self.earlier = self.record
        else:
            self.earlier = earlier

    def clear_staging(self) -> None:
        """Remove what an interrupted run left in the staging folder, and make it anew."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True, exist_ok=True)

    def commit(self, in_place: Iterable[str] = ()) -> None:
        """Put the staged files in their places and finish the record.

        Parameters
        ----------
        in_place
            Names of files of this run that lie in the folder already.

        Raises
        ------
        OccupiedError
            A name is taken by a file that may not be replaced, or a file that stays would be read
            for one of these.
        """
        staged = sorted(
            path.relative_to(self.staging).as_posix()
            for path in self.staging.rglob("*")
            if path.is_file()
        )
        standing = {name: _synced_mark(self.folder / name) for name in in_place}
        for name in (*staged, *standing):
            self._check_place(name, own=name in standing)
        self._refuse_misleading({*staged, *standing})
        new = {name: _synced_mark(self.staging / name) for name in staged} | standing
        for place in (self.staging, *(p for p in self.staging.rglob("*") if p.is_dir())):
            sync_folder(place)
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
        """Remove what this run staged; what was there before stays as it was.

        Once files are taking their places nothing is removed: the next run completes that.
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
        """Return what the folder holds now, after an error."""
        record = read_record(self.folder, self.kind)
        if record is not None and record.state == "replacing":
            return (
                f"Only some of the new files of {self.folder} are in place. The folder cannot be "
                "read until the same command is run again and completes it."
            )
        if record is not None and record.state == "finished" and record.files != self.earlier.files:
            return f"The new files of {self.folder} are in place, but the disk did not confirm it."
        return _UNTOUCHED

    def remove_made_folders(self) -> None:
        """Remove the folders that `begin` made, as far as they are empty."""
        for place in reversed(self._made):
            with suppress(OSError):
                place.rmdir()

    def make_folders(self) -> None:
        """Make the folder, those above it, and the one of records."""
        missing = [self.folder, *self.folder.parents]
        self._made += [place for place in reversed(missing) if not place.exists()]
        (self.folder / RECORD_FOLDER).mkdir(parents=True, exist_ok=True)
        for place in (*self._made, self.folder / RECORD_FOLDER):
            sync_folder(place.parent)

    def _check_place(self, name: str, *, own: bool) -> None:
        """Raise if a staged file may not take its place."""
        target = self.folder / name
        for place in (target, *target.parents):
            if place == self.folder:
                break
            refuse_link(place)
        if target.is_dir():
            message = f"{target} is a folder, and the output is a file of that name. Move it away."
            raise OccupiedError(message)
        refuse_inputs(target, self.inputs)
        if own or self.force or not os.path.lexists(target):
            return
        if name in self.earlier.names:
            return
        mark = self.earlier.files.get(name)
        if mark is None or file_state(target, mark) == "edited":
            message = f"{target} exists and is not from this run. Move it away, or {_FORCE}."
            raise OccupiedError(message)

    def _refuse_misleading(self, names: set[str]) -> None:
        """Raise if a weights file of somebody else would stay next to weights of ours."""
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
        """Carry out a journal: move staged files to their places, then remove what is obsolete."""
        places = {(self.folder / name).parent for name in journal.new}
        for place in sorted(places):
            # On the disk before anything moves into it, or a loss of power could lose the file.
            for missing in [one for one in reversed([place, *place.parents]) if not one.exists()]:
                missing.mkdir()
                sync_folder(missing.parent)
        for name in journal.new:
            source = self.staging / name
            if source.is_file():
                source.replace(self.folder / name)
        for place in places:
            sync_folder(place)
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
        for place in sorted(emptied - {self.folder}, key=lambda one: len(one.parts), reverse=True):
            with suppress(OSError):
                place.rmdir()  # if it held nothing else
        for place in (self.folder, *emptied):
            if place.is_dir():
                sync_folder(place)
        journal.finished().write(self.folder)
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
    """Yield a staging folder whose files replace the folder's when the block ends without error.

    Parameters are those of `OutputFolder`. If the block raises, the folder is as it was before.

    Raises
    ------
    OccupiedError
        See `OutputFolder.check` and `OutputFolder.commit`; nothing has been replaced then.
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
            with locked(folder, f"{RECORD_FOLDER}/{kind}.lock", target=folder):
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
            target.remove_made_folders()


@contextmanager
def output_file(path: Path, *, inputs: Iterable[Path] = (), force: bool = False) -> Iterator[None]:
    """Hold the right to write one file: it is absent, empty, marked as ours, or ``force`` is given.

    Raises
    ------
    OccupiedError
        Somebody else's file or folder lies there, it is a symbolic link, or it is an input.
    InUseError
        Another process writes it.
    """
    with _disk_errors(path):
        check_output_file(path, inputs=inputs, force=force)
        missing = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(path.parent, f".{path.name[:100]}.lock", target=path):
                check_output_file(path, inputs=inputs, force=force)
                yield
        except BaseException:
            for place in missing:
                with suppress(OSError):
                    place.rmdir()
            raise


def check_output_file(path: Path, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Raise if a file may not be written; see `output_file`."""
    refuse_link(path)
    refuse_inputs(path, [one.resolve() for one in inputs if one.exists()])
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


def refuse_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Raise if an output is an input or lies inside one.

    Parameters
    ----------
    output
        What is to be written.
    inputs
        Resolved paths of files and folders that are read.
    """
    target = output.resolve()
    for path in inputs:
        same = target == path or (
            output.exists() and path.exists() and output.samefile(path) and not output.is_dir()
        )
        if same or (path.is_dir() and path in target.parents):
            how = "is" if same else "lies inside"
            message = (
                f"{output} {how} the input {path}, and inputs are never written. Choose another "
                "place with -o."
            )
            raise OccupiedError(message)


def refuse_link(path: Path) -> None:
    """Raise if a path is a symbolic link."""
    if path.is_symlink():
        message = (
            f"{path} is a symbolic link, and no output is written through one. Name its target."
        )
        raise OccupiedError(message)


def holds_output(folder: Path, kind: str) -> bool:
    """Return True if a folder has a record of one kind of output."""
    return any(record.kind == kind for record in read_records(folder))


@contextmanager
def _disk_errors(target: Path, state: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn what the system refuses into one sentence that is true of the target."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if not isinstance(cause, OSError) or cause.errno in (None, errno.EPIPE, errno.EINTR):
            raise
        if state is None and cause is not error:
            raise  # of one file, `write_atomic` says what is there now
        reason = cause.strerror or str(cause)
        place = cause.filename or target
        message = (
            f"{place} could not be written: {reason}. {_UNTOUCHED if state is None else state()}"
        )
        raise OutputError(message) from error


def _synced_mark(path: Path) -> FileMark:
    """Return the mark of a file that is on the disk."""
    mark = mark_of(path)
    descriptor = os.open(path, os.O_RDWR if os.name != "posix" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return mark


def is_bookkeeping(path: Path) -> bool:
    """Return True for what writers leave next to results: records, locks, half-written files."""
    return path.name == RECORD_FOLDER or path.name.endswith(".lock") or is_leftover(path)
