"""The sections of a report: which figures and tables they hold, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from markupsafe import Markup

from lora_analysis import plots
from lora_analysis.report import (
    pair_tables,
    similarity_figures,
    tables,
    weight_figures,
)
from lora_analysis.report.group_section import group_figures, group_table

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.conclusions import Comparison
    from lora_analysis.conclusions.summary_lines import FindingBox
    from lora_analysis.progress import Progress
    from lora_analysis.report.similarity_figures import ReportFigure
    from lora_analysis.report.tables import ReportTable
    from lora_analysis.studies import GroupAnalysis, Study

# In inches; two narrow figures fit next to each other.
NARROW = 4.7
# Longer tables are in tables/ only, so that the page stays readable.
FOLDED_ROWS = 120
# Tables up to this long are open, longer ones folded.
OPEN_ROWS = 24
FORMATS = ("svg", "png", "pdf")
# Sections of the results with these topics; other results are in the section of pairs.
_SECTION_OF_TOPIC: Final = {
    "amplification": "weights",
    "base weights": "weights",
    "groups": "group",
    "spectra": "ranks",
    "accuracy": "ranks",
    "runs": "tasks",
}
_SECTION_OF_CODE: Final = {"largest-overlap": "modules"}

Drawing = Callable[["Study"], Iterator["ReportFigure"]]


@dataclass(frozen=True, slots=True)
class DrawnFigure:
    """A figure as it is in the page."""

    name: str
    title: str
    caption: str
    svg: str
    narrow: bool


@dataclass(frozen=True, slots=True)
class Section:
    """One section; the reader opens ``folded`` tables and ``folded_figures``."""

    name: str
    title: str
    text: str = ""
    figures: tuple[DrawnFigure, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    folded: tuple[ReportTable, ...] = ()
    folded_figures: tuple[DrawnFigure, ...] = ()
    folded_title: str = ""
    boxes: tuple[FindingBox, ...] = ()
    tables_lead: bool = False

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to show."""
        content = self.figures, self.tables, self.folded, self.folded_figures, self.boxes
        return not any(content)


def draw_figures(
    figures: Iterable[ReportFigure],
    folder: Path,
    formats: Sequence[str] = FORMATS,
    *,
    inline: bool = True,
) -> Iterator[DrawnFigure]:
    """Save each figure in the formats, and yield it for inlining; else its ``svg`` is empty."""
    for figure in figures:
        is_narrow = figure.figure.get_figwidth() < NARROW
        svg = (
            plots.svg_text(figure.figure, title=figure.title, description=figure.alt)
            if inline
            else ""
        )
        if formats:
            plots.save_figure(figure.figure, folder / figure.name, formats)
        drawn = DrawnFigure(figure.name, figure.title, figure.caption, Markup(svg), is_narrow)
        del figure  # may hold every pair of many adapters while the next is drawn
        yield drawn


def _with_tables(
    section: Section, *every: ReportTable | None, open_rows: int = OPEN_ROWS
) -> Section:
    """Return the section with short tables open and longer ones folded."""
    present = [table for table in every if table is not None]
    short = tuple(table for table in present if len(table.rows) <= open_rows)
    folded = tuple(table for table in present if open_rows < len(table.rows) <= FOLDED_ROWS)
    return replace(section, tables=(*section.tables, *short), folded=(*section.folded, *folded))


def sections(
    study: Study,
    compared: Sequence[Comparison],
    boxes: Sequence[FindingBox],
    folder: Path,
    formats: Sequence[str],
    *,
    inline: bool,
    group: GroupAnalysis | None = None,
    progress: Progress | None = None,
) -> list[Section]:
    """Draw and tabulate section by section; empty ones are left out.

    The first one, ``short``, holds the picture next to the summary. ``inline`` renders every
    figure for the page and adds the heat-maps of single modules, which only the HTML page holds.
    Without it and without ``formats``, nothing is drawn.
    """
    plan = _plan(study, compared, group)
    result = []
    for i, (section, drawings, folded) in enumerate(plan, start=1):
        figures, more = (
            tuple(
                figure
                for draw in (functions if inline or formats else ())
                for figure in draw_figures(draw(study), folder / "figures", formats, inline=inline)
            )
            for functions in (drawings, folded)
        )
        if section.name == "modules" and inline:
            single = similarity_figures.single_module_figures(study)
            more += tuple(draw_figures(single, folder, ()))
        of_section = tuple(box for box in boxes if _section_of(box) == section.name)
        result.append(replace(section, figures=figures, folded_figures=more, boxes=of_section))
        if progress:
            progress("report sections", i, len(plan))
    return [section for section in result if not section.is_empty]


def _section_of(box: FindingBox) -> str | None:
    """Return the name of the section of a box; None if it is not about a result."""
    if box.severity != "result":
        return None
    by_topic = _SECTION_OF_TOPIC.get(box.findings[0].topic, "alike")
    return _SECTION_OF_CODE.get(box.code) or by_topic


_Plan = list[tuple[Section, tuple[Drawing, ...], tuple[Drawing, ...]]]


def _plan(study: Study, compared: Sequence[Comparison], group: GroupAnalysis | None) -> _Plan:
    """Return the sections with their tables, the functions that draw their figures, and folded."""
    alike = Section("alike", "Alike?", "What is compared, and what may be concluded from it.",
                    tables_lead=True, folded_title="Similarity matrices of the input side, and of "
                    "the signed cosine")  # fmt: skip
    comparisons = pair_tables.comparisons_table(study, compared)
    if comparisons is not None:
        # The one table that is never folded.
        alike = replace(alike, tables=(comparisons,))
    several = study.spectra["rank"].nunique() > 1
    ranks = Section("ranks", "Ranks", "What does a higher rank add?" if several else
                    "How many directions hold most of an update?")  # fmt: skip
    tasks = Section("tasks", "Seeds and tasks", "Does every task agree with itself, and do two "
                    "seeds find the same directions?")  # fmt: skip
    shared = Section("group", "What the group shares", "Do the adapters share a mean, a subspace, "
                     "or nothing?")  # fmt: skip
    layers = Section("layers", "Which layers changed", "How large is the update of each module?")
    weights = Section("weights", "Against W", "Is W stronger along the directions of ΔW than along "
                      "random ones, and is that specific to the update?", tables_lead=True,
                      folded_title="ΔW in the basis of W, and intruder dimensions")  # fmt: skip
    modules = Section("modules", "Per module", "Where in the model do adapters agree, and do "
                      "unrelated ones agree there, too?", folded_title="Heat-maps of the most "
                      "unusual modules")  # fmt: skip
    return [
        (Section("short", "In short"),
         (partial(similarity_figures.matrix_figure, key="output"),), ()),
        (_with_tables(alike, pair_tables.pairs_table(study), open_rows=0),
         (similarity_figures.level_figures,
          partial(similarity_figures.pair_figures, name="pair", title="Two adapters")),
         tuple(partial(similarity_figures.matrix_figure, key=key) for key in ("input", "cosine"))),
        (_with_tables(ranks, tables.ranks_table(study), tables.accuracy_table(study)),
         (partial(similarity_figures.pair_figures, name="ranks", title="Two ranks"),
          weight_figures.spectrum_figures), ()),
        (_with_tables(tasks, pair_tables.tasks_table(compared), pair_tables.steps_table(study)),
         (partial(similarity_figures.pair_figures, name="seeds", title="Two seeds"),
          similarity_figures.step_figures), ()),
        (_with_tables(shared, group_table(group)), (partial(group_figures, group),), ()),
        (layers, (similarity_figures.change_figures,), ()),
        (_with_tables(weights, tables.amplification_table(study),
                      tables.weight_changes_table(study)),
         (weight_figures.amplification_figures,), (weight_figures.basis_figures,)),
        (_with_tables(_with_tables(modules, tables.modules_table(study, "output"),
                                   tables.module_groups_table(study)),
                      tables.modules_table(study, "input"), open_rows=0),
         (similarity_figures.map_figures,), ()),
    ]  # fmt: skip
