"""The formats that are read and written; the module of a format is imported when it is asked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.formats.sources import Format
    from lora_analysis.storage.atomic import Content

# Modules with a ``FORMAT``, or formats that were registered. The first that recognizes a source
# reads it. Those with marks of their own come first: diffusers and FLUX files also have PEFT's
# keys, and a plain ``.lora_A`` may be loralib's or anybody's.
READERS: Final[list[str | Format]] = [
    "diffusion.diffusers", "diffusion.flux", "diffusion.kohya", "peft.framework_dumps",
    "peft.reader", "gguf", "mlx", "llm.torchtune", "llm.litgpt", "llm.adapterhub",
    "llm.opendelta", "llm.nemo", "diffusion.cloneofsimo", "diffusion.lycoris", "loralib", "pairs",
]  # fmt: skip
# Format → the module that writes it: its ``contents`` returns the files by name.
WRITERS: Final = {
    "peft": "peft.writer",
    "diffusers": "diffusion.diffusers",
    "kohya": "diffusion.kohya",
    "flux": "diffusion.flux",
    "loralib": "loralib",
    "mlx": "mlx",
    "gguf": "gguf_writer",
}
# Formats of image models, which have the same loaders.
IMAGE_FORMATS: Final = frozenset({"kohya", "flux", "diffusers"})
# Formats whose writer carries over what their files hold next to the factors.
CARRYING: Final = IMAGE_FORMATS | {"loralib", "peft"}
# Format → suffix of the file that its writer makes if the path names one; others make folders.
FILE_SUFFIXES: Final = {
    "diffusers": ".safetensors",
    "flux": ".safetensors",
    "gguf": ".gguf",
    "kohya": ".safetensors",
    "loralib": ".safetensors",
}
_NOTES: Final = {
    "loralib": "loralib.loralib_notes",
    "mlx": "mlx.mlx_notes",
    "gguf": "gguf_writer.gguf_notes",
}


def register_format(format: Format) -> None:
    """Add a format to those that `read_adapter` and `find_adapters` recognize.

    It is asked before the formats of this library, and replaces a registered one of its name.

    Parameters
    ----------
    format
        A `KeyScheme`, or an instance of another subclass of `Format`.
    """
    READERS[:] = [
        format,
        *(entry for entry in READERS if isinstance(entry, str) or entry.name != format.name),
    ]


def formats_for(path: Path | None, options: ReadOptions) -> Iterator[Format]:
    """Yield the formats in the order in which they are asked if they recognize a path.

    The path is None for tensors in memory. The caller's names for the tensors of a file go first,
    then a config that PEFT may have written. Whole models go last, and only if there is a base that
    they can be the difference to.
    """
    first: tuple[str, ...] = ()
    if options.pair is not None and (
        path is None or (path.is_file() and _load("pairs.has_matching_names")(path, options))
    ):
        first = ("pairs",)
    elif path is not None and (path / "adapter_config.json").is_file():
        first = ("peft.reader",)
    last = () if path is None or options.base is None else ("not_adapters",)
    for entry in (*first, *READERS, *last):
        yield _load(f"{entry}.FORMAT") if isinstance(entry, str) else entry


def contents_of(format: str) -> Callable[..., dict[str, Content]]:
    """Return the function that gives the files of a format: name → what to write.

    It takes the adapter and the options of the format. The file that makes the set readable comes
    last; a star in a name stands for the name of the folder.
    """
    return cast("Callable[..., dict[str, Content]]", _load(f"{WRITERS[format]}.contents"))


def notes_of(format: str) -> Callable[[Adapter], list[str]]:
    """Return the function that lists what a format's writer folds into something else."""
    if format not in _NOTES:
        return lambda _: []
    return cast("Callable[[Adapter], list[str]]", _load(_NOTES[format]))


def _load(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"lora_analysis.formats.{module}"), attribute)
