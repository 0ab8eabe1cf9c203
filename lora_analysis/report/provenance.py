"""How a report was made: versions, hashes, and Python lines that give the same numbers."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis import __version__

if TYPE_CHECKING:
    from lora_analysis.studies import Study

PACKAGES = ("numpy", "scipy", "matplotlib", "pandas")


def made(study: Study, command: str | None) -> dict[str, Any]:
    """Return what the section on how it was made shows."""
    versions = [f"lora_analysis {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return {
        "version": __version__,
        "command": command or "lora_analysis.write_report(study, path)",
        "versions": ", ".join(versions),
        "base": "none" if study.base is None else study.base.label,
        "python": python_lines(study),
        "hashes": [
            (label, one.provenance.sha256 or "in memory") for label, one in study.adapters.items()
        ],
    }


def python_lines(study: Study) -> str:
    """Return a program that computes the numbers of the report anew from the same files.

    They are to be run in the folder in which the report was made: paths below it are relative.
    Where an adapter or the base was made in memory, the line says that it has to be put there.
    """
    lines = ["from lora_analysis import read_adapter, study", ""]
    groups: dict[str, list[str]] = {"adapters": [], "reference": []}
    for label in study.adapters:
        groups["reference" if label in study.reference else "adapters"].append(label)
    for name, labels in groups.items():
        if labels:
            lines += [f"{name} = [", *(f"    {_reading(study, one)}," for one in labels), "]"]
    given = ["adapters", *(["reference=reference"] if groups["reference"] else [])]
    for name, value in study.options.items():
        shown = _near(value) if name == "base" and isinstance(value, str) else value
        given.append(f"{name}={'...' if value is ... else repr(shown)}")
    lines += [f"result = study({', '.join(given)})", ""]
    if len(study.similarities):
        lines += [
            'result.similarities.groupby(["relation", "side"])[["phi_1_1", "omega"]].median()',
        ]
    if len(study.amplifications):
        lines += [
            'full = result.amplifications.query("at_rank")',
            'full.groupby("adapter")[["amplification_factor", "enrichment"]].median()',
        ]
    lines.append('result.spectra.groupby("adapter")[["stable_rank", "energy_rank_90"]].median()')
    return "\n".join(lines)


def _near(place: str) -> str:
    """Return a path relative to the working directory if it lies below; any other as it is."""
    path = Path(place)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and here in path.parents else place


def _reading(study: Study, label: str) -> str:
    source = study.adapters[label].provenance
    if source.location is None:
        return f"...,  # {label!r} was made in memory"
    options = [repr(_near(source.location))]
    if "caller" in source.scale_origin.values():
        scales = study.spectra.loc[study.spectra["adapter"] == label, "scale"].unique()
        # Several scales came from one alpha over several ranks.
        options.append(f"scale={float(scales[0])!r}" if len(scales) == 1 else "alpha=...")
    return f"read_adapter({', '.join(options)}, label={label!r})"
