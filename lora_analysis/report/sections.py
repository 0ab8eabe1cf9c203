"""What a report holds, section by section: which figures and tables stand where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from lora_analysis import plots
from lora_analysis.report import (
    figures,
    module_figures,
    pair_tables,
    step_tables,
    tables,
    weight_figures,
)
from lora_analysis.report.selection import telling_modules
from lora_analysis.studies import Relation

if TYPE_CHECKING:
    from pathlib import Path

    from lora_analysis.progress import Progress
    from lora_analysis.report.figures import ReportFigure
    from lora_analysis.report.tables import ReportTable
    from lora_analysis.studies import Study

# In inches; two figures of one column stand side by side.
NARROW = 4.5
# Pages stay readable: longer tables are in tables/ only.
FOLDED_ROWS = 120
# Tables up to this long are shown, longer ones folded.
SHOWN_ROWS = 16
FORMATS = ("svg", "png", "pdf")

Drawing = Callable[["Study"], Iterator["ReportFigure"]]


@dataclass(frozen=True, slots=True)
class DrawnFigure:
    """A figure as a page shows it."""

    name: str
    title: str
    caption: str
    svg: str
    narrow: bool


@dataclass(frozen=True, slots=True)
class Section:
    """One section; ``folded`` and ``telling`` are shown when the reader opens them."""

    name: str
    title: str
    text: str = ""
    figures: tuple[DrawnFigure, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    folded: tuple[ReportTable, ...] = ()
    telling: tuple[DrawnFigure, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it."""
        return not (self.figures or self.tables or self.folded or self.telling)


def drawn_figures(
    found: Iterable[ReportFigure],
    folder: Path,
    formats: Sequence[str] = FORMATS,
    *,
    inline: bool = True,
) -> Iterator[DrawnFigure]:
    """Save each figure in the formats, and return it for inlining; without it, ``svg`` is empty."""
    for one in found:
        narrow = one.figure.get_figwidth() < NARROW
        svg = plots.svg_text(one.figure, title=one.title, description=one.alt) if inline else ""
        if formats:
            plots.save_figure(one.figure, folder / one.name, formats)
        drawn = DrawnFigure(one.name, one.title, one.caption, Markup(svg), narrow)
        del one  # may hold every pair of many adapters while the next is made
        yield drawn


def _placed(section: Section, *found: ReportTable | None, shown_rows: int = SHOWN_ROWS) -> Section:
    """Return the section with tables shown where they are short, folded where they are longer."""
    present = [one for one in found if one is not None]
    shown = tuple(one for one in present if len(one.rows) <= shown_rows)
    folded = tuple(one for one in present if shown_rows < len(one.rows) <= FOLDED_ROWS)
    return replace(section, tables=shown, folded=folded)


def sections(
    study: Study,
    folder: Path,
    formats: Sequence[str],
    *,
    inline: bool,
    progress: Progress | None = None,
) -> list[Section]:
    """Draw and tabulate section by section; those with nothing to show are left out.

    ``inline`` renders every figure for the page, and adds heat-maps of single modules, which only
    the page itself holds. Without it and without ``formats``, nothing is drawn.
    """
    modules = telling_modules(list(dict.fromkeys(study.spectra["module"])))
    plan: list[tuple[Section, tuple[Drawing, ...]]] = [
        (_placed(Section("adapters", "What was analyzed"), tables.adapters_table(study),
                 tables.accuracy_table(study), shown_rows=8), ()),
        (_placed(Section("ranks", "Ranks", "Do different ranks find the same directions, and how "
                         "many directions does an update use?"), tables.spectra_table(study)),
         (figures.rank_figures, weight_figures.spectrum_figures)),
        (_placed(Section("seeds", "Seeds", "Do trainings that differ in their seed alone, or in "
                         "their length, find the same directions?"), pair_tables.runs_table(study),
                 step_tables.steps_table(study)),
         (figures.seed_figures, module_figures.step_figures)),
        (_placed(Section("tasks", *_task_words(study)), pair_tables.overlap_table(study),
                 pair_tables.pairs_table(study)),
         (figures.level_figures, figures.pair_figures, module_figures.clustermap_figures)),
        (_placed(Section("weights", "Against W", "Does ΔW strengthen directions that the frozen "
                         "weight already carries?"), tables.amplification_table(study, modules)),
         (weight_figures.amplification_figures, weight_figures.basis_figures)),
        (_placed(Section("modules", "Per module", "Where in the model? Group means first; single "
                         "modules are those that differ most from the median, either way."),
                 tables.kinds_table(study)), (module_figures.map_figures,)),
    ]  # fmt: skip
    done = []
    for at, (section, drawings) in enumerate(plan, start=1):
        drawn = [
            figure
            for draw in (drawings if inline or formats else ())
            for figure in drawn_figures(draw(study), folder / "figures", formats, inline=inline)
        ]
        section = replace(section, figures=tuple(drawn))  # noqa: PLW2901 - filled step by step
        if section.name == "modules" and inline:
            found = tuple(drawn_figures(module_figures.telling_figures(study), folder, ()))
            section = replace(section, telling=found)  # noqa: PLW2901
        done.append(section)
        if progress:
            progress("report sections", at, len(plan))
    return [one for one in done if not one.empty]


def _task_words(study: Study) -> tuple[str, str]:
    """Return title and question of the section that holds all pairs."""
    if study.select(Relation.REFERENCE, "output").empty:
        return "All pairs", "How alike are they? Without a reference no pair is called related."
    question = "What is shared because the task is, and what by any two adapters of this base?"
    return "Tasks", question
