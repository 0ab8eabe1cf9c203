"""Weights stored as codes: what a code is worth, and how far rounding to it moved a value."""

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
# Of sign, two bits of exponent and one of mantissa; the high bit is the sign.
E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Of sign, two bits of exponent and three of mantissa: eighths up to 1, then three octaves.
_E2M3_SIZES: Final = np.concatenate(
    [np.arange(8) / 8, *((1 + np.arange(8) / 8) * 2.0**octave for octave in range(3))]
)
E2M3: Final = np.concatenate([_E2M3_SIZES, -_E2M3_SIZES]).astype(np.float32)
# A block of MXFP6 is scaled so that its largest value rounds to at most 7.5, the last level.
MXFP6_REACH: Final = 0.25


class RawTensors(Protocol):
    """Stored tensors by name, whole or a run of their elements bit for bit."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What is stored."""

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor's values."""

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return the elements ``start`` to ``stop`` of a tensor, flat, as they are stored."""


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
        Value of every code; None where the codes are the numbers themselves.
    zero
        Broadcasts to ``(m, n)``; what an integer code for 0 is.
    reach
        How far beyond the outermost levels values may have been, in their unit.
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

        The original is taken as uniform over the values that round to the code. A writer that
        compensates errors rather than rounding to the nearest (GPTQ) errs more.
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
        """What it is called: "bitsandbytes nf4"."""

    @property
    def transposed(self) -> bool | None:
        """Whether rows are input features; None where the family decides, as for plain weights."""

    @property
    def step(self) -> int:
        """Runs of rows start at multiples of it."""

    def decoder(self, tensors: RawTensors, index: int | None) -> Decoder:
        """Return what decodes runs of rows, of one expert where there are several."""


def plane_of(shape: tuple[int, ...], index: int | None) -> tuple[int, int]:
    """Return rows and columns: of one of a stack, or of kernels, which have a row per output."""
    if index is None and len(shape) > 2:
        return shape[0], math.prod(shape[1:])
    return shape[-2], shape[-1]


def cell_variances(levels: NDArray[np.float32], reach: float = 0.0) -> NDArray[np.float32]:
    """Return the mean square distance from every level of the values that are nearest to it.

    A cell reaches half way to the neighbors, ``a`` below and ``b`` above; uniform over it, the
    mean square is ``(a³ + b³)/(3(a + b))``, which is step²/12 for equal steps. Beyond the outermost
    levels there is ``reach``: nothing where blocks are scaled so that their largest value is one
    of them, more where the scale is a power of two.
    """
    return _cell_variances(levels.tobytes(), reach)


@cache
def _cell_variances(raw: bytes, reach: float) -> NDArray[np.float32]:
    levels = np.frombuffer(raw, np.float32)
    finite = np.unique(levels[np.isfinite(levels)]).astype(np.float64)  # one zero for +0 and −0
    half = np.diff(finite) / 2
    below, above = np.concatenate([[reach], half]), np.concatenate([half, [reach]])
    variances = (below**3 + above**3) / (3 * (below + above))
    places = np.searchsorted(finite, np.nan_to_num(levels, posinf=0, neginf=0))
    return np.where(np.isfinite(levels), variances[places], 0).astype(np.float32)


@cache
def float_levels(dtype: str) -> NDArray[np.float32]:
    """Return the 256 values of an 8-bit float type."""
    codes = np.arange(256, dtype=raw_dtype(dtype))
    values = np.empty(256, dtype=result_dtype(dtype))
    widen(codes, dtype, values)
    return values


def powers_of_two(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the scales that E8M0 bytes mean: ``2^(e − 127)``; 255 is NaN."""
    return np.asarray(float_levels("float8_e8m0fnu")[exponents], np.float32)


def nibbles(packed: NDArray[np.uint8], *, high_first: bool) -> NDArray[np.uint8]:
    """Return the 4-bit codes of bytes, twice as many along the last axis."""
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def six_bit_codes(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the 6-bit codes of bytes, four of every three along the last axis, lowest first."""
    low, middle, high = (packed[..., at::3].astype(np.uint32) for at in range(3))
    words = low | middle << 8 | high << 16
    codes = np.stack([words >> shift & 63 for shift in (0, 6, 12, 18)], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.uint8)


def unpacked(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the ``bits``-bit codes of 32-bit words, along the first axis, lowest bits first.

    Codes follow each other without gaps and may cross from one word into the next.
    """
    count = words.shape[0] * 32 // bits
    wide = words.view(np.uint32).astype(np.uint64)
    following = np.concatenate([wide[1:], np.zeros_like(wide[:1])])
    place = np.arange(count) * bits
    word, shift = place // 32, (place % 32).astype(np.uint64)
    shift = shift.reshape(-1, *(1,) * (words.ndim - 1))
    pairs = wide[word] | (following[word] << np.uint64(32))
    return np.asarray((pairs >> shift) & np.uint64((1 << bits) - 1), np.uint8)


def refused(label: str, tensor: str, storage: str, why: str) -> BaseWeightError:
    """Return the error for a quantized weight whose tensors do not fit together."""
    return BaseWeightError(f"{label}: '{tensor}' ({storage}): {why}.")
