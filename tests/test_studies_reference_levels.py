"""Reference files: levels of unrelated adapters, written once and read under limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims.simulation import Base, Setting

from lora_analysis.cli import run
from lora_analysis.conclusions import Conclusion, Reason, comparisons
from lora_analysis.errors import InputError, MalformedFileError, OccupiedError
from lora_analysis.formats import write_adapter
from lora_analysis.studies import Study, study
from lora_analysis.studies.reference_levels import (
    QUANTILES,
    PairOfModules,
    level_of_pair,
    read_reference,
    reference_levels,
    write_reference,
)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(np.random.default_rng(5), Setting(modules=4, dimension=40, geometry=0.3))


@pytest.fixture(scope="module")
def strangers(base: Base) -> Study:
    return study(list(base.strangers([1.0] * 6)), workers=1)


@pytest.fixture
def path(strangers: Study, tmp_path: Path) -> Path:
    target = tmp_path / "base.reference.json"
    write_reference(strangers, target)
    return target


def test_levels_are_quantiles_of_the_unrelated_pairs(strangers: Study) -> None:
    levels = reference_levels(strangers)
    assert {(level.module_type, level.side) for level in levels} == {
        (kind, side) for kind in ("q_proj", "v_proj") for side in ("input", "output")
    }
    rows = strangers.similarities
    rows = rows[(rows["module_type"] == "q_proj") & (rows["side"] == "output")]
    excess = (rows["omega"] - rows["chance_omega"]) / (1 - rows["chance_omega"])
    values = excess.groupby([rows["a"], rows["b"]]).mean()
    level = next(v for v in levels if (v.module_type, v.side) == ("q_proj", "output"))
    assert level.pairs == len(values) == 15
    assert (level.adapters, level.tasks, level.ranks) == (6, 6, (8, 8))
    np.testing.assert_allclose(level.quantiles, np.quantile(values, QUANTILES), rtol=1e-12)
    norms = strangers.spectra[strangers.spectra["module_type"] == "q_proj"]
    medians = norms.groupby("adapter")["norm"].median()
    assert level.ranges["norm"] == (medians.min(), medians.max())


def test_a_file_gives_back_the_levels_to_the_bit(strangers: Study, path: Path) -> None:
    assert read_reference(path) == reference_levels(strangers)


def test_a_study_without_unrelated_pairs_has_no_level(base: Base) -> None:
    one_task = [base.adapter("task", seed) for seed in range(3)]
    with pytest.raises(InputError, match="no level to store"):
        reference_levels(study(one_task, workers=1))


def test_a_level_is_used_in_its_range_and_only_with_enough_pairs(strangers: Study) -> None:
    levels = reference_levels(strangers)
    level = next(v for v in levels if (v.module_type, v.side) == ("q_proj", "output"))
    inside = {name: sum(bounds) / 2 for name, bounds in level.ranges.items()}

    def asked(**changes: Any) -> tuple[float, float, int] | None:
        strength = {"q_proj": inside | changes.pop("strength", {})}
        fields = {"base": level.base, "side": "output", "ranks": (8, 8)} | changes
        pair = PairOfModules(module_types={"q_proj": 2}, strengths=[strength] * 2, **fields)
        return level_of_pair(levels, pair)

    assert asked() == (level.median, level.maximum, 15)
    assert asked(ranks=(4, 8)) is None
    assert asked(base="another/base") is None
    assert asked(strength={"norm": 2 * level.ranges["norm"][1]}) is None
    few = [v for v in levels if v.pairs >= 100]
    assert (
        level_of_pair(few, PairOfModules(level.base, "output", (8, 8), {"q_proj": 1}, [])) is None
    )


def test_two_adapters_get_a_level_from_a_file_and_no_test(base: Base, path: Path) -> None:
    a, b = (base.adapter(f"new{i}", 50 + i, label="AB"[i]) for i in range(2))
    wide = json.loads(path.read_text())
    for level in wide["levels"]:
        level["ranges"] = {name: [0.0, 1e6] for name in level["ranges"]}
    path.write_text(json.dumps(wide))
    output, _ = comparisons(study([a, b], reference=[path], workers=1))
    levels = [v for v in read_reference(path) if v.side == "output"]
    assert output.unrelated is not None
    assert output.unrelated.median == pytest.approx(np.mean([v.median for v in levels]), rel=1e-12)
    assert output.unrelated.maximum == pytest.approx(
        np.mean([v.maximum for v in levels]), rel=1e-12
    )
    assert output.reason is Reason.LEVEL_ONLY
    assert output.conclusion in (
        Conclusion.MORE_ALIKE_THAN_RANDOM,
        Conclusion.NOT_DISTINGUISHABLE_FROM_RANDOM,
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "something else"}, "not a reference file"),
        ({"version": 99}, "Write it again"),
        ({"statistic": "another"}, "Write it again"),
        ({"levels": 3}, "damaged"),
        ({"levels": [{"base": "b"}]}, "damaged"),
    ],
)
def test_a_file_that_is_not_ours_is_refused(
    path: Path, change: dict[str, Any], reason: str
) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MalformedFileError, match=reason):
        read_reference(path)


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 0},
        {"pairs": True},
        {"side": "left"},
        {"ranks": [8]},
        {"values": [0.0] * 3},
        {"values": [float("nan")] * 7},
        {"values": [1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]},
        {"ranges": {"norm": [0.0, 1.0]}},
        {"ranges": {"norm": ["0", 1.0], "participation_ratio": [0.0, 1.0]}},
        {"base": None},
    ],
)
def test_a_damaged_level_is_refused(path: Path, change: dict[str, Any]) -> None:
    document = json.loads(path.read_text())
    document["levels"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(MalformedFileError):
        read_reference(path)


def test_the_command_line_writes_shows_and_uses_a_reference_file(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for adapter in base.strangers([1.0] * 6):
        write_adapter(adapter, tmp_path / "all" / adapter.label)
    target = tmp_path / "base.reference.json"
    sources = [str(path) for path in sorted((tmp_path / "all").iterdir())]
    assert run(["reference", *sources, "-o", str(target)]) == 0
    assert "T of unrelated pairs" in capsys.readouterr().out
    assert run(["reference", *sources, "-o", str(target), "--format", "json"]) == 0  # ours
    document = json.loads(capsys.readouterr().out)
    assert {level["pairs"] for level in document["levels"]} == {15}
    pair = [str(tmp_path / name) for name in "ab"]
    for i, name in enumerate(pair):
        write_adapter(base.adapter(f"x{i}", 80 + i), name)
    assert run(["compare", *pair, "--reference", str(target), "--format", "json"]) == 0


def test_a_file_of_somebody_else_is_not_replaced(strangers: Study, tmp_path: Path) -> None:
    target = tmp_path / "notes.json"
    target.write_text('{"mine": 1}')
    with pytest.raises(OccupiedError):
        write_reference(strangers, target)
    assert target.read_text() == '{"mine": 1}'
    write_reference(strangers, target, force=True)
    assert read_reference(target)
