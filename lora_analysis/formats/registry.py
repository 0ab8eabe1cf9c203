"""The formats that are read and written; a format's module is imported when its turn comes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from lora_analysis.errors import InputError
from lora_analysis.storage.documents import read_json_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.sources import AdapterRef, ReadOptions
    from lora_analysis.storage.atomic import Content


class Format(Protocol):
    """What a format's module provides."""

    @property
    def NAME(self) -> str:  # noqa: N802 - a module's constant
        """Name in ``Provenance.format``."""

    def recognizes(self, path: Path, options: ReadOptions) -> bool:
        """Say, from content and options, whether the format lies at exactly this file or folder."""

    def find(self, path: Path, options: ReadOptions) -> list[AdapterRef]:
        """Return the adapters at exactly this path, without looking into sub-folders."""

    def read(self, path: Path, name: str | None, options: ReadOptions) -> Adapter:
        """Read one of them."""


# The first that recognizes a source reads it. Those with marks of their own come first: diffusers
# and FLUX files also have PEFT's keys, and a plain ``.lora_A`` may be loralib's or anybody's.
READERS: Final = (
    "diffusion.diffusers", "diffusion.flux", "diffusion.kohya", "peft.merged_linear",
    "peft.framework_dumps", "peft.reader", "gguf", "mlx", "llm.torchtune", "llm.litgpt",
    "llm.adapterhub", "llm.opendelta", "llm.nemo", "diffusion.cloneofsimo", "diffusion.lycoris",
    "loralib", "pairs",
)  # fmt: skip
# Format → the module that writes it: its ``contents`` returns the files by name.
WRITERS: Final = {
    "peft": "peft.writer",
    "diffusers": "diffusion.diffusers_writer",
    "kohya": "diffusion.kohya_writer",
    "flux": "diffusion.flux_writer",
    "loralib": "loralib_writer",
    "mlx": "mlx_writer",
    "gguf": "gguf_writer",
}
# Formats whose writer keeps the scale of each module and the type of the source.
LIKE_SOURCE: Final = frozenset({"kohya", "flux", "diffusers"})
# Formats whose writer carries over what their files hold next to the factors.
CARRYING: Final = LIKE_SOURCE | {"loralib", "peft"}
# Format → suffix of the file that its writer makes where the path names one; others make folders.
FILE_SUFFIXES: Final = {
    "diffusers": ".safetensors",
    "flux": ".safetensors",
    "gguf": ".gguf",
    "kohya": ".safetensors",
    "loralib": ".safetensors",
}
_NOTES: Final = {
    "loralib": "loralib_writer.loralib_notes",
    "mlx": "mlx_writer.mlx_notes",
    "gguf": "gguf_writer.gguf_notes",
}


def readers(path: Path, options: ReadOptions) -> Iterator[Format]:
    """Yield the formats in the order in which they are asked whether they know a path.

    What the caller says of a file's names goes before what they look like.
    """
    first = _named_in_config(path)
    if options.pair is not None and path.is_file():
        from lora_analysis.formats import pairs

        first = (pairs.NAME, *first) if pairs.described(path, options) else first
    for name in (*first, *(one for one in READERS if one not in first)):
        yield cast("Format", import_module(f"lora_analysis.formats.{name}"))


def _named_in_config(path: Path) -> tuple[str, ...]:
    """Return PEFT's readers where the config names PEFT: the commonest case asks no others."""
    config = path / "adapter_config.json"
    try:
        found = read_json_object(config) if config.is_file() else {}
    except InputError:
        return ()
    if "peft_type" not in found:
        return ()
    return ("peft.merged_linear", "peft.reader") if found.get("enable_lora") else ("peft.reader",)


def contents_of(format: str) -> Callable[..., dict[str, Content]]:
    """Return the function that gives the files of a format: name → what to write.

    It takes the adapter and the format's own options. The file that makes the set readable comes
    last; a star in a name stands for the name of the folder.
    """
    return cast("Callable[..., dict[str, Content]]", _loaded(f"{WRITERS[format]}.contents"))


def notes_of(format: str) -> Callable[[Adapter], list[str]]:
    """Return the function that says what a format's writer folds into something else."""
    if format not in _NOTES:
        return lambda _: []
    return cast("Callable[[Adapter], list[str]]", _loaded(_NOTES[format]))


def _loaded(place: str) -> Any:
    module, _, name = place.rpartition(".")
    return getattr(import_module(f"lora_analysis.formats.{module}"), name)
