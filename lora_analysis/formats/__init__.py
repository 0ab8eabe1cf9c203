"""Adapters on disk and in memory: read from and written to the formats of many trainers.

A format is an instance of `Format`, most of them a `KeyScheme`: a regular expression over tensor
keys, a scale rule and a few hooks. It is chosen by the content of a source, never by its suffix.
Nothing outside this folder depends on a key, a config field or a file name of any format, and
nothing in it computes with the factors it reads.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_analysis.formats.build import AdapterParts as AdapterParts
    from lora_analysis.formats.key_scheme import KeyPattern as KeyPattern
    from lora_analysis.formats.key_scheme import KeyScheme as KeyScheme
    from lora_analysis.formats.live import ModelReader as ModelReader
    from lora_analysis.formats.live import as_adapter as as_adapter
    from lora_analysis.formats.live import as_update as as_update
    from lora_analysis.formats.live import is_adapter_like as is_adapter_like
    from lora_analysis.formats.live import map_modules as map_modules
    from lora_analysis.formats.live import read_factors as read_factors
    from lora_analysis.formats.live import unique_labels as unique_labels
    from lora_analysis.formats.load import expand_glob as expand_glob
    from lora_analysis.formats.load import find_adapters as find_adapters
    from lora_analysis.formats.load import find_sources as find_sources
    from lora_analysis.formats.load import load_adapter as load_adapter
    from lora_analysis.formats.load import read_adapter as read_adapter
    from lora_analysis.formats.load import skip_seen as skip_seen
    from lora_analysis.formats.options import ReadOptions as ReadOptions
    from lora_analysis.formats.registry import register_format as register_format
    from lora_analysis.formats.side_tensors import unwritten_findings as unwritten_findings
    from lora_analysis.formats.sources import AdapterRef as AdapterRef
    from lora_analysis.formats.sources import Format as Format
    from lora_analysis.formats.writing import write_adapter as write_adapter
    from lora_analysis.formats.writing import writing_notes as writing_notes
    from lora_analysis.formats.writing import written_names as written_names

# Imported on use: the command line needs the options alone for its help.
_HOME = {
    "build": ("AdapterParts",),
    "key_scheme": ("KeyPattern", "KeyScheme"),
    "live": (
        "ModelReader",
        "as_adapter",
        "as_update",
        "unique_labels",
        "is_adapter_like",
        "map_modules",
        "read_factors",
    ),
    "load": (
        "skip_seen",
        "expand_glob",
        "find_adapters",
        "find_sources",
        "load_adapter",
        "read_adapter",
    ),
    "options": ("ReadOptions",),
    "registry": ("register_format",),
    "sources": ("AdapterRef", "Format"),
    "side_tensors": ("unwritten_findings",),
    "writing": ("write_adapter", "writing_notes", "written_names"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605  (a list of str, built)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        message = f"module 'lora_analysis.formats' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(f"lora_analysis.formats.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
