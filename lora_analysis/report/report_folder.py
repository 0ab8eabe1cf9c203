"""Write a report: report.html (or .md), figures/, tables/, results.json and grids.npz.

The last section states how the report was made: versions, hashes, and a Python program that gives
the same numbers.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from markupsafe import Markup

from lora_analysis import __version__
from lora_analysis.conclusions import comparisons, findings
from lora_analysis.conclusions.summary_lines import finding_boxes, summary
from lora_analysis.errors import MissingExtraError, OccupiedError
from lora_analysis.report.group_section import report_group
from lora_analysis.report.pair_tables import initializations_table
from lora_analysis.report.results import (
    all_tables,
    csv_text,
    grids_file,
    results,
    square_table,
    write_square_csv,
)
from lora_analysis.report.sections import FORMATS, Section, sections
from lora_analysis.report.tables import adapters_table
from lora_analysis.storage.atomic import write_atomic
from lora_analysis.storage.outputs import OutputFolder, holds_output, output_folder
from lora_analysis.studies import Study
from lora_analysis.studies import study as run_study
from lora_analysis.text import join_names, plural, printable, printable_json, printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_analysis.progress import Progress


GRIDS, RESULTS = "grids.npz", "results.json"
# results.json names its generator within its first bytes.
_HEAD = 200


def write_report(
    study: Any,
    path: str | Path,
    *,
    title: str | None = None,
    command: str | None = None,
    form: Literal["html", "md"] = "html",
    parquet: bool = False,
    figures: Sequence[str] = FORMATS,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Write a study as one self-contained report, with figures, tables and numbers next to it.

    Parameters
    ----------
    study
        From `lora_analysis.study`; or what it takes, a list of adapters in any form, which is
        then studied without a base.
    path
        Folder to write into; created if missing. An earlier report of this package in it is
        replaced as a whole, once the new one is complete. It may contain the adapters of the study.
    title
        Heading; derived from the adapters by default.
    command
        The command line, for the section on how the report was made.
    form
        ``"html"``: one file without scripts or network access; ``"md"``: Markdown for a README
        or a model card, which links to the files in ``figures/``.
    parquet
        Write the tables as Parquet too (extra ``parquet``).
    figures
        Formats of the files in ``figures/``: any of ``"svg"``, ``"png"``, ``"pdf"``.
    progress
        Called with ("report sections", done, total).
    force
        Replace other files, or edited files of an earlier report, at the names that the report
        writes.

    Returns
    -------
    Path
        Path of report.html or report.md.

    Raises
    ------
    MissingExtraError
        ``parquet`` is set and pyarrow is missing; nothing is written.
    OccupiedError
        The folder holds other files and ``force`` is not set, or it is an input.
    InUseError
        Another process writes a report to the folder.
    OutputError
        A file could not be written; the message states what the folder holds now.
    """
    if not isinstance(study, Study):
        study = run_study(study)
    if parquet:
        try:
            import pyarrow as pa  # noqa: F401
        except ImportError as error:
            message = "Parquet tables need pyarrow: pip install 'lora-analysis[parquet]'."
            raise MissingExtraError(message) from error
    folder = Path(path)
    check_report_folder(folder, inputs=study_inputs(study), force=force)
    run = {"title": title, "command": command, "adapters": list(study.adapters), "as": form}
    with output_folder(
        folder, kind="report", verb="report", run=run, inputs=study_inputs(study), force=force
    ) as staging:
        compared, all_findings = comparisons(study), findings(study)
        group, of_group = report_group(study, progress=progress)
        if of_group is not None:
            all_findings = (*all_findings, of_group)
        lines = summary(study, compared, all_findings)
        boxes, rest = finding_boxes(all_findings)
        drawn = sections(
            study, compared, boxes, staging, figures, group=group, progress=progress,
            inline=form == "html",
        )  # fmt: skip
        usual_title, lead = _heading(study)
        page = {
            "title": title or usual_title,
            "lead": lead,
            "is_report": True,
            "summary": lines,
            "picture": next((section for section in drawn if section.name == "short"), None),
            "sections": [section for section in drawn if section.name != "short"],
            "boxes": [box for box in boxes if box.severity != "result"],
            "rest": rest,
            "adapters": adapters_table(study),
            "initializations": initializations_table(study),
            "provenance": provenance(study, command),
            # The format of the files that a Markdown page can show.
            "image": next((suffix for suffix in ("svg", "png") if suffix in figures), None),
        }
        _write_tables(study, staging / "tables", parquet=parquet)
        document = json.dumps(
            results(study, all_findings, compared, lines, group),
            indent=1, allow_nan=False, ensure_ascii=False,
        )  # fmt: skip
        write_atomic(staging / RESULTS, printable_json(document).encode())
        if (grids := grids_file(study)) is not None:
            write_atomic(staging / GRIDS, grids)
        text = _environment(form).get_template(f"report.{form}.j2").render(page)
        write_atomic(staging / f"report.{form}", text.encode())
    return folder / f"report.{form}"


def check_report_folder(folder: Path, *, inputs: Sequence[Path], force: bool) -> None:
    """Raise if a report may not be written into a folder, before any work is done.

    Raises
    ------
    OccupiedError
        See `OutputFolder.check`; or the folder holds a report of a version without records.
    """
    results = folder / RESULTS
    if not force and not holds_output(folder, "report") and results.is_file():
        with results.open("rb") as stream:
            earlier = b'"generator": "lora_analysis' in stream.read(_HEAD)
        if earlier:
            message = (
                f"{folder} holds a report of an earlier version of this package, which kept no "
                "record of its files. Choose another folder, or pass --force (force=True in "
                "Python) to replace it."
            )
            raise OccupiedError(message)
    OutputFolder(folder, kind="report", verb="report", inputs=inputs, force=force).check()


def study_inputs(study: Study) -> list[Path]:
    """Return the files and folders that a study was read from."""
    inputs = [path for adapter in study.adapters.values() for path in adapter.provenance.inputs]
    return inputs if study.base is None else [*inputs, *study.base.inputs]


def write_page(
    study: Study,
    page_sections: Sequence[Section],
    path: Path,
    *,
    title: str,
    lead: str,
    command: str,
) -> Path:
    """Write a page with the given sections in the layout of a report; return its path."""
    page = {
        "title": title,
        "lead": lead,
        "is_report": False,
        "sections": page_sections,
        "provenance": provenance(study, command),
    }
    text = _environment("html").get_template("report.html.j2").render(page)
    return write_atomic(path, text.encode())


def _write_tables(study: Study, folder: Path, *, parquet: bool) -> None:
    tables = all_tables(study)
    matrix = study.similarity_matrix
    if matrix is not None and len(matrix.labels) > 1:
        tables += [
            (f"similarity_matrix_{what}", square_table(matrix.labels, matrix.matrix(what)))
            for what in ("output", "input", "cosine")
        ]
    for name, table in tables:
        if table.empty:
            continue
        is_square = name.startswith("similarity_matrix_")
        content = partial(write_square_csv, table) if is_square else csv_text(table).encode()
        write_atomic(folder / f"{name}.csv", content)
        if parquet:
            write_atomic(folder / f"{name}.parquet", table.to_parquet(None, index=False))


def _environment(form: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_analysis.report"),
        autoescape=form == "html",
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=_printable_value if form == "html" else _printable_lines,
    )
    environment.filters["md"] = _markdown_text
    environment.filters["md_code"] = _markdown_code
    return environment


def _printable_value(value: Any) -> Any:
    """Return a value with unprintable characters escaped; our own drawings stay as they are."""
    return value if isinstance(value, Markup) else printable(str(value))


def _printable_lines(value: Any) -> str:
    """Return the same for Markdown, in which the lines of a macro pass through here."""
    return printable_lines(str(value))


def _markdown_text(text: str) -> str:
    """Return text with the special characters of Markdown escaped."""
    line = printable(" ".join(str(text).split()))
    return "".join("\\" + c if c in "\\`*_[]<>|#$~" else c for c in line)


def _markdown_code(text: str) -> str:
    """Return text as inline code, between more backticks than it holds in a row."""
    line = printable(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{ticks} {line} {ticks}" if "`" in line else f"`{line}`"


def _heading(study: Study) -> tuple[str, str]:
    """Return the title of a report, and the sentences on what it is about."""
    names = list(study.adapters)
    bases = set(study.runs["base_model"].dropna())
    of = f" of {bases.pop().rpartition('/')[2]}" if len(bases) == 1 else ""
    title = f"LoRA adapter {names[0]}" if len(names) == 1 else f"{len(names)} LoRA adapters{of}"
    runs = study.runs[~study.runs["adapter"].isin(study.reference)]
    facts = []
    if tasks := runs["task"].nunique():
        facts.append(plural(tasks, "task"))
    if ranks := sorted({int(rank) for rank in runs["rank"].dropna()}):
        facts.append(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {join_names(list(map(str, ranks)))}"
        )
    if seeds := runs["seed"].nunique():
        facts.append(plural(seeds, "seed"))
    parts = [
        plural(len(runs), "adapter") + (f" ({', '.join(facts)})" if facts else ""),
        plural(study.spectra["module"].nunique(), "module"),
    ]
    if study.reference:
        parts.insert(1, plural(len(study.reference), "reference adapter"))
    if total := len(study.pairs):
        counted = (study.pairs[["population_output", "population_input"]] != "").any(axis=1)
        parts.append(
            f"{plural(total, 'pair')}, of which {int(counted.sum())} are of one task or unrelated"
            if counted.any() and total > 1
            else plural(total, "pair")
        )
    if left := len(study.pairs) - study.compared_pairs:
        parts.append(
            f"{plural(left, 'pair')} with nothing to compare (an untrained adapter, or no module "
            "in common)"
        )
    base = f"Base weights: {study.base.label}." if study.base else "No base weights were given."
    return title, f"{'; '.join(parts)}. {base}"


PACKAGES = ("numpy", "scipy", "matplotlib", "pandas")


def provenance(study: Study, command: str | None) -> dict[str, Any]:
    """Return the facts for the section on how the report was made."""
    versions = [f"lora_analysis {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {
        "version": __version__,
        "command": command or "lora_analysis.write_report(study, path)",
        "versions": ", ".join(versions),
        "base": "none" if study.base is None else study.base.label,
        "python": "\n".join(_python_lines(study)),
        "hashes": [
            (label, adapter.provenance.sha256 or "in memory")
            for label, adapter in study.adapters.items()
        ],
    }


def _python_lines(study: Study) -> list[str]:
    """Return lines of Python that repeat a study, to run in the folder of the report's command.

    Adapters and base weights from memory are replaced by ``...``.
    """
    lines = ["from lora_analysis import read_adapter, study", ""]
    groups: dict[str, list[str]] = {"adapters": [], "reference": []}
    for label in study.adapters:
        groups["reference" if label in study.reference else "adapters"].append(label)
    for name, labels in groups.items():
        if labels:
            calls = [f"    {_python_call(study, label)}," for label in labels]
            lines += [f"{name} = [", *calls, "]"]
    arguments = ["adapters", *(["reference=reference"] if groups["reference"] else [])]
    for name, value in study.options.items():
        typed = _shorten_path(value) if name == "base" and isinstance(value, str) else value
        arguments.append(f"{name}={'...' if typed is ... else repr(typed)}")
    lines += [f"result = study({', '.join(arguments)})", ""]
    if len(study.similarities):
        lines += [
            "from lora_analysis.conclusions import comparisons",
            "for comparison in comparisons(result):",
            "    print(comparison.subject, comparison.side, comparison.conclusion, "
            "comparison.mean_excess)",
        ]
    if len(study.amplifications):
        lines += [
            'full = result.amplifications.query("at_rank")',
            'full.groupby("adapter")[["amplification_factor", "enrichment"]].median()',
        ]
    lines.append('result.spectra.groupby("adapter")[["stable_rank", "energy_rank_90"]].median()')
    return lines


def _shorten_path(source: str) -> str:
    """Return a path relative to the working directory if it is below; any other unchanged."""
    path, folder = Path(source), Path.cwd()
    is_below = path.is_absolute() and folder in path.parents
    return str(path.relative_to(folder)) if is_below else source


def _python_call(study: Study, label: str) -> str:
    source = study.adapters[label].provenance
    if source.location is None:
        return f"...,  # {label!r} was built in memory"
    options = [repr(_shorten_path(source.location))]
    if "caller" in source.scale_origin.values():
        scales = study.spectra.loc[study.spectra["adapter"] == label, "scale"].unique()
        # Several scales came from one alpha over several ranks.
        options.append(f"scale={float(scales[0])!r}" if len(scales) == 1 else "alpha=...")
    return f"read_adapter({', '.join(options)}, label={label!r})"
