"""Atomic writes, JSON documents and the bundled data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.storage import bundled
from lora_analysis.storage.atomic import write_atomic, write_together
from lora_analysis.storage.bundled import bundled_data
from lora_analysis.storage.documents import read_json_object


def test_bytes_and_writers_give_the_file_its_new_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert write_atomic(path, b"one") == path
    assert path.read_bytes() == b"one"
    write_atomic(path, lambda stream: stream.writelines([b"t", b"wo"]))
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(stream: BinaryIO) -> None:
        stream.write(b"half")
        message = "the disk is full"
        raise OSError(message)

    with pytest.raises(OSError, match="disk is full"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no umask")
def test_a_written_file_has_the_mode_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b'{"r": 1, "r": 2}', "'r' appears twice"),
        (b'{"a": {"r": 1, "r": 2}}', "'r' appears twice"),
        (b'{"r": "\xff"}', "not UTF-8"),
        (b'{"r": ' + b"[" * 100_000, "too deeply"),
        (b" " * (2**20 + 1), "1,048,577 bytes"),
    ],
)
def test_a_bad_document_is_refused_with_its_path(tmp_path: Path, raw: bytes, told: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(raw)
    with pytest.raises(MalformedFileError) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_a_model_config_may_hold_infinity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json_object(tmp_path / "config.json")["time_step_limit"][1] == float("inf")


def test_bundled_data_is_found_in_a_package_and_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lora_analysis"
    monkeypatch.setattr(bundled, "_PACKAGE", package)
    with pytest.raises(SourceError, match="No bundled data named 'base'"):
        bundled_data("base")
    (tmp_path / "data" / "base").mkdir(parents=True)
    assert bundled_data("base") == tmp_path / "data" / "base"
    (package / "data" / "base").mkdir(parents=True)
    assert bundled_data("base") == package / "data" / "base"


# Kills itself after each system call in turn that can change the folder, and reports what is left.
_KILLED = """
import json, os, sys
from pathlib import Path
from lora_analysis.storage.atomic import write_together

folder = Path(sys.argv[1])
names = ["weights", "config"]
states = []
for point in range(100):
    for name in names:
        (folder / name).write_bytes(b"old")
    child = os.fork()
    if child == 0:
        left = [point]
        def counted(function):
            def call(*arguments, **options):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return function(*arguments, **options)
            return call
        for owner, name in ((os, "open"), (os, "fsync"), (Path, "replace"), (Path, "unlink")):
            setattr(owner, name, counted(getattr(owner, name)))
        write_together({folder / name: b"new" for name in names})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = {n: (folder / n).read_text() if (folder / n).exists() else None for n in names}
    states.append([code, found["weights"], found["config"]])
    if code == 0:
        break
print(json.dumps(states))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_no_old_file_lies_beside_a_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    states = json.loads(done.stdout)
    assert len(states) > 8
    assert states[-1] == [0, "new", "new"]
    whole = {("old", "old"), ("old", None), ("new", None), ("new", "new")}
    assert {(weights, config) for _, weights, config in states} <= whole


def test_a_disk_that_fills_up_leaves_both_old_files(tmp_path: Path) -> None:
    def fail(stream: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    for name in ("weights", "config"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_together({tmp_path / "weights": b"new", tmp_path / "config": fail})
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {
        "weights": b"old",
        "config": b"old",
    }
