"""PEFT folders made by hand: every rule of the config, every key, every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import low_rank_update
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import load_file, save_file

from lora_analysis.adapter import Adapter, DenseUpdate, LowRankUpdate, Provenance
from lora_analysis.edit import resize_adapter
from lora_analysis.errors import (
    InputError,
    MalformedFileError,
    ScaleError,
    SourceError,
    UnknownFormatError,
    UnsupportedMethodError,
)
from lora_analysis.formats import find_adapters, read_adapter, unwritten_findings, write_adapter
from lora_analysis.formats.sources import label_of

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
Q = "base_model.model.layers.0.q"


def factors(
    rng: np.random.Generator, module: str = Q, rank: int = 4, between: str = "."
) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_A{between}weight": rng.standard_normal((rank, 6)).astype(np.float32),
        f"{module}.lora_B{between}weight": rng.standard_normal((5, rank)).astype(np.float32),
    }


def peft_folder(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = CONFIG
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def only(adapter: Adapter) -> LowRankUpdate:
    (update,) = adapter.values()
    assert isinstance(update, LowRankUpdate)
    return update


@pytest.mark.parametrize("name", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_the_folder_its_config_and_its_weights_all_name_the_adapter(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    tensors = factors(rng)
    folder = peft_folder(tmp_path / "french", tensors)
    adapter = read_adapter(folder / name)
    update = only(adapter)
    assert list(adapter) == ["layers.0.q"]
    assert update.scale == 2.0
    assert update.alpha == 8
    assert update.stored_dtype == "float32"
    np.testing.assert_array_equal(update.A, tensors[f"{Q}.lora_A.weight"])
    np.testing.assert_array_equal(update.B, tensors[f"{Q}.lora_B.weight"])
    assert adapter.label == update.label == "french"
    assert adapter.provenance.path == folder
    assert adapter.provenance.format == "peft"
    assert adapter.provenance.rank == 4
    assert adapter.provenance.scale_origin == {"layers.0.q": "config"}
    assert adapter.config["target_modules"] == ["q"]


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q": 12}}, 3.0),
        ({"alpha_pattern": {"layers.0.q": 12}}, 3.0),
        ({"alpha_pattern": {"ayers.0.q": 12}}, 2.0),
        ({"alpha_pattern": {r"layers\.\d+\.q": 12}}, 3.0),
        ({"alpha_pattern": {"k": 12, ".*": 16, "q": 20}}, 4.0),
        ({"lora_alpha": 8.0}, 2.0),
        ({"lora_alpha": 0}, None),
    ],
)
def test_the_scale_follows_the_config(
    tmp_path: Path, rng: np.random.Generator, fields: dict[str, Any], scale: float
) -> None:
    folder = peft_folder(tmp_path, factors(rng), CONFIG | fields)
    assert only(read_adapter(folder)).scale == scale


def test_the_rank_comes_from_the_factors_and_a_config_that_differs_is_a_finding(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path, factors(rng, rank=2), CONFIG | {"rank_pattern": {"q": 16}})
    adapter = read_adapter(folder)
    assert only(adapter).scale == 8 / 2
    assert adapter.provenance.rank == 2
    (finding,) = adapter.provenance.findings
    assert finding.code == "config-rank-differs"
    assert finding.fields["first"] == "layers.0.q"
    assert (finding.fields["stated"], finding.fields["rank"]) == (16, 2)


def test_modules_of_several_ranks_have_no_common_rank(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = factors(rng) | factors(rng, "base_model.model.layers.1.q", rank=2)
    config = CONFIG | {"rank_pattern": {"1.q": 2}}
    adapter = read_adapter(peft_folder(tmp_path, tensors, config))
    assert adapter.provenance.rank is None
    assert adapter.provenance.findings == ()
    assert [update.scale for update in adapter.values()] == [2.0, 4.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "scale", "origin"),
    [({"scale": 0.5}, 0.5, "caller"), ({"alpha": 2}, 1.0, "caller"), ({}, 4.0, "config")],
)
def test_the_caller_overrides_the_config(
    tmp_path: Path,
    rng: np.random.Generator,
    options: dict[str, float],
    scale: float,
    origin: str,
) -> None:
    folder = peft_folder(tmp_path, factors(rng), CONFIG | {"use_rslora": True})
    adapter = read_adapter(folder, **options)  # type: ignore[arg-type]
    assert only(adapter).scale == scale
    assert adapter.provenance.scale_origin == {"layers.0.q": origin}


def test_an_alpha_that_is_not_stated_leaves_the_scale_unknown(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path, factors(rng), {"peft_type": "LORA", "r": 4})
    adapter = read_adapter(folder)
    assert only(adapter).scale is None
    assert adapter.provenance.scale_origin == {"layers.0.q": "unknown"}
    assert "no lora_alpha" in adapter.provenance.findings[0].text
    assert only(read_adapter(folder, alpha=8)).scale == 2.0


def test_without_a_config_the_factors_are_read_and_the_scale_is_unknown(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path / "run", factors(rng), None)
    adapter = read_adapter(folder)
    assert only(adapter).scale is None
    assert "no adapter_config.json" in adapter.provenance.findings[0].text
    assert only(read_adapter(folder / "adapter_model.safetensors", scale=1)).scale == 1.0


def test_fan_in_fan_out_is_a_layout_and_leaves_the_factors_alone(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path, factors(rng), CONFIG | {"fan_in_fan_out": True})
    assert only(read_adapter(folder)).layout == "conv1d"
    assert only(read_adapter(folder)).shape == (5, 6)


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "",
        "base_model.model._orig_mod.",
        "_fsdp_wrapped_module.base_model.model.",
        "module.base_model.model.",
    ],
)
def test_wrapper_prefixes_are_stripped_from_names(
    tmp_path: Path, rng: np.random.Generator, prefix: str
) -> None:
    folder = peft_folder(tmp_path, factors(rng, f"{prefix}model.layers.0.q"))
    assert list(read_adapter(folder)) == ["model.layers.0.q"]


def test_an_adapter_name_in_the_keys_is_stripped(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = factors(rng, between=".default.") | {
        "base_model.model.score.modules_to_save.default.weight": np.ones((2, 3), np.float32),
        "base_model.model.score.original_module.weight": np.zeros((2, 3), np.float32),
    }
    adapter = read_adapter(peft_folder(tmp_path, tensors, CONFIG | {"modules_to_save": ["score"]}))
    assert list(adapter) == ["layers.0.q"]
    np.testing.assert_array_equal(adapter.saved_modules["score.weight"], np.ones((2, 3)))
    assert "frozen copies" in adapter.provenance.findings[0].text


def test_several_adapters_in_one_file_are_listed_and_chosen_by_name(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = factors(rng, between=".one.") | factors(rng, between=".two.", rank=2)
    folder = peft_folder(tmp_path / "both", tensors)
    with pytest.raises(SourceError, match=r"both#one', '.*both#two'"):
        read_adapter(folder)
    assert [ref.label for ref in find_adapters(folder)] == ["both#one", "both#two"]
    assert only(read_adapter(f"{folder}#two")).rank == 2
    assert read_adapter(find_adapters(folder)[0]).label == "both#one"
    with pytest.raises(SourceError, match="no adapter 'three'"):
        read_adapter(f"{folder}#three")
    with pytest.raises(SourceError, match=r"no adapter 'three'.*both#one"):
        find_adapters(f"{folder}#three")
    assert [str(ref) for ref in find_adapters(f"{folder}#two")] == [f"{folder}#two"]


def test_shards_are_read_as_one(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = factors(rng)
    names = {key: f"adapter_model-0000{i}-of-00002.safetensors" for i, key in enumerate(tensors, 1)}
    for key, name in names.items():
        (tmp_path / name).write_bytes(save({key: tensors[key]}))
    index = {"metadata": {}, "weight_map": names}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    for source in (tmp_path, *tmp_path.iterdir()):
        assert only(read_adapter(source)).shape == (5, 6)
    assert len(find_adapters(tmp_path)) == 1


def test_a_module_trained_in_full_and_adapted_keeps_its_own_factors(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {
        **factors(rng, "base_model.model.classifier"),
        **factors(rng, "base_model.model.classifier.modules_to_save"),
        **factors(rng, "base_model.model.classifier.original_module"),
        "base_model.model.classifier.base_layer.weight": np.ones((5, 6), np.float32),
    }
    adapter = read_adapter(peft_folder(tmp_path, tensors))
    assert list(adapter) == ["classifier"]
    np.testing.assert_array_equal(
        only(adapter).A, tensors["base_model.model.classifier.lora_A.weight"]
    )
    told = " ".join(map(str, adapter.provenance.findings))
    for what in ("frozen copies", "copies of base weights", "also trained in full"):
        assert what in told


def test_tensors_stored_in_full_without_notice_are_a_finding(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = factors(rng) | {"base_model.model.embed_tokens.weight": np.ones((3, 2), np.float32)}
    adapter = read_adapter(peft_folder(tmp_path, tensors))
    assert set(adapter.saved_modules) == {"embed_tokens.weight"}
    assert "embed_tokens.weight" in adapter.provenance.findings[0].text


def test_tensors_in_full_are_a_finding_without_a_config_too(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = factors(rng) | {"base_model.model.head.weight": np.ones((3, 2), np.float32)}
    findings = read_adapter(peft_folder(tmp_path, tensors, None)).provenance.findings
    assert any("stored in full (first: 'head.weight')" in finding.text for finding in findings)


def test_an_update_that_acts_on_some_tokens_only_is_a_finding(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path, factors(rng), CONFIG | {"alora_invocation_tokens": [1, 2]})
    assert "aLoRA" in read_adapter(folder).provenance.findings[0].text


def test_seed_and_task_come_from_a_manifest_beside_the_adapter(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path / "r4-s7" / "adapter", factors(rng))
    manifest = tmp_path / "r4-s7" / "manifest.json"
    manifest.write_text(json.dumps({"seed": 7, "task": "mirrored", "rank": 9}))
    provenance = read_adapter(folder).provenance
    assert (provenance.seed, provenance.task, provenance.rank) == (7, "mirrored", 4)
    assert read_adapter(folder).label == "r4-s7/adapter"
    manifest.write_text(json.dumps({"seed": "seven", "task": None}))
    provenance = read_adapter(folder).provenance
    assert (provenance.seed, provenance.task) == (None, None)


def test_metrics_come_from_a_manifest_and_what_is_no_manifest_is_passed_over(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    path = peft_folder(tmp_path / "run", factors(rng))
    manifest = path / "manifest.json"
    metrics = {"accuracy": 0.75, "steps": 3, "note": "x", "bad": True, "huge": 10**309}
    manifest.write_text(json.dumps({"metrics": metrics | {"inf": float("inf")}}))
    assert read_adapter(path).provenance.metrics == {"accuracy": 0.75, "steps": 3.0}
    for text in ("not JSON", "[1, 2]", '{"metrics": 4}'):
        manifest.write_text(text)
        assert read_adapter(path).provenance.metrics == {}


def test_factors_are_read_when_asked_for_and_not_before(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path, factors(rng) | factors(rng, "base_model.model.layers.1.q"))
    adapter = read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert list(adapter) == ["layers.0.q", "layers.1.q"]
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        adapter["layers.1.q"]


def adalora(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """AdaLoRA's tensors as PEFT names them: parameters, without ``.weight``."""
    values = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 6), (5, 2), (2, 1))]
    return {f"{Q}.lora_{part}": value for part, value in zip("ABE", values, strict=True)}


@pytest.mark.parametrize(
    ("fields", "options", "stated"),
    [
        ({"init_r": 12}, {}, (8 / 12.00001, "config")),
        ({"init_r": 12, "r": 3, "target_r": 2}, {}, (8 / 12.00001, "config")),
        ({}, {}, (8 / 2.00001, "config")),
        ({"lora_alpha": 0}, {}, (2 / 2.00001, "config")),
        ({"init_r": 12}, {"alpha": 6}, (6 / 12.00001, "caller")),
        ({"init_r": 12}, {"scale": 6}, (6.0, "caller")),
        ({"lora_alpha": None}, {}, (None, "unknown")),
        ({"rank_pattern": {"layers.0.q.lora_E": [True, True, False]}}, {}, (8 / 2.00001, "config")),
    ],
)
def test_the_scale_of_adalora_counts_the_rank_before_pruning(
    tmp_path: Path,
    rng: np.random.Generator,
    fields: dict[str, Any],
    options: dict[str, float],
    stated: tuple[float | None, str],
) -> None:
    tensors = adalora(rng)
    config = {"peft_type": "ADALORA", "lora_alpha": 8} | fields
    adapter = read_adapter(peft_folder(tmp_path, tensors, config), **options)  # type: ignore[arg-type]
    update = only(adapter)
    assert (update.scale, adapter.provenance.scale_origin["layers.0.q"]) == stated
    a, b, e = (tensors[f"{Q}.lora_{part}"].astype(float) for part in "ABE")
    np.testing.assert_allclose(update.B @ update.A, b @ np.diag(e[:, 0]) @ a, rtol=1e-5)


def test_adalora_is_told_by_its_keys_where_no_config_says_so(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    adapter = read_adapter(peft_folder(tmp_path, adalora(rng), None), scale=1)
    assert only(adapter).rank == 2
    with pytest.raises(MalformedFileError, match=r"no lora_E, which its config promises"):
        read_adapter(peft_folder(tmp_path, factors(rng), CONFIG | {"peft_type": "ADALORA"}))


def test_an_embedding_and_a_convolution_are_matrices_from_inputs_to_outputs(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    a, b = rng.standard_normal((2, 3, 2, 2)), rng.standard_normal((5, 2, 1, 1))
    tensors = {
        "base_model.model.wte.lora_embedding_A": rng.standard_normal((2, 9)),
        "base_model.model.wte.lora_embedding_B": rng.standard_normal((4, 2)),
        "base_model.model.conv.lora_A.weight": a,
        "base_model.model.conv.lora_B.weight": b,
    }
    adapter = read_adapter(peft_folder(tmp_path, tensors))
    assert {name: update.shape for name, update in adapter.items()} == {
        "conv": (5, 12),
        "wte": (4, 9),
    }
    wanted = 4 * np.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    np.testing.assert_allclose(adapter["conv"].delta_weight().reshape(5, 3, 2, 2), wanted)


def test_layers_that_were_replicated_name_the_one_of_the_base(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = factors(rng) | factors(rng, "base_model.model.layers.3.q")
    config = CONFIG | {"layer_replication": [[0, 2], [1, 3]]}
    adapter = read_adapter(peft_folder(tmp_path, tensors, config))
    names = {name: update.base_name for name, update in adapter.items()}  # type: ignore[union-attr]
    assert names == {"layers.0.q": "", "layers.3.q": "layers.2.q"}


def test_experts_need_a_config_that_says_how_many_they_are(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    stacked = {
        "base_model.model.experts.lora_A.weight": rng.standard_normal((6, 4)),
        "base_model.model.experts.lora_B.weight": rng.standard_normal((5, 6)),
    }
    config = CONFIG | {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    adapter = read_adapter(peft_folder(tmp_path, stacked, config | {"peft_version": "0.19.0"}))
    a, b = stacked.values()
    assert list(adapter) == [f"experts.{expert}.down_proj" for expert in range(3)]
    for expert, update in enumerate(adapter.values()):
        rows, columns = slice(2 * expert, 2 * expert + 2), slice(expert, None, 3)
        np.testing.assert_allclose(update.delta_weight(), 4 * b[:, columns] @ a[rows])
    del config["r"]
    with pytest.raises(MalformedFileError, match=r"6 rows of .*experts\.lora_A.* rank None"):
        read_adapter(peft_folder(tmp_path, stacked, config))


def test_experts_that_nest_the_other_way_round_are_told_by_their_shapes(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """4 features to 2·5 and 5 back to 4, the last projection innermost."""
    shapes = {".base_layer": ((4, 5), (4, 4)), "": ((4, 4), (10, 4))}
    stacked = {
        f"base_model.model.experts{level}.lora_{role}.weight": rng.standard_normal(shape)
        for level, pair in shapes.items()
        for role, shape in zip("AB", pair, strict=True)
    }
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = CONFIG | {"r": 2, "target_modules": [], "target_parameters": targets}
    adapter = read_adapter(peft_folder(tmp_path, stacked, config))
    assert {name: update.shape for name, update in adapter.items()} == {
        "experts.0.down_proj": (4, 5),
        "experts.0.gate_up_proj": (10, 4),
        "experts.1.down_proj": (4, 5),
        "experts.1.gate_up_proj": (10, 4),
    }
    (finding,) = adapter.provenance.findings
    assert finding.code == "expert-order"


CONFIG_ERRORS: list[tuple[dict[str, Any], type[InputError], list[str]]] = [
    ({"r": True}, MalformedFileError, ["r must be a positive integer", "True"]),
    ({"r": 0}, MalformedFileError, ["r must be", "0"]),
    ({"r": "8"}, MalformedFileError, ["r must be", "'8'"]),
    ({"lora_alpha": "16"}, MalformedFileError, ["lora_alpha", "'16'"]),
    ({"lora_alpha": True}, MalformedFileError, ["lora_alpha", "True"]),
    ({"lora_alpha": float("inf")}, MalformedFileError, ["lora_alpha", "inf"]),
    ({"lora_alpha": float("nan")}, MalformedFileError, ["lora_alpha", "nan"]),
    ({"lora_alpha": 10**400}, MalformedFileError, ["lora_alpha", "..."]),
    ({"rank_pattern": [4]}, MalformedFileError, ["rank_pattern", "[4]"]),
    ({"rank_pattern": {"q": 2.5}}, MalformedFileError, ["rank_pattern['q']", "2.5"]),
    ({"alpha_pattern": {"q": None}}, MalformedFileError, ["alpha_pattern['q']", "None"]),
    ({"use_rslora": "yes"}, MalformedFileError, ["use_rslora", "'yes'"]),
    ({"fan_in_fan_out": 1}, MalformedFileError, ["fan_in_fan_out", "1"]),
    ({"modules_to_save": "head"}, MalformedFileError, ["modules_to_save", "'head'"]),
    ({"base_model_name_or_path": 3}, MalformedFileError, ["base_model_name_or_path", "3"]),
    ({"alpha_pattern": {"q(": 1}}, MalformedFileError, ["alpha_pattern", "q("]),
    ({"rank_pattern": {"q[": 1}}, MalformedFileError, ["rank_pattern", "q["]),
    ({"peft_type": "OFT"}, UnsupportedMethodError, ["peft_type", "'OFT'", "extract merged"]),
    ({"peft_type": "VERA"}, UnsupportedMethodError, ["'VERA'", "convert_to_lora", "extract"]),
    ({"peft_type": "PREFIX_TUNING"}, UnsupportedMethodError, ["changes no weight"]),
    ({"peft_type": None}, UnsupportedMethodError, ["peft_type", "None"]),
    ({"monteclora_config": {"buffer_size": 1}}, UnsupportedMethodError, ["monteclora_config"]),
    ({"use_qalora": True}, UnsupportedMethodError, ["use_qalora"]),
    ({"use_bdlora": True}, MalformedFileError, ["use_bdlora", "nblocks", "True"]),
    ({"use_bdlora": {"nblocks": 0}}, MalformedFileError, ["nblocks", "0"]),
    ({"arrow_config": {"top_k": 1}}, UnsupportedMethodError, ["arrow_config"]),
    ({"target_parameters": "w1"}, MalformedFileError, ["target_parameters", "'w1'"]),
    ({"layer_replication": [[2, 0]]}, MalformedFileError, ["layer_replication", "[[2, 0]]"]),
    ({"layer_replication": [[0, 10**9]]}, MalformedFileError, ["layer_replication"]),
    ({"use_dora": 1}, MalformedFileError, ["use_dora", "1"]),
    ({"init_lora_weights": "pissa_niter_16"}, UnsupportedMethodError, ["pissa_niter_16"]),
    ({"init_lora_weights": "olora"}, UnsupportedMethodError, ["W - s·B0·A0"]),
    ({"init_lora_weights": "corda"}, UnsupportedMethodError, ["CorDA"]),
    ({"init_lora_weights": "lora_ga"}, UnsupportedMethodError, ["LoRA-GA"]),
    ({"init_lora_weights": "loftq"}, UnsupportedMethodError, ["LoftQ"]),
    ({"init_lora_weights": "tomorrow"}, UnsupportedMethodError, ["'tomorrow'", "not known"]),
]


@pytest.mark.parametrize(("fields", "kind", "told"), CONFIG_ERRORS)
def test_a_config_that_cannot_be_used_is_refused_with_its_field(
    tmp_path: Path,
    rng: np.random.Generator,
    fields: dict[str, Any],
    kind: type[InputError],
    told: list[str],
) -> None:
    folder = peft_folder(tmp_path, factors(rng), CONFIG | fields)
    with pytest.raises(kind) as caught:
        read_adapter(folder)
    for part in [str(folder / "adapter_config.json"), *told]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "start", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "true", "mica"]
)
def test_initializations_that_leave_the_base_alone_are_read(
    tmp_path: Path, rng: np.random.Generator, start: object
) -> None:
    folder = peft_folder(tmp_path, factors(rng), CONFIG | {"init_lora_weights": start})
    assert only(read_adapter(folder)).scale == 2.0


def matrix(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype=dtype)


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
TENSOR_ERRORS: list[tuple[dict[str, np.ndarray], type[InputError], list[str]]] = [
    ({A: matrix(4, 6)}, MalformedFileError, ["'layers.0.q'", A, "lora_B"]),
    ({B: matrix(5, 4)}, MalformedFileError, ["'layers.0.q'", B, "lora_A"]),
    ({A: matrix(4, 6), B: matrix(5, 3)}, MalformedFileError, ["(4, 6)", "(5, 3)"]),
    ({A: matrix(6, 4), B: matrix(4, 5)}, MalformedFileError, ["(6, 4)", "(4, 5)", "(r, d_in)"]),
    ({A: matrix(0), B: matrix(5, 4)}, MalformedFileError, [A, "(0,)", "gathering"]),
    ({A: matrix(4, 6), B: matrix(0, 4)}, MalformedFileError, [B, "(0, 4)"]),
    ({A: matrix(4, 6), B: matrix(5, 4, dtype=np.int8)}, MalformedFileError, [B, "int8"]),
    ({A: matrix(4, 6, 1, 1), B: matrix(5, 3, 1, 1)}, MalformedFileError, ["(4, 6)", "(5, 3)"]),
    ({A: matrix(5000, 1), B: matrix(1, 5000)}, MalformedFileError, ["rank 5000", "4096"]),
    (
        {A: np.full((4, 6), np.nan, np.float32), B: matrix(5, 4)},
        MalformedFileError,
        ["24 non-finite of 24"],
    ),
    ({"head.weight": matrix(2, 2)}, MalformedFileError, ["no LoRA factors", "head.weight"]),
    (
        {A: matrix(4, 6), B: matrix(5, 4), f"{Q}.lora_magnitude_vector": matrix(4)},
        MalformedFileError,
        ["magnitude of 'layers.0.q' has 4 entries for 5 rows"],
    ),
    (
        {A: matrix(4, 6), B: matrix(5, 4), f"{Q}.lora_diag": matrix(3)},
        MalformedFileError,
        [A, "diagonal of shape (3,)"],
    ),
    (
        {A: matrix(4, 6), B: matrix(5, 4), "x.lora_diag": matrix(4)},
        MalformedFileError,
        ["'x.lora_diag' belongs to a module without"],
    ),
    (
        {A: matrix(4, 6), B: matrix(5, 4), f"{Q}.lora_magnitude_vector.other": matrix(5)},
        MalformedFileError,
        ["lora_magnitude_vector.other' belongs to no factors"],
    ),
    (
        {
            A: matrix(4, 6),
            B: matrix(5, 4),
            f"{Q}.base_layer.lora_A.weight": matrix(4, 6),
            f"{Q}.base_layer.lora_B.weight": matrix(5, 4),
        },
        UnsupportedMethodError,
        ["base_layer.lora_A.weight", "expert"],
    ),
    (
        {f"{Q}.lora_A": matrix(4, 6), f"{Q}.lora_B": matrix(5, 4)},
        UnsupportedMethodError,
        ["lora_A"],
    ),
    (
        {A: matrix(4, 6), B: matrix(5, 4), "layers.0.q.lora_A.weight": matrix(4, 6)},
        MalformedFileError,
        ["both factor A"],
    ),
    (
        {A: matrix(4, 6), B: matrix(5, 4), f"{Q}.lora_A.one.weight": matrix(4, 6)},
        MalformedFileError,
        ["others do not"],
    ),
]


@pytest.mark.parametrize(("tensors", "kind", "told"), TENSOR_ERRORS)
def test_tensors_that_are_no_plain_pair_are_refused_with_name_and_shape(
    tmp_path: Path, tensors: dict[str, np.ndarray], kind: type[InputError], told: list[str]
) -> None:
    folder = peft_folder(tmp_path, tensors)
    with pytest.raises(kind) as caught:
        list(read_adapter(folder).values())
    for part in [str(folder / "adapter_model.safetensors"), *told]:
        assert part in str(caught.value)


def test_a_config_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SourceError, match=r"The folder holds: adapter_config\.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(UnknownFormatError, match=r"pickle.*safetensors.*allow_pickle"):
        read_adapter(tmp_path)


def test_a_broken_config_is_found_and_named(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = peft_folder(tmp_path, factors(rng))
    (folder / "adapter_config.json").write_text("{")
    assert len(find_adapters(folder)) == 1
    with pytest.raises(MalformedFileError, match=r"adapter_config\.json"):
        read_adapter(folder)


def test_truncated_weights_are_found_and_named(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = peft_folder(tmp_path, factors(rng)) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert len(find_adapters(tmp_path)) == 1
    for source in (tmp_path, weights):
        with pytest.raises(MalformedFileError, match=r"adapter_model\.safetensors.*cut short"):
            read_adapter(source)


SEGMENT = st.text("abq01_$(é", min_size=1, max_size=4)
NAME = st.lists(SEGMENT, min_size=1, max_size=3).map(".".join)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Adapters with ranks, scales and names that collide as PEFT's patterns read them."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    layout = draw(st.sampled_from(["linear", "conv1d"]))
    updates = {
        name: LowRankUpdate(
            name=name,
            A=rng.standard_normal((rank, 7)).astype(dtype),
            B=rng.standard_normal((3, rank)).astype(dtype),
            scale=draw(st.sampled_from([2.0, 0.3, 1e-3, -1.0, 1 / 3])),
            layout=layout,
        )
        for name, rank in draw(
            st.dictionaries(NAME, st.integers(1, 5), min_size=1, max_size=6)
        ).items()
    }
    return Adapter(
        updates,
        label="before",
        provenance=Provenance(base_model="some/base"),
        saved_modules={"head.weight": rng.standard_normal((2, 3)).astype(np.float32)},
        config={"use_rslora": draw(st.booleans()), "task_type": "SEQ_CLS"},
    )


@given(before=adapters())
def test_what_is_written_reads_back_as_the_same_update(
    tmp_path_factory: pytest.TempPathFactory, before: Adapter
) -> None:
    folder = tmp_path_factory.mktemp("round") / "new" / "adapter"
    assert write_adapter(before, folder) == folder
    after = read_adapter(folder)
    assert list(after) == list(before)
    assert after.provenance.findings == ()
    assert after.provenance.base_model == "some/base"
    assert after.config["task_type"] == "SEQ_CLS"
    assert after.config["modules_to_save"] == ["head"]
    np.testing.assert_array_equal(
        after.saved_modules["head.weight"], before.saved_modules["head.weight"]
    )
    for name, update in before.items():
        again = after[name]
        assert isinstance(update, LowRankUpdate)
        assert isinstance(again, LowRankUpdate)
        assert again.layout == update.layout
        assert again.scale == pytest.approx(update.scale, rel=1e-12)
        error = np.linalg.norm(again.delta_weight() - update.delta_weight())
        assert error <= 1e-6 * np.linalg.norm(update.A) * np.linalg.norm(update.B)


def test_patterns_are_plain_names_where_that_is_enough(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    updates = {
        name: low_rank_update(rng, rank=rank, name=name, scale=2.0)
        for name, rank in {"layers.0.q": 4, "layers.1.q": 4, "layers.2.q": 2}.items()
    }
    config_of = write_adapter(Adapter(updates, label="x"), tmp_path) / "adapter_config.json"
    config = json.loads(config_of.read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == {"layers.2.q": 2}
    assert config["alpha_pattern"] == {"layers.2.q": 4}
    assert config["target_modules"] == ["layers.0.q", "layers.1.q", "layers.2.q"]


@pytest.mark.parametrize(
    ("ranks", "pattern"),
    [
        ({"layers.2.q": 2, "layers.2.k": 4, "v": 4}, {"layers.2.q": 2}),
        # PEFT would read 'z.q' by the key 'q', whatever their order was before it sorted them.
        ({"q": 2, "z.q": 3, "k": 4, "v": 4}, {"^q": 2, r"^z\.q": 3}),
        # 'a.q' would also match 'b.a.q', a dot any character: anchored and escaped then.
        ({"a.q": 2, "b.a.q": 4, "c": 4}, {r"^a\.q": 2}),
        ({"l.1.q": 2, "l11.q": 4, "c": 4}, {r"^l\.1\.q": 2}),
        ({"a(q": 2, "b": 4, "c": 4}, {r"^a\(q": 2}),
    ],
)
def test_patterns_never_reach_another_module(
    tmp_path: Path, rng: np.random.Generator, ranks: dict[str, int], pattern: dict[str, int]
) -> None:
    updates = {
        name: low_rank_update(rng, rank=rank, name=name, scale=0.5) for name, rank in ranks.items()
    }
    folder = write_adapter(Adapter(updates, label="x"), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].items()) == list(pattern.items())
    assert {update.scale for update in read_adapter(folder).values()} == {0.5}  # type: ignore[union-attr]
    assert read_adapter(folder).provenance.findings == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 0},
        {"exclude_modules": ["layers.1.q"]},
        {"layers_pattern": "layers"},
    ],
)
def test_targets_that_other_fields_narrowed_are_written_as_full_names(
    tmp_path: Path, rng: np.random.Generator, fields: dict[str, Any]
) -> None:
    tensors = factors(rng) | factors(rng, "base_model.model.layers.2.q")
    adapter = read_adapter(peft_folder(tmp_path / "in", tensors, CONFIG | fields))
    written = write_adapter(adapter, tmp_path / "out") / "adapter_config.json"
    assert json.loads(written.read_text())["target_modules"] == ["layers.0.q", "layers.2.q"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1]"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = [1, 2]"),
    ],
)
def test_what_was_trained_beside_the_factors_is_not_lost_in_writing(
    tmp_path: Path, rng: np.random.Generator, fields: dict[str, Any], told: str
) -> None:
    adapter = read_adapter(peft_folder(tmp_path / "in", factors(rng), CONFIG | fields))
    with pytest.raises(UnsupportedMethodError) as caught:
        write_adapter(adapter, tmp_path / "out")
    for part in ("in was trained with", told, "not written"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bfloat16_factors_survive_a_round_trip_bit_for_bit(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    pair = {A: torch.randn(4, 6).bfloat16(), B: torch.randn(5, 4).bfloat16()}
    peft_folder(tmp_path / "bf16", {})
    save_file(pair, tmp_path / "bf16" / "adapter_model.safetensors")
    first = read_adapter(tmp_path / "bf16")
    assert only(first).stored_dtype == "bfloat16"
    again = only(read_adapter(write_adapter(first, tmp_path / "f32")))
    np.testing.assert_array_equal(again.A, pair[A].float().numpy())
    np.testing.assert_array_equal(again.B, pair[B].float().numpy())


def test_what_cannot_be_written_is_refused_and_nothing_is_left(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    cases: list[tuple[Adapter, type[InputError], str]] = [
        (Adapter({"q": low_rank_update(rng, scale=None)}, label="x"), ScaleError, "not known"),
        (Adapter({"q": DenseUpdate("q", np.ones((2, 2)))}, label="x"), InputError, "dense"),
        (Adapter({}, label="x"), InputError, "no module"),
        (
            Adapter({"q.base_layer.k": low_rank_update(rng)}, label="x"),
            InputError,
            "meaning of its own",
        ),
        (
            Adapter(
                {"q": LowRankUpdate("q", np.full((1, 2), 1e300), np.ones((2, 1)), 1.0)}, label="x"
            ),
            InputError,
            "too large for float32",
        ),
    ]
    for adapter, kind, told in cases:
        with pytest.raises(kind, match=told):
            write_adapter(adapter, tmp_path / "out")
    with pytest.raises(InputError, match="'nonsense' is not written"):
        write_adapter(cases[0][0], tmp_path / "out", format="nonsense")
    assert list(tmp_path.iterdir()) == []


def test_reading_imports_numpy_and_no_heavier_library(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = peft_folder(tmp_path, factors(rng), CONFIG | {"alpha_pattern": {"q": 4}})
    code = (
        "import sys; from lora_analysis.formats import read_adapter\n"
        "from lora_analysis.bases import open_base\n"
        f"a = read_adapter({str(folder)!r}); a['layers.0.q'].delta_weight()\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'pandas', 'regex', 'safetensors', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real
def test_real_peft_folders_read_with_their_ranks_and_scales(real_adapters: Path) -> None:
    neo = read_adapter(real_adapters / "gpt-neo-peft")
    assert len(neo) == 24
    assert neo.provenance.rank == 8
    assert neo.provenance.base_model == "EleutherAI/gpt-neo-125M"
    final = read_adapter(real_adapters / "qwen2.5-peft" / "final")
    assert final.label == "qwen2.5-peft/final"
    assert final["model.layers.0.self_attn.v_proj"].shape == (128, 896)
    for adapter in (neo, final):
        assert {update.scale for update in adapter.values()} == {2.0}  # type: ignore[union-attr]
        assert set(adapter.provenance.scale_origin.values()) == {"config"}
        assert adapter.provenance.findings == ()
    labels = [ref.label for ref in find_adapters(real_adapters / "qwen2.5-peft")]
    assert labels == [
        f"qwen2.5-peft/{name}" for name in ("checkpoint-23", "checkpoint-46", "final")
    ]


@pytest.mark.parametrize(
    ("place", "label"),
    [
        ("sst2", "sst2"),
        ("sst2/final", "sst2/final"),
        ("imdb/lora_adapter", "imdb/lora_adapter"),
        ("imdb/model/checkpoint-500", "imdb/model/checkpoint-500"),
        ("a/b/output/best_model/checkpoint-9", "output/best_model/checkpoint-9"),
        ("imdb/pytorch_lora_weights.safetensors", "imdb/pytorch_lora_weights"),
        ("x/model_of_ours/model_of_theirs", "model_of_theirs"),
    ],
)
def test_a_name_that_says_nothing_takes_the_folder_above(place: str, label: str) -> None:
    assert label_of(Path("/somewhere") / place) == label


@pytest.mark.parametrize("pickled", [False, True])
def test_what_a_file_holds_next_to_the_factors_is_carried_over(
    tmp_path: Path, rng: np.random.Generator, pickled: bool
) -> None:
    """Copies of base weights that PEFT saves with resized vocabularies, bit for bit."""
    copy = f"{Q}.base_layer.weight"
    tensors: dict[str, torch.Tensor] = {k: torch.from_numpy(v) for k, v in factors(rng).items()}
    tensors[copy] = torch.from_numpy(rng.standard_normal((5, 6))).to(torch.bfloat16)
    source = tmp_path / "in"
    source.mkdir()
    if pickled:
        torch.save(tensors, source / "adapter_model.bin")
    else:
        save_file(tensors, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text(json.dumps(CONFIG))
    adapter = read_adapter(source, allow_pickle=pickled)
    assert list(adapter.side_tensors) == [copy]
    for name, written in (("copy", adapter), ("small", resize_adapter(adapter, rank=2).adapter)):
        target = write_adapter(written, tmp_path / name)
        stored = load_file(target / "adapter_model.safetensors")
        assert stored[copy].dtype == torch.bfloat16
        assert torch.equal(stored[copy], tensors[copy])
        assert list(read_adapter(target).side_tensors) == [copy]
        assert unwritten_findings(written, "peft") == []
    (finding,) = unwritten_findings(adapter, "mlx")
    assert finding.code == "side-tensors-not-written"
    assert finding.fields["keys"] == [copy]


@pytest.mark.parametrize("end", ["lora_B.bias", "token_adapter.trainable_tokens_delta"])
def test_what_alters_the_model_is_refused_in_other_formats(
    tmp_path: Path, rng: np.random.Generator, end: str
) -> None:
    tensors = factors(rng) | {f"{Q}.{end}": np.ones(5, np.float32)}
    adapter = read_adapter(peft_folder(tmp_path / "in", tensors))
    written = read_adapter(write_adapter(adapter, tmp_path / "out"))
    assert list(written.side_tensors) == list(adapter.side_tensors) == [f"{Q}.{end}"]
    with pytest.raises(UnsupportedMethodError, match=r"would compute different.*--to peft"):
        write_adapter(adapter, tmp_path / "mlx", format="mlx")
