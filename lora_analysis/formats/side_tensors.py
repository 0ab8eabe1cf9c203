"""Tensors that a file stores next to the factors: read with the adapter, written by its format.

A writer of the source's format carries these tensors and the file's metadata over. Every other
writer refuses an adapter whose model would compute different numbers without them, and names the
rest in a finding.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from lora_analysis.adapter import SideTensor
from lora_analysis.errors import UnsupportedMethodError
from lora_analysis.finding import Finding, quote_names
from lora_analysis.formats.registry import CARRYING
from lora_analysis.storage.tensor_writer import OutputTensor
from lora_analysis.storage.tensors import read_bits
from lora_analysis.text import plural

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from lora_analysis.adapter import Adapter
    from lora_analysis.storage.tensors import NamedTensors

# Entries of the metadata that every writer makes itself.
_REWRITTEN: Final = frozenset(
    {"format", "lora_adapter_metadata", "lora_analysis", "lora_analysis.fused_parts"}
)


def side_tensors(
    tensors: NamedTensors, keys: Iterable[str], *, harmless: Collection[str] = ()
) -> dict[str, SideTensor]:
    """Return tensors of a file that are not part of any update; none is read yet.

    Parameters
    ----------
    tensors
        The file.
    keys
        Keys of the tensors.
    harmless
        Keys of tensors that do not change what a model computes, such as embeddings of new words.
    """
    return {
        key: SideTensor(
            tensors.infos[key].dtype,
            tensors.infos[key].shape,
            partial(read_bits, tensors, key),
            alters_model=key not in harmless,
        )
        for key in keys
    }


def side_findings(what: str, keys: Sequence[str]) -> list[Finding]:
    """Return the finding on tensors next to the factors, if there are any."""
    if not keys:
        return []
    fields = {"count": len(keys), "tensors": plural(len(keys), "tensor"), "what": what}
    return [Finding("side-tensors", {**fields, "keys": list(keys)})]


def source_format(adapter: Adapter) -> str:
    """Return the format that an adapter's side tensors and metadata belong to.

    LoHa and LoKr of LyCORIS become pairs of factors, which LyCORIS writes under kohya's keys.
    """
    source = adapter.provenance.source_format or adapter.provenance.format
    return "kohya" if source == "lycoris" else source


def _is_carried(adapter: Adapter, format: str) -> bool:
    return format in CARRYING and source_format(adapter) == format


def carried_tensors(adapter: Adapter, format: str) -> dict[str, SideTensor]:
    """Return the side tensors that a writer of a format writes too.

    Raises
    ------
    UnsupportedMethodError
        The format is not the source's, and a model without them would compute other numbers.
    """
    if _is_carried(adapter, format):
        return dict(adapter.side_tensors)
    needed = [key for key, tensor in adapter.side_tensors.items() if tensor.alters_model]
    if needed:
        source = source_format(adapter)
        hint = f" format='{source}' (command line: --to {source}) keeps them."
        message = (
            f"{adapter.label} also stores {quote_names(needed)} next to the factors, which a file "
            f"of {format} cannot hold: a model that loads it would compute different numbers. It "
            f"is not written.{hint if source in CARRYING else ''}"
        )
        raise UnsupportedMethodError(message)
    return {}


def side_output(adapter: Adapter, format: str) -> list[OutputTensor]:
    """Return the side tensors that a file of the format carries over from its source.

    Raises
    ------
    UnsupportedMethodError
        The format is not the source's, and a model without them would compute other numbers.
    """
    return [
        OutputTensor(key, tensor.dtype, tensor.shape, tensor.read)
        for key, tensor in carried_tensors(adapter, format).items()
    ]


def carried_metadata(adapter: Adapter, format: str) -> dict[str, str]:
    """Return the entries of the source's metadata that a writer of a format writes too."""
    if not _is_carried(adapter, format):
        return {}
    metadata = adapter.provenance.metadata
    return {key: value for key, value in metadata.items() if key not in _REWRITTEN}


def unwritten_findings(adapter: Adapter, format: str) -> list[Finding]:
    """Return findings on tensors and metadata of the source that a file of a format lacks.

    `write_adapter` refuses tensors without which a model would compute different numbers; the
    others (embeddings of new words, the source's metadata) are named here.
    """
    if _is_carried(adapter, format):
        return []
    findings = []
    if keys := [key for key, tensor in adapter.side_tensors.items() if not tensor.alters_model]:
        fields = {"count": len(keys), "format": format, "keys": keys}
        fields["tensors"] = plural(len(keys), "tensor")
        findings.append(Finding("side-tensors-not-written", fields))
    if names := [key for key in adapter.provenance.metadata if key not in _REWRITTEN]:
        entries = f"{len(names)} {'entry' if len(names) == 1 else 'entries'}"
        fields = {"count": len(names), "format": format, "keys": names, "entries": entries}
        findings.append(Finding("metadata-not-written", fields))
    return findings
