"""The sections of a report: which figures and tables they hold, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from lora_analysis import plots
from lora_analysis.report import (
    module_figures,
    pair_tables,
    similarity_figures,
    step_tables,
    tables,
    weight_figures,
)
from lora_analysis.report.representatives import representative_modules
from lora_analysis.studies import Relation

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.progress import Progress
    from lora_analysis.report.similarity_figures import ReportFigure
    from lora_analysis.report.tables import ReportTable
    from lora_analysis.studies import Study

# In inches; two narrow figures fit next to each other.
NARROW = 4.5
# Longer tables are in tables/ only, so that the page stays readable.
FOLDED_ROWS = 120
# Tables up to this long are open, longer ones folded.
OPEN_ROWS = 16
FORMATS = ("svg", "png", "pdf")

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
    """One section; the reader opens ``folded`` tables and figures of ``single_modules``."""

    name: str
    title: str
    text: str = ""
    figures: tuple[DrawnFigure, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    folded: tuple[ReportTable, ...] = ()
    single_modules: tuple[DrawnFigure, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if the section has no figure and no table."""
        return not (self.figures or self.tables or self.folded or self.single_modules)


def drawn_figures(
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
    section: Section, *tables: ReportTable | None, open_rows: int = OPEN_ROWS
) -> Section:
    """Return the section with short tables open and longer ones folded."""
    present = [table for table in tables if table is not None]
    short = tuple(table for table in present if len(table.rows) <= open_rows)
    folded = tuple(table for table in present if open_rows < len(table.rows) <= FOLDED_ROWS)
    return replace(section, tables=short, folded=folded)


def sections(
    study: Study,
    folder: Path,
    formats: Sequence[str],
    *,
    inline: bool,
    progress: Progress | None = None,
) -> list[Section]:
    """Draw and tabulate section by section; empty ones are left out.

    ``inline`` renders every figure for the page and adds heat maps of single modules, which only
    the HTML page holds. Without it and without ``formats``, nothing is drawn.
    """
    plan = _plan(study)
    result = []
    for i, (section, drawings) in enumerate(plan, start=1):
        drawn = [
            figure
            for draw in (drawings if inline or formats else ())
            for figure in drawn_figures(draw(study), folder / "figures", formats, inline=inline)
        ]
        section = replace(section, figures=tuple(drawn))  # noqa: PLW2901 - filled step by step
        if section.name == "modules" and inline:
            figures = module_figures.single_module_figures(study)
            single = tuple(drawn_figures(figures, folder, ()))
            section = replace(section, single_modules=single)  # noqa: PLW2901
        result.append(section)
        if progress:
            progress("report sections", i, len(plan))
    return [section for section in result if not section.is_empty]


def _plan(study: Study) -> list[tuple[Section, tuple[Drawing, ...]]]:
    """Return the sections with their tables, and the functions that draw their figures."""
    modules = representative_modules(list(dict.fromkeys(study.spectra["module"])))
    if study.select(Relation.OTHER_TASK, "output").empty:
        pairs = "All pairs", "How alike are the adapters? Conclusions need a reference."
    else:
        pairs = (
            "Tasks",
            "Which overlap comes from the task, and which do any two adapters of this base have?",
        )
    return [
        (_with_tables(Section("adapters", "Adapters"), tables.adapters_table(study),
                      tables.accuracy_table(study), open_rows=8), ()),
        (_with_tables(Section("ranks", "Ranks", "Do different ranks find the same directions, and "
                              "how many directions hold 90 % of ‖ΔW‖²?"),
                      tables.spectra_table(study)),
         (similarity_figures.rank_figures, weight_figures.spectrum_figures)),
        (_with_tables(Section("seeds", "Seeds", "Do runs with different seeds, or of different "
                              "length, find the same directions?"),
                      pair_tables.seeds_table(study), step_tables.steps_table(study)),
         (similarity_figures.seed_figures, module_figures.step_figures)),
        (_with_tables(Section("tasks", *pairs), pair_tables.overlap_table(study),
                      pair_tables.pairs_table(study)),
         (similarity_figures.group_figures, similarity_figures.pair_figures,
          module_figures.clustermap_figures)),
        (_with_tables(Section("weights", "Base weights", "Does ΔW amplify directions that W "
                              "already emphasizes?"), tables.amplification_table(study, modules)),
         (weight_figures.amplification_figures, weight_figures.basis_figures)),
        (_with_tables(Section("modules", "Modules", "Where in the model do the adapters agree? "
                              "Group medians first; single modules are those farthest from the "
                              "median, in both directions."),
                      tables.module_types_table(study)), (module_figures.map_figures,)),
    ]  # fmt: skip
