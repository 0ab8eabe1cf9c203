"""Files that are not what their name promises are named for what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_analysis.errors import InputError
from lora_analysis.formats import read_adapter

STARTS = {
    "HTML page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title>",
    "an HTML page": b"\n  <html lang='en'>",
    "XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "pointer of Xet": b"# xet version 0\nfilesize = 12\nhash = '00'\n",
    "message of a server": b"Entry not found",
    "JSON error message": b'{"error":"Repository not found"}',
    "plain text.*'hello there'": b"hello there\nthis is a note",
    "gzip": b"\x1f\x8b\x08" + bytes(32),
}


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "gemma.lora.h5", "adapter_model.bin"]
)
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_what_is_no_file_of_tensors_is_named(
    tmp_path: Path, kind: str, name: str, allow_pickle: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(STARTS[kind])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(InputError, match=kind) as caught:
        read_adapter(path, allow_pickle=allow_pickle)
    assert str(path) in str(caught.value)


def test_a_page_in_place_of_a_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(STARTS["HTML page"])
    with pytest.raises(InputError, match=r"adapter_config\.json: the file is an HTML page"):
        read_adapter(tmp_path)


def test_a_folder_that_holds_kerass_hdf5_alone_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "gemma.lora.h5").write_bytes(STARTS["HDF5"])
    with pytest.raises(InputError, match=r"gemma\.lora\.h5: this is an HDF5 file.*h5py"):
        read_adapter(tmp_path)
