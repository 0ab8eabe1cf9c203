from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_analysis import demo
from lora_analysis.cli import run
from lora_analysis.storage.records import RECORD_FOLDER
from lora_analysis.storage.source_names import bundled_data
from lora_analysis.training import LoopOptions, RunConfig, demo_sweep

CELLS = (("rotate", 2, 0), ("rotate", 3, 0), ("mirror", 2, 1))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo of three runs of three steps."""
    loop = LoopOptions(steps=3, warmup_steps=1, evaluations=1)
    configs = [RunConfig(task=t, rank=r, seed=s, loop=loop) for t, r, s in CELLS]
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_sweep", lambda: configs)
        told: list[tuple[str, int, int]] = []
        # The files of a report's figures take most of its time, and have tests of their own.
        patch.setitem(demo.write_report.__kwdefaults__, "figures", ("svg",))
        demo.run_demo(folder, device="cpu", progress=lambda *event: told.append(event))
        assert (folder / "figures" / "ranks_output.svg").is_file()
        patch.setitem(demo.write_report.__kwdefaults__, "figures", ())
        first = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.*")}
        demo.run_demo(folder, device="cpu")  # everything is finished: nothing is trained again
        assert first == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.*")}
    assert ("adapters", 3, 3) in told
    assert ("modules", 8, 8) in told
    assert told[-1] == ("report sections", 8, 8)
    return folder


@pytest.mark.slow
def test_the_demo_leaves_runs_and_a_report(short: Path) -> None:
    names = {path.name for path in (short / "runs").iterdir()}
    assert names == {RECORD_FOLDER, "sweep.json", "rotate-r2-s0", "rotate-r3-s0", "mirror-r2-s1"}
    results = json.loads((short / "results.json").read_text())
    assert {row["task"] for row in results["adapters"]} == {"rotate", "mirror"}
    assert "figure-ranks_output" in (short / "report.html").read_text()


@pytest.mark.slow
def test_amplify_on_a_trained_adapter_equals_the_dense_formula(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = short / "runs" / "rotate-r3-s0", bundled_data("digits-vit")
    code = run(["amplify", str(folder), "--base", str(base), "--format", "json"])
    assert code == 0
    rows = json.loads(capsys.readouterr().out)["modules"]
    factors = load_file(folder / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] / 3
    for row in rows:
        key = f"base_model.model.{row['module']}"
        A, B = (factors[f"{key}.lora_{x}.weight"].to(torch.float64).numpy() for x in "AB")
        W = weights[f"{row['module']}.weight"].to(torch.float64).numpy()
        u, s, vt = np.linalg.svd(scale * B @ A)
        k = row["k"]
        projected = np.linalg.norm(u[:, :k].T @ W @ vt[:k].T)
        norm = np.linalg.norm(s[:k])
        rms = np.linalg.norm(W) * k / np.sqrt(W.size)
        assert row["projected"] == pytest.approx(projected, rel=1e-9)
        assert row["amplification_factor"] == pytest.approx(norm / projected, rel=1e-9)
        assert row["chance_factor"] == pytest.approx(norm / rms, rel=1e-9)
        assert row["enrichment"] == pytest.approx(projected / rms, rel=1e-9)
        top = np.linalg.norm(np.linalg.svd(W, compute_uv=False)[:k])
        assert row["projected_weight"] == pytest.approx(top, rel=1e-9)


def test_the_demo_trains_the_13_adapters_that_its_conclusions_need() -> None:
    cells = {(one.task, one.rank, one.seed) for one in demo_sweep()}
    assert len(cells) == 13
    assert {c for c in cells if c[1] == 8} == {
        (task, 8, seed) for task in ("rotate", "invert", "mirror") for seed in (0, 1, 2)
    }
    assert {c for c in cells if c[1] != 8} == {
        ("rotate", rank, seed) for rank in (4, 64) for seed in (0, 1)
    }
    assert len({one.alpha for one in demo_sweep()}) == 1


def test_the_demo_on_text_has_the_same_seeds_on_a_second_task() -> None:
    configs = demo.text_sweep()
    assert len({config.name for config in configs}) == 10
    eights = {(c.task, c.seed) for c in configs if c.rank == 8}
    assert eights == {(task, seed) for task in ("scipy", "sklearn") for seed in (0, 1, 2)}
    assert {(c.task, c.rank, c.seed) for c in configs if c.rank != 8} == {
        ("scipy", rank, seed) for rank in (4, 64) for seed in (0, 1)
    }
    assert len({(c.alpha, c.targets, c.base, c.data, c.loop) for c in configs}) == 1
