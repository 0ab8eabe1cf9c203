"""Stacks of experts, shared factors, block-diagonal and other variants, against PEFT's layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, VeloraConfig
from peft.tuners.lora.variants import BdLoraLinearVariant
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_analysis.adapter import Adapter, LowRankUpdate
from lora_analysis.bases import open_base
from lora_analysis.bases.locating import _count_experts
from lora_analysis.cli import group, run
from lora_analysis.effective import effective_adapter
from lora_analysis.errors import (
    IncompatibleError,
    InputError,
    MalformedFileError,
    UnsupportedMethodError,
)
from lora_analysis.finding import Finding
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.studies import study

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS, RANK, WIDTH, INNER = 4, 3, 8, 10


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))


class Model(nn.Module):
    """A router and a stack of experts, as transformers 5 stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.q_proj = nn.Linear(WIDTH, 12, bias=False)
        self.o_proj = nn.Linear(12, WIDTH, bias=False)
        self.experts = Experts()


def saved(folder: Path, **fields: Any) -> Any:
    """Save a PEFT adapter with random factors and return the live model."""
    torch.manual_seed(0)
    model = get_peft_model(Model(), LoraConfig(r=RANK, lora_alpha=6, **fields))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def stacked(folder: Path, **fields: Any) -> dict[str, np.ndarray]:
    """Save an adapter of both stacks; return PEFT's ΔW of each expert by module."""
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = saved(folder, target_modules=[], target_parameters=targets, **fields)
    deltas = {}
    for module in model.modules():
        if type(module).__name__ == "ParamWrapper":
            for expert, delta in enumerate(module.get_delta_weight("default")):
                name = f"experts.{expert}.{module.parameter_name}"
                deltas[name] = delta.detach().double().numpy()
    return deltas


def restated(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's config."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def repacked(folder: Path) -> None:
    """Pack the columns of every B as Unsloth did: one expert's columns next to each other."""
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if "lora_B" in key:
            columns = tensor.reshape(len(tensor), RANK, EXPERTS)
            tensors[key] = np.ascontiguousarray(columns.swapaxes(1, 2)).reshape(len(tensor), -1)
    save_file(tensors, folder / WEIGHTS)


def assert_updates(adapter: Adapter, deltas: dict[str, np.ndarray]) -> None:
    assert set(adapter) == set(deltas)
    for name, delta in deltas.items():
        np.testing.assert_allclose(adapter[name].delta_weight(), delta, rtol=0, atol=1e-5)


def only(adapter: Adapter, code: str) -> Finding:
    (finding,) = [finding for finding in adapter.provenance.findings if finding.code == code]
    return finding


def test_the_writers_mark_decides_the_order_of_the_columns(tmp_path: Path) -> None:
    deltas = stacked(tmp_path)
    adapter = read_adapter(tmp_path)
    assert_updates(adapter, deltas)
    finding = only(adapter, "expert-order")
    assert (finding.fields["order"], finding.fields["source"]) == ("expert-fastest", "default")
    assert finding.fields["experts"] == EXPERTS
    repacked(tmp_path)
    with pytest.raises(AssertionError):
        assert_updates(read_adapter(tmp_path), deltas)
    restated(tmp_path, auto_mapping={"base_model_class": "X", "unsloth_fixed": True})
    adapter = read_adapter(tmp_path)
    assert_updates(adapter, deltas)
    finding = only(adapter, "expert-order")
    assert (finding.fields["order"], finding.fields["source"]) == ("expert-slowest", "mark")
    assert "unsloth_fixed" in finding.text


def test_what_is_written_has_pefts_order_and_no_mark(tmp_path: Path) -> None:
    deltas = stacked(tmp_path / "a")
    repacked(tmp_path / "a")
    restated(tmp_path / "a", auto_mapping={"base_model_class": "X", "unsloth_fixed": True})
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "b")
    adapter = read_adapter(tmp_path / "b")
    assert_updates(adapter, deltas)
    assert adapter.config["auto_mapping"] == {"base_model_class": "X"}
    assert only(adapter, "expert-order").fields["order"] == "expert-fastest"


def test_the_caller_overrides_the_mark(tmp_path: Path) -> None:
    deltas = stacked(tmp_path)
    restated(tmp_path, auto_mapping={"unsloth_fixed": True})
    adapter = read_adapter(tmp_path, expert_order="expert-fastest")
    assert_updates(adapter, deltas)
    assert only(adapter, "expert-order").fields["source"] == "caller"
    repacked(tmp_path)
    restated(tmp_path, auto_mapping=None)
    assert_updates(read_adapter(tmp_path, expert_order="expert-slowest"), deltas)
    with pytest.raises(InputError, match=r"expert_order must be 'expert-fastest' or"):
        read_adapter(tmp_path, expert_order="fastest")  # type: ignore[arg-type]


def test_the_order_is_an_option_of_the_command_line(tmp_path: Path) -> None:
    stacked(tmp_path)
    norms = []
    for order in ("expert-fastest", "expert-slowest"):
        arguments = ["inspect", str(tmp_path), "--format", "json", "--expert-order", order]
        result = CliRunner().invoke(group, arguments)
        assert result.exit_code == 0, result.output
        (document,) = json.loads(result.output)["adapters"]
        codes = {finding["code"]: finding["fields"] for finding in document["findings"]}
        assert codes["expert-order"]["order"] == order
        norms.append([module["norm"] for module in document["modules"]])
    assert norms[0] != norms[1]


def base(folder: Path, experts: int, *, split: bool = False, **config: Any) -> Path:
    """Write a base with so many experts, stacked or each with tensors of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"gate_up_proj": (2 * INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    if split:
        tensors = {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": rng.standard_normal(shape)
            for expert in range(experts)
            for name, shape in shapes.items()
        }
    else:
        tensors = {
            f"model.layers.0.mlp.experts.{name}": rng.standard_normal((experts, *shape))
            for name, shape in shapes.items()
        }
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"} | config))
    return folder


@pytest.mark.parametrize("split", [False, True])
def test_a_base_of_other_experts_is_refused_with_both_numbers(tmp_path: Path, split: bool) -> None:
    stacked(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    other = open_base(base(tmp_path / "eight", 8, split=split))
    with pytest.raises(IncompatibleError, match=r"4 experts .* has 8.*--experts 8"):
        effective_adapter(adapter, other)
    with pytest.raises(IncompatibleError, match="4 experts"):
        study([adapter], base=other)
    arguments = ["amplify", str(tmp_path / "a"), "--base", str(tmp_path / "eight")]
    assert run(arguments) == 3
    fitting = open_base(base(tmp_path / "four", 4, split=split))
    assert set(effective_adapter(adapter, fitting)) == set(adapter)


def test_the_number_of_experts_comes_from_the_config_where_no_tensor_tells(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": np.ones((4, 3), np.float32)}
    for name, config in {
        "plain": {"num_local_experts": 6},
        "nested": {"text_config": {"num_experts": 6}},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert _count_experts(open_base(tmp_path / name)) == 6
    assert _count_experts(open_base(tensors)) is None


def test_a_rank_per_expert_that_is_not_the_configs_follows_from_the_number(tmp_path: Path) -> None:
    deltas = stacked(tmp_path)
    restated(tmp_path, r=RANK * 2)
    adapter = read_adapter(tmp_path, experts=EXPERTS, scale=2.0)
    assert_updates(adapter, deltas)
    assert {update.rank for update in adapter.values()} == {RANK}
    with pytest.raises(MalformedFileError, match=r"12 rows .* 5 experts"):
        read_adapter(tmp_path, experts=5)
    restated(tmp_path, r=5)
    with pytest.raises(MalformedFileError, match=r"12 rows.*rank 5.*experts="):
        read_adapter(tmp_path)


def test_the_weight_of_a_module_adapted_as_a_parameter_is_the_module(tmp_path: Path) -> None:
    model = saved(tmp_path, target_modules=[], target_parameters=["q_proj.weight"])
    adapter = read_adapter(tmp_path)
    update = adapter["q_proj"]
    assert isinstance(update, LowRankUpdate)
    assert (update.layout, update.base_name) == ("linear", "")
    delta = model.base_model.model.q_proj.get_delta_weight("default").detach().double().numpy()
    assert_updates(adapter, {"q_proj": delta})
    assert adapter.provenance.findings == ()


# ------------------------------------------------------------------------------- shared factors


def shared(**parts: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        f"base_model.model.model.layers.0.mlp.experts.{part}.lora_{role}.weight": (
            rng.standard_normal(shape).astype(np.float32)
        )
        for part, pair in parts.items()
        for role, shape in zip("AB", pair, strict=True)
    }


UP = ((1, RANK, WIDTH), (EXPERTS, INNER, RANK))
DOWN = ((EXPERTS, RANK, INNER), (1, WIDTH, RANK))


def tinker(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": "all-linear"}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_factors_that_all_experts_share_are_read_per_expert(tmp_path: Path) -> None:
    tensors = shared(w1=UP, w3=UP, w2=DOWN)
    adapter = read_adapter(tinker(tmp_path / "a", tensors))
    assert len(adapter) == 3 * EXPERTS
    for part in ("w1", "w2", "w3"):
        stem = f"base_model.model.model.layers.0.mlp.experts.{part}"
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        dense = 2 * np.matmul(b.astype(float), a.astype(float))  # broadcasts the shared one
        for expert in range(EXPERTS):
            update = adapter[f"model.layers.0.mlp.experts.{expert}.{part}"]
            np.testing.assert_allclose(update.delta_weight(), dense[expert], atol=1e-12)
    finding = only(adapter, "expert-factors-shared")
    assert finding.fields == {"parameters": ["w1", "w2", "w3"], "experts": EXPERTS}
    other = open_base(base(tmp_path / "eight", 8))
    with pytest.raises(IncompatibleError, match=r"4 experts .* has 8"):
        effective_adapter(adapter, other)


def test_factors_with_an_axis_of_experts_need_not_share(tmp_path: Path) -> None:
    tensors = shared(w1=((EXPERTS, RANK, WIDTH), (EXPERTS, INNER, RANK)))
    adapter = read_adapter(tinker(tmp_path / "a", tensors))
    a, b = (tensor.astype(float) for tensor in tensors.values())
    update = adapter["model.layers.0.mlp.experts.2.w1"]
    np.testing.assert_allclose(update.delta_weight(), 2 * b[2] @ a[2], atol=1e-12)
    assert only(adapter, "expert-stack").fields["experts"] == EXPERTS


def test_other_factors_of_three_axes_are_refused_with_their_own_shapes(tmp_path: Path) -> None:
    tensors = shared(w1=((EXPERTS, WIDTH, RANK), (EXPERTS, RANK, INNER)))
    with pytest.raises(InputError, match=r"\(4, 8, 3\) in the file.*\(4, 3, 10\) in the file"):
        read_adapter(tinker(tmp_path / "a", tensors))


def test_shared_factors_of_rank_1_are_not_taken_for_a_kernel(tmp_path: Path) -> None:
    tensors = shared(w1=((1, 1, WIDTH), (EXPERTS, INNER, 1)))
    adapter = read_adapter(tinker(tmp_path / "a", tensors))
    assert adapter["model.layers.0.mlp.experts.3.w1"].shape == (INNER, WIDTH)


def test_a_projection_that_the_model_lacks_has_empty_factors(tmp_path: Path) -> None:
    tensors = shared(w1=UP, w2=DOWN, w3=((0,), (0,)))
    adapter = read_adapter(tinker(tmp_path / "a", tensors))
    assert {name.rpartition(".")[2] for name in adapter} == {"w1", "w2"}
    assert only(adapter, "empty-placeholders").fields["types"] == ["w3"]


def test_unembed_tokens_is_the_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    key = "base_model.model.model.unembed_tokens.lora_{}.weight"
    tensors = {
        key.format("A"): rng.standard_normal((RANK, WIDTH)),
        key.format("B"): rng.standard_normal((20, RANK)),
    }
    assert list(read_adapter(tinker(tmp_path / "a", tensors))) == ["lm_head"]


# ----------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("count", [1, 2, 4])
def test_block_diagonal_factors_are_expanded_as_peft_does(tmp_path: Path, count: int) -> None:
    blocks = BdLoraConfig(
        target_modules_bd_a=["o_proj"],
        target_modules_bd_b=["q_proj"],
        nblocks=count,
        match_strict=False,
    )
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "router"], use_bdlora=blocks
    )
    model: Any = get_peft_model(Model(), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    deltas = {
        name: BdLoraLinearVariant._get_bdlora_delta_weight(
            model.base_model.model.get_submodule(name), "default"
        )
        .detach()
        .double()
        .numpy()
        for name in ("q_proj", "o_proj", "router")
    }
    adapter = read_adapter(tmp_path)
    assert_updates(adapter, deltas)
    assert {update.rank for update in adapter.values()} == {4}
    restated(tmp_path, use_bdlora={"target_modules_bd_a": ["o_proj"], "nblocks": 3})
    with pytest.raises(MalformedFileError, match="3 blocks one below the other"):
        read_adapter(tmp_path)


def test_velora_is_a_plain_product(tmp_path: Path) -> None:
    velora = VeloraConfig(num_groups=2, init_type="random")
    model = saved(tmp_path, target_modules=["q_proj"], velora_config=velora)
    delta = model.base_model.model.q_proj.get_delta_weight("default").detach().double().numpy()
    assert_updates(read_adapter(tmp_path), {"q_proj": delta})


# ----------------------------------------------------------------------------- sharded savings


def plain(folder: Path, shapes: dict[str, tuple[int, ...]], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.{key}.weight": rng.standard_normal(shape).astype(np.float32)
        for key, shape in shapes.items()
    }
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


def layers(count: int, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"layers.{i}.q_proj.lora_{role}": shape
        for i in range(count)
        for role, shape in (("A", a), ("B", b))
    }


def test_empty_factors_are_named_as_not_gathered(tmp_path: Path) -> None:
    shapes = layers(3, (4, 6), (5, 4)) | layers(1, (0,), (0,))
    with pytest.raises(MalformedFileError, match=r"1 of 3 modules are empty .*ZeRO-3.*zero_to"):
        read_adapter(plain(tmp_path / "a", shapes))
    with pytest.raises(MalformedFileError, match=r"holds no tensors.*ZeRO-3"):
        read_adapter(plain(tmp_path / "b", {}))


def test_empty_saved_tensors_are_a_finding_and_no_saved_modules(tmp_path: Path) -> None:
    shapes = layers(2, (4, 6), (5, 4)) | {"lm_head": (0,), "embed_tokens": (7, 6)}
    folder = plain(tmp_path / "a", shapes, modules_to_save=["lm_head", "embed_tokens"])
    adapter = read_adapter(folder)
    assert set(adapter.saved_modules) == {"embed_tokens.weight"}
    finding = only(adapter, "empty-saved-tensors")
    assert (finding.severity, finding.fields["first"]) == ("damage", "lm_head.weight")
    assert len(adapter.provenance.findings) == 1


@pytest.mark.parametrize(("count", "word"), [(2, "two"), (4, "four")])
def test_one_ranks_rows_are_named_for_what_they_are(tmp_path: Path, count: int, word: str) -> None:
    folder = plain(tmp_path / "a", layers(3, (4 // count, 16), (8 // count, 4)))
    with pytest.raises(UnsupportedMethodError, match=rf"one of {word} ranks.*FSDP2"):
        read_adapter(folder)


def test_factors_of_different_ranks_in_one_module_are_not_a_shard(tmp_path: Path) -> None:
    shapes = layers(3, (4, 16), (8, 4)) | {"layers.1.q_proj.lora_A": (2, 16)}
    with pytest.raises(MalformedFileError, match="different ranks"):
        read_adapter(plain(tmp_path / "a", shapes))


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "non_lora_state_dict.bin"])
def test_a_side_file_is_mentioned(tmp_path: Path, name: str) -> None:
    folder = plain(tmp_path / "a", layers(2, (4, 6), (5, 4)))
    (folder / name).write_bytes(b"x")
    assert only(read_adapter(folder), "side-file").fields["file"] == name
