"""The LoRA paper's section 7 and appendix H from the demo's adapters, with its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_analysis import plots
from lora_analysis.adapter import DenseUpdate
from lora_analysis.amplify import amplification
from lora_analysis.demo import find_demo_runs, study_demo, train_demo
from lora_analysis.errors import InputError
from lora_analysis.progress import Progress
from lora_analysis.report import (
    FORMATS,
    ReportFigure,
    ReportTable,
    Section,
    draw_figures,
    write_page,
)
from lora_analysis.report.report_folder import study_inputs
from lora_analysis.report.tables import accuracy_table
from lora_analysis.similarity import random_similarity, subspace_similarity
from lora_analysis.storage.outputs import OutputFolder, output_folder
from lora_analysis.text import number

if TYPE_CHECKING:
    from lora_analysis.plots import Panel
    from lora_analysis.similarity import SimilarityGrid
    from lora_analysis.studies import Study


TITLE = "The LoRA paper’s section 7, on handwritten digits"
LEAD = (
    "The figures and tables of section 7 and appendix H of Hu et al., “LoRA” (arXiv 2106.09685), "
    "in their panel layout, from adapters of a small vision transformer for digits. Values of the "
    "paper are quoted where it prints or draws them. They are GPT-3’s (d = 12,288, layer 48 of 96; "
    "those of figures read off them, ± 0.002), this model has d = 192 and four layers: the shape "
    "of a figure can be compared, its numbers cannot."
)
# Ranks 8 and 64 with different seeds: with one seed they would share the order of the data.
SMALL, LARGE, SECOND = "rotate-r8-s0", "rotate-r64-s1", "rotate-r64-s0"
RANKS = ("rotate-r4-s0", "rotate-r8-s0", "rotate-r64-s0")


def make_reproduction(
    folder: Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    force: bool = False,
) -> tuple[Study, Path]:
    """Train the demo's missing adapters, draw the paper's figures, return the study and the page.

    Parameters
    ----------
    folder
        Folder of the demo, whose ``runs/`` are reused if present. Receives ``section7.html`` and
        ``section7/`` with every figure as SVG, PNG and PDF.
    device, progress, force
        As for the demo.
    """
    OutputFolder(
        folder, kind="reproduction", verb="reproduce", inputs=find_demo_runs(folder), force=force
    ).check()
    runs = train_demo(folder / "runs", device=device, progress=progress, force=force)
    result = study_demo(runs, progress=progress)
    return result, write_reproduction(result, folder, progress=progress, force=force)


def write_reproduction(
    study: Study,
    folder: Path,
    *,
    formats: Sequence[str] = FORMATS,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Draw the paper's figures of section 7 and appendix H from the study of a demo run.

    ``formats`` are the file formats in ``section7/``; ``force`` replaces foreign files at the
    names that are written.

    Raises
    ------
    InputError
        An adapter of the demo's sweep is not in the study.
    """
    missing = [label for label in (SMALL, LARGE, *RANKS) if label not in study.adapters]
    if missing or study.base is None:
        message = f"The paper's figures need the demo's sweep and base; missing: {missing}."
        raise InputError(message)
    made = []
    with output_folder(
        folder, kind="reproduction", verb="reproduce", inputs=study_inputs(study), force=force
    ) as staging:
        for index, (name, title, question, draw) in enumerate(_PARTS, start=1):
            figures = tuple(draw_figures(draw(study), staging / "section7", formats))
            table = None
            if name.startswith("table"):
                table = accuracy_table(study) if name == "table-6" else table_7(study)
            tables = () if table is None else (table,)
            made.append(Section(name, title, question, figures, tables))
            if progress:
                progress("report sections", index, len(_PARTS))
        write_page(
            study, made, staging / "section7.html", title=TITLE, lead=LEAD,
            command="lora-analysis reproduce",
        )  # fmt: skip
    return folder / "section7.html"


def _modules(study: Study, layer: int) -> dict[str, str]:
    """Return title to name of the query and value projections of one layer."""
    names = [name for name in study.adapters[SMALL] if f".{layer}." in name]
    return {f"ΔW{name.rpartition('.')[2][0]}": name for name in names}


def _layers(study: Study) -> list[int]:
    return sorted({int(layer) for layer in study.spectra["layer"].dropna()})


def _grids(study: Study, a: str, b: str, layer: int) -> dict[str, SimilarityGrid]:
    """Return the paper's grids: right singular vectors of A."""
    return {
        title: study.grid(a, b, name, side="input", of="A")
        for title, name in _modules(study, layer).items()
    }


def _describe_cells(grids: dict[str, SimilarityGrid], *cells: tuple[int, int]) -> str:
    """Return "ΔWq: φ(1, 1) 0.61, φ(8, 64) 0.92; ΔWv: …"."""
    return "; ".join(
        f"{title}: " + ", ".join(f"φ({i}, {j}) {number(grid.at(i, j))}" for i, j in cells)
        for title, grid in grids.items()
    )


def _middle_layer(study: Study) -> int:
    layers = _layers(study)
    return layers[len(layers) // 2]


_ABOUT_A = (
    "Right singular vectors of A, as in the paper; those of ΔW, which do not depend on how it is "
    "factored, are in the demo’s report. "
)


def _figure_3(study: Study) -> Iterator[ReportFigure]:
    grids = _grids(study, SMALL, LARGE, _middle_layer(study))
    cells = ((1, 1), (1, 64), (8, 64))
    yield ReportFigure(
        "figure_3",
        "Figure 3: rank 8 against rank 64.",
        f"{_ABOUT_A}Here {_describe_cells(grids, *cells)}. The paper: ΔWq: φ(1, 1) 0.404, "
        "φ(1, 64) 0.436, φ(8, 64) 0.213; ΔWv: φ(1, 1) 0.436, φ(8, 64) 0.170. Random subspaces give "
        "0.005 there (64 of 12,288) and 0.33 here (64 of 192): hence the second row.",
        f"Four heat maps and their excess over random. {_describe_cells(grids, *cells)}.",
        plots.figure_ranks(grids),
    )


def _figure_4(study: Study) -> Iterator[ReportFigure]:
    grids = _grids(study, SECOND, LARGE, _middle_layer(study))
    first = next(iter(grids.values()))
    panels = grids | {"random Gaussian": random_similarity(first.dimension, first.values.shape)}
    corner = _describe_cells(panels, (1, 1), (64, 64))
    yield ReportFigure(
        "figure_4",
        "Figure 4: two seeds of rank 64.",
        f"{_ABOUT_A}Here {corner}. The paper at (64, 64): ΔWq 0.060, ΔWv 0.026, random 0.005.",
        f"Three heat maps and their excess over random. {corner}.",
        plots.figure_seeds(panels),
    )


def _figure_6(study: Study) -> Iterator[ReportFigure]:
    rows = {f"layer {n + 1}": _grids(study, SMALL, LARGE, n) for n in _layers(study)}
    corners = "; ".join(f"{row}, {_describe_cells(grids, (1, 1))}" for row, grids in rows.items())
    yield ReportFigure(
        "figure_6",
        "Figure 6: rank 8 against rank 64, by layer.",
        f"{_ABOUT_A}All {len(rows)} layers (the paper: the 1st, 32nd, 64th and 96th of 96), as "
        f"excess over random. φ itself: {corners}.",
        f"Heat maps of the excess over random, {len(rows)} layers down. {corners}.",
        plots.figure_layers(rows, excess=True),
    )


def _figure_7(study: Study) -> Iterator[ReportFigure]:
    rows = {f"layer {n + 1}": _grids(study, SECOND, LARGE, n) for n in _layers(study)}
    panels: list[list[Panel]] = [
        [plots.Panel(grids[title], f"{title}, {row}", None, True) for row, grids in rows.items()]
        for title in next(iter(rows.values()))
    ]
    corners = "; ".join(f"{row}, {_describe_cells(grids, (1, 1))}" for row, grids in rows.items())
    yield ReportFigure(
        "figure_7",
        "Figure 7: two seeds of rank 64, by layer.",
        f"{_ABOUT_A}All {len(rows)} layers, excess over random. φ itself: {corners}.",
        f"Heat maps of the excess over random, {len(rows)} layers across. {corners}.",
        plots.figure_grid(panels, title=f"{SECOND} and {LARGE}, input directions of A"),
    )


def _figure_8(study: Study) -> Iterator[ReportFigure]:
    """Yield φ of W_q's directions with those of ΔW_q at each rank, and with random ones."""
    name = next(iter(_modules(study, _middle_layer(study)).values()))
    weight = study.base.weight(name)  # type: ignore[union-attr]  # checked by the caller
    whole = DenseUpdate(name, weight.array().astype("float64"), label="W")
    panels = {
        f"ΔW, r = {study.adapters[label][name].rank}": subspace_similarity(
            whole, study.adapters[label][name], side="input"
        )
        for label in RANKS
    }
    last = list(panels.values())[-1]
    panels["random Gaussian"] = random_similarity(last.dimension, last.values.shape)
    inside = "; ".join(
        f"{title}: φ(8, {grid.values.shape[1]}) {number(grid.at(8, grid.values.shape[1]))}"
        for title, grid in panels.items()
    )
    yield ReportFigure(
        "figure_8",
        "Figure 8: W’s directions against ΔW’s.",
        f"φ(i, j) of W’s leading i (down) and ΔW’s leading j (across), right singular vectors, "
        f"{name}, as excess over random. φ itself: {inside}. The paper gives no number: it reports "
        "that ΔW does not contain W’s top directions, and that a larger rank picks up more "
        "directions that W emphasizes.",
        f"Four heat maps of the excess over random. {inside}.",
        plots.figure_grid(
            [[plots.Panel(grid, title, None, True) for title, grid in panels.items()]],
            title=f"φ(W, ΔW, i, j), {name}",
        ),
    )


def _no_figures(_study: Study) -> Iterator[ReportFigure]:
    yield from ()


def table_7(study: Study) -> ReportTable:
    """Return ‖UᵀWV‖ for three choices of directions, and the factor, next to the paper's."""
    name = next(iter(_modules(study, _middle_layer(study)).values()))
    weight = study.base.weight(name)  # type: ignore[union-attr]  # checked by the caller
    rows: list[tuple[str, ...]] = []
    for label in RANKS:
        measured = amplification(study.adapters[label][name], weight)
        top = measured.weight_top[-1] if measured.weight_top is not None else float("nan")
        values = (measured.projected[-1], top, measured.random.rms[-1], measured.weight_norm)
        size = float((measured.S**2).sum() ** 0.5)
        ends = (
            size,
            measured.amplification_factor[-1],
            measured.chance_factor[-1],
            measured.enrichment[-1],
        )
        rows.append(("here", str(len(measured.S)), *map(number, (*map(float, values), *ends))))
    rows += [
        ("paper", "4", "0.32", "21.67", "0.02", "61.95", "6.91", "21.6", "343", "15.9"),
        ("paper", "64", "1.90", "37.71", "0.33", "61.95", "3.57", "1.88", "11.1", "5.9"),
    ]
    columns = ("model", "r", "‖UᵀWV‖ ΔW’s", "W’s", "random", "‖W‖", "‖ΔW‖", "factor",
               "random factor",
               "enrichment")  # fmt: skip
    caption = (
        f"Table 7: {name} here, W_q of GPT-3’s layer 48 in the paper. Factor: ‖ΔW‖/‖UᵀWV‖ along "
        "ΔW’s directions. Random factor and enrichment are not in the paper; they were computed "
        "from its numbers: the factor of random directions of the same size, and W along ΔW’s "
        "directions over W along random ones. A factor of 21.6 is below that of random "
        "directions: W is strong along ΔW’s directions."
    )
    return ReportTable("Table 7", caption, columns, tuple(rows))


_Part = tuple[str, str, str, Callable[["Study"], Iterator[ReportFigure]]]
_PARTS: Sequence[_Part] = (
    ("table-6", "7.2 What is the optimal rank? Table 6",
     "How good is each rank? (The paper’s tasks differ, so its numbers are not quoted.)",
     _no_figures),
    ("figure-3", "7.2 Subspace similarity between ranks: Figure 3",
     "Does rank 64 contain the directions of rank 8?", _figure_3),
    ("figure-4", "7.2 Subspace similarity between seeds: Figure 4",
     "Do two seeds find the same directions?", _figure_4),
    ("table-7", "7.3 How does ΔW compare to W? Table 7",
     "Does ΔW amplify directions that W already carries?", _no_figures),
    ("figure-6", "H.1 Similarity between ranks, by layer: Figure 6", "", _figure_6),
    ("figure-7", "H.2 Similarity between seeds, by layer: Figure 7", "", _figure_7),
    ("figure-8", "H.3 Similarity between W and ΔW: Figure 8", "", _figure_8),
)  # fmt: skip
