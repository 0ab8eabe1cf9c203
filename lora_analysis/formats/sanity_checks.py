"""Sanity checks: numbers in an adapter that training does not leave.

A file of tensors has no checksum, and most damage looks like learned numbers. `module_statistics`
measures one module while it is loaded; `sanity_findings` decides about all modules together, so
that no module is loaded a second time: what is normal for a norm, which modules never received a
gradient and which factors are copies can be said about the whole adapter only.
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
from lora_analysis.names import may_be_tied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter, FilePosition, Update

# The maximum over a million normal numbers is 5 times their rms; in 7,700 real factors at most 20.
ENLARGED: Final = 50.0
# Ratios of a norm to those of the other modules of its type; in real adapters at most 2.9.
OUTSIDE, UNUSUAL = 10.0, 5.0
MIN_OTHERS: Final = 3
# Files are written in blocks of so many bytes: where one was lost, zeros start and end there.
BLOCK_BYTES: Final = 512
MIN_HOLE_BYTES: Final = 256
MIN_RUN_BYTES: Final = 512
SCATTERED: Final = 0.05
# Zero runs of a factor that align with blocks by chance, in expectation, above which none counts.
_ALIGNED_BY_CHANCE: Final = 0.05
# An alpha of a few hundred over a rank of 1 occurs.
_LARGE_SCALE: Final = 1e4
_LARGE: Final = 1e4
# Adam's first step already moves B by the learning rate.
_TINY: Final = 1e-20
# With fewer other entries, a single one may hold all that was learned.
_FEW: Final = 16
_NUMBERS: Final = re.compile(r"\d+")
_INDEX: Final = re.compile(r"(?:^|(?<=[._]))\d+(?=[._]|$)")
_PROJECTION: Final = re.compile(r"(?:^|(?<=[._]))(to_|add_|w)?(query|key|value|[qkv])(?=[._]|$)")


class ZeroRun(NamedTuple):
    """A run of zeros in a factor: its bytes in the file, and whether it is a hole in the file."""

    bytes: int
    hole: bool


@dataclass(frozen=True, slots=True)
class FactorStatistics:
    """What one factor's entries say about damage.

    Attributes
    ----------
    norm, largest
        Frobenius norm and largest absolute entry.
    excess
        Largest absolute entry over the rms of the other non-zero ones, if above `ENLARGED`;
        infinite if there are no others; else 0.
    run
        The longest run of zeros in the file's order, holes first; None without a long one.
    tail
        Bytes of zeros at the factor's end in the file, if they are many.
    scattered
        Share of zeros outside of zero rows, zero columns and long runs.
    fingerprint
        Equal for equal factors.
    """

    shape: tuple[int, int]
    norm: float
    largest: float
    excess: float
    run: ZeroRun | None
    tail: int
    scattered: float
    fingerprint: tuple[Any, ...]
    position: FilePosition | None


@dataclass(frozen=True, slots=True)
class ModuleStatistics:
    """What one module's numbers say about damage; ``A`` and ``B`` are None for a dense update."""

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


def module_statistics(update: Update, *, norm: float | None = None) -> ModuleStatistics:
    """Return the statistics of one loaded module that `sanity_findings` needs.

    Parameters
    ----------
    update
        The module's update.
    norm
        ‖ΔW‖_F (in units of an unknown scale), if it has been computed already.
    """
    if not isinstance(update, LowRankUpdate):
        largest = _largest(update.delta.ravel(order="K"))
        return ModuleStatistics(update.name, update.layout, update.stored_dtype, None, 0.0, largest)
    a_at, b_at = update.stored_at
    a, b = _factor_statistics(update.A, a_at), _factor_statistics(update.B, b_at)
    if norm is None:
        norm = _product_norm(update)
    largest = max(a.largest, b.largest)
    return ModuleStatistics(
        update.name, update.layout, update.stored_dtype, update.scale, norm, largest, a, b
    )


def sanity_findings(
    modules: Iterable[ModuleStatistics], known: Iterable[Finding] = ()
) -> tuple[Finding, ...]:
    """Return what the numbers of an adapter say about damage, decided over all its modules.

    Parameters
    ----------
    modules
        Statistics of every module that was loaded.
    known
        What the adapter's reader has noticed already; a code among them is not given again.

    Returns
    -------
    tuple of Finding
        Damage first, at most one finding per code, with the affected modules in its fields.
    """
    every = list(modules)
    low_rank = [module for module in every if module.A is not None]
    codes = {finding.code for finding in known}
    findings = [
        finding
        for check in _CHECKS
        for finding in check(low_rank if check in _JOINT else every)
        if finding.code not in codes
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity != "damage"))


def check_updates(updates: Iterable[Update], known: Iterable[Finding] = ()) -> tuple[Finding, ...]:
    """Return the sanity findings about updates that are loaded one after the other."""
    return sanity_findings((module_statistics(update) for update in updates), known)


def with_sanity_findings(adapter: Adapter) -> Adapter:
    """Return the adapter with the sanity findings about its numbers; every module is loaded."""
    known = adapter.provenance.findings
    new = check_updates(adapter.values(), known)
    return adapter.with_provenance(findings=(*known, *new)) if new else adapter


# Statistics of one factor


def _largest(flat: NDArray[np.floating[Any]]) -> float:
    return max(float(flat.max()), -float(flat.min()))


def _factor_statistics(
    values: NDArray[np.floating[Any]], position: FilePosition | None
) -> FactorStatistics:
    flat = values.ravel(order="K")  # the file's order, for a factor that is stored as it is
    high, low = float(flat.max()), float(flat.min())
    largest = max(high, -low)
    square = float(np.vdot(flat, flat)) if largest < 1e15 else _square(flat)
    zeros = flat == 0
    count = int(np.count_nonzero(zeros))
    if position is not None and position.shape != values.shape:
        position = None  # another matrix than the one that was read
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
        excess=_excess(flat, largest, square, flat.size - count),
        run=run,
        tail=tail,
        scattered=scattered,
        fingerprint=(values.shape, high, low, *sample),
        position=position,
    )


def _square(flat: NDArray[np.floating[Any]]) -> float:
    wide = flat.astype(np.float64)
    with np.errstate(over="ignore"):
        return float(np.vdot(wide, wide))


def _product_norm(update: LowRankUpdate) -> float:
    """Return ‖s·B·A‖ from the Gram matrices of the factors, to the precision of their type."""
    a, b = update.A, update.B
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.vdot(b.T @ b, a @ a.T))
    scale = 1.0 if update.scale is None else abs(update.scale)
    return scale * math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.inf


def _excess(flat: NDArray[np.floating[Any]], largest: float, square: float, nonzero: int) -> float:
    """Return the largest entry over the rms of the other non-zero ones, 0 if it is not enlarged.

    Zeros do not count: rows of an embedding that were never seen would make all others large.
    """
    if largest == 0:
        return 0.0
    others = nonzero - 1
    if others == 0:
        return math.inf if flat.size > _FEW else 0.0
    # Most factors are decided by what was summed already, with room for its rounding.
    peak = largest * largest  # infinite beyond 1e154: an exponent's bit in double precision
    remainder = max(square - peak, 0.0) if math.isfinite(peak) else 0.0
    if others < _FEW or peak * others < 0.9 * ENLARGED**2 * remainder:
        return 0.0
    sizes = np.abs(flat.astype(np.float64))
    sizes[int(sizes.argmax())] = 0.0
    rms = math.sqrt(float(np.vdot(sizes, sizes)) / others)
    ratio = min(largest / rms, sys.float_info.max) if rms > 0 else math.inf
    return ratio if ratio > ENLARGED else 0.0


def _zeros(
    values: NDArray[np.floating[Any]],
    zeros: NDArray[np.bool_],
    count: int,
    position: FilePosition,
) -> tuple[ZeroRun | None, int, float]:
    """Return the most telling run of zeros of a factor, its tail, and its scattered zeros."""
    least = -(-MIN_HOLE_BYTES // position.itemsize)
    starts, stops = _runs(zeros, least) if count >= least else (_NONE, _NONE)
    run, tail = None, 0
    if len(starts):
        run = _telling_run(starts, stops, values, position)
        tail = int(stops[-1] - starts[-1]) * position.itemsize if stops[-1] == zeros.size else 0
    if count <= SCATTERED * zeros.size:
        return run, tail, 0.0
    for start, stop in zip(starts, stops, strict=True):
        zeros[start:stop] = False  # a view of nothing else: made for this module
    order: Literal["C", "F"] = "C" if values.flags.c_contiguous else "F"
    table = zeros.reshape(values.shape[0], values.shape[1], order=order)
    zero_rows, zero_columns = (np.all(values == 0, axis=axis) for axis in (1, 0))
    rest = table[~zero_rows][:, ~zero_columns]
    share = float(np.count_nonzero(rest)) / rest.size if rest.size else 0.0
    return run, tail, share if share > SCATTERED else 0.0


_NONE: Final = np.zeros(0, dtype=np.intp)


def _runs(zeros: NDArray[np.bool_], least: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return where runs of at least ``least`` zeros start and stop."""
    edges = np.flatnonzero(zeros[1:] != zeros[:-1]) + 1
    bounds = np.concatenate(([0], edges, [zeros.size]))
    starts, stops = bounds[:-1], bounds[1:]
    long = zeros[starts] & (stops - starts >= least)
    return starts[long], stops[long]


def _telling_run(
    starts: NDArray[np.intp],
    stops: NDArray[np.intp],
    values: NDArray[np.floating[Any]],
    position: FilePosition,
) -> ZeroRun | None:
    """Return the longest hole, or else the longest run, if it is long enough to be mentioned.

    A hole starts and ends at blocks of the file or at the tensor's ends. Where a factor has many
    runs (tokens that were never seen), or where whole rows are zero and rows align with blocks,
    some end there by chance: those are no holes.
    """
    size, item = values.size, position.itemsize
    row = values.shape[1] if values.flags.c_contiguous else values.shape[0]
    longest, hole = 0, 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        length = (stop - start) * item
        longest = max(longest, length)
        inner = [end for end in (start, stop) if 0 < end < size]
        if any((position.offset + end * item) % BLOCK_BYTES for end in inner):
            continue
        whole_rows = start % row == 0 and stop % row == 0
        coarse = whole_rows and (row * item >= MIN_HOLE_BYTES or len(starts) > 1)
        step = min(BLOCK_BYTES, item * (row if coarse else 1))
        if len(starts) * (step / BLOCK_BYTES) ** len(inner) < _ALIGNED_BY_CHANCE:
            hole = max(hole, length)
    if hole:
        return ZeroRun(hole, hole=True)
    return ZeroRun(longest, hole=False) if longest >= MIN_RUN_BYTES else None


# Conclusions about modules one by one


def _affected(names: Sequence[str], total: int) -> dict[str, Any]:
    """Return the fields that every finding has: how many modules, of how many, and which."""
    return {"count": len(names), "total": total, "modules": list(names)}


def _enlarged(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: one entry far above the others, as a flipped exponent bit leaves it."""
    hits = [(f.excess, role, f, m) for m in modules for role, f in m.factors if f.excess]
    if hits:
        excess, role, factor, module = max(hits, key=lambda hit: hit[0])
        names = list(dict.fromkeys(hit[3].module for hit in hits))
        fields = {"role": role, "module": module.module, "value": factor.largest}
        single = math.isinf(excess)
        yield Finding(
            "single-entry" if single else "enlarged-entry",
            fields | ({} if single else {"ratio": excess}) | _affected(names, len(modules)),
        )


def _large(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: values above 1e4 that their own factor does not single out."""
    hits = [m for m in modules if m.largest > _LARGE and not any(f.excess for _, f in m.factors)]
    if hits:
        worst = max(hits, key=lambda m: m.largest)
        role = next((role for role, f in worst.factors if f.largest == worst.largest), "ΔW")
        fields = {"role": role, "module": worst.module, "value": worst.largest}
        yield Finding("large-values", fields | _affected([m.module for m in hits], len(modules)))


def _tiny(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: factors without any entry above 1e-20: bytes that were read as another type."""
    hits = [(f, role, m) for m in modules for role, f in m.factors if 0 < f.largest < _TINY]
    if hits:
        factor, role, module = hits[0]
        names = list(dict.fromkeys(hit[2].module for hit in hits))
        fields = {"role": role, "module": module.module, "value": factor.largest}
        yield Finding("tiny-values", fields | _affected(names, len(modules)))


def _scales(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: a scale above 1e4."""
    hits = [m for m in modules if m.scale is not None and abs(m.scale) > _LARGE_SCALE]
    if hits:
        worst = max(hits, key=lambda m: abs(m.scale or 0.0))
        fields = {"module": worst.module, "value": worst.scale}
        yield Finding("large-scale", fields | _affected([m.module for m in hits], len(modules)))


def _zero_runs(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: holes in the file, and other long runs of zeros."""
    torn = _torn(modules)
    for code, hole in (("file-hole", True), ("zeros-in-a-row", False)):
        hits = [
            (run.bytes, role, m)
            for m in modules
            for role, f in m.factors
            if (run := torn.get((m.module, role), f.run)) is not None and run.hole is hole
        ]
        if hits:
            length, role, module = max(hits, key=lambda hit: hit[0])
            names = list(dict.fromkeys(hit[2].module for hit in hits))
            fields = {"role": role, "module": module.module, "bytes": length}
            yield Finding(code, fields | _affected(names, len(modules)))


def _torn(modules: Sequence[ModuleStatistics]) -> dict[tuple[str, str], ZeroRun]:
    """Return the factors that end in zeros and are followed by a zero one in the file, as holes."""
    stored = [
        (f.position.offset, f.position.bytes, (m.module, role), f)
        for m in modules
        for role, f in m.factors
        if f.position is not None
    ]
    stored.sort(key=lambda entry: entry[0])
    return {
        key: ZeroRun(factor.tail, hole=True)
        for (offset, size, key, factor), (start, _, _, after) in pairwise(stored)
        if factor.tail and after.largest == 0 and offset + size == start
    }


def _scattered(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: more than 5 % zeros between other entries."""
    hits = [(f.scattered, role, m) for m in modules for role, f in m.factors if f.scattered]
    if hits:
        share, role, module = max(hits, key=lambda hit: hit[0])
        names = list(dict.fromkeys(hit[2].module for hit in hits))
        fields = {"role": role, "module": module.module, "share": share, "dtype": module.dtype}
        yield Finding("scattered-zeros", fields | _affected(names, len(modules)))


# Conclusions about all modules together


def _zero_a(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: A is zero in a linear layer, where it starts random."""
    names = [m.module for m in modules if _is_zero_a(m)]
    if names:
        yield Finding("zero-a", _affected(names, len(modules)))


def _is_zero_a(module: ModuleStatistics) -> bool:
    """Return True if A is zero and should not be: AdaLoRA's A, scaled by its E, may be."""
    a, b = module.A, module.B
    if a is None or b is None or a.largest > 0 or module.layout == "embedding":
        return False
    return a.position is not None or b.position is None


def _no_gradient(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: B is zero in some modules only: whole types or layers, or scattered ones."""
    zero = {m.module for m in modules if _has_zero_start(m)}
    if not zero or not any(m.A and m.B and m.A.largest and m.B.largest for m in modules):
        return  # nothing is zero, or all of it is: untrained
    whole = zero & _whole_groups([m.module for m in modules], zero)
    names = [m.module for m in modules if m.module in zero]
    for code, members in (
        ("zero-b", [name for name in names if name not in whole]),
        ("no-gradient", [name for name in names if name in whole]),
    ):
        if members:
            yield Finding(code, _affected(members, len(modules)))


def _has_zero_start(module: ModuleStatistics) -> bool:
    """Return True if the factor that starts at zero still is: B, or A of an embedding."""
    if module.A is None or module.B is None:
        return False
    if module.layout == "embedding":
        return module.A.largest == 0 or module.B.largest == 0
    return module.B.largest == 0 and module.A.largest > 0


def _whole_groups(names: Sequence[str], zero: set[str]) -> set[str]:
    """Return the members of types and layers that are zero as a whole.

    A layer is what shares a name up to a number. One module alone makes a layer only at the end
    of the model, where a feature is taken from an earlier layer, and as an expert.
    """
    types: dict[str, list[str]] = defaultdict(list)
    layers: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        types[module_kind(name)].append(name)
        for match in _INDEX.finditer(name):
            layers[name[: match.start()], int(match[0][:9])].append(name)
    last: dict[str, int] = {}
    for parent, index in layers:
        last[parent] = max(index, last.get(parent, 0))
    whole = {name for members in types.values() if zero.issuperset(members) for name in members}
    for (parent, index), members in layers.items():
        is_unit = len(members) > 1 or "expert" in parent or index == last[parent]
        if is_unit and zero.issuperset(members):
            whole.update(members)
    return whole


def _twins(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: A and B both identical in two modules, and A alone among q, k, v of a layer."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for m in modules:
        if m.A and m.B and m.A.largest and m.B.largest:
            groups[m.A.fingerprint, m.B.fingerprint].append(m.module)
    # Embedding and head of a model with tied weights have one update.
    twins = [
        names for names in groups.values() if len(names) > 1 and not all(map(may_be_tied, names))
    ]
    if twins:
        fields = {"module": twins[0][0], "other": twins[0][1]}
        names = [name for group in twins for name in group]
        yield Finding("twin-modules", fields | _affected(names, len(modules)))
    copied = _copied(modules, {name for group in twins for name in group})
    if copied:
        yield Finding("copied-a", {"count": len(copied), "modules": copied})


def _copied(modules: Sequence[ModuleStatistics], twins: set[str]) -> list[str]:
    """Return the modules among q, k, v of a layer that store one and the same A."""
    groups: dict[tuple[Any, ...], dict[Any, str]] = defaultdict(dict)
    for m in modules:
        match = _PROJECTION.search(m.module)
        if m.A is None or not m.A.largest or match is None or m.module in twins:
            continue
        layer = f"{m.module[: match.start(2)]}*{m.module[match.end(2) :]}"
        # Parts that the reader took out of one stored A have one position.
        stored = m.A.position.offset if m.A.position else m.module
        groups[layer, m.A.fingerprint].setdefault(stored, m.module)
    return [name for group in groups.values() if len(group) > 1 for name in group.values()]


class _Outlier(NamedTuple):
    """A quantity of a module outside the range of the other modules."""

    ratio: float
    quantity: str
    bound: str
    value: float
    others: int
    scope: str


def module_kind(name: str) -> str:
    """Return a module's type: its name without numbers, ``"layers..q_proj"``."""
    return _NUMBERS.sub("", name)


def _norms(modules: Sequence[ModuleStatistics]) -> Iterator[Finding]:
    """Rule: ‖A‖, ‖B‖, ‖ΔW‖ or a largest entry outside the range of the other modules."""
    hits: dict[str, list[tuple[_Outlier, str]]] = {"norm-outlier": [], "unusual-norm": []}
    # A single entry that is named already makes the norms large, and would hide others in them.
    compared = [m for m in modules if not any(f.excess for _, f in m.factors)]
    for pool, members, scope in _pools(compared):
        for quantity, (value, measure) in _QUANTITIES.items():
            levels = sorted(level for m in pool if 0 < (level := measure(m)) < math.inf)
            if len(levels) <= MIN_OTHERS:
                continue
            for m in members:
                bound, ratio = _ratio(measure(m), levels)
                if ratio > UNUSUAL:
                    outlier = _Outlier(ratio, quantity, bound, value(m), len(levels) - 1, scope)
                    outside = ratio > OUTSIDE and not _is_rare_expert(m, outlier)
                    hits["norm-outlier" if outside else "unusual-norm"].append((outlier, m.module))
    strong = {name for _, name in hits["norm-outlier"]}
    hits["unusual-norm"] = [hit for hit in hits["unusual-norm"] if hit[1] not in strong]
    for code, outliers in hits.items():
        if outliers:
            # The cause before its effect: a large B makes ΔW and its largest entry large.
            order = list(_QUANTITIES)
            worst, name = max(
                outliers, key=lambda hit: (round(math.log2(hit[0].ratio)), -order.index(hit[0][1]))
            )
            names = list(dict.fromkeys(hit[1] for hit in outliers))
            fields = {"module": name, **worst._asdict(), "limit": OUTSIDE}
            yield Finding(code, fields | _affected(names, len(modules)))


def _ratio(level: float, levels: Sequence[float]) -> tuple[str, float]:
    """Return how far a level is outside the range of the others in a sorted list it is in."""
    if not 0 < level < math.inf:
        return "", 0.0
    low = levels[1] if level == levels[0] else levels[0]
    high = levels[-2] if level == levels[-1] else levels[-1]
    return ("maximum", level / high) if level > high else ("minimum", low / level)


def _is_rare_expert(module: ModuleStatistics, outlier: _Outlier) -> bool:
    """Return True if a norm is small in an expert, which may have been routed to a few times."""
    return outlier.bound == "minimum" and "expert" in module.module


def _pools(
    modules: Sequence[ModuleStatistics],
) -> Iterator[tuple[list[ModuleStatistics], list[ModuleStatistics], str]]:
    """Yield the modules of each type, with those that they are compared with.

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


# Quantities that are compared between modules, as they are and relative to the module's shape:
# ‖A‖ grows with the rank, ‖B‖ and ‖ΔW‖ with the outputs too, a random A's entries with 1/√inputs.
_QUANTITIES: Final[
    dict[str, tuple[Callable[[ModuleStatistics], float], Callable[[ModuleStatistics], float]]]
] = {
    "‖A‖": (lambda m: _factor(m, "A").norm, lambda m: _rms(_factor(m, "A")) * _inputs(m) ** 0.5),
    "‖B‖": (lambda m: _factor(m, "B").norm, lambda m: _rms(_factor(m, "B"))),
    "the largest entry of A": (
        lambda m: _factor(m, "A").largest,
        lambda m: _factor(m, "A").largest * _inputs(m) ** 0.5,
    ),
    "the largest entry of B": (
        lambda m: _factor(m, "B").largest,
        lambda m: _factor(m, "B").largest,
    ),
    "‖ΔW‖": (lambda m: m.norm, lambda m: m.norm / _factor(m, "B").shape[0] ** 0.5),
}


def _factor(module: ModuleStatistics, role: str) -> FactorStatistics:
    factor: FactorStatistics = getattr(module, role)
    return factor


def _rms(factor: FactorStatistics) -> float:
    return factor.norm / math.sqrt(math.prod(factor.shape))


def _inputs(module: ModuleStatistics) -> int:
    return _factor(module, "A").shape[1]


_JOINT: Final = (_zero_a, _no_gradient, _twins, _norms)
_CHECKS: Final[tuple[Callable[[Sequence[ModuleStatistics]], Iterator[Finding]], ...]] = (
    _zero_a,
    _enlarged,
    _large,
    _tiny,
    _scales,
    _norms,
    _zero_runs,
    _no_gradient,
    _twins,
    _scattered,
)
