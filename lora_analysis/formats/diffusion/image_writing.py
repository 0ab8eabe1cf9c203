"""Files of image models: modules with alphas and stored types, metadata brought up to date.

Trainers state ranks, alphas, captions and trigger words as strings in the header of a file. They
are kept, and those that no longer hold are brought up to date as sd-scripts'
``networks/resize_lora.py`` does: rank, alpha, comment, and the two hashes by which sd-webui's
extensions recognize a model (``precalculate_safetensors_hashes`` of ``library/train_util.py``): of
the tensors alone, and of 64 kB behind the first megabyte, both of the file as it would be with the
``ss_*`` entries as its only metadata. An entry that the source does not have is not added to its
metadata, except for our mark.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import numpy as np

from lora_analysis.formats.diffusion.image_scheme import ALPHA_TYPE
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.side_tensors import carried_metadata, source_format
from lora_analysis.formats.written import (
    exact_alpha,
    module_tensors,
    norms_shape,
    stored_types,
    writable_outlines,
)
from lora_analysis.storage.dtypes import is_exact, narrow, narrowed_type
from lora_analysis.storage.tensor_writer import (
    OutputTensor,
    safetensors_content,
    write_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.storage.atomic import Content

_DIM: Final = "ss_network_dim"
_ALPHA: Final = "ss_network_alpha"
_COMMENT: Final = "ss_training_comment"
_MODEL_HASH: Final = "sshs_model_hash"
_LEGACY_HASH: Final = "sshs_legacy_hash"
# Also computed from the tensors' bytes (the ModelSpec of Stability AI).
_SPEC_HASH: Final = "modelspec.hash_sha256"
_SEVERAL: Final = "Dynamic"
# What the legacy hash is computed from, in bytes of the file.
_LEGACY_RANGE: Final = (0x100000, 0x110000)


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """A module before its numbers are read for the file.

    ``dtypes`` are the types in which its factors and DoRA's norms are written, ``alpha_type`` that
    of its alpha: those of its source, if they hold the numbers exactly.
    """

    name: str
    outline: UpdateOutline
    alpha: float
    dtypes: tuple[str, str]
    alpha_type: str = "float32"

    def tensors(
        self,
        adapter: Adapter,
        a: str,
        b: str,
        *,
        alpha: str | None = None,
        norms: str = "",
        peft_norms: bool = False,
    ) -> list[OutputTensor]:
        """Return the module's tensors under keys; alpha only if it has a key, norms if DoRA's.

        The norms have the shape in which LyCORIS stores them, or PEFT (``peft_norms``).
        """
        outline = self.outline
        shape = norms_shape(outline)
        if not peft_norms:
            ones = tuple(1 for _ in outline.kernel)
            shape = (outline.shape[0], 1, *ones)
            if outline.magnitude_side == "input":
                shape = (1, outline.shape[1] // math.prod(outline.kernel), *ones)
        tensors = module_tensors(
            adapter,
            self.name,
            a,
            b,
            norms=(norms, shape) if outline.has_magnitude else None,
            dtypes=self.dtypes,
        )
        if alpha is not None:
            value = np.array([self.alpha])
            with np.errstate(over="ignore", under="ignore"):
                types = (self.alpha_type, "float32")
                dtype = next((t for t in types if is_exact(value, t)), "float64")
                stored = value if dtype == "float64" else narrow(value, dtype, alpha)
            tensors.append(OutputTensor(alpha, dtype, (), lambda: stored.reshape(())))
        return tensors


def planned_modules(
    adapter: Adapter, format: str, *, input_norms: bool = True
) -> dict[str, PlannedModule]:
    """Return the modules of an adapter; raise if an image format cannot store one of them.

    Parameters
    ----------
    adapter, format
        The adapter, and the name of the format for messages.
    input_norms
        True if the format can store DoRA's norms of input columns.

    Raises
    ------
    InputError
        The adapter has no modules, a dense update, or an alpha that is not finite.
    UnsupportedMethodError
        More than the factors was trained, or the format cannot express an update.
    ScaleError
        A scale is not known.
    """
    outlines = writable_outlines(
        adapter, format, layouts=("linear", "conv"), variants=(DORA,), input_norms=input_norms
    )
    return {
        name: PlannedModule(
            name,
            outline,
            exact_alpha(outline),
            stored_types(adapter, name, outline),
            narrowed_type(adapter.config.get(ALPHA_TYPE, "float32")),
        )
        for name, outline in outlines.items()
    }


def image_file(
    adapter: Adapter,
    format: str,
    name: str,
    modules: Iterable[PlannedModule],
    tensors: Sequence[OutputTensor],
    *,
    more: Mapping[str, str] | None = None,
) -> dict[str, Content]:
    """Return a file of an image format by its name.

    Parameters
    ----------
    adapter, format, name
        The adapter, the format that is written, and the file's name.
    modules
        The modules that are written, for their ranks and alphas.
    tensors
        All tensors that are written; read once for the hashes if the file states any.
    more
        Further entries of the metadata.
    """
    source_metadata = adapter.provenance.metadata if source_format(adapter) == format else {}
    # The metadata of the source, with the entries updated that no longer hold.
    carried = carried_metadata(adapter, format)
    is_new = format == "kohya" and not carried
    metadata = {**carried, **_updated_network(adapter, carried, list(modules), is_new=is_new)}
    hashes = {_MODEL_HASH, _LEGACY_HASH} if is_new else {_MODEL_HASH, _LEGACY_HASH, _SPEC_HASH}
    if is_new or metadata.keys() & hashes:
        digests = _Digests()
        counted = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        write_safetensors(cast("BinaryIO", digests), tensors, counted)
        model, legacy = digests.model.hexdigest(), digests.legacy.hexdigest()[:8]
        updated = {_MODEL_HASH: model, _LEGACY_HASH: legacy, _SPEC_HASH: f"0x{model}"}
        metadata |= {k: updated[k] for k in hashes if is_new or k in carried}
    # Loaders of image models do not need the entry "format"; the source's is kept.
    start = {} if source_metadata and "format" not in source_metadata else {"format": "pt"}
    return {name: safetensors_content(tensors, {**start, **metadata, **(more or {})})}


def _updated_network(
    adapter: Adapter, carried: Mapping[str, str], modules: Sequence[PlannedModule], *, is_new: bool
) -> dict[str, str]:
    """Return the entries on rank and alpha; those of a file that was not edited stay as they are.

    Convolutions often have a rank of their own, which such a file states elsewhere.
    """
    if not is_new and adapter.provenance.format != "memory":
        return {}
    dim = _common([str(module.outline.rank) for module in modules])
    before = carried.get(_DIM)
    updated = {_DIM: dim, _ALPHA: _common([str(module.alpha) for module in modules])}
    if is_new:
        base = adapter.provenance.base_model
        return updated | ({"ss_base_model_version": base} if base else {})
    if dim != before:
        start = f" from {before}" if before else ""
        to = "Dynamic resize{}" if dim == _SEVERAL else f"dimension is resized{{}} to {dim}"
        updated[_COMMENT] = f"{to.format(start)}; {carried.get(_COMMENT, '')}"
    return {key: value for key, value in updated.items() if key in carried}


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else _SEVERAL


class _Digests:
    """A stream that computes digests of a safetensors file from one pass over its tensors.

    They are sd-scripts' ``sshs_model_hash``, in 64 hexadecimal digits, and ``sshs_legacy_hash``, of
    which 8 are stated, if of the file's metadata only the ``ss_*`` entries are written.
    """

    def __init__(self) -> None:
        self.model = hashlib.sha256()
        self.legacy = hashlib.sha256()
        self._start = b""  # the first eight bytes, which give the length of the header
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
