"""Adapters in merged models: healthy merges are never accused, planted mistakes are named."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
)

from lora_analysis import (
    Adapter,
    DenseUpdate,
    LowRankUpdate,
    open_base,
    read_adapter,
    write_adapter,
)
from lora_analysis.adapter import Provenance, Update
from lora_analysis.cli import run
from lora_analysis.errors import InputError, ScaleError
from lora_analysis.merging import Cause, MergeConclusion, TensorState, merge_check, merge_forecast
from lora_analysis.merging.replay import preimage, spacing
from lora_analysis.storage.dtypes import round_to

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZE, RANK, SCALE = 96, 8, 0.75
NAMES = ("layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj")


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round with torch, which is not what is tested."""
    return torch.from_numpy(values).to(TYPES[dtype]).float().numpy()


@dataclass
class Merge:
    """A base, an adapter and what a merge in float32 gives, stored in one type."""

    adapter: Adapter
    base: dict[str, np.ndarray]
    dtype: str

    def delta(self, name: str) -> np.ndarray:
        update: Any = self.adapter[name]
        return (np.float32(update.scale) * (update.B @ update.A)).astype(np.float32)

    def merged(self, **changes: np.ndarray | float) -> dict[str, np.ndarray]:
        """Return the merged model; ``changes`` replaces ΔW of a module, or gives a factor."""
        model = {}
        for key, W in self.base.items():
            name = key.removesuffix(".weight")
            if name not in self.adapter:
                model[key] = W
                continue
            change = changes.get(name.replace(".", "_"), 1.0)
            delta = (
                change if isinstance(change, np.ndarray) else np.float32(change) * self.delta(name)
            )
            model[key] = rounded(W + delta, self.dtype)
        return model

    def check(self, merged: dict[str, np.ndarray]) -> Any:
        # What a file of this type holds: float32 arrays with its numbers.
        return merge_check(self.adapter, self.base, merged)


def make(dtype: str, size: float = 0.05, *, names: tuple[str, ...] = NAMES) -> Merge:
    """Return a merge with ‖ΔW‖/‖W‖ of about ``size``."""
    rng = np.random.default_rng(3)
    updates: dict[str, Update] = {}
    base = {}
    for name in names:
        W = rng.standard_normal((SIZE, SIZE)).astype(np.float32) / np.sqrt(SIZE)
        A = rng.standard_normal((RANK, SIZE)).astype(np.float32)
        B = rng.standard_normal((SIZE, RANK)).astype(np.float32)
        B *= np.float32(size * np.linalg.norm(W) / np.linalg.norm(SCALE * (B @ A)))
        base[f"{name}.weight"] = rounded(W, dtype)
        updates[name] = LowRankUpdate(name, A, B, SCALE)
    base["norm.weight"] = rounded(rng.standard_normal(SIZE).astype(np.float32), dtype)
    adapter = Adapter(updates, label="adapter", provenance=Provenance(rank=RANK))
    return Merge(adapter, base, dtype)


each_type = pytest.mark.parametrize("dtype", TYPES)


@each_type
@pytest.mark.parametrize("size", [0.3, 0.05, 0.01])
def test_a_healthy_merge_is_applied_and_nothing_else_differs(dtype: str, size: float) -> None:
    case = make(dtype, size)
    result = case.check(case.merged())
    assert result.conclusion is MergeConclusion.APPLIED
    assert not result.is_failed
    assert not result.tensors
    assert result.equal == 1
    low, high = result.strength()
    assert low <= 1 <= high
    assert all(0 < module.resolution < 0.05 for module in result.modules)


@each_type
def test_an_untouched_model_lacks_the_adapter(dtype: str) -> None:
    case = make(dtype)
    result = case.check(case.base)
    assert result.counts() == {MergeConclusion.ABSENT: 3}
    assert result.is_failed


def test_an_update_below_the_rounding_is_inconclusive() -> None:
    case = make("bfloat16", 1e-9)
    assert np.array_equal(
        case.merged()["layers.0.q_proj.weight"], case.base["layers.0.q_proj.weight"]
    )
    result = case.check(case.merged())
    assert result.conclusion is MergeConclusion.INCONCLUSIVE
    assert result.is_inconclusive
    assert {module.cause for module in result.modules} == {Cause.NOTHING_TO_SEE}


@each_type
@pytest.mark.parametrize(
    ("strength", "cause"),
    [
        (0.5, None), (-1.0, Cause.NEGATED), (1.01, None), (0.97, None), (1 / SCALE, Cause.UNSCALED),
        (SCALE, Cause.SCALED_TWICE), (1 / np.sqrt(RANK), Cause.RSLORA_AS_LORA), (0.3141, None),
        (float(RANK), Cause.NOT_DIVIDED),
    ],
)  # fmt: skip
def test_a_wrong_strength_is_found_with_an_interval_that_holds_it(
    dtype: str, strength: float, cause: Cause | None
) -> None:
    case = make(dtype)
    result = case.check(case.merged(layers_0_k_proj=strength))
    wrong = next(module for module in result.modules if module.module == "layers.0.k_proj")
    assert wrong.conclusion is MergeConclusion.WRONG_STRENGTH
    assert wrong.cause is cause
    low, high = wrong.strength
    assert low <= np.float32(strength) <= high
    assert high - low < 0.02
    assert result.counts()[MergeConclusion.APPLIED] == 2
    assert result.is_failed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousandth_is_found_where_the_update_is_clear(dtype: str) -> None:
    case = make(dtype, 0.3)
    result = case.check(case.merged(layers_0_k_proj=1.001))
    assert [m.conclusion for m in result.modules].count(MergeConclusion.WRONG_STRENGTH) == 1


@each_type
def test_two_merges_and_twice_the_strength_are_twice(dtype: str) -> None:
    case = make(dtype)
    doubled = case.check(case.merged(layers_1_q_proj=2.0))
    again = Merge(case.adapter, case.merged(), dtype).merged()
    assert doubled.counts()[MergeConclusion.TWICE] == 1
    assert case.check(again).counts() == {MergeConclusion.TWICE: 3}


def rows_only(case: Merge) -> np.ndarray:
    delta = case.delta("layers.0.q_proj").copy()
    delta[SIZE // 3 :] = 0
    return delta


def half_ranks(case: Merge) -> np.ndarray:
    update: Any = case.adapter["layers.0.q_proj"]
    half = RANK // 2
    return np.float32(SCALE) * (update.B[:, :half] @ update.A[:half])


DEFECTS: dict[str, tuple[Callable[[Merge], np.ndarray], MergeConclusion, Cause | None]] = {
    "rows": (rows_only, MergeConclusion.PARTLY, Cause.SOME_ROWS),
    "columns": (
        lambda case: np.where(np.arange(SIZE) % 3 == 0, 0, case.delta("layers.0.q_proj")),
        MergeConclusion.PARTLY, Cause.SOME_COLUMNS,
    ),
    "ranks": (half_ranks, MergeConclusion.PARTLY, Cause.SOME_RANKS),
    "transposed": (
        lambda case: case.delta("layers.0.q_proj").T.copy(),
        MergeConclusion.CHANGED, Cause.TRANSPOSED,
    ),
    "other layer": (
        lambda case: case.delta("layers.1.q_proj"), MergeConclusion.CHANGED, Cause.OTHER_MODULE,
    ),
    "another checkpoint": (
        lambda case: case.delta("layers.0.q_proj")
        + 0.01 * np.abs(case.delta("layers.0.q_proj")).mean()
        * np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32),
        MergeConclusion.CHANGED, None,
    ),
}  # fmt: skip


@each_type
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_named(dtype: str, defect: str) -> None:
    make_delta, conclusion, cause = DEFECTS[defect]
    case = make(dtype, 0.2)
    delta = np.ascontiguousarray(make_delta(case), np.float32)
    result = case.check(case.merged(layers_0_q_proj=delta))
    wrong = next(module for module in result.modules if module.module == "layers.0.q_proj")
    assert (wrong.conclusion, wrong.cause) == (conclusion, cause)
    assert result.is_failed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_that_was_undone_is_restored(dtype: str) -> None:
    case = make(dtype, 0.2)
    merged = case.merged()
    undone = {
        key: rounded(W - case.delta(key.removesuffix(".weight")), dtype)
        if key.removesuffix(".weight") in case.adapter
        else W
        for key, W in merged.items()
    }
    assert not np.array_equal(undone["layers.0.q_proj.weight"], case.base["layers.0.q_proj.weight"])
    assert case.check(undone).counts() == {MergeConclusion.RESTORED: 3}


def test_other_tensors_are_accounted_for() -> None:
    case = make("bfloat16")
    merged = case.merged()
    merged["norm.weight"] = merged["norm.weight"] * 2
    merged["new.weight"] = np.ones((2, 2), np.float32)
    result = case.check(merged)
    assert {(t.name, t.state) for t in result.tensors} == {
        ("norm.weight", TensorState.CHANGED), ("new.weight", TensorState.ONLY_MERGED),
    }  # fmt: skip
    assert result.is_failed
    assert result.conclusion is MergeConclusion.CHANGED
    assert len(result.to_frame()) == 3


def test_rows_of_a_fused_weight_that_no_module_adapts_are_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((3 * SIZE, SIZE)).astype(np.float32)
    A, B = (rng.standard_normal(s).astype(np.float32) for s in ((RANK, SIZE), (SIZE, RANK)))
    updates = {name: LowRankUpdate(name, A, B, 0.1) for name in ("h.0.attn.q_proj",)}
    adapter = Adapter(updates, label="adapter")
    base = {"h.0.attn.qkv_proj.weight": fused}
    merged = {"h.0.attn.qkv_proj.weight": fused.copy()}
    merged["h.0.attn.qkv_proj.weight"][:SIZE] += np.float32(0.1) * (B @ A)
    healthy = merge_check(adapter, base, merged)
    assert healthy.conclusion is MergeConclusion.APPLIED
    assert not healthy.is_failed
    merged["h.0.attn.qkv_proj.weight"][SIZE] += 1
    damaged = merge_check(adapter, base, merged)
    assert [t.state for t in damaged.tensors] == [TensorState.OTHER_ROWS]
    assert damaged.is_failed


def test_a_dense_update_is_checked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    W, D = (rng.standard_normal((SIZE, SIZE)).astype(np.float32) for _ in range(2))
    adapter = Adapter({"q_proj": DenseUpdate("q_proj", D)}, label="adapter")
    merged = {"q_proj.weight": rounded(W + D, "bfloat16")}
    assert merge_check(adapter, {"q_proj.weight": W}, merged).conclusion is MergeConclusion.APPLIED


def test_models_without_the_modules_and_unknown_scales_are_refused() -> None:
    case = make("float32")
    with pytest.raises(InputError, match="No module of adapter"):
        merge_check(case.adapter, {"other.weight": np.eye(4, dtype=np.float32)}, case.base)
    name = NAMES[0]
    unknown: Any = case.adapter[name]
    adapter = Adapter({name: LowRankUpdate(name, unknown.A, unknown.B, None)}, label="a")
    with pytest.raises(ScaleError, match="scale"):
        merge_check(adapter, case.base, case.base)


@each_type
def test_the_preimage_contains_all_that_rounds_to_a_number(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = round_to(rng.standard_normal(1000) * 10.0 ** rng.integers(-4, 4, 1000), dtype)
    low, high = preimage(values, (dtype,))
    inside = low + (high - low) * rng.uniform(size=1000)
    assert (np.abs(round_to(inside, dtype) - values) <= spacing(values, dtype)).all()
    for share in (-0.24, 0.24):  # the number below a power of two is half as far
        beyond = values + share * spacing(values, dtype)
        assert ((low <= beyond) & (beyond <= high)).all()
        assert np.array_equal(round_to(beyond, dtype), values)


@each_type
def test_rounding_is_that_of_torch(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    assert np.array_equal(round_to(values.astype(np.float64), dtype), rounded(values, dtype))


def trained(model: Any, dtype: torch.dtype) -> Any:
    """Give PEFT's factors numbers as training would, in a type."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.05 * torch.randn_like(parameter)
        elif "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": False,
}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


def peft_merge(
    folder: Path,
    types: tuple[str, str, str],
    config: PretrainedConfig = LlamaConfig(**SIZES),  # noqa: B008 - not changed
    **options: Any,
) -> Any:
    """Merge with PEFT: base stored, adapter stored and model loaded in three types."""
    base_type, adapter_type, loaded_type = (TYPES[name] for name in types)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).to(base_type).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=loaded_type)
    lora = peft.LoraConfig(r=4, lora_alpha=6, **({"target_modules": TARGETS} | options))
    wrapped = trained(peft.get_peft_model(model, lora, autocast_adapter_dtype=False), adapter_type)
    wrapped.save_pretrained(folder / "adapter")
    wrapped.merge_and_unload(safe_merge=base_type == torch.float32).save_pretrained(
        folder / "merged"
    )
    return merge_check(read_adapter(folder / "adapter"), folder / "base", folder / "merged")


MATRIX = list(itertools.product(TYPES, repeat=3))


@pytest.mark.slow
@pytest.mark.parametrize("types", MATRIX, ids="-".join)
def test_what_peft_merges_is_applied(types: tuple[str, str, str], tmp_path: Path) -> None:
    result = peft_merge(tmp_path, types, use_dora=MATRIX.index(types) % 2 == 1)
    assert result.counts() == {MergeConclusion.APPLIED: 4}
    assert not result.is_failed
    assert not result.tensors


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_peft_merges_into_half_precision_is_applied(dora: bool, tmp_path: Path) -> None:
    result = peft_merge(tmp_path, ("bfloat16", "float32", "bfloat16"), use_dora=dora)
    assert result.counts() == {MergeConclusion.APPLIED: 4}
    assert not result.is_failed


@pytest.mark.slow
@pytest.mark.parametrize("types", MATRIX[::5], ids="-".join)
def test_what_peft_merges_into_stacked_experts_is_applied(
    types: tuple[str, str, str], tmp_path: Path
) -> None:
    parameters = [f"mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    result = peft_merge(
        tmp_path, types, MixtralConfig(**SIZES, num_local_experts=3),
        target_modules=["q_proj"], target_parameters=parameters,
    )  # fmt: skip
    assert result.counts() == {MergeConclusion.APPLIED: 7}
    assert not result.is_failed


def test_doras_low_rank_part_alone_is_a_partial_merge(tmp_path: Path) -> None:
    peft_merge(tmp_path, ("float32", "float32", "float32"), use_dora=True)
    adapter = read_adapter(tmp_path / "adapter")
    base = open_base(tmp_path / "base")
    before = {name: base.stored_tensor(name) for name in base.names}
    added = dict(before)
    for name, update in adapter.items():
        key = base.weight(name, shape=update.shape).name
        delta = update.delta_weight()
        added[key] = (
            before[key] + (delta if delta.shape == before[key].shape else delta.T)
        ).astype(np.float32)
    result = merge_check(adapter, tmp_path / "base", added)
    assert {m.conclusion for m in result.modules} == {MergeConclusion.PARTLY}
    assert {m.cause for m in result.modules} == {Cause.WITHOUT_MAGNITUDE}
    assert {m.conclusion for m in merge_check(adapter, before, before).modules} == {
        MergeConclusion.ABSENT
    }


def test_saved_modules_are_checked(tmp_path: Path) -> None:
    peft_merge(tmp_path, ("float32",) * 3, modules_to_save=["lm_head"])
    healthy = merge_check(
        read_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "merged"
    )
    assert not healthy.is_failed


@pytest.mark.parametrize(("size", "kept"), [(0.3, 0.98), (1e-4, 0.1)])
def test_the_forecast_is_what_the_merge_keeps(size: float, kept: float) -> None:
    case = make("bfloat16", size)
    merged = case.merged()
    for forecast in merge_forecast(case.adapter, case.base, dtype="bfloat16"):
        key = f"{forecast.module}.weight"
        added = merged[key].astype(np.float64) - case.base[key]
        delta = case.delta(forecast.module).astype(np.float64)
        expected = np.vdot(added, delta) / np.vdot(delta, delta)
        assert forecast.retained == pytest.approx(expected, abs=1e-3)
        assert forecast.unchanged == pytest.approx((added == 0).mean(), abs=1e-3)
        assert forecast.rounding == 0
        assert (forecast.retained > kept) == (size > 0.1)
        assert forecast.is_lost == (size < 0.01)


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = run([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def test_the_command_says_by_its_exit_code_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make("float32")
    merged = case.merged()
    models = {
        "base": case.base,
        "good": merged,
        "missing": merged | {"layers.0.q_proj.weight": case.base["layers.0.q_proj.weight"]},
        "other": merged | {"norm.weight": merged["norm.weight"] + 1},
    }
    for name, tensors in models.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    write_adapter(case.adapter, tmp_path / "adapter")
    tiny = make("float32", 1e-12)
    write_adapter(tiny.adapter, tmp_path / "tiny")
    options = ["--base", tmp_path / "base.safetensors", "--not-transposed", "--merged"]
    for model, expected, text in (
        ("good", 0, "applied"), ("base", 5, "absent"), ("missing", 5, "partly applied"),
        ("other", 5, "changed otherwise"),
    ):  # fmt: skip
        arguments = [
            "merge-check",
            tmp_path / "adapter",
            *options,
            tmp_path / f"{model}.safetensors",
        ]
        code, out = run_cli(capsys, *arguments)
        assert (code, text in out) == (expected, True), out
        assert run_cli(capsys, *arguments, "--format", "quiet") == (expected, f"{text}\n")
        code, out = run_cli(capsys, *arguments, "--format", "json")
        document = json.loads(out)
        assert document["conclusion"] == text
        assert len(document["modules"]) == 3
    code, out = run_cli(
        capsys, "merge-check", tmp_path / "tiny", *options, tmp_path / "base.safetensors"
    )
    assert (code, "inconclusive" in out) == (6, True)
    code, out = run_cli(
        capsys, "merge-check", tmp_path / "adapter", *options[:-1], "--dtype", "bfloat16"
    )
    assert (code, "keeps" in out) == (0, True)
