"""From pairs of stored tensors to an adapter: shared by every two-factor format."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_analysis.adapter import KroneckerParts, LowRankUpdate
from lora_analysis.errors import InputError, MalformedFileError, SourceError, UnsupportedMethodError
from lora_analysis.finding import Finding
from lora_analysis.formats.stored import StoredFactor, kronecker_operands, tensor
from lora_analysis.storage.dtypes import FLOATING
from lora_analysis.storage.limits import (
    MAX_ADAPTER_BYTES,
    MAX_DIMENSION,
    MAX_EXPERTS,
    MAX_RANK,
    MAX_SCALE,
    MAX_VALUE,
    MIN_SCALE,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Layout, ScaleOrigin
    from lora_analysis.formats.options import ReadOptions
    from lora_analysis.storage.tensors import NamedTensors


FactorRole = Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class StoredPair:
    """The two factors of one module, A as ``(r, d_in)`` and B as ``(d_out, r)``, not yet read.

    ``most_rank`` is the limit of its rank; the other fields are those of the update, see
    :class:`~lora_analysis.adapter.LowRankUpdate`.
    """

    module: str
    a: StoredFactor
    b: StoredFactor
    layout: Layout = "linear"
    kernel: tuple[int, ...] = ()
    variant: str = ""
    base_name: str = ""
    magnitude: StoredFactor | None = None
    magnitude_side: Literal["output", "input"] = "output"
    most_rank: int = MAX_RANK

    @classmethod
    def of(cls, module: str, a: str, b: str, *, flipped: bool = False) -> StoredPair:
        """Return the pair of two stored matrices; ``flipped`` if both are stored transposed."""
        first, second = tensor(a), tensor(b)
        if flipped:
            first, second = first.transpose(), second.transpose()
        return cls(module, first, second)


@dataclass(frozen=True, slots=True)
class StatedScale:
    """The scale of one module, the alpha it comes from, and who stated them."""

    scale: float | None
    alpha: float | None
    origin: ScaleOrigin


UNKNOWN_SCALE = StatedScale(None, None, "unknown")


def scale_from_alpha(
    alpha: float, rank: int, origin: ScaleOrigin, *, rslora: bool = False
) -> StatedScale:
    """Return the scale ``alpha/r``, or ``alpha/sqrt(r)`` with rsLoRA.

    An alpha of 0 leaves it unknown: such factors are not applied, but may have been trained.
    """
    if alpha == 0:
        return StatedScale(None, 0.0, origin)
    return StatedScale(alpha / (rank**0.5 if rslora else rank), alpha, origin)


def finite_number(value: object) -> float | None:
    """Return a number of a configuration as a float, None if it is not a finite number."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
        return None
    return float(value)  # type: ignore[arg-type]


def callers_scale(options: ReadOptions, rank: int, *, rslora: bool = False) -> StatedScale | None:
    """Return the scale the caller asked for, None if the file's counts."""
    if options.scale is not None:
        return StatedScale(float(options.scale), None, "caller")
    if options.alpha is not None:
        return scale_from_alpha(float(options.alpha), rank, "caller", rslora=rslora)
    return None


def stored_rank(tensors: NamedTensors, pair: StoredPair) -> int:
    """Return the rank of a stored pair, its types and shapes checked from the headers alone.

    Raises
    ------
    MalformedFileError
        A factor is empty, flat or holds no floating-point numbers, the ranks of the two differ,
        or they exceed the limits.
    UnsupportedMethodError
        A factor has more than two dimensions.
    """
    where = f"{tensors.file_of(pair.a.name)}: '{pair.module}'"
    a, b = (_factor_shape(tensors, pair, factor) for factor in (pair.a, pair.b))
    (rank, d_in), (d_out, rank_b) = a, b
    if rank != rank_b:
        hint = "A fused, grouped or block-diagonal variant, or damage?"
        if d_in == d_out and pair.module in pair.a.name and pair.module in pair.b.name:
            names = [f.name.replace(pair.module, "{name}", 1) for f in (pair.a, pair.b)]
            hint = (
                f"They fit transposed, as in x·A·B: pass pair=('{names[0]}', '{names[1]}') and "
                f"scale= or alpha= (command line: --pair '{names[0]},{names[1]}' --scale 1). If A "
                "and B are swapped, name B first."
            )
        message = (
            f"{where} has factors of different ranks: {_describe(tensors, pair.a, a)}, "
            f"{_describe(tensors, pair.b, b)}; A must be (r, d_in) and B (d_out, r). "
            f"{hint}"
        )
        raise MalformedFileError(message)
    if rank > pair.most_rank or max(d_in, d_out) > MAX_DIMENSION:
        message = (
            f"{where} has rank {rank} and shape ({d_out}, {d_in}); the limits are rank "
            f"{pair.most_rank} and {MAX_DIMENSION} features."
        )
        raise MalformedFileError(message)
    return rank


def _describe(tensors: NamedTensors, factor: StoredFactor, shape: tuple[int, int]) -> str:
    """Return a factor's name and shape, and that in the file if it was changed."""
    stored = tensors.infos[factor.name].shape
    in_file = "" if stored == shape else f", {stored} in the file"
    return f"{factor.name} is {shape}{in_file}"


def _factor_shape(tensors: NamedTensors, pair: StoredPair, factor: StoredFactor) -> tuple[int, int]:
    """Return the two dimensions of a factor; raise if it is not a matrix of floats."""
    for name in factor.names:
        info = tensors.infos[name]
        where = f"{tensors.file_of(name)}: tensor '{name}' of '{pair.module}'"
        if not info.shape or 0 in info.shape:
            message = (
                f"{where} has shape {info.shape}, a factor must be a non-empty matrix. "
                "Was it saved from a sharded training without gathering the parts?"
            )
            raise MalformedFileError(message)
        if info.dtype not in FLOATING and not info.dtype.startswith("gguf_"):
            message = f"{where} holds {info.dtype}, a factor must hold floating-point numbers."
            raise MalformedFileError(message)
    where = f"{tensors.file_of(factor.name)}: tensor '{factor.name}' of '{pair.module}'"
    try:
        shape = factor.shape(tensors)
    except ValueError as error:
        message = f"{where} does not have the shape that the format requires: {error}."
        raise MalformedFileError(message) from error
    if len(shape) > 2:
        message = (
            f"{where} has shape {shape}: an update of a convolution or of experts, which is not "
            "supported for this format; only updates of plain matrices are."
        )
        raise UnsupportedMethodError(message)
    if len(shape) < 2 or 0 in shape:
        message = f"{where} has shape {shape}, a factor must be a non-empty matrix."
        raise MalformedFileError(message)
    return shape[0], shape[1]


def update_loaders(
    tensors: NamedTensors,
    pairs: Sequence[StoredPair],
    scales: Mapping[str, StatedScale],
    *,
    label: str,
    stated_ranks: Collection[int] = (),
) -> dict[str, Callable[[], LowRankUpdate]]:
    """Return a function per module that reads its two factors.

    Parameters
    ----------
    tensors, pairs, scales
        The file, the factors of its modules, and their scales.
    label
        Name of the adapter.
    stated_ranks
        Ranks of a configuration; a file with one of them does not have A and B swapped.

    Raises
    ------
    MalformedFileError
        A scale or the total size exceeds the limits, or A and B are swapped.
    """
    _check_swapped(tensors, pairs, stated_ranks)
    for pair in pairs:
        scale = scales[pair.module]
        if scale.scale and not MIN_SCALE <= abs(scale.scale) <= MAX_SCALE:
            message = (
                f"{tensors.file_of(pair.a.name)}: the scale of '{pair.module}' would be "
                f"{scale.scale:g} ({scale.origin}); the limits are {MIN_SCALE:g} and "
                f"{MAX_SCALE:g}. Is the alpha damaged? Pass scale= or alpha= (command line: "
                "--scale, --alpha) to set it."
            )
            raise MalformedFileError(message)
    names = {name for pair in pairs for factor in (pair.a, pair.b) for name in factor.names}
    total = 4 * sum(tensors.infos[name].elements for name in names)
    if total > MAX_ADAPTER_BYTES:
        message = (
            f"{tensors.path}: the factors take {total:,} bytes, the limit is "
            f"{MAX_ADAPTER_BYTES:,}. Is it a whole model?"
        )
        raise MalformedFileError(message)
    return {
        pair.module: partial(load_update, tensors, pair, scales[pair.module], label)
        for pair in pairs
    }


def _check_swapped(
    tensors: NamedTensors, pairs: Sequence[StoredPair], stated_ranks: Collection[int]
) -> None:
    """Raise if A and B are swapped: no module has a side above its rank, some rank is twice both.

    Swapped factors of square weights look like that. One side below the rank is a small head, and
    if the two sides differ, swapped factors do not fit together at all.
    """
    ranks, sides = [], []
    # Factors of products are computed, not stored, so they cannot be swapped.
    pairs = [pair for pair in pairs if pair.most_rank == MAX_RANK]
    for pair in pairs:
        a, b = pair.a.shape(tensors), pair.b.shape(tensors)
        ranks.append(a[0])
        sides.append((b[0], a[1]))
    ratios = [rank / max(shape) for rank, shape in zip(ranks, sides, strict=True)]
    if (
        min(ratios, default=0) < 1
        or max(ratios, default=0) < 2
        or not set(ranks).isdisjoint(stated_ranks)
    ):
        return
    first = pairs[0]
    message = (
        f"{tensors.path}: A and B are swapped: the rank of every module exceeds both sides of its "
        f"update (first: '{first.module}', rank {ranks[0]}, update {sides[0]}). Exchange the names "
        f"of the two factors ('{first.a.name}' and '{first.b.name}')."
    )
    raise MalformedFileError(message)


def _read_factor(
    tensors: NamedTensors, pair: StoredPair, role: FactorRole, factor: StoredFactor
) -> NDArray[Any]:
    """Read a factor; raise if a number exceeds `MAX_VALUE`, which no training leaves."""
    try:
        values = factor.read(tensors)
    except OSError as error:
        message = f"{tensors.file_of(factor.name)}: cannot be read: {error.strerror or error}."
        raise SourceError(message) from error
    flat = values.ravel(order="K")
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.vdot(flat, flat))
    # Non-finite numbers are counted and named by the update itself.
    if square > MAX_VALUE**2 and np.isfinite(flat).all():
        largest = float(np.abs(flat).max())
        if largest > MAX_VALUE:
            message = (
                f"{tensors.file_of(factor.name)}: {role} of '{pair.module}' holds "
                f"{largest:.3g} (limit {MAX_VALUE:g}): the training diverged or the file is "
                "damaged."
            )
            raise MalformedFileError(message)
    return values


def load_update(
    tensors: NamedTensors, pair: StoredPair, scale: StatedScale, label: str
) -> LowRankUpdate:
    """Read the two factors of one module."""
    a, b = _read_factor(tensors, pair, "A", pair.a), _read_factor(tensors, pair, "B", pair.b)
    operands = list(zip(kronecker_operands(pair.b), kronecker_operands(pair.a), strict=False))
    parts = [(left.read(tensors), right.read(tensors)) for left, right in operands]
    try:
        return LowRankUpdate(
            name=pair.module,
            A=a,
            B=b,
            scale=scale.scale,
            alpha=scale.alpha,
            stored_dtype=tensors.infos[pair.a.name].dtype,
            layout=pair.layout,
            kernel=pair.kernel,
            variant=pair.variant,
            base_name=pair.base_name,
            magnitude=None if pair.magnitude is None else pair.magnitude.read(tensors),
            magnitude_side=pair.magnitude_side,
            label=label,
            stored_at=(pair.a.position(tensors), pair.b.position(tensors)),
            kronecker=KroneckerParts(parts[0], parts[1], a, b) if parts else None,
        )
    except InputError as error:
        message = f"{tensors.file_of(pair.a.name)}: {error}"
        raise MalformedFileError(message) from error


def common_rank(ranks: Mapping[str, int]) -> int | None:
    """Return the rank all modules share, or None."""
    distinct = set(ranks.values())
    return distinct.pop() if len(distinct) == 1 else None


def scale_findings(scales: Mapping[str, StatedScale], reason: str) -> list[Finding | str]:
    """Return the findings about modules of unknown scale, and about those of alpha 0."""
    unknown = sum(scale.scale is None and scale.alpha != 0 for scale in scales.values())
    fields = {"modules": unknown, "of": len(scales), "reason": reason}
    findings = [Finding("scale-unknown", fields)] if unknown else []
    return [*findings, *alpha_zero_findings(scales)]


def alpha_zero_findings(scales: Mapping[str, StatedScale]) -> list[Finding]:
    """Return the finding about modules whose alpha is 0, if there are any."""
    unused = sum(scale.scale is None and scale.alpha == 0 for scale in scales.values())
    return [Finding("alpha-zero", {"modules": unused, "of": len(scales)})] if unused else []


def complete_pairs(
    path: object,
    factors: Mapping[str, Mapping[FactorRole, str]],
    names: tuple[str, str] = ("{name}.lora_A.weight", "{name}.lora_B.weight"),
) -> list[StoredPair]:
    """Return the pairs of all modules; raise if a module has only one factor.

    ``names`` are the names of the tensors of A and of B in the format, for the message.
    """
    pairs = []
    for module, stored in factors.items():
        if len(stored) != 2:
            (present,) = stored.values()
            missing = names["A" in stored].replace("{name}", module)
            message = (
                f"{path}: '{module}' has '{present}' but no '{missing}'. A LoRA file stores both; "
                "is it truncated, or from another method?"
            )
            raise MalformedFileError(message)
        pairs.append(StoredPair.of(module, stored["A"], stored["B"]))
    return pairs


def split_stack(
    tensors: NamedTensors, pair: StoredPair, *, mark: str, names: tuple[str, str]
) -> Iterator[StoredPair]:
    """Yield the pair of each expert of a stack with A ``(E, r, d_in)`` and B ``(E, d_out, r)``.

    Parameters
    ----------
    tensors, pair
        The file, and the factors of the stack.
    mark
        Segment of the module's name that ``.experts.N.`` stands for; without it, the number comes
        behind the name, and the base has a stack too.
    names
        The format's names of the two factors, for the message.

    Raises
    ------
    MalformedFileError
        The factors are no such stack, or one of more than `MAX_EXPERTS`.
    """
    a, b = (tensors.infos[factor.name].shape for factor in (pair.a, pair.b))
    if len(b) != 3 or a[0] != b[0] or a[0] > MAX_EXPERTS:
        message = (
            f"{tensors.path}: '{pair.module}' has {names[0]} {a} and {names[1]} {b}; a stack of "
            f"experts needs (E, r, in) and (E, out, r), with at most {MAX_EXPERTS:,} experts."
        )
        raise MalformedFileError(message)
    for expert in range(a[0]):
        module, base_name = f"{pair.module}.{expert}", f"{pair.module}[{expert}]"
        if mark in pair.module:
            module, base_name = pair.module.replace(mark, f".experts.{expert}."), ""
        a_e, b_e = pair.a.at(expert), pair.b.at(expert)
        yield replace(pair, module=module, base_name=base_name, a=a_e, b=b_e)
