"""Sanity checks: numbers in an adapter that training does not leave.

A file of tensors has no checksum, and most damage looks like learned numbers. `module_statistics`
measures one module while it is loaded; `sanity_findings` decides about all modules together, so
that no module is loaded a second time: the usual range of a norm, modules that never received a
gradient and copied factors are only visible over the whole adapter.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.finding import Finding
from lora_analysis.linalg.arrays import FEW_ENTRIES, peak_and_rest, zero_runs
from lora_analysis.names import may_be_tied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, FilePosition, Update

# The maximum over a million normal numbers is 5 times their rms; in 7,700 real factors at most 20.
MAX_PEAK_RATIO: Final = 50.0
# Ratios of a norm to those of the other modules of its type; in real adapters at most 2.9.
OUTSIDE, UNUSUAL = 10.0, 5.0
MIN_OTHERS: Final = 3
# How far ΔW must be outside the others' range for a norm of A or B alone to count: the factors
# (GA, BG⁻¹) give the same ΔW, whatever their norms.
_VISIBLE: Final = 1.5
# Files are written in blocks of this many bytes: if one was lost, zeros start and end at blocks.
BLOCK_BYTES: Final = 512
MIN_HOLE_BYTES: Final = 256
MIN_RUN_BYTES: Final = 512
SCATTERED: Final = 0.05
# Expected number of zero runs of a factor that end on blocks by chance; above it, none is a hole.
_ALIGNED_BY_CHANCE: Final = 0.05
# An alpha of a few hundred over a rank of 1 occurs.
_LARGE_SCALE: Final = 1e4
_LARGE: Final = 1e4
# Adam's first step already moves B by the learning rate.
_TINY: Final = 1e-20
_NUMBERS: Final = re.compile(r"\d+")
_INDEX: Final = re.compile(r"(?:^|(?<=[._]))\d+(?=[._]|$)")
_PROJECTION: Final = re.compile(r"(?:^|(?<=[._]))(to_|add_|w)?(query|key|value|[qkv])(?=[._]|$)")


class ZeroRun(NamedTuple):
    """A run of zeros in a factor: its bytes in the file, and whether it is a hole in the file."""

    bytes: int
    is_hole: bool


@dataclass(frozen=True, slots=True)
class FactorStatistics:
    """Statistics of one factor's entries.

    Attributes
    ----------
    norm, largest
        Frobenius norm and largest absolute entry.
    peak_ratio
        Largest absolute entry over the rms of the other non-zero ones, if above
        `MAX_PEAK_RATIO`; infinite if there are no others; else 0.
    run
        The longest run of zeros in the file's order, holes first; None without a long one.
    tail
        Bytes of zeros at the factor's end in the file, if they are many.
    scattered
        Share of zeros outside of zero rows, zero columns and long runs.
    fingerprint
        Equal for equal factors.
    nonzero
        Number of entries other than zero.
    """

    shape: tuple[int, int]
    norm: float
    largest: float
    peak_ratio: float
    run: ZeroRun | None
    tail: int
    scattered: float
    fingerprint: tuple[Any, ...]
    position: FilePosition | None
    nonzero: int = 0

    @property
    def is_selection(self) -> bool:
        """Whether each row is a unit vector, as in a LoRA of full rank that was made of a LoKr."""
        count = self.shape[0]
        return self.largest == 1 and self.nonzero == count and self.norm == math.sqrt(count)

    @property
    def rms(self) -> float:
        """Root mean square of the entries."""
        return self.norm / math.sqrt(math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class ModuleStatistics:
    """Statistics of one module; ``A`` and ``B`` are None for a dense update."""

    module: str
    layout: str
    dtype: str
    scale: float | None
    norm: float
    largest: float
    A: FactorStatistics | None = None
    B: FactorStatistics | None = None

    @property
    def factors(self) -> tuple[tuple[str, FactorStatistics], ...]:
        """The two factors by role; none for a dense update."""
        return () if self.A is None or self.B is None else (("A", self.A), ("B", self.B))

    @property
    def is_trained(self) -> bool:
        """Whether both factors have entries other than zero."""
        return bool(self.factors) and all(factor.largest > 0 for _, factor in self.factors)

    @property
    def has_peak(self) -> bool:
        """Whether one entry of a factor is far above its others."""
        return any(factor.peak_ratio for _, factor in self.factors)


def module_statistics(update: Update, *, norm: float | None = None) -> ModuleStatistics:
    """Compute the statistics of one loaded module that `sanity_findings` needs.

    Parameters
    ----------
    update
        The module's update.
    norm
        ‖ΔW‖_F (in units of an unknown scale), if it has been computed already.
    """
    name, layout, dtype = update.name, update.layout, update.stored_dtype
    if not isinstance(update, LowRankUpdate):
        flat = update.delta.ravel(order="K")
        largest = max(float(flat.max()), -float(flat.min()))
        return ModuleStatistics(name, layout, dtype, None, 0.0, largest)
    a, b = map(_factor_statistics, (update.A, update.B), update.stored_at)
    if norm is None:
        # ‖s·B·A‖ from the Gram matrices of the factors, to the precision of their type.
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.vdot(update.B.T @ update.B, update.A @ update.A.T))
        size = math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.inf
        norm = (1.0 if update.scale is None else abs(update.scale)) * size
    largest = max(a.largest, b.largest)
    return ModuleStatistics(name, layout, dtype, update.scale, norm, largest, a, b)


def sanity_findings(
    modules: Iterable[ModuleStatistics], existing: Iterable[Finding] = ()
) -> tuple[Finding, ...]:
    """Return the findings about damaged or unusual numbers of an adapter.

    Parameters
    ----------
    modules
        Statistics of every module that was loaded.
    existing
        Findings of the adapter's reader; their codes are not given again.

    Returns
    -------
    tuple of Finding
        Damage first, at most one finding per code, with the affected modules in its fields.
    """
    every = list(modules)
    low_rank = [module for module in every if module.factors]
    codes = {finding.code for finding in existing}
    findings = [
        finding
        for check in _CHECKS
        for finding in check(low_rank if check in _JOINT else every)
        if finding.code not in codes
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity != "damage"))


def check_updates(
    updates: Iterable[Update], existing: Iterable[Finding] = ()
) -> tuple[Finding, ...]:
    """Return the sanity findings about updates that are loaded one after the other."""
    return sanity_findings((module_statistics(update) for update in updates), existing)


def with_sanity_findings(adapter: Adapter) -> Adapter:
    """Return the adapter with the sanity findings about its numbers; every module is loaded."""
    existing = adapter.provenance.findings
    new = check_updates(adapter.values(), existing)
    return adapter.with_provenance(findings=(*existing, *new)) if new else adapter


# Statistics of one factor


def _factor_statistics(
    values: NDArray[np.floating[Any]], position: FilePosition | None
) -> FactorStatistics:
    flat = values.ravel(order="K")  # the file's order, for a factor that is stored as it is
    high, low = float(flat.max()), float(flat.min())
    largest = max(high, -low)
    if largest < 1e15:
        square = float(np.vdot(flat, flat))
    else:
        wide = flat.astype(np.float64)
        with np.errstate(over="ignore"):
            square = float(np.vdot(wide, wide))
    zeros = flat == 0
    count = int(np.count_nonzero(zeros))
    if position is not None and position.shape != values.shape:
        position = None  # not the matrix that was read
    run, tail, scattered = None, 0, 0.0
    if position is not None and 0 < count < flat.size:
        run, tail, scattered = _zeros(values, zeros, count, position)
    step = max(1, flat.size // 32)
    with np.errstate(over="ignore", invalid="ignore"):
        sample = (flat[::step].tobytes(), flat[-8:].tobytes(), float(flat.sum()))
    return FactorStatistics(
        shape=(values.shape[0], values.shape[1]),
        norm=math.sqrt(square),
        largest=largest,
        peak_ratio=_peak_ratio(flat, largest, square, flat.size - count),
        run=run,
        tail=tail,
        scattered=scattered,
        fingerprint=(values.shape, high, low, *sample),
        position=position,
        nonzero=flat.size - count,
    )


def _peak_ratio(
    flat: NDArray[np.floating[Any]], largest: float, square: float, nonzero: int
) -> float:
    """Return the largest entry over the rms of the other non-zero ones, 0 if it is not a peak.

    Zeros do not count: rows of an embedding that were never seen would make all others large.
    """
    others = nonzero - 1
    if largest == 0:
        return 0.0
    if others == 0:
        return math.inf if flat.size > FEW_ENTRIES else 0.0
    # Most factors are decided by what was summed already, with room for its rounding.
    peak = largest * largest  # infinite beyond 1e154: an exponent's bit in double precision
    remainder = max(square - peak, 0.0) if math.isfinite(peak) else 0.0
    if others < FEW_ENTRIES or peak * others < 0.9 * MAX_PEAK_RATIO**2 * remainder:
        return 0.0
    _, rest = peak_and_rest(flat)
    rms = math.sqrt(float(np.vdot(rest, rest)) / others)
    ratio = min(largest / rms, sys.float_info.max) if rms > 0 else math.inf
    return ratio if ratio > MAX_PEAK_RATIO else 0.0


def _zeros(
    values: NDArray[np.floating[Any]],
    zeros: NDArray[np.bool_],
    count: int,
    position: FilePosition,
) -> tuple[ZeroRun | None, int, float]:
    """Return the longest run of zeros of a factor, its tail, and the share of scattered zeros."""
    run, tail, runs = None, 0, []
    least = -(-MIN_HOLE_BYTES // position.itemsize)
    if count >= least:
        starts, stops = zero_runs(zeros)
        is_long = stops - starts >= least
        runs = list(zip(starts[is_long].tolist(), stops[is_long].tolist(), strict=True))
    if runs:
        run = _longest_run(runs, values, position)
        start, stop = runs[-1]
        tail = (stop - start) * position.itemsize if stop == zeros.size else 0
    if count <= SCATTERED * zeros.size:
        return run, tail, 0.0
    for start, stop in runs:
        zeros[start:stop] = False  # a view of nothing else: made for this module
    order: Literal["C", "F"] = "C" if values.flags.c_contiguous else "F"
    table = zeros.reshape(values.shape[0], values.shape[1], order=order)
    zero_rows, zero_columns = (np.all(values == 0, axis=axis) for axis in (1, 0))
    rest = table[~zero_rows][:, ~zero_columns]
    share = float(np.count_nonzero(rest)) / rest.size if rest.size else 0.0
    return run, tail, share if share > SCATTERED else 0.0


def _longest_run(
    runs: Sequence[tuple[int, int]], values: NDArray[np.floating[Any]], position: FilePosition
) -> ZeroRun | None:
    """Return the longest hole, or else the longest run, if it is long enough to be mentioned.

    A hole starts and ends at blocks of the file or at the tensor's ends. If a factor has many
    runs (tokens that were never seen), or if whole rows are zero and rows align with blocks,
    some end there by chance: those are not holes.
    """
    size, item = values.size, position.itemsize
    row = values.shape[1] if values.flags.c_contiguous else values.shape[0]
    longest, hole = 0, 0
    for start, stop in runs:
        length = (stop - start) * item
        longest = max(longest, length)
        inner = [end for end in (start, stop) if 0 < end < size]
        if any((position.offset + end * item) % BLOCK_BYTES for end in inner):
            continue
        whole_rows = start % row == 0 and stop % row == 0
        coarse = whole_rows and (row * item >= MIN_HOLE_BYTES or len(runs) > 1)
        step = min(BLOCK_BYTES, item * (row if coarse else 1))
        if len(runs) * (step / BLOCK_BYTES) ** len(inner) < _ALIGNED_BY_CHANCE:
            hole = max(hole, length)
    if hole:
        return ZeroRun(hole, is_hole=True)
    return ZeroRun(longest, is_hole=False) if longest >= MIN_RUN_BYTES else None


# Conclusions about modules one by one


class _Hit(NamedTuple):
    """A module to which a rule applies: how strongly, and the fields of a finding about it."""

    size: float
    module: str
    fields: dict[str, Any]


def _worst_finding(code: str, hits: Sequence[_Hit], total: int) -> Iterator[Finding]:
    """Yield the finding about the strongest hit, with all affected modules, if there are any."""
    if hits:
        worst = max(hits, key=lambda hit: hit.size)
        modules = list(dict.fromkeys(hit.module for hit in hits))
        yield Finding(code, worst.fields | _affected_fields(modules, total))


def _affected_fields(names: list[str], total: int) -> dict[str, Any]:
    """Return the fields that every finding has: how many modules, of how many, and which."""
    return {"count": len(names), "total": total, "modules": names}


def _factors(
    modules: Sequence[ModuleStatistics],
) -> Iterator[tuple[ModuleStatistics, FactorStatistics, dict[str, Any]]]:
    """Yield every factor with its module, and the fields that name the two."""
    for module in modules:
        for role, factor in module.factors:
            yield module, factor, {"role": role, "module": module.module}


def _enlarged_entries(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: one entry far above the others, as a flipped exponent bit leaves it."""
    hits = []
    for m, f, fields in _factors(modules):
        if f.peak_ratio:
            ratio = {"ratio": f.peak_ratio} if math.isfinite(f.peak_ratio) else {}
            hits.append(_Hit(f.peak_ratio, m.module, {**fields, "value": f.largest, **ratio}))
    single = any(math.isinf(hit.size) for hit in hits)
    yield from _worst_finding("single-entry" if single else "enlarged-entry", hits, len(modules))


def _large_values(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: values above 1e4 that their own factor does not single out."""
    hits = []
    for m in modules:
        if m.largest > _LARGE and not m.has_peak:
            role = next((role for role, f in m.factors if f.largest == m.largest), "ΔW")
            fields = {"role": role, "module": m.module, "value": m.largest}
            hits.append(_Hit(m.largest, m.module, fields))
    yield from _worst_finding("large-values", hits, len(modules))


def _tiny_values(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: factors without any entry above 1e-20: bytes that were read as another type."""
    hits = [
        _Hit(0.0, m.module, {**fields, "value": f.largest})
        for m, f, fields in _factors(modules)
        if 0 < f.largest < _TINY
    ]
    yield from _worst_finding("tiny-values", hits, len(modules))


def _large_scales(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: a scale above 1e4."""
    hits = [
        _Hit(abs(m.scale), m.module, {"module": m.module, "value": m.scale})
        for m in modules
        if m.scale is not None and abs(m.scale) > _LARGE_SCALE
    ]
    yield from _worst_finding("large-scale", hits, len(modules))


def _zero_runs(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: holes in the file, and other long runs of zeros.

    A factor that ends in zeros, and is followed by a zero one in the file, is a hole.
    """
    stored = [
        (f.position.offset, f.position.bytes, (m.module, fields["role"]), f)
        for m, f, fields in _factors(modules)
        if f.position is not None
    ]
    stored.sort(key=lambda entry: entry[0])
    across = {
        key: ZeroRun(factor.tail, is_hole=True)
        for (offset, size, key, factor), (start, _, _, after) in pairwise(stored)
        if factor.tail and after.largest == 0 and offset + size == start
    }
    for code, is_hole in (("file-hole", True), ("zeros-in-a-row", False)):
        hits = [
            _Hit(run.bytes, m.module, {**fields, "bytes": run.bytes})
            for m, f, fields in _factors(modules)
            if (run := across.get((m.module, fields["role"]), f.run)) and run.is_hole is is_hole
        ]
        yield from _worst_finding(code, hits, len(modules))


def _scattered_zeros(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: more than 5 % zeros between other entries."""
    hits = [
        _Hit(f.scattered, m.module, {**fields, "share": f.scattered, "dtype": m.dtype})
        for m, f, fields in _factors(modules)
        if f.scattered
    ]
    yield from _worst_finding("scattered-zeros", hits, len(modules))


# Conclusions about all modules together


def _zero_a_factors(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: A is zero in a linear layer, where it starts random; AdaLoRA's A times E may be."""
    names = [
        m.module
        for m in modules
        if (m.A and m.B and m.A.largest == 0 and m.layout != "embedding")
        and (m.A.position is not None or m.B.position is None)
    ]
    if names:
        yield Finding("zero-a", _affected_fields(names, len(modules)))


def _zero_b_factors(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: B is zero in some modules only: whole types or layers, or scattered ones."""
    if not any(m.is_trained for m in modules):
        return
    names = []
    for m in modules:
        # B starts at zero, and so does A of an embedding.
        zero = {role for role, factor in m.factors if factor.largest == 0}
        if zero == {"B"} or (zero and m.layout == "embedding"):
            names.append(m.module)
    whole = _whole_groups([m.module for m in modules], set(names))
    for code, members in (
        ("zero-b", [name for name in names if name not in whole]),
        ("no-gradient", [name for name in names if name in whole]),
    ):
        if members:
            yield Finding(code, _affected_fields(members, len(modules)))


def _whole_groups(names: Sequence[str], zero: set[str]) -> set[str]:
    """Return the members of types and layers that are zero as a whole.

    A layer is what shares a name up to a number. One module alone makes a layer only at the end
    of the model, where a feature is taken from an earlier layer, and as an expert.
    """
    types: dict[str, list[str]] = defaultdict(list)
    layers: dict[tuple[str, int], list[str]] = defaultdict(list)
    last: dict[str, int] = defaultdict(int)
    for name in names:
        types[module_kind(name)].append(name)
        for match in _INDEX.finditer(name):
            parent, index = name[: match.start()], int(match[0][:9])
            layers[parent, index].append(name)
            last[parent] = max(index, last[parent])
    groups = [*types.values()]
    groups += [
        members
        for (parent, index), members in layers.items()
        if len(members) > 1 or "expert" in parent or index == last[parent]
    ]
    return {name for members in groups if zero.issuperset(members) for name in members}


def _identical_modules(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: A and B both identical in two modules, and A alone among q, k, v of a layer."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for m in modules:
        if m.is_trained:
            groups[tuple(factor.fingerprint for _, factor in m.factors)].append(m.module)
    # Embedding and head of a model with tied weights have one update.
    twins = [
        names for names in groups.values() if len(names) > 1 and not all(map(may_be_tied, names))
    ]
    members = [name for group in twins for name in group]
    if twins:
        fields = {"module": twins[0][0], "other": twins[0][1]}
        yield Finding("twin-modules", fields | _affected_fields(members, len(modules)))
    copies = _copies([m for m in modules if m.module not in members])
    if copies:
        yield Finding("copied-a", {"count": len(copies), "modules": copies})


def _copies(modules: Sequence[ModuleStatistics]) -> list[str]:
    """Return the modules among q, k, v of a layer that store one and the same A."""
    groups: dict[tuple[Any, ...], dict[Any, str]] = defaultdict(dict)
    for m in modules:
        match = _PROJECTION.search(m.module)
        if m.A is None or not m.A.largest or m.A.is_selection or match is None:
            continue
        layer = f"{m.module[: match.start(2)]}*{m.module[match.end(2) :]}"
        # Parts that the reader took out of one stored A have one position.
        stored = m.A.position.offset if m.A.position else m.module
        groups[layer, m.A.fingerprint].setdefault(stored, m.module)
    return [name for group in groups.values() if len(group) > 1 for name in group.values()]


def module_kind(name: str) -> str:
    """Return a module's type: its name without numbers, ``"layers..q_proj"``."""
    return _NUMBERS.sub("", name)


# Quantities that are compared between modules; the cause before its effect: a large B makes ΔW
# and its largest entry large.
_QUANTITIES: Final = ("‖A‖", "‖B‖", "the largest entry of A", "the largest entry of B", "‖ΔW‖")

# Positions of the largest entries, two after the norms of their factors.
_PEAKS: Final = (2, 3)


def _quantities(module: ModuleStatistics) -> tuple[list[float], list[float]]:
    """Return the compared quantities of a module, as they are and relative to its shape.

    ‖A‖ grows with the rank, ‖B‖ and ‖ΔW‖ with the outputs too, a random A's entries with
    1/√inputs.
    """
    (_, a), (_, b) = module.factors
    inputs, outputs = a.shape[1] ** 0.5, b.shape[0] ** 0.5
    values = [a.norm, b.norm, a.largest, b.largest, module.norm]
    relative = [a.rms * inputs, b.rms, a.largest * inputs, b.largest, module.norm / outputs]
    return values, relative


class _Outlier(NamedTuple):
    """A quantity of a module outside the range of the other modules."""

    module: str
    ratio: float
    quantity: str
    bound: str
    value: float
    others: int
    scope: str


def _norm_outliers(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: ‖A‖, ‖B‖, ‖ΔW‖ or a largest entry outside the range of the other modules."""
    # A single entry that is named already makes the norms large, and would hide others in them.
    outliers = list(_outliers([m for m in modules if not m.has_peak]))
    # An expert may have been routed to a few times: its norms may be small.
    strong = [
        outlier
        for outlier in outliers
        if outlier.ratio > OUTSIDE
        and not (outlier.bound == "minimum" and "expert" in outlier.module)
    ]
    names = {outlier.module for outlier in strong}
    weak = [outlier for outlier in outliers if outlier.module not in names]
    for code, members in (("norm-outlier", strong), ("unusual-norm", weak)):
        hits = [
            _Hit(
                round(math.log2(outlier.ratio)) - _QUANTITIES.index(outlier.quantity) / 10,
                outlier.module,
                {**outlier._asdict(), "limit": OUTSIDE},
            )
            for outlier in members
        ]
        yield from _worst_finding(code, hits, len(modules))


def _outliers(modules: Sequence[ModuleStatistics]) -> Iterator[_Outlier]:
    """Yield every quantity of a module that is more than `UNUSUAL` times outside the others'.

    The norm of a factor counts only if ΔW is outside its range, too; the largest entry also if it
    stands out from its own factor.
    """
    for pool, members, scope in _pools(modules):
        measures = {m.module: _quantities(m) for m in pool}
        levels_of = [
            sorted(relative[i] for _, relative in measures.values() if 0 < relative[i] < math.inf)
            for i in range(len(_QUANTITIES))
        ]
        # Largest entry over the rms of its factor.
        peaks = {
            name: {i: relative[i] / relative[i - 2] if relative[i - 2] > 0 else 0.0 for i in _PEAKS}
            for name, (_, relative) in measures.items()
        }
        peak_levels = {i: sorted(of[i] for of in peaks.values() if of[i] > 0) for i in _PEAKS}
        for i, quantity in enumerate(_QUANTITIES):
            levels = levels_of[i]
            if len(levels) <= MIN_OTHERS:
                continue
            for m in members:
                values, relative = measures[m.module]
                bound, ratio = _distance(relative[i], levels)
                if ratio > UNUSUAL and (
                    _is_outside(relative[-1], levels_of[-1], bound)
                    or (i in _PEAKS and _is_outside(peaks[m.module][i], peak_levels[i], bound))
                ):
                    yield _Outlier(
                        m.module, ratio, quantity, bound, values[i], len(levels) - 1, scope
                    )


def _is_outside(level: float, levels: Sequence[float], bound: str) -> bool:
    """Return True if a level is clearly outside the others' range, on the given side."""
    if len(levels) < 2:
        return False
    side, ratio = _distance(level, levels)
    return side == bound and ratio > _VISIBLE


def _distance(level: float, levels: Sequence[float]) -> tuple[str, float]:
    """Return how far a level is outside the range of the others in a sorted list it is in."""
    if not 0 < level < math.inf:
        return "", 0.0
    low = levels[1] if level == levels[0] else levels[0]
    high = levels[-2] if level == levels[-1] else levels[-1]
    return ("maximum", level / high) if level > high else ("minimum", low / level)


def _pools(
    modules: Sequence[ModuleStatistics],
) -> Iterator[tuple[list[ModuleStatistics], list[ModuleStatistics], str]]:
    """Yield the modules that are compared, those of them that are judged, and a name for all.

    A type of fewer than four is compared with the whole adapter; embeddings, whose B starts
    random and A at zero, with each other only.
    """
    for embedding in (False, True):
        pool = [m for m in modules if (m.layout == "embedding") is embedding]
        types: dict[str, list[ModuleStatistics]] = defaultdict(list)
        for m in pool:
            types[module_kind(m.module)].append(m)
        few: list[ModuleStatistics] = []
        for members in types.values():
            if len(members) > MIN_OTHERS:
                yield members, members, "of its type"
            else:
                few += members
        if few:
            yield pool, few, "of the adapter"


_JOINT: Final = (_zero_a_factors, _zero_b_factors, _identical_modules, _norm_outliers)
_CHECKS: Final[tuple[Callable[[Sequence[ModuleStatistics]], Iterator[Finding]], ...]] = (
    _zero_a_factors,
    _enlarged_entries,
    _large_values,
    _tiny_values,
    _large_scales,
    _norm_outliers,
    _zero_runs,
    _zero_b_factors,
    _identical_modules,
    _scattered_zeros,
)
