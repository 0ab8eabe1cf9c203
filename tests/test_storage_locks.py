"""One process in a folder: who is kept out, and which locks count as left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import BinaryIO, TextIO

import pytest

from lora_analysis.errors import InUseError
from lora_analysis.storage import atomic
from lora_analysis.storage.atomic import lock_folder, write_atomic

HOST = socket.gethostname()
posix = pytest.mark.skipif(os.name != "posix", reason="processes of POSIX systems")


def test_a_lock_names_its_holder_and_goes_with_the_block(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text().split()[:2] == [str(os.getpid()), HOST]
    assert list(tmp_path.iterdir()) == []


def test_a_second_holder_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    told = rf"{tmp_path} is in use by process {os.getpid()} on {HOST}"
    with lock_folder(tmp_path), pytest.raises(InUseError, match=told), lock_folder(tmp_path):
        pass


def test_an_error_gives_the_lock_up(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        raise ZeroDivisionError
    with lock_folder(tmp_path):
        pass


def test_locks_of_other_names_are_others(tmp_path: Path) -> None:
    with lock_folder(tmp_path), lock_folder(tmp_path, ".lock-2"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock-2"]


def test_the_holder_of_a_folder_is_rid_of_what_was_left_half_written(tmp_path: Path) -> None:
    def fail(stream: BinaryIO) -> None:
        for left in tmp_path.glob(".table*.tmp"):
            left.with_name(left.name.replace("table", "figure")).touch()
            (tmp_path / "below" / left.name).touch()
        message = "the disk is full"
        raise OSError(message)

    (tmp_path / "below").mkdir()
    with pytest.raises(OSError, match="disk"):
        write_atomic(tmp_path / "table.csv", fail)
    others = [tmp_path / ".hidden", tmp_path / ".own.tmp", tmp_path / "plain.tmp"]
    for path in others:
        path.touch()
    assert len(list(tmp_path.glob(".figure*.tmp"))) == 1
    with lock_folder(tmp_path, ".lock-2"):
        assert len(list(tmp_path.glob(".figure*.tmp"))) == 1
    with lock_folder(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == sorted([*others, tmp_path / "below"])


@posix
def test_a_lock_that_is_held_is_respected_whatever_it_says(tmp_path: Path) -> None:
    # As between containers, where the holder's number means another process, or none.
    with lock_folder(tmp_path):
        (tmp_path / ".lock").write_text(f"999999999 {HOST} 5\n")
        with pytest.raises(InUseError), lock_folder(tmp_path):
            pass


@posix
def test_a_number_that_was_given_out_again_is_not_the_holder(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(f"{os.getpid()} {HOST} 1\n")
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text().split()[2] != "1"


@posix
def test_a_holder_that_ended_and_was_not_waited_for_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
    (tmp_path / ".lock").write_text(f"{process.pid} {HOST}\n")
    with lock_folder(tmp_path):
        pass
    process.wait()


def test_a_lock_of_another_host_counts_as_long_as_it_is_renewed(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("17 elsewhere 12345\n")
    with pytest.raises(InUseError, match="process 17 on elsewhere"), lock_folder(tmp_path):
        pass
    assert lock.read_text() == "17 elsewhere 12345\n"
    past = lock.stat().st_mtime - 1000
    os.utime(lock, (past, past))
    with lock_folder(tmp_path):
        assert HOST in lock.read_text()


def test_a_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = threading.Event()
    monkeypatch.setattr(atomic, "_RENEWAL", 0.01)
    monkeypatch.setattr(os, "utime", lambda _path: renewed.set())
    with lock_folder(tmp_path):
        assert renewed.wait(60)


@posix
def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"), lock_folder(tmp_path / "folder"):
        pass
    assert target.read_text() == ""


@posix
def test_a_lock_that_its_holder_deletes_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = atomic._try_lock
    deleted: list[Path] = []

    def hold_late(stream: TextIO) -> bool:
        if not deleted:
            deleted.append(tmp_path / ".lock")
            deleted[0].unlink()  # as its holder does, between our opening and our holding it
        return hold(stream)

    monkeypatch.setattr(atomic, "_try_lock", hold_late)
    with lock_folder(tmp_path):
        assert deleted[0].exists()
        with pytest.raises(InUseError), lock_folder(tmp_path):
            pass


@posix
def test_of_many_that_race_for_a_lock_one_at_a_time_has_it(tmp_path: Path) -> None:
    script = tmp_path / "racer.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            from pathlib import Path
            from lora_analysis.errors import InUseError
            from lora_analysis.storage.atomic import lock_folder
            folder = Path(sys.argv[1])
            won = 0
            while won < 100:
                try:
                    with lock_folder(folder):
                        alone = folder / "alone"
                        os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
                        alone.unlink()
                        won += 1
                except InUseError:
                    pass
            """
        )
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    racers = [subprocess.Popen([sys.executable, script, folder]) for _ in range(3)]
    assert [racer.wait(timeout=120) for racer in racers] == [0, 0, 0]


def _hold_until_killed(folder: Path, ready: object) -> None:
    with lock_folder(folder):
        ready.set()
        signal.pause()


@posix
def test_a_killed_holders_lock_is_taken_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold_until_killed, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InUseError, match=f"process {process.pid}"), lock_folder(tmp_path):
        pass
    process.kill()
    process.join()
    assert (tmp_path / ".lock").exists()
    with lock_folder(tmp_path):
        pass
