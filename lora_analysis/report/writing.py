"""Put a study on disk: report.html (or .md), figures/, tables/ and results.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from markupsafe import Markup

from lora_analysis import __version__, plots
from lora_analysis.findings import findings, plural
from lora_analysis.report import figures, tables
from lora_analysis.report.results import TABLE_NAMES, all_tables, results
from lora_analysis.report.selection import telling_modules
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.studies import REFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_analysis.report.figures import ReportFigure
    from lora_analysis.report.tables import ReportTable
    from lora_analysis.studies import Progress, Study

# In inches; two figures of one column stand side by side.
NARROW = 4.5
# Pages stay readable: longer tables are in tables/ only.
FOLDED_ROWS = 120


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    title: str
    caption: str
    svg: str
    narrow: bool


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    title: str
    text: str
    figures: tuple[_Figure, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    folded: tuple[ReportTable, ...] = ()


def write_report(
    study: Study,
    path: str | Path,
    *,
    title: str | None = None,
    command: str | None = None,
    form: Literal["html", "md"] = "html",
    progress: Progress | None = None,
) -> Path:
    """Write a study as one self-contained report, with figures, tables and numbers beside it.

    Parameters
    ----------
    study
        From `lora_analysis.study`.
    path
        Folder to write into; made if missing. Files of an earlier report are replaced.
    title
        Heading; made from the adapters by default.
    command
        The command line that led here, for the section on how it was made.
    form
        ``"html"``: one file without script or network access; ``"md"``: Markdown for a README
        or a model card, which shows the files in ``figures/``.

    progress
        Called with ("report sections", done, total).

    Returns
    -------
    Path
        Of report.html or report.md.
    """
    folder = Path(path)
    _prepare(folder)
    said = findings(study)
    page = {
        "title": title or _title(study),
        "lead": _lead(study),
        "findings": said,
        "sections": _sections(study, folder, progress),
        "made": _made(study, command),
    }
    for name, table in all_tables(study):
        if not table.empty:
            write_atomic(folder / "tables" / f"{name}.csv", tables.csv_text(table).encode())
    document = json.dumps(results(study, said), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomic(folder / "results.json", document.encode())
    text = _environment(form).get_template(f"report.{form}.j2").render(page)
    return write_atomic(folder / f"report.{form}", text.encode())


def _prepare(folder: Path) -> None:
    """Make the folders, and take away what an earlier report left: it may not be written anew."""
    for place, suffixes in (("figures", (".svg", ".png")), ("tables", (".csv",))):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for old in (folder / place).iterdir():
            if old.suffix in suffixes and old.stem in (*figures.NAMES, *TABLE_NAMES):
                old.unlink()


def _environment(form: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_analysis.report"),
        autoescape=form == "html",
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _markdown_text
    return environment


def _markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is: names may hold anything."""
    safe = "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in str(text))
    return " ".join(safe.split())


def _title(study: Study) -> str:
    names = list(study.adapters)
    if len(names) == 1:
        return f"What {names[0]} learned"
    bases = {one.provenance.base_model for one in study.adapters.values()} - {None}
    of = f" of {Path(str(bases.pop())).name}" if len(bases) == 1 else ""
    return f"{len(names)} LoRA adapters{of}"


def _lead(study: Study) -> str:
    modules = study.spectra["module"].nunique()
    pairs = plural(len(study.pairs), "pair")
    compared = f", {pairs} compared on both sides, each beside chance" if len(study.pairs) else ""
    against = f" Held against {study.base.label}." if study.base else " No base weights were given."
    return (
        f"{plural(len(study.adapters), 'adapter')}, {plural(modules, 'module')}{compared}.{against}"
    )


def _drawn(found: Iterable[ReportFigure], folder: Path) -> tuple[_Figure, ...]:
    """Save each figure as SVG and PNG, and return it for inlining."""
    result = []
    for one in found:
        narrow = one.figure.get_figwidth() < NARROW
        svg = plots.svg_text(one.figure, title=one.title, description=one.alt)
        plots.save_figure(one.figure, folder / "figures" / one.name)
        result.append(_Figure(one.name, one.title, one.caption, Markup(svg), narrow))
    return tuple(result)


def _present(*found: ReportTable | None) -> tuple[ReportTable, ...]:
    return tuple(one for one in found if one is not None)


def _short(*found: ReportTable | None) -> tuple[ReportTable, ...]:
    return tuple(one for one in _present(*found) if len(one.rows) <= FOLDED_ROWS)


def _sections(study: Study, folder: Path, progress: Progress | None) -> list[_Section]:
    """Draw and tabulate section by section; those with nothing to show are left out."""
    modules = telling_modules(list(dict.fromkeys(study.spectra["module"])))
    plan = (
        (
            _Section("adapters", "What was analysed", ""),
            None,
            (tables.adapters_table(study), tables.accuracy_table(study)),
        ),
        (
            _Section("ranks", "Across ranks", "Do different ranks find the same directions?"),
            figures.rank_figures,
            (),
        ),
        (
            _Section(
                "seeds",
                "Across seeds",
                "Do two trainings that differ in nothing but their seed find the same directions?",
            ),
            figures.seed_figures,
            (),
        ),
        (
            _Section(
                "reference",
                *_reference_words(study),
                folded=_short(tables.pairs_table(study)),
            ),
            figures.level_figures,
            (tables.overlap_table(study),),
        ),
        (
            _Section(
                "weights",
                "Against W",
                "Does ΔW strengthen directions that the frozen weight already carries?",
            ),
            figures.amplification_figures,
            (tables.amplification_table(study, modules),),
        ),
        (
            _Section("spectra", "How many directions", ""),
            figures.spectrum_figures,
            (tables.spectra_table(study),),
        ),
    )
    sections = []
    for done, (section, draw, shown) in enumerate(plan, start=1):
        drawn = _drawn(draw(study), folder) if draw else ()
        sections.append(replace(section, figures=drawn, tables=_present(*shown)))
        if progress:
            progress("report sections", done, len(plan))
    return [one for one in sections if one.figures or one.tables or one.folded]


def _reference_words(study: Study) -> tuple[str, str]:
    """Return title and question of the section that holds all pairs."""
    if study.select(REFERENCE, "output").empty:
        return "All pairs", "How alike are they? Without a reference no pair is called related."
    question = "What is shared because the task is, and what by any two adapters of this base?"
    return "Against unrelated adapters", question


def _made(study: Study, command: str | None) -> dict[str, Any]:
    packages = ("numpy", "scipy", "matplotlib", "pandas")
    versions = [f"lora_analysis {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {
        "version": __version__,
        "command": command or "lora_analysis.write_report(study, path)",
        "versions": ", ".join(versions),
        "base": "none" if study.base is None else study.base.label,
        "hashes": [
            (label, one.provenance.sha256 or "in memory") for label, one in study.adapters.items()
        ],
    }
