"""``lora-analysis doctor``: installed versions, devices and extras."""

from __future__ import annotations

import platform
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from lora_analysis import __version__
from lora_analysis.cli.exit_codes import DONE, REFUSED
from lora_analysis.cli.options import output_options
from lora_analysis.cli.show import print_facts, print_json

CORE = (
    "torch", "numpy", "scipy", "matplotlib", "pandas", "safetensors", "jinja2", "click", "rich",
    "regex", "threadpoolctl", "array-api-compat",
)  # fmt: skip
# Features of each extra; its packages are listed in the distribution's metadata.
EXTRAS = {
    "demo": "demo, train and reproduce on the bundled digits",
    "demo-text": "demo --text on a pretrained sentence encoder",
    "hf": "adapters and bases by name (hf://owner/name), train on models of transformers",
    "data": "train on data sets of a hub, on images and on Parquet",
    "gguf": "convert --to gguf, bases in GGUF's quantized types",
    "quantized": "bases in GGUF's quantized types, train on a quantized base",
    "ray": "sweep and report on the machines of a Ray cluster",
    "trackers": "train --tracker with TensorBoard, Trackio, W&B",
    "parquet": "report --parquet",
    "notebook": "the notebooks",
    "docs": "building the documentation",
    "dev": "the tests",
}
_REQUIREMENT = re.compile(r"([\w.-]+)")
_FOR_EXTRA = re.compile(r"extra == ['\"]([\w.-]+)['\"]")


@click.command(name="doctor")
@output_options
def command(*, form: str) -> int:
    """Show versions, devices and extras, and what each missing extra would add.

    The exit code is 3 if a required package is missing.
    """
    packages = {name: _version(name) for name in CORE}
    extras = {
        name: [package for package in needed if _version(package) is None]
        for name, needed in _extras()
    }
    devices = _devices() if packages.get("torch") else []
    missing = [name for name, version in packages.items() if version is None]
    document: dict[str, Any] = {
        "lora_analysis": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpus": _cpus(),
        "devices": devices,
        "cache": _cache(),
        "extras": {
            name: {"here": not lacking, "missing": lacking, "for": EXTRAS.get(name)}
            for name, lacking in extras.items()
        },
        "missing": missing,
    }
    if form == "json":
        print_json(document)
    elif form == "quiet":
        click.echo("incomplete" if missing else "ok")
    else:
        _print(document)
    return REFUSED if missing else DONE


def _extras() -> list[tuple[str, list[str]]]:
    """Return the extras in the order of the table, each with its packages."""
    needed: dict[str, list[str]] = {}
    for line in _requirements():
        package, extra = _REQUIREMENT.match(line), _FOR_EXTRA.search(line)
        if package and extra:
            needed.setdefault(extra[1], []).append(package[1])
    order = list(EXTRAS)
    return sorted(
        needed.items(), key=lambda item: order.index(item[0]) if item[0] in EXTRAS else 99
    )


def _requirements() -> list[str]:
    """Return the requirements of the installed package, or of a checkout's pyproject.toml."""
    try:
        return metadata.requires("lora-analysis") or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        return []
    extras = tomllib.loads(project.read_text("utf-8"))["project"]["optional-dependencies"]
    return [
        f"{requirement}; extra == '{name}'"
        for name, needed in extras.items()
        for requirement in needed
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """Return the devices that ``--device`` accepts, fastest first; empty if torch is broken."""
    try:
        from lora_analysis.training.devices import available_devices
    except (ImportError, OSError):
        return []
    return available_devices()


def _cpus() -> int | None:
    """Return the number of usable CPUs; None if a package that counts them is missing."""
    try:
        from lora_analysis.execution import available_workers
    except ImportError:
        return None
    return available_workers()


def _cache() -> Path | None:
    """Return the cache folder; None if a required package is missing."""
    try:
        from lora_analysis.storage.cache import cache_folder
    except ImportError:
        return None
    return cache_folder()


def _print(document: dict[str, Any]) -> None:
    packages = document["packages"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines: list[tuple[str, object]] = [
        ("lora_analysis", document["lora_analysis"]),
        ("python", f"{document['python']} on {document['platform']}"),
        ("packages", versions),
        ("cpus", document["cpus"] or "not known"),
        ("devices", ", ".join(document["devices"]) or "none (torch does not load)"),
        ("cache", document["cache"] or "not known"),
    ]
    for name, extra in document["extras"].items():
        what = extra["for"] or "not described here"
        lacking = f"not here (no {', '.join(extra['missing'])}): {what}; "
        install = f"pip install 'lora-analysis[{name}]'"
        lines.append((f"extra {name}", f"here: {what}" if extra["here"] else lacking + install))
    if document["missing"]:
        names = ", ".join(document["missing"])
        lines.append(("missing", f"{names}. Install the package again: pip install lora-analysis"))
    print_facts(lines)
