from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
from factories import adapter
from test_studies import sweep  # noqa: F401  (a fixture)

from lora_analysis.adapter import Adapter, LowRankUpdate, Provenance
from lora_analysis.bases import open_base
from lora_analysis.finding import CODES
from lora_analysis.formats import read_adapter, write_adapter
from lora_analysis.report import results_schema, write_report
from lora_analysis.report.pair_tables import steps_table
from lora_analysis.report.representatives import (
    choose_drawn_pairs,
    rank_pair,
    representative_modules,
    seed_pair,
)
from lora_analysis.report.results import csv_text
from lora_analysis.similarity import subspace_similarity
from lora_analysis.studies import Failure, study
from lora_analysis.text import number

# Elements that end themselves in HTML.
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What a test wants to know of a page; raises where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [
            value or "" for _, found in self.tags for key, value in found.items() if key == name
        ]


@pytest.fixture(scope="module")
def report(
    sweep: list[Adapter],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """One report with every section, read by many tests."""
    rng = np.random.default_rng(1)
    weights = {f"{name}.weight": rng.standard_normal((48, 40)) for name in sweep[0]}
    folder = tmp_path_factory.mktemp("report")
    return write_report(
        study(sweep, base=open_base(weights), draws=2),
        folder,
        figures=("svg",),
        command="made by a test",
    )


@pytest.mark.slow
def test_the_page_runs_no_script_and_asks_for_nothing(report: Path) -> None:
    page = Page(report.read_text())
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not [a for _, found in page.tags for a in found if a.startswith("on")]
    for value in page.attributes("href") + page.attributes("xlink:href") + page.attributes("src"):
        assert value.startswith(("#", "data:image/png;base64,")), value
    assert "url(http" not in report.read_text().replace(" ", "")


def test_the_page_forbids_scripts_and_requests_by_policy(report: Path) -> None:
    page = Page(report.read_text())
    policies = [
        found["content"]
        for tag, found in page.tags
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "script-src" not in policies[0]


def test_every_id_is_unique_and_every_link_leads_somewhere(report: Path) -> None:
    page = Page(report.read_text())
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for link in page.attributes("href"):
        if link.startswith("#"):
            assert link[1:] in ids


def test_the_sections_come_in_the_order_of_the_questions(report: Path) -> None:
    page = Page(report.read_text())
    sections = [found["aria-labelledby"] for tag, found in page.tags if tag == "section"]
    assert sections == [
        "short", "definitions", "alike", "ranks", "tasks", "layers", "weights", "modules",
        "limits", "provenance",
    ]  # fmt: skip
    figures = [found["id"] for tag, found in page.tags if tag == "figure"]
    assert figures == [
        "figure-similarity_matrix_output", "figure-levels_output", "figure-levels_input",
        "figure-similarity_matrix_input", "figure-similarity_matrix_cosine",
        "figure-ranks_output", "figure-ranks_input", "figure-energy", "figure-seeds_output",
        "figure-seeds_input", "figure-changes_map", "figure-changes", "figure-enrichment",
        "figure-enrichment_controls", "figure-enrichment_layers", "figure-energy_output",
        "figure-energy_input", "figure-intruders_output", "figure-intruders_input",
        "figure-modules", "figure-module_1", "figure-module_2", "figure-module_3",
        "figure-module_4",
    ]  # fmt: skip
    svgs = [found for tag, found in page.tags if tag == "svg"]
    assert len(svgs) == len(figures)
    assert all(found.get("role") == "img" for found in svgs)


def test_terms_are_defined_before_the_first_table(report: Path) -> None:
    text = report.read_text()
    assert text.index('id="definitions"') < text.index("<strong>ω</strong>") < text.index("<table")


def test_figures_and_tables_lie_beside_the_page(report: Path) -> None:
    folder = report.parent
    names = {path.name for path in (folder / "figures").iterdir()}
    assert {
        "ranks_output.svg",
        "modules.svg",
        "enrichment.svg",
        "similarity_matrix_cosine.svg",
    } <= names
    with (folder / "tables" / "similarities.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 10 * 4 * 2
    assert 0 <= float(rows[0]["phi_1_1"]) <= 1


def test_results_are_strict_json_with_every_row(report: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"results.json holds {constant}")

    text = (report.parent / "results.json").read_text()
    results = json.loads(text, parse_constant=refuse)
    assert results["schema_version"] == 5
    jsonschema.validate(results, results_schema())
    assert len(results["overlaps"]) == 10 * 2
    assert {one["k"] for one in results["amplifications"]} == {4, 8}
    assert results["findings"][0]["text"]
    assert results["run_inference"][0]["smallest_p"] == pytest.approx(1 / 2)
    assert results["comparisons"][0]["conclusion"] == "too few runs"


def test_the_summaries_are_medians_of_the_tables(report: Path) -> None:
    results = json.loads((report.parent / "results.json").read_text())
    with (report.parent / "tables" / "similarities.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for one in results["overlaps"]:
        own = [
            float(row["omega"])
            for row in rows
            if (row["a"], row["b"], row["side"]) == (one["a"], one["b"], one["side"])
        ]
        assert one["rows"] == len(own) == 4
        assert one["omega"] == pytest.approx(np.median(own))


@pytest.mark.parametrize("count", [1, 2])
def test_small_studies_follow_the_schema_too(
    rng: np.random.Generator, tmp_path: Path, count: int
) -> None:
    made = [adapter(rng, label=f"a{n}", rank=2 + n) for n in range(count)]
    write_report(study(made), tmp_path, figures=(), form="md")
    results = json.loads((tmp_path / "results.json").read_text())
    jsonschema.validate(results, results_schema())
    assert (results["similarity_matrix"] is None) == (count == 1)
    assert (tmp_path / "grids.npz").is_file() == (count == 2)


def test_the_grids_beside_the_page_are_those_of_the_study(
    sweep: list[Adapter],  # noqa: F811
    report: Path,
) -> None:
    name = "layers.1.v_proj"
    with np.load(report.parent / "grids.npz", allow_pickle=False) as grids:
        # Pairs of ranks and of seeds, each with an unrelated one; both sides, four modules.
        assert len(grids) == 4 * 2 * 4
        found = grids[f"turn-r4-s1|turn-r8-s0|output|{name}"]
    expected = subspace_similarity(sweep[1][name], sweep[4][name], side="output").values
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_lines_of_python_give_the_numbers_of_the_report(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    places = [
        write_adapter(adapter(rng, label=f"turn-r{rank}-s{seed}", rank=rank), tmp_path / name)
        for rank, seed, name in ((2, 0, "a"), (3, 1, "b"))
    ]
    result = study(
        [read_adapter(place, label=f"turn-r{n + 2}-s{n}") for n, place in enumerate(places)],
        label="{task}-r{rank}-s{seed}",
        modules="q_proj",
    )
    text = write_report(result, tmp_path / "out", figures=(), form="md").read_text()
    assert "![" not in text  # no picture that is not there
    lines = text.split("```python\n")[1].split("```")[0]
    told: dict[str, object] = {}
    exec(lines, told)  # the lines are the report's own
    again = told["result"]
    pd.testing.assert_frame_equal(again.similarities, result.similarities)  # type: ignore[attr-defined]
    assert list(again.runs["task"]) == ["turn", "turn"]  # type: ignore[attr-defined]


def test_artifacts_come_before_what_they_touch(report: Path) -> None:
    results = json.loads((report.parent / "results.json").read_text())
    severities = [finding["severity"] for finding in results["findings"]]
    assert severities.index("artifact") < severities.index("result")


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a schema with its reference replaced."""
    if "$ref" not in part:
        return part
    target = schema["$defs"][part["$ref"].rpartition("/")[2]]
    return {**target, **{key: value for key, value in part.items() if key != "$ref"}}


def _undescribed(
    value: Any, part: dict[str, Any], schema: dict[str, Any], path: str
) -> Iterator[str]:
    """Yield the paths of keys in a document that its schema does not describe."""
    part = _resolved(part, schema)
    alternatives = [_resolved(a, schema) for a in part.get("anyOf", part.get("oneOf", ()))]
    wanted = "properties" if isinstance(value, dict) else "items"
    part = next((a for a in alternatives if wanted in a), part)
    if isinstance(value, dict):
        for key, item in value.items():
            of_key = part["properties"].get(key, part["additionalProperties"])
            if not of_key or "description" not in _resolved(of_key, schema):
                yield f"{path}.{key}"
            else:
                yield from _undescribed(item, of_key, schema, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _undescribed(item, part["items"], schema, f"{path}[]")


def test_the_schema_describes_every_key_of_a_document(report: Path) -> None:
    results = json.loads((report.parent / "results.json").read_text())
    schema = results_schema()
    assert not set(_undescribed(results, schema, schema, ""))
    results["comparisons"][0]["undescribed"] = 1
    assert set(_undescribed(results, schema, schema, "")) == {".comparisons[].undescribed"}


def test_the_schema_documents_every_code(report: Path) -> None:
    results = json.loads((report.parent / "results.json").read_text())
    schema = results_schema()
    listed = schema["properties"]["findings"]["items"]["properties"]["code"]["oneOf"]
    assert [entry["const"] for entry in listed] == list(CODES)
    for entry in listed:
        code = CODES[entry["const"]]
        assert (entry["title"], entry["description"]) == (
            f"{code.severity}: {code.topic}", code.template,
        )  # fmt: skip
    results["findings"][0]["code"] = "no-such-code"
    with pytest.raises(jsonschema.ValidationError, match="no-such-code"):
        jsonschema.validate(results, schema)


def test_tables_are_written_as_parquet_when_asked(rng: np.random.Generator, tmp_path: Path) -> None:
    result = study([adapter(rng, label="one")])
    write_report(result, tmp_path, figures=(), form="md", parquet=True)
    found = pd.read_parquet(tmp_path / "tables" / "spectra.parquet")
    assert list(found["module"]) == list(result.spectra["module"])


@pytest.mark.slow
def test_the_same_study_gives_the_same_bytes(rng: np.random.Generator, tmp_path: Path) -> None:
    result = study([adapter(rng, modules=1, label=f"r{r}", rank=r) for r in (2, 3)])
    first, second = (write_report(result, tmp_path / name, figures=("svg",)) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    for figure in (first.parent / "figures").iterdir():
        assert figure.read_bytes() == (second.parent / "figures" / figure.name).read_bytes()


@pytest.mark.slow
def test_hostile_names_are_shown_as_text(rng: np.random.Generator, tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>$\\frac{"
    update = LowRankUpdate(
        name=name, A=rng.standard_normal((2, 9)), B=rng.standard_normal((8, 2)), scale=1.0
    )
    hostile = Adapter({name: update}, label="<b>=cmd()")
    other = Adapter({name: update}, label="other")
    path = write_report(
        study([hostile, other]),
        tmp_path,
        title="<i>title</i>",
        command="run <u>this</u>",
        figures=(),
    )
    page = Page(path.read_text())
    assert not {tag for tag, _ in page.tags} & {"img", "script", "b", "i", "u"}
    assert "<b>=cmd()" in "".join(page.text)


def test_csv_cells_that_a_spreadsheet_would_run_are_quoted() -> None:
    text = csv_text(pd.DataFrame({"name": ["=cmd()", "+1", "plain"], "value": [-1.0, 2.0, 3.0]}))
    assert [line.split(",")[0] for line in text.splitlines()[1:]] == ["'=cmd()", "'+1", "plain"]
    assert "-1.0" in text


def test_one_adapter_alone_makes_a_report(rng: np.random.Generator, tmp_path: Path) -> None:
    text = write_report(study([adapter(rng, label="alone")]), tmp_path, figures=()).read_text()
    assert "<h1>LoRA adapter alone</h1>" in text
    assert "Across ranks" not in text


def test_an_untrained_adapter_alone_makes_a_report(tmp_path: Path) -> None:
    empty = LowRankUpdate(name="q", A=np.ones((2, 9)), B=np.zeros((8, 2)), scale=1.0)
    text = write_report(
        study([Adapter({"q": empty}, label="empty")]), tmp_path, figures=()
    ).read_text()
    assert "empty is untrained" in text
    assert "figure-" not in text


def test_failures_are_named_in_the_report(rng: np.random.Generator, tmp_path: Path) -> None:
    result = study([adapter(rng)], failures=[Failure("bad.safetensors", "it is truncated")])
    text = write_report(result, tmp_path, figures=()).read_text()
    assert "bad.safetensors could not be analyzed: it is truncated" in text


@pytest.mark.slow
def test_the_markdown_report_shows_findings_figures_and_tables(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    result = study([adapter(rng, label="r2", rank=2), adapter(rng, label="r3", rank=3)])
    path = write_report(result, tmp_path, figures=("svg",), form="md", title="A *bold* title")
    text = path.read_text()
    assert path.name == "report.md"
    assert "![Two ranks, output side.](figures/ranks_output.svg)" in text
    assert (tmp_path / "figures" / "ranks_output.svg").is_file()
    assert "# A \\*bold\\* title" in text
    header = next(line for line in text.splitlines() if line.startswith("| comparison"))
    ruler = text.splitlines()[text.splitlines().index(header) + 1]
    assert header.count("|") == ruler.count("|")


def test_the_representative_modules_are_one_middle_layer_of_each_type() -> None:
    names = [f"layers.{i}.{kind}_proj" for i in range(8) for kind in "qkv"]
    assert representative_modules(names) == ["layers.4.q_proj", "layers.4.v_proj"]
    assert representative_modules(["a.0.q", "a.1.q", "a.2.q", "a.3.q"]) == ["a.1.q", "a.2.q"]
    assert representative_modules(["q"]) == ["q"]


def test_the_figure_of_ranks_takes_the_largest_against_the_one_near_eight(
    rng: np.random.Generator,
) -> None:
    made = [
        Adapter(
            dict(adapter(rng, rank=rank)),
            label=f"r{rank}",
            provenance=Provenance(rank=rank, seed=0, task="t"),
        )
        for rank in (2, 7, 3, 12)
    ]

    def names(adapters: list[Adapter]) -> tuple[str, str]:
        pair = rank_pair(study(adapters))
        assert pair is not None
        return pair.a, pair.b

    assert names(made) == ("r7", "r12")
    assert names(list(reversed(made))) == ("r7", "r12")
    assert seed_pair(study(made)) is None
    # A stranger whose rank is nearer to 8 does not answer what ranks of one task share.
    assert names([*made, adapter(rng, label="stranger", rank=8)]) == ("r7", "r12")


def test_heat_maps_stand_next_to_an_unrelated_pair_of_the_same_ranks(
    sweep: list[Adapter],  # noqa: F811
) -> None:
    result = study(sweep)
    pairs = choose_drawn_pairs(result)
    assert list(pairs) == ["ranks", "seeds"]
    of_class = result.pairs.set_index(["a", "b"])["pair_class"]
    rank = result.runs.set_index("adapter")["rank"]
    for pair in pairs.values():
        assert pair.unrelated is not None
        a, b = pair.unrelated
        assert of_class.get((a, b), of_class.get((b, a))) == "unrelated"
        assert (rank[a], rank[b]) == (rank[pair.a], rank[pair.b])
    assert pairs["ranks"].unrelated == ("flip-r4-s1", "turn-r8-s0")


@pytest.mark.slow
def test_a_later_report_leaves_nothing_of_an_earlier_one(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    one = adapter(rng, label="one")
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in one}
    result = study([one], base=open_base(weights), draws=0)
    write_report(result, tmp_path, figures=("svg", "pdf"), form="md")
    (tmp_path / "figures" / "mine.png").write_bytes(b"mine")
    assert (tmp_path / "tables" / "amplifications.csv").is_file()
    write_report(study([one]), tmp_path, figures=("png",), form="md")
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        "adapters.csv",
        "spectra.csv",
    }
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"energy.png", "changes_map.png", "changes.png", "mine.png"}
    assert json.loads((tmp_path / "results.json").read_text())["amplifications"] == []


@pytest.mark.slow
def test_a_manifest_with_accuracy_alone_makes_a_table(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    made = [
        Adapter(
            dict(adapter(rng)),
            label=f"s{seed}",
            provenance=Provenance(rank=4, seed=seed, task="t", metrics=metrics),
        )
        for seed, metrics in ((0, {"accuracy": 0.75}), (1, {}))
    ]
    text = write_report(study(made), tmp_path, figures=(), form="md").read_text()
    assert "75.0%" in text
    assert not re.search(r"\bnan\b", text)


def test_the_steps_of_a_run_stand_in_a_table(rng: np.random.Generator) -> None:
    first = adapter(rng, label="whole", task="t", seed=0, step=9)
    steps = {}
    for step, share in ((0, 0.0), (4, 0.5), (9, 1.0)):
        updates = {
            name: replace(one, B=share * one.B, A=one.A * (1 + 0.1 * share))  # type: ignore[type-var]
            for name, one in first.items()
        }
        described = replace(first.provenance, step=step)
        steps[step] = Adapter(updates, label=f"s{step}", provenance=described)
    weights = {f"{name}.weight": rng.standard_normal((24, 20)) for name in first}
    result = study(list(steps.values()), base=open_base(weights))
    table = steps_table(result)
    assert table is not None
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["run"], row["step"]) for row in rows] == [("s9", "0"), ("s9", "4"), ("s9", "9")]
    assert rows[0]["ω"] == "–"
    assert float(rows[1]["ω"]) == float(rows[2]["ω"]) == 1  # the same directions, half as long
    assert rows[0]["A's rotation"] == "0"
    assert [row["A's growth"] for row in rows] == ["0", "0.05", "0.10"]
    full = result.amplifications[result.amplifications["at_rank"]].groupby("adapter")["enrichment"]
    assert rows[2]["enrichment"] == number(float(full.median()["s9"]))
    assert rows[0]["enrichment"] == "–"
    without = steps_table(study([steps[4], steps[9]]))
    assert without is not None
    assert "enrichment" not in without.columns
    assert [row[-2:] for row in without.rows] == [("–", "–"), ("–", "–")]
    assert steps_table(study([steps[9]])) is None


@pytest.mark.slow
def test_eight_adapters_of_one_base_are_reported_as_a_group(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    made = [
        adapter(rng, label=f"a{n}", rank=2, d_out=40, task="a", seed=n, base_model="acme/base-1b")
        for n in range(8)
    ]
    others = [
        adapter(rng, label=f"b{n}", rank=2, d_out=40, task="b", seed=9, base_model="acme/base-1b")
        for n in range(1)
    ]
    path = write_report(study([*made, *others]), tmp_path / "eight", figures=())
    page = Page(path.read_text())
    sections = [tag["aria-labelledby"] for name, tag in page.tags if name == "section"]
    assert "group" in sections
    assert "figure-group" in page.attributes("id")
    results = json.loads((path.parent / "results.json").read_text())
    jsonschema.validate(results, results_schema())
    group = results["group_analysis"]
    assert group["adapters"] == [f"a{n}" for n in range(8)]
    assert group["others"] == ["b0"]
    assert group["text"] in html.unescape(path.read_text())
    (finding,) = [f for f in results["findings"] if f["topic"] == "groups"]
    assert finding["code"] == f"group-{group['conclusion']}"
    assert {row["module_type"] for row in group["by_type"]} == {"all", "q_proj", "v_proj"}
    few = write_report(study(made[:7]), tmp_path / "seven", figures=(), form="md")
    assert json.loads((few.parent / "results.json").read_text())["group_analysis"] is None
    assert "What the group shares" not in few.read_text()


def test_a_report_says_why_a_group_is_not_analyzed(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    first = adapter(rng, label="a0", rank=2, d_out=40)
    copies = [first.with_label(f"a{n}") for n in range(8)]
    path = write_report(study(copies), tmp_path, figures=(), form="md")
    (finding,) = [
        finding
        for finding in json.loads((path.parent / "results.json").read_text())["findings"]
        if finding["topic"] == "groups"
    ]
    assert finding["code"] == "group-not-analyzed"
    assert "a1, near-duplicate with a0" in finding["text"]
