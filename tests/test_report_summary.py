"""What a report says first, and that its table, its sentences and its files say the same."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import adapter

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.bases import open_base
from lora_analysis.conclusions import comparisons, findings, summary
from lora_analysis.conclusions.summary_lines import MOST_BOXES, finding_boxes
from lora_analysis.conclusions.weight_findings import spectra_by_rank
from lora_analysis.finding import CODES, Finding, Severity
from lora_analysis.report import write_report
from lora_analysis.report.pair_tables import COMPARISON_COLUMNS, comparison_row
from lora_analysis.report.representatives import module_changes, module_populations
from lora_analysis.report.tables import modules_table, ranks_table
from lora_analysis.studies import Study, study
from lora_analysis.text import overlap_number

NAMES = [f"layers.{layer}.{kind}_proj" for layer in range(3) for kind in "qv"]


def trained(
    rng: np.random.Generator, task: str, seed: int, rank: int = 4, strength: float = 6.0
) -> Adapter:
    """Return an adapter whose first output direction is that of its task."""
    directions = np.random.default_rng(ord(task[0]))
    updates = {}
    for name in NAMES:
        B = rng.standard_normal((64, rank))
        B[:, 0] += strength * directions.standard_normal(64)
        updates[name] = LowRankUpdate(name=name, A=rng.standard_normal((rank, 48)), B=B, scale=0.1)
    known = Provenance(task=task, rank=rank, seed=seed)
    return Adapter(updates, label=f"{task}-r{rank}-s{seed}", provenance=known)


def lines_of(result: Study) -> list[tuple[str, str]]:
    """Return the codes and texts of the summary."""
    lines = summary(result)
    return [(line.finding.code, line.text) for line in lines]


@pytest.fixture(scope="module")
def tasks() -> Study:
    """Three tasks × three seeds, and two more ranks of one task."""
    rng = np.random.default_rng(4)
    made = [trained(rng, task, seed) for task in ("add", "copy", "sort") for seed in range(3)]
    made += [trained(rng, "add", seed, rank) for rank in (2, 8) for seed in range(2)]
    return study(made)


def test_tasks_that_differ_are_told_apart_in_the_first_line(tasks: Study) -> None:
    lines = lines_of(tasks)
    comparison = comparisons(tasks)[0]
    assert [code for code, _ in lines] == [
        "summary-tasks-told-apart", "summary-size", "summary-ranks", "summary-no-artifacts",
        "summary-scope",
    ]  # fmt: skip
    assert "3 tasks can be told apart" in lines[0][1]
    assert f"p = {comparison.p:.2g}" in lines[0][1]
    assert f"T {overlap_number(comparison.mean_excess)} " in lines[1][1]
    assert comparison.size in lines[1][1]


def test_strangers_are_not_told_apart_and_get_no_word_for_their_size() -> None:
    rng = np.random.default_rng(8)
    made = [trained(rng, task, seed, strength=0) for task in "abc" for seed in range(3)]
    lines = lines_of(study(made))
    assert lines[0][0] == "summary-tasks-not-told-apart"
    assert "nearly" not in lines[1][1]
    assert "largely" not in lines[1][1]


def test_too_few_runs_are_said_to_be_too_few() -> None:
    rng = np.random.default_rng(8)
    lines = lines_of(study([trained(rng, task, seed) for task in "ab" for seed in range(2)]))
    assert lines[0][0] == "summary-tasks-too-few-runs"
    assert "the same:" not in lines[1][1]  # a size that was not detected


def test_two_adapters_of_unknown_relation_say_what_is_missing(rng: np.random.Generator) -> None:
    lines = lines_of(study([adapter(rng, label=label, d_out=64, d_in=64) for label in "ab"]))
    assert [code for code, _ in lines][:2] == ["summary-conclusion", "summary-size"]
    assert lines[-1][0] == "summary-no-reference"
    assert "needs five adapters of other tasks" in lines[-1][1]


def test_one_adapter_alone_says_what_can_be_said(rng: np.random.Generator) -> None:
    lines = lines_of(study([adapter(rng, label="alone")]))
    assert [code for code, _ in lines] == [
        "summary-rank", "summary-no-damage", "summary-one-adapter",
    ]  # fmt: skip


def test_adapters_of_different_bases_are_said_not_to_be_compared(rng: np.random.Generator) -> None:
    made = [
        Adapter(dict(adapter(rng)), label=name, provenance=Provenance(base_model=f"acme/{name}"))
        for name in ("first", "second")
    ]
    assert lines_of(study(made))[-1][0] == "summary-nothing-compared"


def test_tasks_of_one_run_each_are_said_to_have_no_conclusion(rng: np.random.Generator) -> None:
    lines = lines_of(study([trained(rng, task, seed) for seed, task in enumerate("abcdefghi")]))
    assert lines[-1][0] == "summary-one-run-each"
    assert "compared in pairs" in lines[-1][1]


def test_copies_and_shared_initializations_are_counted(rng: np.random.Generator) -> None:
    first = trained(rng, "add", 0)
    copy = Adapter(dict(first), label="copy", provenance=first.provenance)
    others = [trained(rng, "add", seed) for seed in (1, 2)]
    lines = dict(lines_of(study([first, copy, *others])))
    assert "1 of 6 pairs, each of which is one sample" in lines["summary-one-sample"]


def test_a_copy_under_another_task_name_is_called_a_wrong_name(rng: np.random.Generator) -> None:
    first = trained(rng, "add", 0)
    known = Provenance(task="sort", rank=4, seed=7)
    copy = Adapter(dict(first), label="sort-r4-s7", provenance=known)
    others = [trained(rng, task, seed) for task in ("add", "copy") for seed in (1, 2)]
    lines = dict(lines_of(study([first, copy, *others])))
    assert "two task names in 1 of 15 pairs" in lines["summary-wrong-labels"]
    assert "summary-one-sample" not in lines


def test_a_summary_has_at_most_five_lines_that_lead_somewhere(tasks: Study) -> None:
    rng = np.random.default_rng(1)
    studies = [tasks, study([trained(rng, t, s) for t, s in itertools.product("ab", range(3))])]
    for result in studies:
        lines = summary(result)
        assert 3 <= len(lines) <= 5
        assert {line.section for line in lines} <= {"alike", "ranks", "limits"}
        assert len({line.text for line in lines}) == len(lines)


def _finding(code: str, index: int) -> Finding:
    fields: dict[str, Any] = {
        "adapter": f"a{index}", "modules": 3, "untrained": index, "adapters": [f"a{index}"],
        "text": f"note {index}",
    }  # fmt: skip
    return Finding(code, fields)


def test_findings_of_one_code_share_a_box() -> None:
    boxes, rest = finding_boxes([_finding("untrained-modules", i) for i in range(6)])
    assert [(box.code, len(box.findings)) for box in boxes] == [("untrained-modules", 6)]
    assert not rest


@dataclass(frozen=True)
class _Stub:
    """A finding of any code, without its fields."""

    code: str

    @property
    def severity(self) -> Severity:
        return CODES[self.code].severity


def test_there_are_at_most_fifteen_boxes_and_damage_comes_first() -> None:
    every: Any = [_Stub(code) for code in CODES for _ in range(2)]
    boxes, rest = finding_boxes(every)
    assert len(boxes) == MOST_BOXES
    order = [("damage", "result", "artifact", "limit").index(box.severity) for box in boxes]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2, 3}
    in_boxes = [id(finding) for box in boxes for finding in box.findings]
    assert sorted([*in_boxes, *map(id, rest)]) == sorted(map(id, every))
    # What the tables show needs no box.
    assert not {"more-alike", "reference-pairs", "directions-by-energy"} & {b.code for b in boxes}


def _cells(html: str, caption_start: str) -> list[list[str]]:
    """Return the texts of the cells of the table whose caption starts so."""
    table = next(t for t in html.split("<table>")[1:] if f"<caption>{caption_start}" in t)
    rows = re.findall(r"<tr>(.*?)</tr>", table.split("</table>")[0].split("<tbody>")[1])
    return [[unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r)] for r in rows]


def _markdown(text: str) -> str:
    return re.sub(r"\\([\\`*_\[\]<>|#$~])", r"\1", text)


@pytest.mark.slow
def test_page_markdown_and_json_have_the_same_numbers_and_sentences(
    tasks: Study, tmp_path: Path, undrawn: None
) -> None:
    html = write_report(tasks, tmp_path / "html", figures=()).read_text()
    path = write_report(tasks, tmp_path / "md", figures=(), form="md")
    markdown = _markdown(path.read_text())
    for folder in ("html", "md"):
        results = json.loads((tmp_path / folder / "results.json").read_text())
        every = comparisons(tasks)
        assert len(results["comparisons"]) == len(every) > 4
        for fields, comparison in zip(results["comparisons"], every, strict=True):
            row = dict(zip(COMPARISON_COLUMNS, comparison_row(comparison), strict=True))
            assert list(row.values()) in _cells(html, "T: mean over modules")
            assert f"| {' | '.join(row.values())} |" in markdown
            assert row["T"] == overlap_number(fields["mean_excess"])
            assert row["unrelated"] == overlap_number(fields["unrelated"])
            assert row["largest"] == overlap_number(fields["unrelated_maximum"])
            assert row["ω"] == overlap_number(fields["omega"])
            assert row["p"] == ("–" if fields["p"] is None else f"{fields['p']:.2g}")
            assert row["angle"] == f"{fields['angle']:.0f}°"
        said = unescape(re.sub(r"<[^>]+>", "", html))
        for finding in [*results["findings"], *results["summary"]]:
            assert finding["text"] in said
            assert finding["text"] in markdown
        for finding in results["findings"]:
            assert f'<code class="code">{finding["code"]}</code>' in html
            assert f"`{finding['code']}`" in markdown


def test_ranks_are_compared_over_the_same_tasks_everywhere(tasks: Study) -> None:
    by_rank, of_tasks = spectra_by_rank(tasks)
    assert of_tasks == ("add",)
    assert [(spectra.rank, spectra.adapters) for spectra in by_rank] == [(2, 2), (4, 3), (8, 2)]
    table = ranks_table(tasks)
    assert table is not None
    finding = next(f for f in findings(tasks) if f.code == "directions-by-energy")
    for row, spectra, fields in zip(table.rows, by_rank, finding.fields["ranks"], strict=True):
        assert float(row[5]) == spectra.energy_rank_90[1] == fields["median"]
        assert f"rank {spectra.rank}: {spectra.energy_rank_90[1]:g} (" in finding.text
    line = dict(lines_of(tasks))["summary-ranks"]
    assert f"{by_rank[-1].energy_rank_90[1]:g} directions at rank 8" in line


def test_a_median_between_two_counts_is_printed_as_such(rng: np.random.Generator) -> None:
    made = []
    for seed, counts in enumerate(((2, 2, 2), (3, 3, 3))):
        updates = {}
        for name, count in zip(NAMES, counts, strict=False):
            basis = np.linalg.qr(rng.standard_normal((24, 4)))[0]
            scale = np.where(np.arange(4) < count, 1.0, 0.01)
            A = np.linalg.qr(rng.standard_normal((20, 4)))[0].T
            updates[name] = LowRankUpdate(name=name, A=A, B=basis * scale, scale=1.0)
        made.append(Adapter(updates, label=f"s{seed}"))
    result = study(made)
    table = ranks_table(result)
    assert table is not None
    assert table.rows[0][5] == "2.5" or float(table.rows[0][5]) == 2.5
    assert "in 2.5 of 4 directions" in dict(lines_of(result))["summary-rank"]
    finding = next(f for f in findings(result) if f.code == "directions-by-energy")
    assert "rank 4: 2.5 (" in finding.text


def test_values_per_module_are_of_one_population(tasks: Study) -> None:
    (populations,) = module_populations(tasks, "output")
    assert [population.is_unrelated for population in populations] == [False, True]
    for population, name in zip(populations, ("replicate", "unrelated"), strict=True):
        expected = tasks.population(name, "output").groupby("module")["excess_omega"].median()
        assert population.excess.to_dict() == pytest.approx(expected.to_dict())
        assert str(tasks.population(name, "output").groupby(["a", "b"]).ngroups) in population.name
    table = modules_table(tasks, "output")
    assert table is not None
    assert populations[0].name in table.caption
    assert populations[1].name in table.caption
    for row in table.rows:
        assert row[2] == overlap_number(populations[0].excess[row[0]])
        assert row[4] == overlap_number(populations[1].excess[row[0]])


def test_changes_are_relative_to_the_weights_if_there_are_any(
    tasks: Study, rng: np.random.Generator
) -> None:
    changes = module_changes(tasks)
    assert changes is not None
    assert changes.symbol == "‖ΔW‖"
    assert "base weights" in changes.note
    weights = {f"{name}.weight": rng.standard_normal((64, 48)) for name in NAMES}
    adapters = [trained(rng, "add", seed) for seed in range(2)]
    relative = module_changes(study(adapters, base=open_base(weights), draws=0))
    assert relative is not None
    assert relative.symbol == "‖ΔW‖/‖W‖"
    expected = [
        np.median(
            [
                np.linalg.norm(a[name].scale * a[name].B @ a[name].A)  # type: ignore[union-attr]
                / np.linalg.norm(weights[f"{name}.weight"])
                for a in adapters
            ]
        )
        for name in NAMES
    ]
    assert list(relative.values[NAMES]) == pytest.approx(expected)
