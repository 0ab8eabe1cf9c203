"""Atomic writes, JSON documents and the bundled data."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import BinaryIO

import pytest

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.storage import source_names
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.documents import (
    parse_json,
    parse_json_text,
    read_json_object,
    read_toml,
)
from lora_analysis.storage.safetensors import read_header
from lora_analysis.storage.source_names import bundled_data


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
    monkeypatch.setattr(source_names, "_PACKAGE", package)
    with pytest.raises(SourceError, match="No bundled data named 'base'"):
        bundled_data("base")
    (tmp_path / "data" / "base").mkdir(parents=True)
    assert bundled_data("base") == tmp_path / "data" / "base"
    (package / "data" / "base").mkdir(parents=True)
    assert bundled_data("base") == package / "data" / "base"


DEEP = 30_000


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * DEEP + " = 1",
        "a" + '."a"' * DEEP + " = 1",
        "[a" + " . a" * DEEP + "]",
        "[[a" + ".'a'" * DEEP + "]]",
        "a = {" + "b" + ".b" * DEEP + " = 1}",
        "a = " + "[" * DEEP + "]" * DEEP,
        "a = " + "[\n" * DEEP,
        "a = " + "{b = " * DEEP + "1" + "}" * DEEP,
    ],
)
def test_deep_toml_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("tomllib.loads", None)
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(MalformedFileError, match=r"sweep.toml is not TOML: line \d+ nests more"):
        read_toml(path)


def test_toml_of_any_length_and_little_depth_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    lines = [f"[a.b.c{n}]\nx.y = [1.5, 2.5]\nz = '{'.' * 99}'\n# {'[' * 99}\n" for n in range(50)]
    text = "".join(lines) + 'w = """' + "[.\n" * 99 + '"""\nv = "' + '\\"[' * 99 + '"\n'
    path.write_text(text)
    assert read_toml(path) == tomllib.loads(text)
    path.write_text("a = 1\n" * 60_000)
    with pytest.raises(MalformedFileError, match=r"360,000 bytes are too many"):
        read_toml(path)


@pytest.mark.parametrize("depth", [65, 500, 900, DEEP])
@pytest.mark.parametrize("pair", [("[", "]"), ('{"a": ', "}")])
def test_deep_json_is_refused_wherever_it_stands(
    tmp_path: Path, depth: int, pair: tuple[str, str]
) -> None:
    inner = pair[0] * depth + "1" + pair[1] * depth
    path = tmp_path / "config.json"
    path.write_text(f'{{"a": {inner}}}')
    with pytest.raises(MalformedFileError, match=r"config.json: the file .*nests too deeply"):
        read_json_object(path)
    with pytest.raises(MalformedFileError, match=r"metadata 'x' .*nests too deeply"):
        parse_json_text(f'{{"a": {inner}}}', path, what="metadata 'x'")
    with pytest.raises(ValueError, match="nests too deeply"):
        parse_json(inner)
    raw = f'{{"a": {inner}}}'.encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(MalformedFileError, match=r"x.safetensors: .*nests too deeply"):
        read_header(file)


def test_json_as_deep_as_configurations_are_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": ' + "[" * 60 + "]" * 60 + "}")
    assert list(read_json_object(path)) == ["a"]
