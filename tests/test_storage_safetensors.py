"""The header parser and the tensor reads, against the safetensors library and torch."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save
from safetensors.torch import save_file as save_torch

from lora_analysis.errors import (
    InputError,
    MalformedFileError,
    SourceError,
    UnknownFormatError,
)
from lora_analysis.storage.limits import MAX_HEADER_BYTES
from lora_analysis.storage.safetensors import read_header
from lora_analysis.storage.tensor_reader import iter_blocks, read_tensor
from lora_analysis.storage.tensors import open_tensors

STORED = [np.float32, np.float64, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, bool]


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header: an object is written as JSON, bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.slow
@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.sampled_from(STORED).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
        ),
        min_size=1,
        max_size=5,
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
def test_what_the_safetensors_library_writes_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    arrays: dict[str, np.ndarray],
    metadata: dict[str, str] | None,
) -> None:
    path = tmp_path_factory.mktemp("round") / "file.safetensors"
    path.write_bytes(save(arrays, metadata=metadata))
    header = read_header(path)
    assert dict(header.metadata) == (metadata or {})
    assert set(header.tensors) == set(arrays)
    for name, array in arrays.items():
        read = read_tensor(path, header.tensors[name])
        wanted = array.astype(np.float32) if array.dtype == np.float16 else array
        assert read.shape == array.shape
        assert read.dtype == wanted.dtype
        np.testing.assert_array_equal(read, wanted)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_bit_pattern_of_a_narrow_float_is_upcast_exactly(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    if dtype.itemsize == 1:
        bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    tensor = bits.view(dtype).reshape(16, -1)
    save_torch({"all": tensor}, tmp_path / "f.safetensors")
    info = read_header(tmp_path / "f.safetensors").tensors["all"]
    wanted = tensor.float().numpy()
    assert info.dtype == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(read_tensor(tmp_path / "f.safetensors", info), wanted)
    for rows, columns, tile in iter_blocks(tmp_path / "f.safetensors", info, elements=700):
        np.testing.assert_array_equal(tile, wanted[rows, columns])


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("last", [0x7BFF, 0x7C00, 0x7FFF])
def test_halves_are_widened_exactly_in_either_way(tmp_path: Path, last: int, flushed: bool) -> None:
    # Up to 0x7BFF all are finite. What a processor that flushes subnormals would make of the first
    # thousand is zero; another library in the process may have told it to.
    bits = np.concatenate([np.arange(0x7C00), [last], np.arange(0x8000, 0xFC00)]).astype(np.uint16)
    wanted = bits.view(np.float16).astype(np.float32)
    (tmp_path / "f.safetensors").write_bytes(save({"all": bits.view(np.float16)}))
    info = read_header(tmp_path / "f.safetensors").tensors["all"]
    was = torch.set_flush_denormal(flushed)
    try:
        read = read_tensor(tmp_path / "f.safetensors", info)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(read.view(np.uint32), wanted.view(np.uint32))
    assert was  # the machine can be told at all


@given(
    m=st.integers(0, 12),
    n=st.integers(0, 12),
    elements=st.integers(1, 40),
    dtype=st.sampled_from([np.float32, np.float64, np.float16]),
)
def test_blocks_cover_a_matrix_once_in_tiles_of_bounded_size(
    tmp_path_factory: pytest.TempPathFactory, m: int, n: int, elements: int, dtype: type
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "file.safetensors"
    matrix = np.arange(m * n, dtype=dtype).reshape(m, n)
    path.write_bytes(save({"before": np.ones(3, np.float32), "matrix": matrix}))
    seen = np.zeros((m, n), dtype=int)
    whole = np.zeros((m, n), dtype=np.float32)
    for rows, columns, tile in iter_blocks(
        path, read_header(path).tensors["matrix"], elements=elements
    ):
        assert tile.size <= elements
        assert tile.dtype == np.float32
        whole[rows, columns] = tile
        seen[rows, columns] += 1
    assert (seen == 1).all()
    np.testing.assert_array_equal(whole, matrix)


def test_blocks_reuse_one_buffer(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(save({"w": rng.standard_normal((10, 4)).astype(np.float32)}))
    tiles = [tile for *_, tile in iter_blocks(path, read_header(path).tensors["w"], elements=8)]
    assert len(tiles) == 5
    assert all(np.shares_memory(tiles[0], tile) for tile in tiles)


def is_open(path: Path) -> bool:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return any(link.resolve() == path.resolve() for link in links)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files cannot be listed")
def test_blocks_close_the_file_also_when_they_are_abandoned(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(save({"w": np.ones((10, 4), np.float32)}))
    blocks = iter_blocks(path, read_header(path).tensors["w"], elements=8)
    next(blocks)
    assert is_open(path)
    blocks.close()
    assert not is_open(path)


GOOD = entry("F32", [2, 2], 0, 16)

MALFORMED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda p: p.write_bytes(b""), ["0 bytes"]),
    "three bytes": (lambda p: p.write_bytes(b"abc"), ["3 bytes"]),
    "header longer than the file": (
        lambda p: p.write_bytes((100).to_bytes(8, "little") + b"{}"),
        ["claims 100 bytes", "10 in all"],
    ),
    "header beyond the limit": (
        lambda p: p.write_bytes((2**63).to_bytes(8, "little") + b"{}"),
        [f"limit {MAX_HEADER_BYTES:,}"],
    ),
    "not UTF-8": (lambda p: raw_file(p, b'{"a\xff": 1}'), ["not UTF-8", "byte 3"]),
    "not JSON": (lambda p: raw_file(p, b"{]"), ["not valid JSON"]),
    "a list": (lambda p: raw_file(p, []), ["JSON object", "list"]),
    "deep JSON": (lambda p: raw_file(p, b'{"a":' * 100_000), ["too deeply"]),
    "5000 digits": (lambda p: raw_file(p, b'{"a":' + b"9" * 5000 + b"}"), ["not valid JSON"]),
    "NaN": (lambda p: raw_file(p, b'{"a": NaN}'), ["NaN is not JSON"]),
    "duplicate names": (
        lambda p: raw_file(
            p, b'{"w": %s, "w": %s}' % ((json.dumps(GOOD).encode(),) * 2), bytes(16)
        ),
        ["'w' appears twice"],
    ),
    "metadata of a number": (
        lambda p: raw_file(p, {"__metadata__": {"format": 1}}),
        ["__metadata__", "strings"],
    ),
    "an entry that is no object": (lambda p: raw_file(p, {"w": 3}), ["'w'", "unknown type None"]),
    "unknown type": (
        lambda p: raw_file(p, {"w": entry("F33", [2, 2], 0, 16)}, bytes(16)),
        ["'w'", "'F33'"],
    ),
    "negative dimension": (
        lambda p: raw_file(p, {"w": entry("F32", [-2, -2], 0, 16)}, bytes(16)),
        ["'w'", "shape", "[-2, -2]"],
    ),
    "a dimension that is true": (
        lambda p: raw_file(p, {"w": entry("F32", [True, 4], 0, 16)}, bytes(16)),
        ["'w'", "shape"],
    ),
    "a thousand dimensions": (
        lambda p: raw_file(p, {"w": entry("F32", [1] * 1000, 0, 4)}, bytes(4)),
        ["'w'", "shape"],
    ),
    "shape overflow": (
        lambda p: raw_file(p, {"w": entry("F32", [2**62, 2**62], 0, 0)}),
        ["'w'", "offsets give 0"],
    ),
    "a dimension beyond 64 bits": (
        lambda p: raw_file(p, {"w": entry("F32", [10**30], 0, 0)}),
        ["'w'", "shape"],
    ),
    "shape larger than its bytes": (
        lambda p: raw_file(p, {"w": entry("F32", [3, 2], 0, 16)}, bytes(16)),
        ["'w'", "(3, 2)", "needs 24 bytes", "give 16"],
    ),
    "half a byte": (
        lambda p: raw_file(p, {"w": entry("F4", [3], 0, 1)}, bytes(1)),
        ["'w'", "needs 2 bytes"],
    ),
    "offsets backwards": (
        lambda p: raw_file(p, {"w": entry("F32", [2, 2], 16, 0)}, bytes(16)),
        ["'w'", "data_offsets", "[16, 0]"],
    ),
    "three offsets": (
        lambda p: raw_file(p, {"w": GOOD | {"data_offsets": [0, 16, 16]}}, bytes(16)),
        ["'w'", "data_offsets"],
    ),
    "overlap": (
        lambda p: raw_file(p, {"a": GOOD, "b": entry("F32", [2, 2], 8, 24)}, bytes(24)),
        ["'b' overlaps 'a' by 8 bytes"],
    ),
    "hole": (
        lambda p: raw_file(p, {"a": GOOD, "b": entry("F32", [2, 2], 20, 36)}, bytes(36)),
        ["'b' leaves a hole after 'a' by 4 bytes"],
    ),
    "hole at the start": (
        lambda p: raw_file(p, {"b": entry("F32", [2, 2], 4, 20)}, bytes(20)),
        ["'b' leaves a hole after 'the header' by 4 bytes"],
    ),
    "short data": (lambda p: raw_file(p, {"w": GOOD}, bytes(15)), ["cut short"]),
    "trailing bytes": (lambda p: raw_file(p, {"w": GOOD}, bytes(17)), ["trailing"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_damaged_header_is_refused_with_file_tensor_and_reason(tmp_path: Path, case: str) -> None:
    make, told = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(MalformedFileError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    for part in told:
        assert part in str(caught.value)


@given(cut=st.integers(0, 10_000), flip=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_mutated_file_is_read_or_refused_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, bit: int
) -> None:
    whole = bytearray(
        save({f"layers.{i}.w": np.ones((3, 2), np.float16) for i in range(4)}, {"format": "pt"})
    )
    whole[flip % len(whole)] ^= 1 << bit
    path = tmp_path_factory.mktemp("mutated") / "file.safetensors"
    path.write_bytes(whole[: max(len(whole) - cut % 97, 0)])
    try:
        tensors = open_tensors(path)
        for name in tensors.infos:
            assert tensors.read(name).size == math.prod(tensors.infos[name].shape)
    except InputError:
        pass


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(save({"w": np.ones((10, 4), np.float32)}))
    info = read_header(path).tensors["w"]
    os.truncate(path, 100)
    with pytest.raises(MalformedFileError, match="'w' ends at byte"):
        read_tensor(path, info)
    with pytest.raises(MalformedFileError, match="'w' ends at byte"):
        next(iter_blocks(path, info))


def test_a_type_without_plain_numbers_is_listed_and_not_read(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "f.safetensors", {"w": entry("F4", [2, 4], 0, 4)}, bytes(4))
    info = read_header(path).tensors["w"]
    assert info.dtype == "float4_e2m1"
    with pytest.raises(UnknownFormatError, match="'w' is stored as float4_e2m1"):
        read_tensor(path, info)
    with pytest.raises(UnknownFormatError, match="'w' is stored as float4_e2m1"):
        next(iter_blocks(path, info))


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in the file system")
def test_a_pipe_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(SourceError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.safetensors does not exist"):
        read_header(tmp_path / "gone.safetensors")


def test_shards_are_read_through_their_index(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {name: rng.standard_normal((3, 2)).astype(np.float32) for name in "abc"}
    (tmp_path / "m-1.safetensors").write_bytes(save({"a": arrays["a"], "b": arrays["b"]}))
    (tmp_path / "m-2.safetensors").write_bytes(save({"c": arrays["c"]}, {"format": "pt"}))
    places = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": places}))
    tensors = open_tensors(index)
    assert [file.name for file in tensors.files] == ["m-1.safetensors", "m-2.safetensors"]
    assert tensors.metadata == {"format": "pt"}
    assert tensors.file_of("c").name == "m-2.safetensors"
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors.read(name), array)


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"a": 3}}, "gives 3"),
        ({"weight_map": {"a": "../m.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "/etc/m.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "sub/../../m.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "C:\\m.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "..\\m.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "m.bin"}}, "own folder"),
        ({"weight_map": {"a": "m.safetensors", "z": "m.safetensors"}}, "'z'"),
        ({"weight_map": {"a": "missing.safetensors"}}, "does not exist"),
    ],
)
def test_an_index_that_misleads_is_refused(tmp_path: Path, document: object, told: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(save({"a": np.ones(2, np.float32)}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        open_tensors(index)
    assert told in str(caught.value)
    assert "safetensors" in str(caught.value)


@pytest.mark.real
def test_real_files_read_as_the_safetensors_library_reads_them(real_adapters: Path) -> None:
    from safetensors.numpy import load_file

    files = sorted(real_adapters.rglob("*.safetensors"))
    assert len(files) >= 12
    for path in files:
        tensors, wanted = open_tensors(path), load_file(path)
        assert set(tensors.infos) == set(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(tensors.read(name), array)
