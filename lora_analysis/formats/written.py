"""What every writer needs: checks before a byte is written, shapes, alphas, and a module's tensors.

Everything that can be refused is refused from the outlines of the updates; the numbers are read
module by module while the file is written, so that no more than one module is in memory.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from lora_analysis.adapter import NOT_STORED, ROW_ORDERS, Adapter, LazyUpdate, LowRankUpdate
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.formats.peft.adapter_config import refuse_more_than_factors
from lora_analysis.formats.peft.module_pairs import DORA
from lora_analysis.formats.side_tensors import carried_tensors
from lora_analysis.storage.dtypes import is_exact, narrow, narrowed_type, to_float32
from lora_analysis.storage.tensor_writer import OutputTensor, output_group

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Update, UpdateOutline

T = TypeVar("T", int, float)
Shape = tuple[int, ...]
# Key, role, shape and stored type of a tensor that is written.
_Entry = tuple[str, str, Shape, str]

DTYPES: Final = ("float32", "float16", "bfloat16")
"""Types that factors can be written in."""

_LAYOUTS: Final = frozenset({"linear", "embedding", "conv", "conv1d"})


def writable_outlines(
    adapter: Adapter,
    format: str,
    *,
    layouts: Collection[str],
    variants: Collection[str] = (),
    input_norms: bool = False,
    unknown_scale: bool = False,
) -> dict[str, UpdateOutline]:
    """Return the outlines of an adapter's updates; raise if a format cannot store one of them.

    Parameters
    ----------
    adapter, format
        The adapter and the name of the format, for messages.
    layouts
        Layouts of weights that the format has.
    variants
        Methods beyond plain LoRA that the format can express.
    input_norms
        Whether DoRA's norms may be those of input columns.
    unknown_scale
        Whether the format can leave the scale of all modules open.

    Raises
    ------
    InputError
        There are no modules, or one is a dense update.
    UnsupportedMethodError
        More than the factors was trained, or the format cannot express an update.
    ScaleError
        A scale is not known.
    """
    refuse_more_than_factors(adapter.config, adapter.label, f"which {format} files cannot express.")
    if adapter.saved_modules:
        message = (
            f"{adapter.label} also trained '{next(iter(adapter.saved_modules))}' in full, which a "
            f"file of {format} cannot hold. It is not written."
        )
        raise UnsupportedMethodError(message)
    carried_tensors(adapter, format)  # refuses side tensors that the format cannot hold
    outlines = low_rank_outlines(adapter)
    for outline in outlines.values():
        refuse_update(
            outline,
            adapter.label,
            format,
            layouts=layouts,
            variants=variants,
            input_norms=input_norms,
        )
    if not (unknown_scale and has_unknown_scale(outlines)):
        for outline in outlines.values():
            outline.known_scale()
    return outlines


def has_unknown_scale(outlines: Mapping[str, UpdateOutline]) -> bool:
    """Return True if the scale is unknown, as it is if a file states it for no module."""
    return all(outline.scale is None for outline in outlines.values())


def low_rank_outlines(adapter: Adapter) -> dict[str, UpdateOutline]:
    """Return the outline of each module; one module at a time is loaded for it.

    Raises
    ------
    InputError
        There are no modules, or one is a dense update.
    """
    outlines = {}
    for name in adapter:
        outlines[name] = adapter.outline(name)
        if outlines[name].dense:
            message = f"'{name}' in {adapter.label} is a dense update; a LoRA file holds A and B."
            raise InputError(message)
    if not outlines:
        message = f"{adapter.label} adapts no module; there is nothing to write."
        raise InputError(message)
    return outlines


def refuse_update(
    update: UpdateOutline,
    label: str,
    format: str,
    *,
    layouts: Collection[str] = _LAYOUTS,
    variants: Collection[str] = (DORA,),
    input_norms: bool = False,
) -> None:
    """Raise UnsupportedMethodError for an update that a file of a format cannot express.

    The parameters are those of `writable_outlines`.
    """
    if update.layout not in layouts:
        reason = f"for a weight of layout '{update.layout}', which a file of {format} cannot store"
    elif update.variant in ROW_ORDERS:
        reason = (
            f"read with its {update.variant}, which a file of {format} cannot state; pass heads= "
            "(command line: --heads), the heads of the base, to read them in the model's"
        )
    elif update.variant not in ("", *variants):
        reason = (
            f"part of a {update.variant} update, which also changes the base weight; a file of "
            f"{format} cannot store that"
        )
    elif update.variant == DORA and not update.has_magnitude:
        reason = "a DoRA update without its magnitude"
    elif update.magnitude_side == "input" and not input_norms:
        reason = f"DoRA with norms of input columns; a file of {format} holds norms of rows"
    elif update.base_name:
        reason = f"for the weight '{update.base_name}', and loaders look for '{update.name}'"
    else:
        return
    message = f"'{update.name}' in {label} is {reason}. It is not written."
    raise UnsupportedMethodError(message)


def is_dora(updates: Iterable[UpdateOutline], subject: str, format: str) -> bool:
    """Return True if all updates are DoRA's, False if none is.

    Raises
    ------
    InputError
        Some are and some are not, which one flag in a config cannot express.
    """
    kinds = {update.variant == DORA for update in updates}
    if len(kinds) > 1:
        message = (
            f"{subject}: DoRA in some modules only, which a config of {format} cannot express."
        )
        raise InputError(message)
    return kinds.pop()


def exact_alpha(update: UpdateOutline, *, rslora: bool = False) -> float:
    """Return the alpha for which ``alpha/r`` (``alpha/√r`` with rsLoRA) is the scale of an update.

    Raises
    ------
    InputError
        Scale times rank is not finite.
    """
    divisor = math.sqrt(update.rank) if rslora else update.rank
    scale, alpha = update.known_scale(), update.alpha
    if alpha is None or alpha / divisor != scale:
        alpha = scale * divisor
    if not math.isfinite(alpha):
        message = f"The alpha of '{update.name}', {scale:g} times {divisor:g}, is not finite."
        raise InputError(message)
    # 2.0000000000000004·8 is meant as 16: the nearest whole number that gives the same scale.
    return float(round(alpha)) if round(alpha) / divisor == scale else float(alpha)


def json_number(value: float) -> float:
    """Return a whole number as an int, which JSON writes without a fraction."""
    return int(value) if value == int(value) else value


def default_and_others(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Return the commonest value, and the entries that have a different one."""
    default, _ = Counter(values.values()).most_common(1)[0]
    return default, {name: value for name, value in values.items() if value != default}


def low_rank_update(adapter: Adapter, name: str) -> LowRankUpdate:
    """Return the update of a module that `low_rank_outlines` found to be of two factors."""
    update = adapter[name]
    if not isinstance(update, LowRankUpdate):
        message = f"'{name}' in {adapter.label} became a dense update while it was written."
        raise InputError(message)
    return update


def join_updates(
    adapter: Adapter,
    rows: Mapping[str, Sequence[int] | NDArray[np.intp]],
    height: int,
    leading: str,
    *,
    is_shared: bool = False,
) -> LowRankUpdate:
    """Return low-rank updates as one of a weight whose rows they divide.

    A has those of the updates below each other, B each update's in its rows. With ``is_shared``,
    all have the same A and scale, and B is filled row by row under that A.

    Parameters
    ----------
    adapter, rows
        The adapter, and the rows that each of its modules has in the weight.
    height
        Rows of the weight.
    leading
        The module whose scale the whole has; ratios of scales go into B.
    """
    updates = {module: low_rank_update(adapter, module) for module in rows}
    first = updates[leading]
    rank = first.rank if is_shared else sum(update.rank for update in updates.values())
    B = np.zeros((height, rank), np.result_type(*(update.B for update in updates.values())))
    start = 0
    for module, update in updates.items():
        same = update.scale == first.scale
        ratio = 1 if same else update.known_scale() / first.known_scale()
        columns = slice(start, start + update.rank)
        B[rows[module], columns] = update.B if same else update.B * ratio
        start += 0 if is_shared else update.rank
    A = first.A if is_shared else np.vstack([update.A for update in updates.values()])
    return replace(first, A=A, B=B, alpha=None, stored_at=NOT_STORED)


def stored_types(adapter: Adapter, name: str, outline: UpdateOutline) -> tuple[str, str]:
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


def round_update(update: LowRankUpdate, dtype: str) -> LowRankUpdate:
    """Return an update with A and B rounded to a stored type; DoRA's norms have their own.

    Raises
    ------
    InputError
        A number is too large for the type.
    """
    A = to_float32(narrow(update.A, dtype, f"A of '{update.name}'"), dtype)
    B = to_float32(narrow(update.B, dtype, f"B of '{update.name}'"), dtype)
    return replace(update, A=A, B=B, stored_dtype=dtype, stored_at=NOT_STORED)


def in_dtype(adapter: Adapter, dtype: str) -> Adapter:
    """Return an adapter whose factors are rounded to a stored type when they are read.

    Raises
    ------
    InputError
        The type is not one that factors can be written in.
    """
    check_dtype(dtype)
    updates = {
        name: LazyUpdate(
            replace(adapter.outline(name), stored_dtype=dtype),
            partial(_load_rounded, adapter, name, dtype),
        )
        for name in adapter
    }
    return adapter.copy_with(updates=updates)


def _load_rounded(adapter: Adapter, name: str, dtype: str) -> Update:
    update = adapter[name]
    return round_update(update, dtype) if isinstance(update, LowRankUpdate) else update


def check_dtype(dtype: str) -> None:
    """Raise InputError unless factors can be written in a type."""
    if dtype not in DTYPES:
        message = f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}."
        raise InputError(message)


def layer_shapes(outline: UpdateOutline) -> tuple[Shape, Shape]:
    """Return the shapes of A and B as the layer stores them, of a convolution with its kernel."""
    (d_out, d_in), rank, kernel = outline.shape, outline.rank, outline.kernel
    return (rank, d_in // math.prod(kernel), *kernel), (d_out, rank, *(1 for _ in kernel))


def norms_shape(outline: UpdateOutline) -> Shape:
    """Return the shape in which PEFT stores DoRA's norms of a layer's outputs."""
    ones = (1 for _ in outline.kernel)
    return (1, outline.shape[0], *ones) if outline.kernel else (outline.shape[0],)


def module_tensors(
    adapter: Adapter,
    name: str,
    a: str,
    b: str,
    *,
    norms: tuple[str, Shape] | None = None,
    dtypes: tuple[str, str] = ("float32", "float32"),
) -> list[OutputTensor]:
    """Return the factors of a module, and DoRA's norms, under their keys.

    Parameters
    ----------
    adapter, name
        The adapter and the module; its numbers are read when they are written.
    a, b
        Keys of the two factors, which are written in the shapes of `layer_shapes`.
    norms
        Key and shape of DoRA's norms, if they are written.
    dtypes
        Stored types of the factors and of the norms.
    """
    a_shape, b_shape = layer_shapes(adapter.outline(name))
    entries: list[_Entry] = [(a, "A", a_shape, dtypes[0]), (b, "B", b_shape, dtypes[0])]
    if norms is not None:
        entries.append((norms[0], "magnitude", norms[1], dtypes[1]))
    tensors = []
    # Tensors of one type stand next to each other in the file, and are read together.
    for dtype in dict.fromkeys(entry[3] for entry in entries):
        group = [entry for entry in entries if entry[3] == dtype]
        shapes = {key: shape for key, _, shape, _ in group}
        produce = partial(_module_arrays, adapter, name, group)
        tensors += output_group(shapes, produce, dtype=dtype)
    return tensors


def _module_arrays(
    adapter: Adapter, name: str, entries: Sequence[_Entry]
) -> dict[str, NDArray[Any]]:
    update = low_rank_update(adapter, name)
    return {
        key: narrow(getattr(update, role), dtype, f"{role} of '{name}'").reshape(shape)
        for key, role, shape, dtype in entries
    }
