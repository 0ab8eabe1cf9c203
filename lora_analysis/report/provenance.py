"""How a report was made: versions, hashes, and a Python program that gives the same numbers."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_analysis import __version__

if TYPE_CHECKING:
    from lora_analysis.studies import Study

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
        "python": python_lines(study),
        "hashes": [
            (label, adapter.provenance.sha256 or "in memory")
            for label, adapter in study.adapters.items()
        ],
    }


def python_lines(study: Study) -> str:
    """Return a program that recomputes the numbers of the report from the same files.

    Run it in the folder in which the report was made: paths below it are relative. Adapters and
    base weights from memory are replaced by ``...``.
    """
    lines = ["from lora_analysis import read_adapter, study", ""]
    groups: dict[str, list[str]] = {"adapters": [], "reference": []}
    for label in study.adapters:
        groups["reference" if label in study.reference else "adapters"].append(label)
    for name, labels in groups.items():
        if labels:
            lines += [f"{name} = [", *(f"    {_reading(study, label)}," for label in labels), "]"]
    arguments = ["adapters", *(["reference=reference"] if groups["reference"] else [])]
    for name, value in study.options.items():
        typed = _relative(value) if name == "base" and isinstance(value, str) else value
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
    return "\n".join(lines)


def _relative(source: str) -> str:
    """Return a path relative to the working directory if it is below; any other unchanged."""
    path, folder = Path(source), Path.cwd()
    is_below = path.is_absolute() and folder in path.parents
    return str(path.relative_to(folder)) if is_below else source


def _reading(study: Study, label: str) -> str:
    source = study.adapters[label].provenance
    if source.location is None:
        return f"...,  # {label!r} was built in memory"
    options = [repr(_relative(source.location))]
    if "caller" in source.scale_origin.values():
        scales = study.spectra.loc[study.spectra["adapter"] == label, "scale"].unique()
        # Several scales came from one alpha over several ranks.
        options.append(f"scale={float(scales[0])!r}" if len(scales) == 1 else "alpha=...")
    return f"read_adapter({', '.join(options)}, label={label!r})"
