"""``lora-analysis doctor``: what is installed, and what that allows."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import click

from lora_analysis import __version__
from lora_analysis.cli.options import output_options
from lora_analysis.cli.show import print_facts, print_json

CORE = (
    "torch", "numpy", "scipy", "matplotlib", "pandas", "safetensors", "jinja2", "click", "rich",
    "regex", "threadpoolctl", "array-api-compat",
)  # fmt: skip
# Extra, the modules it brings, and what works with it.
EXTRAS = {
    "demo": (("sklearn",), "demo, train and reproduce on the bundled digits"),
    "hf": (("huggingface_hub",), "adapters and bases by name (hf://owner/name)"),
    "quantized": (("gguf",), "bases in GGUF's quantised types"),
    "parquet": (("pyarrow",), "report --parquet"),
    "notebook": (("notebook",), "the notebooks"),
}


@click.command(name="doctor")
@output_options
def command(*, form: str) -> int:
    """Say which versions, devices and extras are here, and what is missing for what.

    Exit code 1 where a package that is always needed is missing.
    """
    found = {name: _version(name) for name in CORE}
    extras = {
        name: all(find_spec(one) is not None for one in modules)
        for name, (modules, _) in EXTRAS.items()
    }
    devices = _devices() if found.get("torch") else []
    missing = [name for name, version in found.items() if version is None]
    document: dict[str, Any] = {
        "lora_analysis": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": found,
        "devices": devices,
        "extras": extras,
        "missing": missing,
    }
    if form == "json":
        print_json(document)
    elif form == "quiet":
        click.echo("incomplete" if missing else "ok")
    else:
        _print(document)
    return 1 if missing else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """Return the devices that ``--device`` takes, fastest first; those of a broken torch none."""
    try:
        from lora_analysis.training.devices import available_devices
    except (ImportError, OSError):
        return []
    return available_devices()


def _print(document: dict[str, Any]) -> None:
    from lora_analysis.execution import available_workers
    from lora_analysis.storage.cache import cache_folder

    packages = document["packages"]
    known = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines: list[tuple[str, object]] = [
        ("lora_analysis", document["lora_analysis"]),
        ("python", f"{document['python']} on {document['platform']}"),
        ("packages", known),
        ("cpus", available_workers()),
        ("devices", ", ".join(document["devices"]) or "none (torch does not load)"),
        ("cache", cache_folder()),
    ]
    for name, there in document["extras"].items():
        what = EXTRAS[name][1]
        install = f"for {what}: pip install 'lora-analysis[{name}]'"
        lines.append((f"extra {name}", f"here: {what}" if there else f"not here; {install}"))
    if document["missing"]:
        names = ", ".join(document["missing"])
        lines.append(("missing", f"{names}. Install the package again: pip install lora-analysis"))
    print_facts(lines)
