"""Weights stored as codes: values of the codes, and the expected error of rounding to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from lora_analysis.errors import BaseWeightError
from lora_analysis.storage.dtypes import raw_dtype, result_dtype, widen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lora_analysis.storage.safetensors import TensorInfo

# MXFP4 scales a block by 2^(⌊log₂ largest⌋ − 2): its largest is below 8, its last level is 6.
MXFP4_REACH: Final = 2.0
# Sign (the high bit), two bits of exponent and one of mantissa.
E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Sign, two bits of exponent and three of mantissa: eighths up to 1, then three octaves.
_E2M3_SIZES: Final = np.concatenate(
    [np.arange(8) / 8, *((1 + np.arange(8) / 8) * 2.0**octave for octave in range(3))]
)
E2M3: Final = np.concatenate([_E2M3_SIZES, -_E2M3_SIZES]).astype(np.float32)
# A block of MXFP6 is scaled so that its largest value rounds to at most 7.5, the last level.
MXFP6_REACH: Final = 0.25
# cuBLAS reads block scales in tiles of 128 rows by 4 blocks; ComfyUI stores them so. Inside a tile,
# rows 32 apart follow each other; rows and blocks are padded to whole tiles.
_TILE_ROWS: Final = 128
_TILE_BLOCKS: Final = 4


class RawTensors(Protocol):
    """Stored tensors by name, whole or a run of their elements bit for bit."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Header entries by name."""

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor's values."""

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return the elements ``start`` to ``stop`` of a tensor as stored, flat."""


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """Some rows of a weight: ``scale·levels[codes]``, or ``scale·(codes − zero)``.

    Attributes
    ----------
    codes
        ``(m, n)``, integers.
    scale
        Broadcasts to ``(m, n)``.
    levels
        Value of every code; None if the codes are the numbers themselves.
    zero
        Broadcasts to ``(m, n)``; the integer code of 0.
    reach
        Distance beyond the outermost levels that values may have had, in units of the levels.
    """

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    levels: NDArray[np.float32] | None = None
    zero: NDArray[Any] | None = None
    reach: float = 0.0

    def values(self) -> NDArray[np.float32]:
        """Return the weights, ``(m, n)``."""
        if self.levels is None:
            numbers: NDArray[np.float32] = self.codes.astype(np.float32)
            if self.zero is not None:
                numbers -= self.zero.astype(np.float32)
        else:
            numbers = self.levels[self.codes]
        numbers *= self.scale
        return numbers

    def squared_errors(self) -> NDArray[np.float32]:
        """Return the mean square error of each weight, ``(m, n)``, after rounding to the nearest.

        The original is taken as uniform over the values that round to the code. The error is larger
        for writers that compensate errors instead of rounding to the nearest (GPTQ).
        """
        square = np.square(self.scale, dtype=np.float32)
        if self.levels is None:
            return np.broadcast_to(square / np.float32(12), self.codes.shape)
        return np.asarray(cell_variances(self.levels, self.reach)[self.codes] * square)


Decoder = Callable[[slice], Coded]


class Quantized(Protocol):
    """One weight stored as codes, in the shape that its plain numbers have."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, columns)``, or ``(experts, rows, columns)``."""

    @property
    def storage(self) -> str:
        """Name of the storage: "bitsandbytes nf4"."""

    @property
    def transposed(self) -> bool | None:
        """True if rows are input features; None if the family decides, as for plain weights."""

    @property
    def step(self) -> int:
        """Runs of rows must start at multiples of this number."""

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:
        """Return a function that decodes runs of rows; ``index`` selects an expert of a stack."""


def plane_of(shape: tuple[int, ...], index: int | None) -> tuple[int, int]:
    """Return rows and columns of one matrix of a stack, or of kernels with a row per output."""
    if index is None and len(shape) > 2:
        return shape[0], math.prod(shape[1:])
    return shape[-2], shape[-1]


def cell_variances(levels: NDArray[np.float32], reach: float = 0.0) -> NDArray[np.float32]:
    """Return the mean square distance from every level of the values that are nearest to it.

    A cell extends half way to the neighbors, ``a`` below and ``b`` above; uniform over it, the mean
    square is ``(a³ + b³)/(3(a + b))``, which is step²/12 for equal steps. Cells of the outermost
    levels extend by ``reach`` on the outside: 0 if blocks are scaled so that their largest value is
    a level, more if the scale is a power of two.
    """
    return _cell_variances(levels.tobytes(), reach)


@cache
def _cell_variances(raw: bytes, reach: float) -> NDArray[np.float32]:
    levels = np.frombuffer(raw, np.float32)
    finite = np.unique(levels[np.isfinite(levels)]).astype(np.float64)  # one zero for +0 and −0
    half = np.diff(finite) / 2
    below, above = np.concatenate([[reach], half]), np.concatenate([half, [reach]])
    variances = (below**3 + above**3) / (3 * (below + above))
    positions = np.searchsorted(finite, np.nan_to_num(levels, posinf=0, neginf=0))
    return np.where(np.isfinite(levels), variances[positions], 0).astype(np.float32)


@cache
def float_levels(dtype: str) -> NDArray[np.float32]:
    """Return the 256 values of an 8-bit float type."""
    codes = np.arange(256, dtype=raw_dtype(dtype))
    values = np.empty(256, dtype=result_dtype(dtype))
    widen(codes, dtype, values)
    return values


def powers_of_two(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the scales of E8M0 bytes: ``2^(e − 127)``; 255 is NaN."""
    return np.asarray(float_levels("float8_e8m0fnu")[exponents], np.float32)


def nibbles(packed: NDArray[np.uint8], *, high_first: bool) -> NDArray[np.uint8]:
    """Return the 4-bit codes of bytes, twice as many along the last axis."""
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def six_bit_codes(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the 6-bit codes of bytes, four of every three along the last axis, lowest first."""
    low, middle, high = (packed[..., i::3].astype(np.uint32) for i in range(3))
    words = low | middle << 8 | high << 16
    codes = np.stack([words >> shift & 63 for shift in (0, 6, 12, 18)], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.uint8)


def unpack(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the ``bits``-bit codes of 32-bit words, along the first axis, lowest bits first.

    Codes follow each other without gaps and may cross from one word into the next.
    """
    count = words.shape[0] * 32 // bits
    wide = words.view(np.uint32).astype(np.uint64)
    following = np.concatenate([wide[1:], np.zeros_like(wide[:1])])
    first_bit = np.arange(count) * bits
    word, shift = first_bit // 32, (first_bit % 32).astype(np.uint64)
    shift = shift.reshape(-1, *(1,) * (words.ndim - 1))
    pairs = wide[word] | (following[word] << np.uint64(32))
    return np.asarray((pairs >> shift) & np.uint64((1 << bits) - 1), np.uint8)


def untiled_shape(weight: tuple[int, ...], scale: TensorInfo, run: int) -> tuple[int, ...]:
    """Return the shape of tiled scales after `untile`; the stored shape if they do not fit.

    Parameters
    ----------
    weight
        Shape of the weight's numbers.
    scale
        The stored scales.
    run
        Number of weights per scale.
    """
    if len(weight) != 2 or weight[1] % run:
        return scale.shape
    rows, blocks = weight[0], weight[1] // run
    padded = -(-rows // _TILE_ROWS) * _TILE_ROWS * (-(-blocks // _TILE_BLOCKS) * _TILE_BLOCKS)
    return (rows, blocks) if scale.elements == padded else scale.shape


def untile(scales: NDArray[np.float32], rows: int, blocks: int) -> NDArray[np.float32]:
    """Return tiled scales as a matrix ``(rows, blocks)``, without padding."""
    across = -(-blocks // _TILE_BLOCKS)
    tiles = scales.reshape(-1, across, 32, _TILE_ROWS // 32, _TILE_BLOCKS)
    matrix = tiles.transpose(0, 3, 2, 1, 4).reshape(-1, across * _TILE_BLOCKS)
    return np.ascontiguousarray(matrix[:rows, :blocks])


def storage_error(label: str, tensor: str, storage: str, why: str) -> BaseWeightError:
    """Return the error for a quantized weight whose tensors do not fit together."""
    return BaseWeightError(f"{label}: '{tensor}' ({storage}): {why}.")
