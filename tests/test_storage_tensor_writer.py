"""Files of tensors written tensor by tensor: the library's bytes, little memory."""

from __future__ import annotations

import io
import json
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from safetensors.torch import save as save_torch

from lora_analysis import read_adapter, write_adapter
from lora_analysis.adapter import Adapter, LazyUpdate, LowRankUpdate, UpdateOutline
from lora_analysis.edit import resize_adapter
from lora_analysis.errors import InputError
from lora_analysis.formats.registry import WRITERS
from lora_analysis.storage.gguf import read_gguf
from lora_analysis.storage.records import KEY, is_marked
from lora_analysis.storage.safetensors import read_header
from lora_analysis.storage.tensor_writer import (
    OutputTensor,
    output_array,
    output_group,
    safetensors_content,
    write_gguf,
    write_safetensors,
)

TYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
GGUF = {"architecture": "llama", "heads": (4, 4)}


def written(tensors: list[OutputTensor], metadata: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    write_safetensors(stream, tensors, metadata)
    return stream.getvalue()


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_safetensors_are_the_librarys_bytes(described: dict[str, tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, size=shape).astype(kind)
        for name, (kind, shape) in described.items()
    }
    ours = written([output_array(name, array) for name, array in arrays.items()], {"format": "pt"})
    assert ours == save(arrays, metadata={"format": "pt"})


def test_types_that_numpy_lacks_are_given_as_their_bits() -> None:
    tensors, ours = {}, []
    for name, kind, bits in (
        ("bfloat16", torch.bfloat16, torch.uint16),
        ("float8_e4m3fn", torch.float8_e4m3fn, torch.uint8),
        ("float8_e5m2", torch.float8_e5m2, torch.uint8),
    ):
        tensors[name] = torch.randn(3, 4).to(kind)
        array = tensors[name].view(bits).numpy()
        ours.append(OutputTensor(name, name, (3, 4), lambda array=array: array))  # type: ignore[misc]
    assert written(ours, {"format": "pt"}) == save_torch(tensors, metadata={"format": "pt"})


def test_order_says_nothing_and_metadata_are_sorted(rng: np.random.Generator) -> None:
    tensors = [output_array(name, rng.standard_normal(3)) for name in "cab"]
    ours = written(tensors, {"b": "2", "a": "1"})
    assert ours == written(tensors[::-1], {"a": "1", "b": "2"})
    header = json.loads(ours[8 : 8 + int.from_bytes(ours[:8], "little")])
    assert list(header) == ["__metadata__", "a", "b", "c"]
    assert list(header["__metadata__"]) == ["a", "b"]


def test_each_tensor_is_computed_once_and_gone_before_the_next() -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    calls: list[str] = []

    def produce(name: str) -> np.ndarray:
        assert all(reference() is None for reference in alive)
        calls.append(name)
        array = np.full(4, 1.0)
        alive.append(weakref.ref(array))
        return array

    def outputs() -> Iterator[OutputTensor]:
        for name in ("b", "a", "c"):
            yield OutputTensor(name, "float64", (4,), lambda name=name: produce(name))  # type: ignore[misc]

    content = safetensors_content(outputs(), {})
    assert not calls
    assert callable(content)
    content(io.BytesIO())
    assert calls == ["a", "b", "c"]


def test_a_group_is_computed_once_for_all_of_its_tensors() -> None:
    count = 0

    def produce() -> dict[str, np.ndarray]:
        nonlocal count
        count += 1
        return {"a": np.zeros(2, np.float32), "b": np.ones((1, 2), np.float32)}

    group = output_group({"a": (2,), "b": (1, 2)}, produce)
    for _ in range(2):  # a content may be written a second time
        np.testing.assert_array_equal(load(written(group, {}))["b"], [[1, 1]])
    assert count == 2


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([("a", "float32", (2, 2), np.zeros((2, 3), np.float32))], r"\(2, 2\) and is float32"),
        ([("a", "float32", (2,), np.zeros(2))], "float32 .* and is float64"),
        ([("a", "float32", (1,), np.zeros(1, np.float32))] * 2, "both be stored as 'a'"),
        ([("a", "float6", (1,), np.zeros(1, np.float32))], "float6, which is not written"),
        ([("\ud800", "float32", (1,), np.zeros(1, np.float32))], "no text"),
    ],
)
def test_what_was_not_announced_or_has_no_place_is_refused(
    tensors: list[tuple[str, str, tuple[int, ...], np.ndarray]], expected: str
) -> None:
    outputs = [
        OutputTensor(name, kind, shape, lambda array=array: array)  # type: ignore[misc]
        for name, kind, shape, array in tensors
    ]
    with pytest.raises(InputError, match=expected):
        written(outputs, {})


def test_gguf_is_what_its_own_package_reads(tmp_path: Path, rng: np.random.Generator) -> None:
    gguf = pytest.importorskip("gguf")
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "c": np.arange(7, dtype=np.int32),
    }
    bits = torch.randn(3, 4).to(torch.bfloat16)
    outputs = [output_array(name, array) for name, array in arrays.items()]
    outputs.append(OutputTensor("d", "bfloat16", (3, 4), lambda: bits.view(torch.uint16).numpy()))
    fields: dict[str, str | int | float] = {"general.architecture": "llama", "n": 3, "x": 0.5}
    path = tmp_path / "a.gguf"
    with path.open("wb") as stream:
        write_gguf(stream, outputs, fields | {"s": "text"})
    reader = gguf.GGUFReader(path)
    assert [reader.get_field(key).contents() for key in ("n", "x", "s")] == [3, 0.5, "text"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(tensors[name].data).reshape(array.shape), array)
    values = gguf.dequantize(tensors["d"].data, tensors["d"].tensor_type)
    np.testing.assert_array_equal(values, bits.float().numpy())
    assert read_gguf(path).tensors["b"].shape == (2, 3, 4)


# --- marks ------------------------------------------------------------------------------------


def test_every_file_of_tensors_that_is_written_is_marked(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    made = attention(rng)
    for kind in WRITERS:
        write_adapter(made, tmp_path / kind, format=kind, **(GGUF if kind == "gguf" else {}))
        files = [path for path in (tmp_path / kind).glob("[!.]*") if path.suffix != ".json"]
        assert len(files) == 1
        assert is_marked(files[0]), kind
    strange = tmp_path / "strange.safetensors"
    strange.write_bytes(save({"a": np.zeros(3, np.float32)}, metadata={"format": "pt"}))
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    for path in (strange, empty, tmp_path, tmp_path / "none"):
        assert not is_marked(path)


@pytest.mark.parametrize("kind", ["peft", "mlx"])
def test_a_config_of_another_writing_is_noticed(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_adapter(attention(rng), first, format=kind)
    write_adapter(attention(rng, scale=7.0), second, format=kind)
    config = first / "adapter_config.json"
    config.write_text(json.dumps(dict(reversed(json.loads(config.read_text()).items()))))
    assert "config-not-written-with-weights" not in codes(first)  # laid out anew, and still itself
    (second / "adapter_config.json").replace(config)
    findings = read_adapter(first).provenance.findings
    (finding,) = [finding for finding in findings if finding.severity == "damage"]
    assert finding.code == "config-not-written-with-weights"
    weights = "adapter_model.safetensors" if kind == "peft" else "adapters.safetensors"
    assert finding.fields == {"weights": weights, "config": "adapter_config.json"}
    assert KEY in read_header(first / weights).metadata


def codes(path: Path) -> list[str]:
    return [finding.code for finding in read_adapter(path).provenance.findings]


# --- memory -----------------------------------------------------------------------------------

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def attention(rng: np.random.Generator, *, scale: float = 2.0) -> Adapter:
    updates = {}
    for module in MODULES:
        name = f"model.layers.0.{module}"
        a, b = rng.standard_normal((2, 16)), rng.standard_normal((16, 2))
        updates[name] = LowRankUpdate(name=name, A=a, B=b, scale=scale)
    return Adapter(updates, label="attention")


def stored(folder: Path, dtype: str, rng: np.random.Generator) -> tuple[Path, int]:
    """Return an adapter of 24 modules on disk, and the bytes of one of them."""
    d, r = 4096, 32
    factor = rng.standard_normal((d, r)).astype(np.float32)
    if dtype == "bfloat16":
        factor = (factor.view(np.uint32) >> 16).astype(np.uint16)
    outputs = [
        OutputTensor(
            f"base_model.model.model.layers.{layer}.{module}.{end}.weight",
            dtype,
            shape,
            lambda shape=shape: factor.reshape(shape),  # type: ignore[misc]
        )
        for layer in range(8)
        for module in MODULES
        for end, shape in (("lora_A", (r, d)), ("lora_B", (d, r)))
    ]
    folder.mkdir()
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        write_safetensors(stream, outputs, {"format": "pt"})
    targets = [module.rpartition(".")[2] for module in MODULES]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, 2 * factor.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", WRITERS)
def test_memory_follows_the_largest_module_and_not_the_adapter(
    tmp_path: Path, rng: np.random.Generator, kind: str, dtype: str
) -> None:
    source, largest = stored(tmp_path / "source", dtype, rng)
    options: dict[str, Any] = GGUF if kind == "gguf" else {}

    def convert(out: str) -> None:
        write_adapter(read_adapter(source), tmp_path / out, format=kind, **options)

    def resize(out: str) -> None:
        small = resize_adapter(read_adapter(source), rank=24, workers=1).adapter
        write_adapter(small, tmp_path / out, format=kind, **options)

    for work in (convert, resize):
        work("warm")  # imports and caches of code
        tracemalloc.start()
        try:
            work("out")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= 8 * largest, f"{work.__name__}: {peak / largest:.1f} modules"


def test_the_result_of_a_resize_holds_no_factors(rng: np.random.Generator) -> None:
    source = adapter(rng, rank=4)
    loads: list[str] = []

    def load(name: str) -> LowRankUpdate:
        loads.append(name)
        update = source[name]
        assert isinstance(update, LowRankUpdate)
        return update

    lazy = {
        name: LazyUpdate(UpdateOutline.of(source[name]), lambda name=name: load(name))  # type: ignore[misc]
        for name in source
    }
    small = resize_adapter(Adapter(lazy, label="lazy"), rank=2)
    assert sorted(loads) == sorted(source)
    assert small.adapter.outline(next(iter(source))).rank == 2
    assert len(loads) == len(source)
    for name in source:
        update = small.adapter[name]
        assert update.rank == small.adapter.outline(name).rank
        assert UpdateOutline.of(update) == small.adapter.outline(name)
