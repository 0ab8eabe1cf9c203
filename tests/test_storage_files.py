"""Atomic writes, JSON documents and the bundled data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.storage import bundled
from lora_analysis.storage.atomic import write_atomic
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
