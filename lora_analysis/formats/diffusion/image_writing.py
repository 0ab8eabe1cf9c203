"""Files of image models: modules with alphas and stored types, metadata brought up to date.

Trainers state ranks, alphas, captions and trigger words as strings in the header of a file.
sd-scripts' ``networks/resize_lora.py`` keeps all of them and updates rank, alpha, comment and the
two hashes by which sd-webui's extensions recognize a model (``library/train_util.py``,
``precalculate_safetensors_hashes``): of the tensors alone, and of 64 kB behind the first megabyte,
both of the file as it would be with the ``ss_*`` entries as its only metadata.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import numpy as np

from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.side_tensors import carried_metadata, source_format
from lora_analysis.formats.written import (
    exact_alpha,
    low_rank_update,
    module_tensors,
    norms_shape,
    writable_outlines,
)
from lora_analysis.storage.dtypes import is_exact, narrowed_type
from lora_analysis.storage.tensor_writer import (
    output_array,
    safetensors_content,
    write_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lora_analysis.adapter import Adapter, UpdateOutline
    from lora_analysis.formats.written import Shape
    from lora_analysis.storage.atomic import Content
    from lora_analysis.storage.tensor_writer import OutputTensor

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

    ``dtypes`` are the types in which its factors and DoRA's norms are written: those of its
    source, if they hold the numbers exactly.
    """

    name: str
    outline: UpdateOutline
    alpha: float
    dtypes: tuple[str, str]

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
        shape = norms_shape(outline) if peft_norms else _lycoris_norms_shape(outline)
        tensors = module_tensors(
            adapter,
            self.name,
            a,
            b,
            norms=(norms, shape) if outline.has_magnitude else None,
            dtypes=self.dtypes,
        )
        if alpha is not None:
            # float32 if that holds the alpha exactly.
            with np.errstate(over="ignore", under="ignore"):
                narrow_alpha = np.array(self.alpha, np.float32)
            exact = float(narrow_alpha) == self.alpha
            tensors.append(output_array(alpha, narrow_alpha if exact else np.array(self.alpha)))
        return tensors


def _lycoris_norms_shape(outline: UpdateOutline) -> Shape:
    ones = tuple(1 for _ in outline.kernel)
    if outline.magnitude_side == "input":
        return (1, outline.shape[1] // math.prod(outline.kernel), *ones)
    return (outline.shape[0], 1, *ones)


def planned_modules(
    adapter: Adapter, format: str, *, input_norms: bool = True
) -> dict[str, PlannedModule]:
    """Return the modules of an adapter; raise if an image format cannot store one of them.

    ``input_norms``: the format can store DoRA's norms of input columns.

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
            name, outline, exact_alpha(outline), _stored_types(adapter, name, outline)
        )
        for name, outline in outlines.items()
    }


def _stored_types(adapter: Adapter, name: str, outline: UpdateOutline) -> tuple[str, str]:
    """Return the types of the factors and of DoRA's norms: the source's if it holds the numbers.

    Readers multiply some tensors out (Tucker cores, learned scalars), whose products it does not.
    """
    stored = narrowed_type(outline.stored_dtype)
    if stored == "float32":
        return stored, stored
    update = low_rank_update(adapter, name)
    exact = is_exact(update.A, stored) and is_exact(update.B, stored)
    norms_exact = update.magnitude is not None and is_exact(update.magnitude, stored)
    return stored if exact else "float32", stored if norms_exact else "float32"


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
    metadata = image_metadata(adapter, format, modules, tensors)
    return {name: safetensors_content(tensors, {"format": "pt", **metadata, **(more or {})})}


def image_metadata(
    adapter: Adapter,
    format: str,
    modules: Iterable[PlannedModule],
    tensors: Sequence[OutputTensor],
) -> dict[str, str]:
    """Return the metadata of the source, with the entries updated that no longer hold.

    Parameters are those of `image_file`.
    """
    carried = carried_metadata(adapter, format)
    metadata = {**carried, **_updated_network(adapter, format, carried, list(modules))}
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
    dim = _common([str(module.outline.rank) for module in modules])
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
        The tensors of the file.
    metadata
        Its metadata; only the ``ss_*`` entries count.

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
    """A stream that computes digests of the bytes written to it."""

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
