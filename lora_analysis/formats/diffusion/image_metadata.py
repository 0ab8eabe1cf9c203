"""Metadata of image models' files: carried over, brought up to date, and the hashes in them.

Trainers state ranks, alphas, captions and trigger words as strings in the header of a file.
sd-scripts' ``networks/resize_lora.py`` keeps all of them and updates rank, alpha, comment and the
two hashes by which sd-webui's extensions recognize a model (``library/train_util.py``,
``precalculate_safetensors_hashes``): of the tensors alone, and of 64 kB behind the first megabyte,
both of the file as it would be with the ``ss_*`` entries as its only metadata.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from lora_analysis.formats.side_tensors import carried_metadata, source_format
from lora_analysis.storage.tensor_writer import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_analysis.adapter import Adapter
    from lora_analysis.formats.diffusion.image_writing import PlannedModule
    from lora_analysis.storage.tensor_writer import OutputTensor

_DIM: Final = "ss_network_dim"
_ALPHA: Final = "ss_network_alpha"
_COMMENT: Final = "ss_training_comment"
_MODEL_HASH: Final = "sshs_model_hash"
_LEGACY_HASH: Final = "sshs_legacy_hash"
# Of the tensors' bytes too (the ModelSpec of Stability AI).
_SPEC_HASH: Final = "modelspec.hash_sha256"
_SEVERAL: Final = "Dynamic"
# What the legacy hash is computed from, in bytes of the file.
_LEGACY_RANGE: Final = (0x100000, 0x110000)


def image_metadata(
    adapter: Adapter,
    format: str,
    modules: Iterable[PlannedModule],
    tensors: Sequence[OutputTensor],
) -> dict[str, str]:
    """Return the metadata of a file of a format: those of its source, with what has changed.

    Parameters
    ----------
    adapter, format
        What is written, and as what.
    modules
        Its modules, for their ranks and alphas.
    tensors
        All that is written; read once for the hashes where the file states any.
    """
    carried = carried_metadata(adapter, format)
    planned = list(modules)
    metadata = {**carried, **_updated_network(adapter, format, carried, planned)}
    if format == "kohya" or metadata.keys() & {_MODEL_HASH, _LEGACY_HASH, _SPEC_HASH}:
        model, legacy = model_hashes(tensors, metadata)
        metadata |= {_MODEL_HASH: model, _LEGACY_HASH: legacy}
        if _SPEC_HASH in metadata:
            metadata[_SPEC_HASH] = f"0x{model}"
    return metadata


def _updated_network(
    adapter: Adapter, format: str, carried: Mapping[str, str], modules: Sequence[PlannedModule]
) -> dict[str, str]:
    """Return the entries on rank and alpha; those of a file that was not edited stay as they are.

    Convolutions often have a rank of their own, which such a file states elsewhere.
    """
    edited = adapter.provenance.format == "memory"
    if not (format == "kohya" or _DIM in carried) or (_DIM in carried and not edited):
        return {}
    dim = _common([str(module.rank) for module in modules])
    updated = {_DIM: dim, _ALPHA: _common([str(module.alpha) for module in modules])}
    base = adapter.provenance.base_model
    if not carried and base:
        updated["ss_base_model_version"] = base
    before = carried.get(_DIM)
    if edited and source_format(adapter) == format and dim != before:
        start = f" from {before}" if before else ""
        to = "Dynamic resize{}" if dim == _SEVERAL else f"dimension is resized{{}} to {dim}"
        updated[_COMMENT] = f"{to.format(start)}; {carried.get(_COMMENT, '')}"
    return updated


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else _SEVERAL


def model_hashes(tensors: Iterable[OutputTensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return the two hashes of a file as sd-scripts computes them, from one pass over its tensors.

    Parameters
    ----------
    tensors
        What the file will hold.
    metadata
        Its metadata, of which the ``ss_*`` entries count.

    Returns
    -------
    tuple of str
        ``sshs_model_hash``, 64 hexadecimal digits, and ``sshs_legacy_hash``, 8 of them.
    """
    digests = _Digests()
    counted = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    write_safetensors(cast("BinaryIO", digests), tensors, counted)
    return digests.model.hexdigest(), digests.legacy.hexdigest()[:8]


class _Digests:
    """A stream that keeps nothing but the digests of what is written to it."""

    def __init__(self) -> None:
        self.model = hashlib.sha256()
        self.legacy = hashlib.sha256()
        self._start = b""  # the first eight bytes, which say how long the header is
        self._written = 0

    def write(self, data: Any) -> int:
        """Take the next bytes of a safetensors file."""
        view = memoryview(data).cast("B")
        missing = 8 - len(self._start)
        self._start += bytes(view[:missing]) if missing else b""
        header_end = 8 + int.from_bytes(self._start, "little") if len(self._start) == 8 else None
        if header_end is not None:
            self.model.update(view[max(header_end - self._written, 0) :])
        first, last = (max(edge - self._written, 0) for edge in _LEGACY_RANGE)
        self.legacy.update(view[first:last])
        self._written += len(view)
        return len(view)
