"""Base weights: which tensor a module means, which way it lies, and its values in blocks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import low_rank_update
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from lora_analysis.amplify import amplification
from lora_analysis.bases import BaseWeights, Weight, memory_source, open_base
from lora_analysis.errors import (
    BaseWeightError,
    InputError,
    MalformedFileError,
    SourceError,
    UnknownFormatError,
)
from lora_analysis.storage import tensors as tensor_files


def base_folder(
    folder: Path, tensors: dict[str, np.ndarray], model_type: str | None = "llama"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(save(tensors))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def matrix(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def base_of(*names: str, shape: tuple[int, int] = (2, 2)) -> BaseWeights:
    return open_base({name: matrix(*shape) for name in names})


def test_a_folder_its_file_and_its_array_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = rng.standard_normal((5, 3)).astype(np.float32)
    folder = base_folder(tmp_path / "tiny", {"layers.0.q.weight": stored})
    for source in (folder, str(folder), folder / "model.safetensors", {"layers.0.q": stored}):
        base = open_base(source)
        weight = base.weight("layers.0.q")
        assert isinstance(weight, Weight)
        assert weight.name == "layers.0.q.weight"
        assert weight.shape == (5, 3)
        assert weight.stored_dtype == "float32"
        assert base.names == ["layers.0.q.weight"]
        np.testing.assert_array_equal(weight.array(), stored)
    assert open_base(folder).label == "tiny"
    assert open_base(folder).model_type == "llama"


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    elements=st.integers(1, 30),
    dtype=st.sampled_from([np.float32, np.float16, np.float64]),
    transposed=st.booleans(),
    stored_in_file=st.booleans(),
)
def test_blocks_cover_the_weight_once_in_either_orientation(
    tmp_path_factory: pytest.TempPathFactory, **case: object
) -> None:
    values = matrix(case["m"], case["n"]).astype(case["dtype"])  # type: ignore[arg-type]
    wanted = (values.T if case["transposed"] else values).astype(np.float32)
    source: object = {"q": values}
    if case["stored_in_file"]:
        source = base_folder(tmp_path_factory.mktemp("base"), {"q.weight": values})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_source, "BLOCK_ELEMENTS", case["elements"])
        patch.setitem(tensor_files.TensorFiles.blocks.__kwdefaults__, "elements", case["elements"])
        weight = open_base(source).weight("q", transposed=case["transposed"])  # type: ignore[arg-type]
        assert weight.shape == wanted.shape
        seen = np.zeros(wanted.shape, dtype=int)
        for rows, columns, tile in weight.blocks():
            assert tile.dtype == np.float32
            assert tile.size <= case["elements"]  # type: ignore[operator]
            np.testing.assert_array_equal(tile, wanted[rows, columns])
            seen[rows, columns] += 1
        assert (seen == 1).all()
        np.testing.assert_array_equal(weight.array(), wanted)


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("base_model.model.model.layers.0.q", "model.layers.0.q"),
        ("model.layers.0.q.base_layer", "model.layers.0.q"),
        ("bert.encoder.layer.0.attention.query", "encoder.layer.0.attention.query"),
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("encoder.layer.0.query", "roberta.encoder.layer.0.query"),
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
        ("model.lm_head", "lm_head"),
        ("classifier", "base_model.model.classifier.original_module"),
    ],
)
def test_prefixes_may_be_missing_or_added(module: str, stored: str) -> None:
    others = ["model.layers.10.q", "model.layers.1.k", "decoder.layer.0.query"]
    assert base_of(stored, *others).weight(module).name == f"{stored}.weight"


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        ("model.layers.1.q", ["model.layers.0.q"]),  # another layer
        ("model.layers.1.q", ["model.layers.11.q"]),  # a longer number
        ("model.layers.1.q", ["h.1.q"]),
        ("model.layers.1.xq", ["model.layers.1.q"]),
        ("model.layers.1.q", ["model.layers.1.xq"]),
        ("decoder.layers.0.q", ["encoder.layers.0.q"]),  # another part of the model
        ("model.decoder.layers.0.q", ["model.encoder.layers.0.q"]),
        ("vision_tower.layers.0.q", ["model.layers.0.q"]),
        ("vision_tower.layers.0.q", ["layers.0.q"]),
        ("model.layers.0.q", []),
    ],
)
def test_another_modules_tensor_is_never_taken(module: str, stored: list[str]) -> None:
    with pytest.raises(BaseWeightError) as caught:
        base_of(*stored).weight(module)
    assert f"no weight belongs to '{module}'" in str(caught.value)
    for name in stored:
        assert f"'{name}'" in str(caught.value)


def test_an_ambiguous_name_lists_its_candidates() -> None:
    base = base_of("text.encoder.layer.0.q", "vision.encoder.layer.0.q")
    with pytest.raises(BaseWeightError, match=r"several.*'text\..*'vision\."):
        base.weight("encoder.layer.0.q")


def test_the_updates_shape_chooses_among_candidates() -> None:
    base = open_base({"a.encoder.layer.0.q": matrix(4, 3), "b.encoder.layer.0.q": matrix(7, 7)})
    weight = base.weight("encoder.layer.0.q", shape=(4, 3))
    assert weight.name == "a.encoder.layer.0.q.weight"


def test_a_shape_that_fits_nothing_is_refused_with_both_shapes(tmp_path: Path) -> None:
    base = open_base(base_folder(tmp_path, {"layers.0.q.weight": matrix(4, 3)}))
    with pytest.raises(BaseWeightError, match=r"of shape \(8, 3\).*'layers\.0\.q'.*\(4, 3\)"):
        base.weight("layers.0.q", shape=(8, 3))
    with pytest.raises(BaseWeightError, match=r"\(4, 3\).*\[out, in\].*update has shape \(3, 4\)"):
        base.weight("layers.0.q", shape=(3, 4))


GPT2 = "transformer.h.0.attn.c_proj.weight"


@pytest.mark.parametrize(
    ("model_type", "name", "transposed"),
    [
        ("gpt2", GPT2, True),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", True),
        ("gpt2", "score.weight", False),
        ("gpt2", "transformer.wte.weight", False),
        ("openai-gpt", "h.0.attn.c_attn.weight", True),
        ("imagegpt", "h.0.attn.c_proj.weight", True),
        ("decision_transformer", "encoder.h.0.attn.c_proj.weight", True),
        ("clvp", "speech_decoder_model.h.0.mlp.c_fc.weight", True),
        ("gpt_bigcode", GPT2, False),
        ("starcoder2", "model.layers.0.mlp.c_proj.weight", False),
        ("gpt_neo", "transformer.h.0.mlp.c_proj.weight", False),
        ("llama", "model.layers.0.self_attn.q_proj.weight", False),
        ("digits-vit", "blocks.0.q.weight", False),
        ("from-tomorrow", "layers.0.q_proj.weight", False),
    ],
)
def test_a_square_weight_is_turned_by_its_family(
    tmp_path: Path, model_type: str, name: str, transposed: bool
) -> None:
    base = open_base(base_folder(tmp_path, {name: matrix(3, 3)}, model_type))
    weight = base.weight(name.removesuffix(".weight"), shape=(3, 3))
    assert weight.transposed is transposed
    np.testing.assert_array_equal(weight.array(), matrix(3, 3).T if transposed else matrix(3, 3))


@pytest.mark.parametrize(
    ("model_type", "told"), [(None, "no config.json"), ("jais", "family 'jais'")]
)
def test_a_square_weight_of_unknown_family_asks(
    tmp_path: Path, model_type: str | None, told: str
) -> None:
    base = open_base(base_folder(tmp_path, {GPT2: matrix(3, 3)}, model_type))
    with pytest.raises(BaseWeightError, match="Pass transposed=True or False") as caught:
        base.weight("transformer.h.0.attn.c_proj", shape=(3, 3))
    assert told in str(caught.value)
    assert "square" in str(caught.value)
    for answer in (True, False):
        weight = base.weight("transformer.h.0.attn.c_proj", shape=(3, 3), transposed=answer)
        assert weight.transposed is answer


def test_without_a_family_the_updates_shape_decides(tmp_path: Path) -> None:
    base = open_base(base_folder(tmp_path, {"h.0.c_attn.weight": matrix(2, 6)}, None))
    assert base.weight("h.0.c_attn", shape=(6, 2)).transposed
    assert not base.weight("h.0.c_attn", shape=(2, 6)).transposed
    with pytest.raises(BaseWeightError, match="cannot be known"):
        base.weight("h.0.c_attn")


def test_a_sharded_folder_reads_through_its_index(tmp_path: Path) -> None:
    places = {}
    for i in range(2):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        (tmp_path / shard).write_bytes(save({f"layers.{i}.q.weight": matrix(2, 3) + i}))
        places[f"layers.{i}.q.weight"] = shard
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for source in (tmp_path, index):
        np.testing.assert_array_equal(
            open_base(source).weight("layers.1.q").array(), matrix(2, 3) + 1
        )
    index.write_text(json.dumps({"weight_map": {"layers.0.q.weight": "../out.safetensors"}}))
    with pytest.raises(MalformedFileError, match="own folder"):
        open_base(tmp_path)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"layers.0.q.qweight": np.zeros((2, 2), np.int32)}, "no qzeros, scales"),
        ({"layers.0.q.weight_packed": np.zeros((2, 2), np.int32)}, "needs weight_scale"),
        ({"layers.0.q.weight": np.zeros((2, 1), np.uint8)}, "stored as uint8"),
        ({"layers.0.q.W_q": np.zeros((2, 1), np.uint8)}, "HQQ"),
        ({"layers.0.q.weight._data": np.zeros((2, 1), np.uint8)}, "quanto"),
        ({"layers.0.q.codebooks": np.zeros((2, 1), np.uint8)}, "AQLM"),
        (
            {
                "layers.0.q.weight": np.zeros((2, 1), np.uint8),
                "layers.0.q.weight.absmax": np.zeros(2, np.float32),
            },
            "bitsandbytes 4-bit without its quant_state",
        ),
        (
            {
                "layers.0.q.weight": np.zeros((2, 2), np.float32),
                "layers.0.q.weight_scale_inv": np.zeros((1, 1), np.float32),
            },
            "stored as float32",
        ),
    ],
)
def test_a_storage_that_is_not_read_is_refused_by_name(
    tmp_path: Path, extra: dict[str, np.ndarray], told: str
) -> None:
    base = open_base(base_folder(tmp_path, extra))
    with pytest.raises(BaseWeightError) as caught:
        base.weight("layers.0.q", shape=(2, 4))
    assert told in str(caught.value)
    assert "layers.0.q" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["hqq", "quanto", "eetq", "torchao"])
def test_a_method_that_is_not_read_is_refused_by_what_the_config_says(
    tmp_path: Path, method: str
) -> None:
    tensors = {"q.weight": np.zeros((2, 2), np.int8), "q.SCB": np.ones(2, np.float32)}
    base_folder(tmp_path, tensors)
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseWeightError, match=f"{method}.*Dequantize"):
        open_base(tmp_path).weight("q")


def test_given_arrays_must_hold_floating_point_numbers() -> None:
    with pytest.raises(BaseWeightError, match="stored as int64"):
        open_base({"q": np.ones((2, 2), np.int64)}).weight("q")


def test_sources_that_are_no_base_say_what_is_there(tmp_path: Path) -> None:
    cases: list[tuple[Path, type[InputError], str]] = [
        (tmp_path / "gone", SourceError, "no file or folder"),
        (tmp_path / "empty", SourceError, "nothing"),
        (tmp_path / "adapter", SourceError, "adapter's folder"),
        (tmp_path / "pickled", UnknownFormatError, "allow_pickle=True"),
        (tmp_path / "pickled" / "pytorch_model.bin", UnknownFormatError, "allow_pickle=True"),
        (tmp_path / "other" / "model.onnx", UnknownFormatError, "safe_serialization"),
        (tmp_path / "broken", MalformedFileError, "3 bytes"),
    ]
    for folder in ("empty", "adapter", "pickled", "broken", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(save({}))
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "other" / "model.onnx").write_bytes(b"")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"abc")
    for source, kind, told in cases:
        with pytest.raises(kind, match=told) as caught:
            open_base(source)
        assert str(source) in str(caught.value)


def test_a_file_of_another_name_is_taken_where_it_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(save({"q.weight": matrix(2, 3)}))
    assert open_base(tmp_path).weight("q", transposed=False).shape == (2, 3)
    assert open_base(tmp_path).label == "weights.safetensors"


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "1 numbers that are not finite"), (-np.inf, "not finite"), (3e38, r"of 3e\+38")],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused_by_name(
    rng: np.random.Generator, value: float, said: str
) -> None:
    W = rng.standard_normal((6, 5)).astype(np.float32)
    W[4, 2] = value
    weight = open_base({"layers.0.q_proj": W}).weight("layers.0.q_proj")
    match = rf"'layers\.0\.q_proj\.weight' holds .*{said}"
    with pytest.raises(BaseWeightError, match=match):
        weight.array()
    with pytest.raises(BaseWeightError, match=match):  # which looks at the norm alone
        amplification(low_rank_update(rng, 6, 5, rank=2), weight)
