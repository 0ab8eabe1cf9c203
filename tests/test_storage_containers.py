"""Torch files and numpy archives: the same tensors as their own libraries read, and no more."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from lora_analysis.errors import (
    InputError,
    MalformedFileError,
    UnknownFormatError,
    UnsupportedMethodError,
)
from lora_analysis.storage.tensors import open_tensors
from lora_analysis.storage.torch_files import read_pickle

FORMATS = pytest.mark.parametrize("zipped", [True, False])


def saved(path: Path, content: Any, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "f32": base,
        "f64": base.double(),
        "f16": base.half(),
        "bf16": base.bfloat16(),
        "i64": torch.arange(5),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "rows of a larger one": base[2:4],
        "every second column": base[:, ::2],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "one row": base[:1],
    }


@FORMATS
def test_a_torch_file_reads_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    content = tensors_of_all_kinds()
    path = saved(tmp_path / "t.bin", content, zipped=zipped)
    wanted = torch.load(path, weights_only=True, map_location="cpu")
    tensors = open_tensors(path, allow_pickle=True)
    assert list(tensors.infos) == list(content)
    assert tensors.files == (path,)
    for name, tensor in wanted.items():
        found = tensors.read(name)
        assert tensors.infos[name].shape == found.shape == tuple(tensor.shape)
        exact = tensor.detach().float() if tensor.is_floating_point() else tensor
        exact = tensor if tensor.dtype == torch.float64 else exact
        np.testing.assert_array_equal(found, exact.numpy())
        if tensor.ndim == 2 and tensor.numel():
            whole = np.zeros(tensor.shape, np.float32)
            for rows, columns, tile in tensors.blocks(name, elements=7):
                whole[rows, columns] = tile
            np.testing.assert_array_equal(whole, tensor.detach().float().numpy())
    assert tensors.infos["bf16"].dtype == "bfloat16"


def test_types_without_a_storage_class_read_too(tmp_path: Path) -> None:
    values = torch.randn(4, 3).to(torch.float8_e4m3fn)
    path = saved(tmp_path / "t.pt", {"w": values})
    tensors = open_tensors(path, allow_pickle=True)
    np.testing.assert_array_equal(tensors.read("w"), values.float().numpy())


@FORMATS
def test_nested_dictionaries_and_lists_are_flattened_or_entered(
    tmp_path: Path, zipped: bool
) -> None:
    a, b = torch.ones(2, 2), torch.zeros(3)
    state = OrderedDict([("q.lora_A", a)])
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    content = {"model": state, "list": [b, (a, b)], "alpha": 16.0, "note": "x", "none": None}
    path = saved(tmp_path / "t.pt", content, zipped=zipped)
    stored = read_pickle(path, allow_pickle=True)
    assert list(stored.header().tensors) == ["model.q.lora_A", "list.0", "list.1.0", "list.1.1"]
    assert list(stored.header("model").tensors) == ["q.lora_A"]
    assert stored.content["alpha"] == 16.0
    with pytest.raises(MalformedFileError, match=r"holds no 'module\.q'"):
        stored.header("module", "q")


@FORMATS
def test_a_pickle_is_read_only_when_it_is_allowed(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "t.bin", {"w": torch.ones(2)}, zipped=zipped)
    with pytest.raises(UnknownFormatError, match=r"allow_pickle=True.*--allow-pickle"):
        open_tensors(path)


class Runs:
    """Its pickle asks for a function to be called when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@FORMATS
def test_what_a_pickle_names_is_never_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "ran"
    path = saved(tmp_path / "t.bin", {"w": torch.ones(2), "x": Runs(marker)}, zipped=zipped)
    with pytest.raises(UnsupportedMethodError, match=r"getattr.*could run code"):
        open_tensors(path, allow_pickle=True)
    assert not marker.exists()


def archive(path: Path, content: bytes, data: bytes = b"", *, kind: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", kind) as out:
        out.writestr("t/data.pkl", content)
        out.writestr("t/byteorder", b"little")
        out.writestr("t/data/0", data)
    return path


def described(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    count: int,
    offset: int = 0,
    key: str = "0",
) -> bytes:
    """The pickle of one float32 tensor with any numbers in it."""

    class Described(pickle._Pickler):  # type: ignore[misc,name-defined,unused-ignore]
        def persistent_id(self, one: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if one is stored else None

    class Tensor:
        def __reduce__(self) -> Any:
            hooks: OrderedDict[Any, Any] = OrderedDict()
            rebuild = torch._utils._rebuild_tensor_v2
            return rebuild, (stored, offset, shape, strides, False, hooks)

    stored = object()
    out = io.BytesIO()
    Described(out, 2).dump({"w": Tensor()})
    return out.getvalue()


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (described((10**6, 10**6), (10**6, 1), count=10**12), "claims 1,000,000,000,000"),
        (described((10**6, 10**6), (0, 0), count=1), "larger than what the file holds"),
        (described((2, 2), (2, 1), count=4, offset=1), "larger than what"),
        (described((2, 2), (3, 1), count=4), "larger than what"),
        (described((2, 2), (2, 1), count=4, key="9"), "claims 4 numbers"),
        (described((2, 2), (2, 1), count=-4), "claims -4 numbers"),
        (described((2, -2), (2, 1), count=4), "damaged"),
        (described((2,) * 70, (0,) * 70, count=4), "damaged"),
        (described((2, 2), (2,), count=4), "damaged"),
        (b"\x80\x02}X\xff\xff\xff\x7f", "damaged"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system"),
        (b"\x80\x02" + b"]" * 5 + b"a" * 9 + b".", "damaged"),
        (b"", "damaged"),
    ],
)
def test_a_pickle_that_lies_is_refused_before_memory_is_reserved(
    tmp_path: Path, made: bytes, told: str
) -> None:
    path = archive(tmp_path / "t.pt", made, np.ones(4, np.float32).tobytes())
    with pytest.raises(InputError) as caught:
        open_tensors(path, allow_pickle=True)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    content = described((2, 2), (2, 1), count=4)
    path = archive(tmp_path / "t.pt", content, bytes(16), kind=zipfile.ZIP_DEFLATED)
    with pytest.raises(MalformedFileError, match=r"data\.pkl' is compressed"):
        open_tensors(path, allow_pickle=True)
    np.savez_compressed(tmp_path / "a.npz", w=np.ones((3, 3)))
    with pytest.raises(MalformedFileError, match=r"w\.npy' is compressed"):
        open_tensors(tmp_path / "a.npz")


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    for zipped in (True, False):
        whole = saved(tmp_path / "t.pt", tensors_of_all_kinds(), zipped=zipped).read_bytes()
        for length in (3, 40, len(whole) // 2, len(whole) - 1):
            (tmp_path / "t.pt").write_bytes(whole[:length])
            with pytest.raises(InputError):
                open_tensors(tmp_path / "t.pt", allow_pickle=True)


@pytest.mark.slow
def test_dictionaries_inside_dictionaries_end_somewhere(tmp_path: Path) -> None:
    deep: Any = torch.ones(1)
    for _ in range(20):
        deep = {"x": deep}
    with pytest.raises(MalformedFileError, match="nested too deeply"):
        open_tensors(saved(tmp_path / "t.pt", deep), allow_pickle=True)
    ring: dict[str, Any] = {}
    ring["ring"] = ring
    with pytest.raises(MalformedFileError, match="nested too deeply"):
        open_tensors(saved(tmp_path / "r.pt", ring), allow_pickle=True)
    wide: Any = {"w": torch.ones(1)}
    for _ in range(7):  # 30^7 ways lead to one tensor
        wide = dict.fromkeys(map(str, range(30)), wide)
    with pytest.raises(MalformedFileError, match=r"too much|are called"):
        open_tensors(saved(tmp_path / "w.pt", wide), allow_pickle=True)


def test_an_archive_of_numpy_reads_as_numpy_reads_it(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    arrays = {
        "a.lora_a": rng.standard_normal((6, 4)).astype(np.float32),
        "half": rng.standard_normal((2, 3)).astype(np.float16),
        "by columns": np.asfortranarray(rng.standard_normal((3, 4, 2))),
        "scalar": np.array(2.0),
        "counts": np.arange(3),
    }
    np.savez(tmp_path / "adapters.npz", **arrays)
    tensors = open_tensors(tmp_path / "adapters.npz")
    assert set(tensors.infos) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors.read(name), array)
        assert tensors.infos[name].dtype == array.dtype.name


def test_an_archive_of_objects_or_of_a_wrong_size_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", w=np.array([{}], dtype=object))
    with pytest.raises(MalformedFileError, match="not plain little-endian numbers"):
        open_tensors(tmp_path / "o.npz")
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    with zipfile.ZipFile(tmp_path / "l.npz", "w") as out:
        out.writestr("w.npy", member.getvalue())
    with pytest.raises(MalformedFileError, match=r"\(1000000, 1000000\)"):
        open_tensors(tmp_path / "l.npz")


def test_reading_a_torch_file_needs_no_torch(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.bin", {"w": torch.ones(2, 2)})
    code = (
        "import sys; from pathlib import Path\n"
        "from lora_analysis.storage.tensors import open_tensors\n"
        f"open_tensors(Path({str(path)!r}), allow_pickle=True).read('w')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("header", [640, 896, 1152, 1408, 65536 + 640])
def test_a_safetensors_header_of_unlucky_length_is_no_pickle(tmp_path: Path, header: int) -> None:
    # The count of header bytes then begins with 0x80 and a small number, as a pickle does.
    tensors = {"a": np.ones(2, np.float32)}
    path = tmp_path / "f.safetensors"
    path.write_bytes(save(tensors, {"note": " " * (header - 88)}))
    assert int.from_bytes(path.read_bytes()[:8], "little") == header
    assert list(open_tensors(path).infos) == ["a"]
