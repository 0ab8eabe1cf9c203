"""Adapters on disk: one file per format, chosen by what the source holds, never by its suffix.

A format is a module with the three functions of :class:`~lora_analysis.formats.registry.Format`;
adding one means writing that module and naming it in the registry. Nothing outside this folder
knows a key, a config field or a file name of any format, and nothing in it computes with the
factors it reads.
"""

from lora_analysis.formats.globs import each_once, expanded
from lora_analysis.formats.reading import find_adapters, read_adapter
from lora_analysis.formats.side_tensors import unwritten_findings
from lora_analysis.formats.sources import AdapterRef
from lora_analysis.formats.writing import (
    write_adapter,
    writing_notes,
    written_names,
)

__all__ = [
    "AdapterRef",
    "each_once",
    "expanded",
    "find_adapters",
    "read_adapter",
    "unwritten_findings",
    "write_adapter",
    "writing_notes",
    "written_names",
]
