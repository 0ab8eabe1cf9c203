"""The update really applied, where it depends on the base weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import low_rank_update, orthonormal
from safetensors.numpy import save_file

from lora_analysis import effective_update, initial_factors_from_base
from lora_analysis.adapter import DenseUpdate, LowRankUpdate
from lora_analysis.bases import open_base
from lora_analysis.cli import run
from lora_analysis.errors import (
    DegenerateSubspaceError,
    IncompatibleError,
    InputError,
    ScaleError,
    UnsupportedMethodError,
)
from lora_analysis.formats.options import InitialFactorsRequest


def of(update: LowRankUpdate, **fields: object) -> LowRankUpdate:
    own = {name: getattr(update, name) for name in ("name", "A", "B", "scale", "label")}
    return LowRankUpdate(**(own | fields))  # type: ignore[arg-type]


@pytest.fixture(name="W")
def weight(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((24, 20))


def test_dora_with_the_norms_it_has_is_the_low_rank_update(
    rng: np.random.Generator, W: np.ndarray
) -> None:
    update = low_rank_update(rng)
    norms = np.linalg.norm(W + update.delta_weight(), axis=1)
    whole = effective_update(of(update, variant="DoRA", magnitude=norms), W)
    assert isinstance(whole, DenseUpdate)
    assert (whole.name, whole.label) == (update.name, update.label)
    np.testing.assert_allclose(whole.delta, update.delta_weight(), rtol=1e-10, atol=1e-12)


def test_dora_gives_every_row_the_norm_it_learned(rng: np.random.Generator, W: np.ndarray) -> None:
    update, norms = low_rank_update(rng), rng.uniform(1, 2, 24)
    whole = effective_update(of(update, variant="DoRA", magnitude=norms), W)
    after = W + whole.delta_weight()
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), norms, rtol=1e-12)
    V = W + update.delta_weight()
    for row, direction in zip(after, V, strict=True):  # rows are scaled, and not turned
        np.testing.assert_allclose(row @ direction, np.linalg.norm(row) * np.linalg.norm(direction))


def test_kasa_takes_the_smallest_directions_out(rng: np.random.Generator, W: np.ndarray) -> None:
    update = low_rank_update(rng, rank=3, scale=0.5)
    whole = effective_update(of(update, variant="KaSA"), W)
    assert isinstance(whole, LowRankUpdate)
    assert (whole.rank, whole.variant, whole.scale) == (6, "", 0.5)
    U, S, Vh = np.linalg.svd(W)
    kept = (U[:, :17] * S[:17]) @ Vh[:17]
    np.testing.assert_allclose(whole.delta_weight(), update.delta_weight() + kept - W, atol=1e-12)


def test_a_plain_update_is_returned_as_it_is(rng: np.random.Generator, W: np.ndarray) -> None:
    update = low_rank_update(rng)
    assert effective_update(update, W) is update


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_start_is_the_product_its_method_takes_from_the_base(
    rng: np.random.Generator, W: np.ndarray, method: str
) -> None:
    base = open_base({"layers.0.q_proj": W.astype(np.float32)})
    update = low_rank_update(rng, scale=0.25)
    a0, b0 = initial_factors_from_base(base)(InitialFactorsRequest(method, update))
    assert (a0.shape, b0.shape) == ((4, 20), (24, 4))
    W = W.astype(np.float32).astype(np.float64)
    if method == "pissa":
        U, S, Vh = np.linalg.svd(W)
        wanted = (U[:, :4] * S[:4]) @ Vh[:4] / 0.25
    else:  # the projection onto the span of the first columns
        first = W[:, :4]
        wanted = first @ np.linalg.lstsq(first, W, rcond=None)[0]
    np.testing.assert_allclose(b0 @ a0, wanted, rtol=1e-8, atol=1e-10)


def test_what_is_not_defined_or_does_not_fit_is_refused(
    rng: np.random.Generator, W: np.ndarray
) -> None:
    update = low_rank_update(rng)
    flat = orthonormal(rng, 24, 20)  # every singular value is 1
    base = open_base({"layers.0.q_proj": flat.astype(np.float32)})
    start = initial_factors_from_base(base)
    for attempt, kind, told in [
        (lambda: effective_update(of(update, variant="DoRA"), W), InputError, "no magnitude"),
        (
            lambda: effective_update(of(update, variant="DoRA", magnitude=np.ones(24)), W.T),
            IncompatibleError,
            r"\(24, 20\), but .* is \(20, 24\)",
        ),
        (
            lambda: effective_update(
                of(update, variant="DoRA", magnitude=np.ones(24)), -update.delta_weight()
            ),
            DegenerateSubspaceError,
            "rows of W",
        ),
        (
            lambda: effective_update(
                of(update, variant="DoRA", magnitude=np.ones(24), scale=None), W
            ),
            ScaleError,
            "not known",
        ),
        (lambda: effective_update(of(update, variant="KaSA"), flat), DegenerateSubspaceError, "16"),
        (lambda: effective_update(of(update, variant="X"), W), UnsupportedMethodError, "'X'"),
        (lambda: start(InitialFactorsRequest("pissa", update)), DegenerateSubspaceError, "sigma_4"),
        (lambda: start(InitialFactorsRequest("corda", update)), UnsupportedMethodError, "'corda'"),
    ]:
        with pytest.raises(kind, match=told):
            attempt()


def stored_with_base(
    folder: Path, rng: np.random.Generator, **config: object
) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """An adapter of one module in PEFT's layout, its base, and all arrays by name."""
    arrays = {
        "W": rng.standard_normal((24, 20)).astype(np.float32),
        "A": rng.standard_normal((2, 20)).astype(np.float32),
        "B": rng.standard_normal((24, 2)).astype(np.float32),
        "m": rng.uniform(1, 2, 24).astype(np.float32),
    }
    adapter, base = folder / "adapter", folder / "model.safetensors"
    adapter.mkdir()
    key = "base_model.model.layers.0.q_proj"
    tensors = {f"{key}.lora_{role}.weight": arrays[role] for role in "AB"}
    if config.get("use_dora"):
        tensors[f"{key}.lora_magnitude_vector"] = arrays["m"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    save_file({"layers.0.q_proj.weight": arrays["W"]}, base)
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (adapter / "adapter_config.json").write_text(json.dumps(document))
    return adapter, base, {name: one.astype(np.float64) for name, one in arrays.items()}


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run([str(one) for one in ("inspect", *arguments, "--format", "json")]) == 0
    return json.loads(capsys.readouterr().out)["adapters"][0]  # type: ignore[no-any-return]


def test_the_command_line_gives_doras_whole_change(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, a = stored_with_base(tmp_path, rng, use_dora=True)
    V = a["W"] + 2 * a["B"] @ a["A"]
    whole = a["m"][:, None] * V / np.linalg.norm(V, axis=1, keepdims=True) - a["W"]
    found = inspected(capsys, adapter, "--trained-on", base)
    np.testing.assert_allclose(
        found["modules"][0]["singular_values"], np.linalg.svd(whole)[1], rtol=1e-6
    )
    assert "computed from" in found["findings"][-1]["text"]
    plain = inspected(capsys, adapter)
    assert "low-rank part" in plain["findings"][0]["text"]
    assert plain["modules"][0]["rank"] == 2


def test_the_command_line_takes_pissas_start_from_the_base(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, a = stored_with_base(tmp_path, rng, init_lora_weights="pissa")
    assert run(["inspect", str(adapter)]) == 3
    assert "--trained-on BASE" in capsys.readouterr().err
    found = inspected(capsys, adapter, "--trained-on", base)
    U, S, Vh = np.linalg.svd(a["W"])
    whole = 2 * a["B"] @ a["A"] - (U[:, :2] * S[:2]) @ Vh[:2]
    np.testing.assert_allclose(
        found["modules"][0]["singular_values"], np.linalg.svd(whole)[1][:4], rtol=1e-5
    )


def test_a_base_that_does_not_fit_is_one_line(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, _ = stored_with_base(tmp_path, rng, use_dora=True)
    save_file({"layers.0.q_proj.weight": np.ones((24, 21), np.float32)}, base)
    assert run(["inspect", str(adapter), "--trained-on", str(base)]) == 3
    assert "(24, 21)" in capsys.readouterr().err
