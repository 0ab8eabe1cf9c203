"""Values of base weights that training cannot produce: enlarged entries, holes, implausible norms.

Files of weights have no checksum, and most damage leaves numbers that look like learned ones. These
checks detect the rest from statistics of one pass over each weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.finding import Finding
from lora_analysis.linalg.arrays import FEW_ENTRIES, peak_and_rest, zero_runs
from lora_analysis.storage.dtypes import FLOAT8, FLOATING, READABLE, raw_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_analysis.bases.weight import Weight
    from lora_analysis.storage.tensors import TensorFiles

# Largest entry over the rms of the others: genuine weights reach a few hundred at most.
MAX_RATIO: Final = 1000.0
# A hole: a run of zeros of at least this many bytes, and this share of the weight.
_HOLE_BYTES: Final = 4096
_HOLE_SHARE: Final = 0.01
# Share of zeros from which a weight is called sparse.
_SPARSE_SHARE: Final = 0.1
# Tables have rows of zeros for entries that were padded or never seen, up to this share.
_TABLE_SHARE: Final = 0.25
# Rms of the entries. Linear layers stay between about 0.001 and 5, tables of T5 reach some tens.
_MAX_RMS: Final = 50.0
_MAX_TABLE_RMS: Final = 1000.0
_MIN_RMS: Final = 1e-8
# Blocks of a tile, and rows of each, in which zeros are counted.
_SAMPLED_BLOCKS: Final = 4
_SAMPLED_ROWS: Final = 2
# Tiles of at most this size are counted whole.
_SMALL: Final = 1 << 16

# How transformers numbers the shards of a model.
_SHARD: Final = re.compile(r".*-(\d{5})-of-(\d{5})\.\w+")
_NUMBER: Final = re.compile(r"\d+")

_TABLES: Final = frozenset(
    {
        "classifier", "embed_in", "embed_out", "embed_positions", "embed_tokens", "lm_head",
        "output", "position_embd", "relative_attention_bias", "score", "shared", "tok_embeddings",
        "token_embd", "tokens_embed", "vocab_projector", "wpe", "wte",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """Statistics from one pass over a weight.

    Attributes
    ----------
    name
        Tensor of the weight.
    elements, stored_bytes
        Number of entries, and the bytes per entry in the file (1 for packed codes).
    storage
        Quantized storage; empty for plain numbers.
    largest
        Absolute value of the largest entry if it exceeds the rest of its tile by far, else 0.
    other_squares
        Sum of the squares of all other entries.
    zeros
        Number of zeros, estimated from a sample of rows in large weights.
    zero_run
        Length of the longest run of zeros in the order of the file.
    whole_rows
        True if that run consists of whole rows.
    """

    name: str
    elements: int
    stored_bytes: int
    storage: str
    largest: float
    other_squares: float
    zeros: float
    zero_run: int
    whole_rows: bool

    @property
    def other_rms(self) -> float:
        """Root mean square of the entries without the largest one."""
        return math.sqrt(self.other_squares / max(self.elements - 1, 1))

    @property
    def rms(self) -> float:
        """Root mean square of the entries."""
        return math.sqrt((self.other_squares + self.largest**2) / max(self.elements, 1))

    @property
    def ratio(self) -> float:
        """The largest entry over the rms of the others; 0 if there are too few to say."""
        if self.elements < FEW_ENTRIES or self.other_rms == 0:
            return 0.0
        return self.largest / self.other_rms

    @property
    def zero_share(self) -> float:
        """Share of the entries that are zero."""
        return self.zeros / max(self.elements, 1)

    @property
    def is_table(self) -> bool:
        """True for embeddings and heads, which have a row for each entry."""
        segments = self.name.removesuffix(".weight").split(".")
        return segments[-1] in _TABLES or segments[-1].endswith(("embedding", "embeddings"))

    @property
    def has_hole(self) -> bool:
        """True if a run of zeros is too long to have been learned."""
        share = self.zero_run / max(self.elements, 1)
        if self.zero_run * self.stored_bytes < _HOLE_BYTES or share < _HOLE_SHARE:
            return False
        return not (self.is_table and self.whole_rows and share < _TABLE_SHARE)

    @property
    def is_far_off(self) -> bool:
        """True if the rms of the entries is outside the range of weights."""
        largest = _MAX_TABLE_RMS if self.is_table else _MAX_RMS
        usual = self.other_rms if self.ratio > MAX_RATIO else self.rms
        return usual > largest or 0 < usual < _MIN_RMS


class WeightWatch:
    """Accumulator of `WeightStatistics`, tile by tile, in the order of the file.

    Notes
    -----
    Adds at most a few percent to a pass over W: the norms of rows, which the pass computes anyway,
    show in which tiles an entry may be enlarged and which rows are zero; further zeros are counted
    in a sample of rows.
    """

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._largest = 0.0
        self._squares = 0.0
        self._other_squares = 0.0  # those of the tile with the largest entry, without it
        self._tile_squares = 0.0
        self._zeros = 0.0
        self._seen = 0
        self._run, self._run_start, self._open = 0, 0, 0
        self._width = 1

    def add(self, tile: NDArray[Any], squares: NDArray[Any]) -> None:
        """Count a tile whose rows follow each other in the file.

        Parameters
        ----------
        tile
            ``(m, n)``.
        squares
            Sum of the squares of each row, ``(m,)``.
        """
        total = float(np.sum(squares, dtype=np.float64))
        self._squares += total
        # An entry's square is part of its row's: only tiles with an outlying row are examined.
        row = float(squares.max())
        if row * max(tile.size - tile.shape[1], 0) > (MAX_RATIO / 2) ** 2 * (total - row):
            largest, rest = peak_and_rest(tile)
            if largest > self._largest:
                self._largest, self._tile_squares = largest, total
                self._other_squares = float(np.dot(rest, rest))
        rows, width = tile.shape
        empty = squares == 0
        filled = rows - int(np.count_nonzero(empty))
        # In a flat weight a hole need not contain a whole row: every zero is counted.
        flat = 2 * width >= self._elements * _HOLE_SHARE or tile.size <= _SMALL
        # Rows of zeros are counted; the share of zeros in all others is estimated from samples of
        # adjacent rows, which need no gathering.
        counted = nonzero = 0
        height = rows if flat else _SAMPLED_ROWS
        for top in range(0, rows, max(rows // _SAMPLED_BLOCKS, height)):
            block = slice(top, top + height)
            sample = tile[block]
            nonzero += int(np.count_nonzero(sample))
            counted += (len(sample) - int(np.count_nonzero(empty[block]))) * width
        share = 1 - nonzero / counted if counted else 0.0
        self._zeros += (rows - filled) * width + share * filled * width
        if filled == rows and not (flat and share > 0):
            # No row is empty: only a run at the end can continue in the next tile.
            self._open = width - 1 - int(np.flatnonzero(tile[-1])[-1])
        else:
            self._keep_longest(self._seen - self._open, self._open)
            starts, stops = zero_runs(tile.ravel() == 0)
            if starts.size and starts[0] == 0:  # continues the run that the tile before ended with
                starts[0] = -self._open
            lengths = stops - starts
            if starts.size:
                longest = int(np.argmax(lengths))
                self._keep_longest(self._seen + int(starts[longest]), int(lengths[longest]))
            at_end = starts.size > 0 and stops[-1] == tile.size
            self._open = int(lengths[-1]) if at_end else 0
        self._seen += tile.size
        self._width = width

    def statistics(self, weight: Weight) -> WeightStatistics:
        """Return the statistics of a weight after its last tile."""
        dtype = weight.stored_dtype
        width = raw_dtype(dtype).itemsize if dtype in READABLE and not weight.storage else 1
        whole = self._run_start % self._width == 0 and self._run % self._width == 0
        return WeightStatistics(
            name=weight.name,
            elements=self._elements,
            stored_bytes=width,
            storage=weight.storage,
            largest=self._largest,
            other_squares=max(self._squares - self._tile_squares + self._other_squares, 0.0),
            zeros=self._zeros,
            zero_run=self._run,
            whole_rows=bool(whole),
        )

    def _keep_longest(self, start: int, length: int) -> None:
        if length > self._run:
            self._run, self._run_start = length, start


def weight_findings(statistics: Iterable[WeightStatistics], base: str) -> tuple[Finding, ...]:
    """Return findings on wrong or unusual values of the weights that were read from a base.

    Parameters
    ----------
    statistics
        Statistics of each weight; a repeated weight counts once.
    base
        Name of the base, for the text of findings.

    Notes
    -----
    A flipped bit is detected if it is the top bit of an exponent; four of five flips in an exponent
    change ‖W‖ by about a percent and are not detected. Nor is a transposed square matrix.
    """
    weights = list({weight.name: weight for weight in statistics}.values())
    findings = []

    def add(code: str, affected: Sequence[WeightStatistics], **fields: Any) -> None:
        counts = {"base": base, "count": len(affected), "total": len(weights)}
        names = [weight.name for weight in affected]
        findings.append(Finding(code, {**counts, "weights": names, **fields}))

    if enlarged := [weight for weight in weights if weight.ratio > MAX_RATIO]:
        worst = max(enlarged, key=lambda weight: weight.ratio)
        add("base-enlarged-entry", enlarged, value=worst.largest, ratio=worst.ratio)
    if far := [weight for weight in weights if weight.is_far_off]:
        worst = max(far, key=lambda weight: abs(math.log(weight.rms)))
        add("base-norm", far, rms=worst.rms)
    if holes := [weight for weight in weights if weight.has_hole]:
        longest = max(holes, key=lambda weight: weight.zero_run / weight.elements)
        size = longest.zero_run * longest.stored_bytes
        add("base-hole", holes, bytes=size, share=longest.zero_run / longest.elements)
    # Training leaves fewer zeros; codes of few bits often are zero.
    plain = [weight for weight in weights if not weight.storage]
    sparse = [weight for weight in plain if weight.zero_share >= _SPARSE_SHARE]
    if len(sparse) > 1 and 2 * len(sparse) >= len(weights):
        median = float(np.median([weight.zero_share for weight in sparse]))
        add("base-sparse", sparse, share=median)
    elif scattered := [weight for weight in sparse if not weight.has_hole]:
        share = max(weight.zero_share for weight in scattered)
        add("base-zeros", scattered, share=share)
    return tuple(findings)


def file_findings(files: TensorFiles, base: str) -> tuple[Finding, ...]:
    """Return findings on wrong or unusual files of a base, from their headers alone.

    Shards of two models are recognized by two types for the same kind of matrix, a kind being a
    name without its numbers. A model with quantized layers mixes types legitimately.
    """
    shard = _SHARD.fullmatch(files.path.name)
    if len(files.files) < 2:
        if shard is None or int(shard[2]) < 2:
            return ()
        fields = {"base": base, "number": int(shard[1]), "total": int(shard[2])}
        return (Finding("base-part", fields),)
    matrices = {name: info for name, info in files.infos.items() if len(info.shape) > 1}
    plain = FLOATING - FLOAT8
    if any(info.dtype not in plain for info in matrices.values()):
        return ()
    first: dict[str, str] = {}
    for name, info in matrices.items():
        other = first.setdefault(_NUMBER.sub("#", name), name)
        files_differ = files.locations[name] != files.locations[other]
        if info.dtype != matrices[other].dtype and files_differ:
            fields = {
                "base": base, "tensor": other, "dtype": matrices[other].dtype,
                "file": files.locations[other].name, "other": name, "other_dtype": info.dtype,
                "other_file": files.locations[name].name,
            }  # fmt: skip
            return (Finding("base-mixed-shards", fields),)
    return ()
