"""How much each module changed: ‖ΔW‖/‖W‖ if a base is given, else ‖ΔW‖."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_analysis.studies.base_models import bases_of, several_bases
from lora_analysis.studies.pair_classes import Exclusion
from lora_analysis.text import plural

if TYPE_CHECKING:
    import pandas as pd

    from lora_analysis.studies import Study


@dataclass(frozen=True, slots=True, eq=False)
class ModuleChanges:
    """Size of the update of each module.

    Attributes
    ----------
    values
        Median over the adapters, by module in the order of the model.
    symbol
        ``"‖ΔW‖/‖W‖"`` or ``"‖ΔW‖"``.
    of
        The adapters behind the medians, in words.
    note
        What limits the comparison between modules; "" if nothing does.
    """

    values: pd.Series
    symbol: str
    of: str
    note: str


def module_changes(study: Study) -> ModuleChanges | None:
    """Return the size of the update of each module; None without a trained module.

    Adapters of one base, without references, earlier checkpoints and repeated copies; of several
    bases, the one with most adapters.
    """
    excluded = study.runs.loc[
        study.runs["excluded"].isin([Exclusion.EARLIER, Exclusion.ONE_SAMPLE, Exclusion.UNTRAINED]),
        "adapter",
    ]
    without = {*excluded, *study.reference}
    symbol, table = "‖ΔW‖", study.spectra[["adapter", "module", "norm"]]
    relative = study.amplifications
    if len(relative):
        relative = relative[relative["at_rank"]]
        symbol, table = "‖ΔW‖/‖W‖", relative[["adapter", "module", "relative_norm"]]
    table = table.set_axis(["adapter", "module", "value"], axis=1)
    table = table[~table["adapter"].isin(without)].dropna()
    if table.empty:
        return None
    of = ""
    if several_bases(study):
        bases = table["adapter"].map(
            dict(zip(study.runs["adapter"], bases_of(study, study.runs["adapter"]), strict=True))
        )
        base = bases.mode().iloc[0]
        table, of = table[bases == base], f" on {base}"
    unknown = study.spectra.loc[
        study.spectra["adapter"].isin(table["adapter"]), "in_units_of_scale"
    ].any()
    notes = [
        " ‖ΔW‖ grows with the size of a module; with base weights (--base) it is divided by ‖W‖."
        if symbol == "‖ΔW‖"
        else "",
        " The scale of some adapters is unknown: their values are in units of it."
        if unknown
        else "",
    ]
    return ModuleChanges(
        values=table.groupby("module", sort=False)["value"].median(),
        symbol=symbol,
        of=f"{plural(table['adapter'].nunique(), 'adapter')}{of}",
        note="".join(notes),
    )
