"""The output policy: what is free to write, and that no instant shows a mixture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from power_loss import disks, put, recorded

from lora_analysis.errors import InUseError, OccupiedError, OutputError, UnfinishedError
from lora_analysis.storage.atomic import lock_folder, write_atomic
from lora_analysis.storage.outputs import output_file, output_folder, write_output_file
from lora_analysis.storage.records import RECORD_FOLDER, read_record, refuse_unfinished

OLD = {"config.json": b'{"set": "old"}', "figures/a.svg": b"old", "only-old.csv": b"1\n"}
NEW = {"config.json": b'{"set": "new"}', "figures/a.svg": b"newer", "only-new.csv": b"2\n"}


def fill(folder: Path, files: dict[str, bytes], **options: Any) -> None:
    """Write a set of files as a verb does."""
    with output_folder(folder, kind="adapter", verb="convert", **options) as staging:
        for name, content in files.items():
            write_atomic(staging / name, content)


def names(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder that a user sees."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and RECORD_FOLDER not in path.parts
    }


def test_an_absent_an_empty_and_an_own_folder_are_free_to_write(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "absent" / "below", tmp_path / "empty"):
        fill(folder, OLD)
        assert contents(folder) == OLD
        fill(folder, NEW)
        assert contents(folder) == NEW
        record = read_record(folder, "adapter")
        assert record is not None
        assert (record.state, record.verb, set(record.files)) == ("finished", "convert", set(NEW))
        assert names(folder / RECORD_FOLDER) == ["adapter.json"]


def test_files_of_others_need_force_and_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OccupiedError, match=r"not empty \(it holds 'notes.txt'"):
        fill(tmp_path, OLD)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    assert not (tmp_path / RECORD_FOLDER).exists()
    fill(tmp_path, OLD, force=True)
    fill(tmp_path, NEW)
    assert contents(tmp_path) == NEW | {"notes.txt": b"mine"}


def test_a_name_taken_by_somebody_elses_file_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    (tmp_path / "only-new.csv").write_bytes(b"mine")
    with pytest.raises(OccupiedError, match=r"only-new.csv exists"):
        fill(tmp_path, NEW)
    assert contents(tmp_path) == OLD | {"only-new.csv": b"mine"}
    fill(tmp_path, NEW, force=True)
    assert contents(tmp_path) == NEW


def test_an_edited_file_needs_force_and_a_damaged_one_is_mended(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    (tmp_path / "only-old.csv").write_bytes(b"1\n2 by hand\n")
    with pytest.raises(OccupiedError, match=r"only-old.csv was edited after .* wrote it"):
        fill(tmp_path, NEW)
    (tmp_path / "only-old.csv").write_bytes(OLD["only-old.csv"])
    for damage in (b"", b"{", b"\0" * 70):
        (tmp_path / "config.json").write_bytes(damage)
        fill(tmp_path, OLD)
        assert contents(tmp_path) == OLD
    (tmp_path / "config.json").unlink()
    fill(tmp_path, OLD)
    assert contents(tmp_path) == OLD


def test_an_edited_file_that_the_new_set_lacks_stays_under_force(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    (tmp_path / "only-old.csv").write_bytes(b"edited")
    fill(tmp_path, NEW, force=True)
    assert contents(tmp_path) == NEW | {"only-old.csv": b"edited"}


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.safetensors.index.json"])
def test_weights_of_others_that_would_stay_are_an_error_also_with_force(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(OccupiedError, match=f"{name} would stay next to"):
        fill(tmp_path, {"adapter_model.safetensors": b"new"}, force=True)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("where", [".", "inside/deeper"])
def test_no_output_is_or_lies_inside_an_input(tmp_path: Path, where: str) -> None:
    given = tmp_path / "base"
    given.mkdir()
    (given / "config.json").write_bytes(b"{}")
    for force in (False, True):
        with pytest.raises(OccupiedError, match="inputs are never written"):
            fill(given / where, NEW, inputs=[given], force=force)
    assert contents(tmp_path) == {"base/config.json": b"{}"}


def test_an_output_folder_may_contain_its_inputs_but_not_write_them(tmp_path: Path) -> None:
    given = tmp_path / "figures"
    given.mkdir()
    (given / "weights").write_bytes(b"mine")
    fill(tmp_path, {"report.html": b"new"}, inputs=[given])
    with pytest.raises(OccupiedError, match="inputs are never written"):
        fill(tmp_path, NEW, inputs=[given], force=True)
    assert contents(tmp_path) == {"report.html": b"new", "figures/weights": b"mine"}


def test_no_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OccupiedError, match="symbolic link"):
        fill(tmp_path / "out", NEW, force=True)
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OccupiedError, match="symbolic link"):
        fill(tmp_path / "link", NEW, force=True)


def test_an_error_in_between_leaves_what_was_there(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        with output_folder(folder, kind="adapter", verb="convert") as staging:
            (staging / "config.json").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()
    fill(tmp_path / "old", OLD)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "old")
    assert contents(tmp_path / "old") == OLD
    refuse_unfinished(tmp_path / "old")


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    with (
        lock_folder(tmp_path, f"{RECORD_FOLDER}/adapter.lock"),
        pytest.raises(InUseError, match=str(os.getpid())),
    ):
        fill(tmp_path, NEW)
    assert contents(tmp_path) == OLD


def test_a_hostile_record_deletes_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD)
    (tmp_path / "victim").write_bytes(b"1\n")
    path = tmp_path / "out" / RECORD_FOLDER / "adapter.json"
    document = json.loads(path.read_text())
    document["files"]["../victim"] = document["files"]["only-old.csv"]
    path.write_text(json.dumps(document))
    assert read_record(tmp_path / "out", "adapter") is None
    with pytest.raises(OccupiedError):
        fill(tmp_path / "out", NEW)
    fill(tmp_path / "out", NEW, force=True)
    assert (tmp_path / "victim").read_bytes() == b"1\n"


class Killed(BaseException):
    """The process ends here: nothing that follows may run, not even clean-up."""


_OPERATIONS = ("replace", "unlink", "fsync", "open", "mkdir", "rmdir")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., bool]]:
    """Return what makes the n-th file operation fail, and all after it if the process is killed.

    Called without a number it disarms, and returns whether the operation was reached.
    """
    state: dict[str, Any] = {"left": None, "error": None}

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            if state["left"] is not None:
                state["left"] -= 1
                if state["left"] == 0 or (state["left"] < 0 and isinstance(state["error"], Killed)):
                    raise state["error"]
            return function(*args, **kwargs)

        return faulty

    for name in _OPERATIONS:
        # A real flush takes most of the time and changes nothing that these tests see.
        function = (lambda _descriptor: None) if name == "fsync" else getattr(os, name)
        monkeypatch.setattr(os, name, wrap(function))

    def arm(count: int | None = None, error: BaseException | None = None) -> bool:
        reached = state["left"] is not None and state["left"] <= 0
        state["left"], state["error"] = count, error
        return reached

    yield arm
    state["left"] = None


def failure_of(folder: Path) -> str | None:
    """Return what writing the new set says: None if it succeeds, "" if the process is killed."""
    try:
        fill(folder, NEW)
    except Killed:
        return ""
    except OutputError as error:
        return str(error)
    return None


def is_refused(folder: Path) -> bool:
    """Return whether readers refuse the folder as unfinished."""
    try:
        refuse_unfinished(folder)
    except UnfinishedError:
        return True
    return False


@pytest.mark.parametrize(
    "error",
    [Killed(), OSError(28, "No space left on device"), OSError(5, "I/O"), OSError(13, "denied")],
    ids=["kill", "ENOSPC", "EIO", "EACCES"],
)
@pytest.mark.parametrize("earlier", [{}, OLD], ids=["new", "replace"])
def test_at_every_file_operation_the_folder_is_old_new_or_refused(
    tmp_path: Path,
    faults: Callable[..., bool],
    error: BaseException,
    earlier: dict[str, bytes],
) -> None:
    count = 0
    while True:
        count += 1
        folder = tmp_path / f"out{count}"
        if earlier:
            fill(folder, earlier)
        faults(count, error)
        message = failure_of(folder)
        if not faults():
            break
        for lock in folder.rglob("*.lock"):
            lock.unlink()  # a lock goes with its process, which here lives on
        seen = contents(folder) if folder.exists() else {}
        refused = is_refused(folder)
        assert refused or seen in (earlier, NEW), count
        if message:
            assert ("Only some of" in message) == refused, message
            assert ("untouched" in message) == (not refused and seen == earlier), message
            assert ("did not confirm" in message) == (not refused and seen == NEW), message
        elif message is None:
            assert seen == NEW
        fill(folder, NEW)  # the next run completes or undoes it
        assert contents(folder) == NEW
        assert names(folder / RECORD_FOLDER) == ["adapter.json"]
        shutil.rmtree(folder)
    assert count > 10


def test_a_single_file_of_others_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "below" / "x.svg"
    write_output_file(path, b"<dc:title>lora_analysis</dc:title>")
    write_output_file(path, b"<svg/>")  # ours by its mark
    with pytest.raises(OccupiedError, match="not written by this program"):
        write_output_file(path, b"new")
    assert path.read_bytes() == b"<svg/>"
    write_output_file(path, b"new", force=True)
    assert [one.name for one in path.parent.iterdir()] == ["x.svg"]
    with pytest.raises(OccupiedError, match="inputs are never written"):
        write_output_file(path, b"newer", inputs=[path], force=True)


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for force in (False, True):
        with pytest.raises(OccupiedError, match="device or a pipe"):
            write_output_file(pipe, b"new", force=force)
    for folder in (tmp_path, pipe):
        with (
            pytest.raises(OccupiedError, match="device or a pipe"),
            output_folder(folder, kind="report", verb="report", force=True) as staging,
        ):
            (staging / "pipe.json").write_bytes(b"new")
    assert pipe.is_fifo()


def test_a_failed_single_file_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), output_file(tmp_path / "a" / "b" / "x.svg"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [{}, OLD], ids=["new", "replace"])
def test_a_loss_of_power_leaves_old_new_or_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: dict[str, bytes]
) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    if earlier:
        fill(root / "out", earlier)
    with recorded(root) as log:
        fill(root / "out", NEW)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    seen = set()
    for name, tree in disks(log):
        copy = tmp_path / name
        put(tree, root, copy)
        folder = copy / "out"
        for lock in folder.rglob("*.lock"):
            lock.unlink()
        files = contents(folder) if folder.exists() else {}
        if is_refused(folder):
            seen.add("refused")
        else:
            assert files in (earlier, NEW), name
            seen.add("new" if files == NEW else "old")
        fill(folder, NEW)
        assert contents(folder) == NEW, name
        shutil.rmtree(copy)
    assert seen == {"old", "new", "refused"}
