"""``lora-analysis doctor``: show installed packages, devices and extras."""

from __future__ import annotations

import platform
import re
import tomllib
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from lora_analysis import __version__
from lora_analysis.cli.options import DONE, REFUSED, VerbCommand, output_options
from lora_analysis.cli.show import print_facts, print_json

CORE = (
    "numpy", "scipy", "matplotlib", "pandas", "safetensors", "jinja2", "click", "rich", "regex",
    "pyyaml", "threadpoolctl", "array-api-compat",
)  # fmt: skip
# Purpose of each extra. Its packages are in the metadata of this package.
EXTRAS = {
    "gpu": "analysis on a GPU, LoRA layers in your own torch models",
    "gguf": "convert --to gguf, base models in GGUF's quantized types",
    "train": "train and sweep on models of transformers, on your own data",
    "demo": "demo, train and reproduce on the bundled digits",
    "demo-text": "demo --text on a pretrained sentence encoder",
    "hf": "adapters and bases by name (hf://owner/name)",
    "quantized": "train --quantized",
    "ray": "sweep and report on the machines of a Ray cluster",
    "trackers": "train --tracker with TensorBoard, Trackio, W&B",
    "notebook": "the notebooks",
    "parquet": "report --parquet, train on Parquet files",
    "docs": "building the documentation",
    "dev": "tests, linters and types",
    "test": "tests that compare with other programs, or need a browser",
    "all": "all of these for users",
}
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([^\]]*)\])?")
_FOR_EXTRA = re.compile(r"extra == ['\"]([\w.-]+)['\"]")


@click.command(name="doctor", cls=VerbCommand)
@output_options("ok, or incomplete")
def command(*, form: str) -> int:
    """Show versions, devices and extras, and what is missing.

    Exit code 3 if a package that is always needed is missing.
    """
    packages = {name: _version(name) for name in CORE}
    extras = {
        name: [package for package in needed if _version(package) is None]
        for name, needed in _extras()
    }
    missing = [name for name, version in packages.items() if version is None]
    # What a missing package prevents is unknown; no device if torch cannot be imported.
    machine: dict[str, Any] = {"cpus": None, "devices": [], "cache": None}
    with suppress(ImportError):
        from lora_analysis.execution import available_workers

        machine["cpus"] = available_workers()
    with suppress(ImportError, OSError):
        from lora_analysis.training.devices import available_devices

        machine["devices"] = available_devices()  # fastest first
    with suppress(ImportError):
        from lora_analysis.storage.cache import cache_folder

        machine["cache"] = cache_folder()
    document: dict[str, Any] = {
        "lora_analysis": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages | {"torch": _version("torch")},
        **machine,
        "extras": {
            name: {"installed": not lacking, "missing": lacking, "for": EXTRAS.get(name)}
            for name, lacking in extras.items()
        },
        "missing": missing,
    }
    if form == "json":
        print_json(document)
    elif form == "quiet":
        click.echo("incomplete" if missing else "ok")
    else:
        _print_report(document)
    return REFUSED if missing else DONE


def _extras() -> list[tuple[str, list[str]]]:
    """Return the extras in the order of the table, each with its packages."""
    needed: dict[str, list[str]] = {}
    included: dict[str, list[str]] = {}
    lines = _requirement_lines()
    for line in lines:
        package, extra = _REQUIREMENT.match(line), _FOR_EXTRA.search(line)
        if package and extra:
            needed.setdefault(extra[1], [])
            if package[2] and package[1].replace("_", "-") == "lora-analysis":
                included[extra[1]] = package[2].split(",")
            else:
                needed[extra[1]].append(package[1])
    for name, others in included.items():
        more = (package for other in others for package in needed.get(other.strip(), []))
        needed[name] = list(dict.fromkeys([*needed[name], *more]))
    order = list(EXTRAS)
    return sorted(
        needed.items(), key=lambda item: order.index(item[0]) if item[0] in EXTRAS else 99
    )


def _requirement_lines() -> list[str]:
    """Return the requirements of the installed package; a checkout has its pyproject.toml."""
    try:
        return metadata.requires("lora-analysis") or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        return []
    tables = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    return [
        f"{package}; extra == '{name}'" for name, packages in tables.items() for package in packages
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _print_report(document: dict[str, Any]) -> None:
    packages = document["packages"]
    installed = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines: list[tuple[str, object]] = [
        ("lora_analysis", document["lora_analysis"]),
        ("python", f"{document['python']} on {document['platform']}"),
        ("packages", installed),
        ("cpus", document["cpus"] or "unknown"),
        ("devices", ", ".join(document["devices"]) or "none (torch is missing or does not load)"),
        ("cache", document["cache"] or "unknown"),
    ]
    for name, extra in document["extras"].items():
        purpose = extra["for"] or "no description"
        missing = f"not installed (missing {', '.join(extra['missing'])}): {purpose}; "
        install = f"pip install 'lora-analysis[{name}]'"
        state = f"installed: {purpose}" if extra["installed"] else missing + install
        lines.append((f"extra {name}", state))
    if document["missing"]:
        names = ", ".join(document["missing"])
        lines.append(("missing", f"{names}. Install the package again: pip install lora-analysis"))
    print_facts(lines)
