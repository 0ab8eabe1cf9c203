"""The modules of two compared adapters, as a table and on a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from lora_analysis.cli.show import print_table, print_text, records
from lora_analysis.text import overlap_number

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study

SortKey = Literal["norm", "relative", "omega", "excess", "cosine", "module"]
_SORT_COLUMNS: Final[dict[str, str]] = {
    "norm": "norm",
    "relative": "relative",
    "omega": "omega_output",
    "excess": "excess_omega_output",
    "cosine": "signed_cosine",
}
_SORTED_BY: Final = {
    "norm": "‖ΔW‖",
    "relative": "‖ΔW‖/‖W‖",
    "omega": "ω on the output side",
    "excess": "excess of ω on the output side",
    "cosine": "signed cosine",
}
# The output side leads.
SIDES: Final = ("output", "input")


def modules_table(result: Study, pair: tuple[str, str]) -> pd.DataFrame:
    """Return one row per common module: norms of A and B, and both sides next to each other."""
    from lora_analysis.studies.pair_classes import ONE_SAMPLE

    rows = result.similarities
    rows = rows[(rows["a"] == pair[0]) & (rows["b"] == pair[1])]
    sides = []
    for side in SIDES:
        of_side = rows[rows["side"] == side].set_index("module")
        sides.append(of_side[list(_SIDE_COLUMNS)].add_suffix(f"_{side}"))
    common = rows[rows["side"] == "output"].set_index("module")
    table = common[["module_type", "signed_cosine", "degeneracy_1_1", "shared_init"]].join(sides)
    if result.pairs["pair_class"].iloc[0] in ONE_SAMPLE:
        table["shared_init"] = False  # the least of what they share
    for column, values in norms_by_module(result, pair).items():
        table[column] = values.reindex(table.index)
    for quantity in ("norm", "relative"):
        table[quantity] = table[[f"{quantity}_a", f"{quantity}_b"]].max(axis=1)
    return table.reset_index()


_SIDE_COLUMNS: Final = ("omega", "chance_omega", "excess_omega", "phi_1_1", "usable")


def norms_by_module(result: Study, pair: tuple[str, str]) -> dict[str, pd.Series]:
    """Return ‖ΔW‖ and ‖ΔW‖/‖W‖ of A and B by module; NaN without a base."""
    columns = {}
    full = result.amplifications[result.amplifications["at_rank"].astype(bool)]
    for name, label in zip("ab", pair, strict=True):
        of_adapter = result.spectra[result.spectra["adapter"] == label]
        columns[f"norm_{name}"] = of_adapter.set_index("module")["norm"]
        relative = full[full["adapter"] == label].set_index("module")["relative_norm"]
        columns[f"relative_{name}"] = relative.astype(float)
    return columns


_NOTES: Final = (
    "A, B: {quantity}. ω: overlap of the subspaces, weighted by energy. random: ω of random "
    "subspaces with the same singular values. T: mean of (ω - random)/(1 - random) over the "
    "modules, 0 for random and 1 for identical subspaces. ∠: angle of the first singular vectors.",
    "φ(i, j) of a module: lora-analysis heatmap. All columns: --format json.",
)
_MARKS: Final = {
    "*": "* not usable in all pairs (see above), so not in T and not in the medians.",
    "†": "† A has a shared initialization: this overlap was not learned.",
}


def print_modules(table: pd.DataFrame, sort: SortKey, top: int, *, has_base: bool) -> None:
    """Print the modules at both ends of an order, and medians over groups of modules.

    The groups are the blocks of an image model, which come first, else the types of modules.
    """
    from lora_analysis.blocks import group_modules, is_image, short_names

    image = is_image(table["module"])
    if image:
        table = table.assign(title=table["module"].map(short_names(table["module"])))
    quantity = "relative" if has_base else "norm"
    # Equal to the printed digits for square modules: one column is enough.
    randoms = [table[f"chance_omega_{side}"].map("{:.3f}".format) for side in SIDES]
    one_random = bool((randoms[0] == randoms[1]).all())
    columns = ["module", "A", "B", "ω out", "random", "ω in", "random", "∠ out", "∠ in", "cosine"]
    if one_random:
        columns[3:7] = ["ω out", "ω in", "random"]
    group_rows = [
        (
            f"{title} ({len(names)})",
            *_medians(table[table["module"].isin(names)], quantity, one_random=one_random),
        )
        for title, names in group_modules(table["module"]).items()
    ]
    has_groups = len(table) > 2 * top and 1 < len(group_rows) < len(table)
    if sort != "module":
        table = table.sort_values(_SORT_COLUMNS[sort], ascending=False, kind="stable")
    chosen, title = table, "all modules"
    if len(table) > 2 * top:
        chosen = table.iloc[[*range(top), *range(len(table) - top, len(table))]]
        title = f"first and last {top} of {len(table)} modules"
    order = "in the order of the files" if sort == "module" else f"by {_SORTED_BY[sort]}"
    body = [_cells(row, quantity, one_random=one_random) for row in records(chosen)]
    if len(table) > 2 * top:
        body.insert(top, ("…", *[""] * (len(columns) - 1)))
    footer = ("median", *_medians(table, quantity, one_random=one_random))
    click.echo()
    if has_groups and image:
        print_table("medians by block", ["block (modules)", *columns[1:]], group_rows)
        click.echo()
    print_table(f"{title}, {order}", columns, body, footer=footer)
    if has_groups and not image:
        click.echo()
        print_table("medians by type of module", columns, group_rows)
    click.echo()
    cells = [cell for row in body for cell in row[1:]]
    for mark, meaning in reversed(_MARKS.items()):
        if any(mark in cell for cell in cells):
            print_text(meaning)
    print_text(_NOTES[0].format(quantity=_SORTED_BY[quantity]))
    print_text(_NOTES[1])


def _cells(row: dict[str, Any], quantity: str, *, one_random: bool) -> tuple[str, ...]:
    """Return the cells of one module."""
    values = {}
    for side in SIDES:
        is_start = side == "input" and row["shared_init"]
        mark = "†" if is_start else "" if row[f"usable_{side}"] else "*"
        values[side] = f"{row[f'omega_{side}']:.3f}{mark}"
    angles = []
    for side in SIDES:
        phi = row[f"phi_1_1_{side}"]
        is_defined = not row["degeneracy_1_1"] and not math.isnan(phi)
        degrees = math.degrees(math.acos(math.sqrt(min(max(phi, 0.0), 1.0)))) if is_defined else 0
        angles.append(f"{degrees:.0f}°" if is_defined else "–")
    randoms = [f"{row[f'chance_omega_{side}']:.3f}" for side in SIDES]
    omegas = (
        (values["output"], values["input"], randoms[0])
        if one_random
        else (values["output"], randoms[0], values["input"], randoms[1])
    )
    return (
        row.get("title", row["module"]),
        *(f"{row[f'{quantity}_{name}']:.3g}" for name in "ab"),
        *omegas,
        *angles,
        overlap_number(row["signed_cosine"]),
    )


def _medians(rows: pd.DataFrame, quantity: str, *, one_random: bool) -> tuple[str, ...]:
    """Return the cells of medians; those of ω over the modules that count on the side."""
    median: dict[str, Any] = {
        f"{quantity}_{name}": float(rows[f"{quantity}_{name}"].median()) for name in "ab"
    }
    defined = rows[rows["degeneracy_1_1"] == ""]
    for side in SIDES:
        counted = rows[rows[f"usable_{side}"].astype(bool)]
        for column in ("omega", "chance_omega"):
            median[f"{column}_{side}"] = float(counted[f"{column}_{side}"].median())
        counted = defined[defined[f"usable_{side}"].astype(bool)]
        median[f"phi_1_1_{side}"] = float(counted[f"phi_1_1_{side}"].median())
    flags = {f"usable_{side}": True for side in SIDES} | {"shared_init": False}
    row = median | flags | {"module": "", "degeneracy_1_1": ""}
    row["signed_cosine"] = float(rows["signed_cosine"].median())
    return tuple(
        "–" if cell == "nan" else cell for cell in _cells(row, quantity, one_random=one_random)[1:]
    )
