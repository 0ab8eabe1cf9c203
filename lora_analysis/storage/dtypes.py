"""Number types of stored tensors: exact values as float32, and rounding to a stored type."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError, UnknownFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS: Final[dict[str, tuple[str, int]]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F32": ("float32", 32),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1", 4),
}
"""Code in the file → our name and the bits per element."""

_RAW: Final[dict[str, str]] = {
    "bool": "?",
    "uint8": "u1",
    "int8": "i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "bfloat16": "<u2",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
    "float8_e4m3fnuz": "u1",
    "float8_e5m2fnuz": "u1",
    "float8_e8m0fnu": "u1",
}
"""Our name → the little-endian numpy type that its bytes are read as."""

# Types that can be copied, but whose elements numpy cannot represent: read as bytes by code that
# unpacks them, refused by name elsewhere.
_CARRIED: Final[dict[str, str]] = {
    "complex64": "<c8",
    "float6_e2m3": "u1",
    "float6_e3m2": "u1",
    "float4_e2m1": "u1",
}

READABLE: Final = frozenset(_RAW)
"""Types whose elements are read as plain numbers."""

FLOAT8: Final = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})
"""8-bit floating-point numbers with a sign; all 256 values are tabulated."""

FLOATING: Final = frozenset({"float16", "bfloat16", "float32", "float64"}) | FLOAT8
"""Types that weights and factors may have. float8_e8m0fnu is for scales only."""

# Exponent bits and the bias of the exponent.
_FLOAT8_LAYOUT: Final = {
    "float8_e4m3fn": (4, 7),
    "float8_e5m2": (5, 15),
    "float8_e4m3fnuz": (4, 8),
    "float8_e5m2fnuz": (5, 16),
}

# Stored type → its largest number.
_LARGEST: Final = {
    "float16": 65504.0,
    "bfloat16": float.fromhex("0x1.fep127"),
    "float32": float(np.finfo(np.float32).max),
}
# 8-bit floats have too few digits to round to; bfloat16 represents all their values.
_WIDER: Final = {"float8_e4m3fn": "bfloat16", "float8_e5m2": "bfloat16"}

# Bits of a half's sign, exponent and fraction in a float32, and the difference of the biases.
_HALF_BITS: Final = np.array(0x8FFFE000, np.uint32).view(np.int32)
_HALF_SCALE: Final = np.float32(2.0**112)


def raw_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy type that a tensor of type ``name`` is read as, bit for bit.

    Types of less than a byte are read as the bytes that they are packed in.

    Raises
    ------
    UnknownFormatError
        The type is not one of safetensors'.
    """
    code = _RAW.get(name) or _CARRIED.get(name)
    if code is None:
        message = f"Numbers of type {name} are not read. Convert the tensor to bfloat16 or wider."
        raise UnknownFormatError(message)
    return np.dtype(code)


def result_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy type of the values of a tensor of type ``name``."""
    if name == "float8_e8m0fnu" or (name in FLOATING and name != "float64"):
        return np.dtype(np.float32)
    return raw_dtype(name).newbyteorder("=")


def widen(raw: NDArray[Any], name: str, out: NDArray[Any]) -> None:
    """Write the values of ``raw`` (type ``name`` as read) to ``out``, which has its shape.

    ``out`` is float32, or any type if ``raw`` already has one of numpy's number types. Exact for
    every type narrower than ``out``: bfloat16 is the upper half of a float32, and all 256 values
    of each 8-bit type are tabulated.
    """
    if name == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, raw)
        # Two passes over cached values are faster than one that converts on the way.
        np.multiply(bits, np.uint32(1 << 16), out=bits)
    elif name == "float16" and out.dtype == np.float32 and _can_widen_as_bits(raw):
        # Five times as fast as numpy's conversion, which takes one number at a time: the bits are
        # shifted as integers, which carries the sign to the top, and multiplied by a power of two.
        signed = out.view(np.int32)
        np.copyto(signed, raw.view("<i2"))
        np.multiply(signed, np.int32(1 << 13), out=signed)
        np.bitwise_and(signed, _HALF_BITS, out=signed)
        np.multiply(out, _HALF_SCALE, out=out)
    elif name in FLOAT8 or name == "float8_e8m0fnu":
        # No index is out of range; "clip" spares numpy the copy it makes in order to check.
        np.take(_float8_values(name), raw, out=out, mode="clip")
    else:
        out[...] = raw


def _can_widen_as_bits(raw: NDArray[Any]) -> bool:
    """Return True if halves can be widened as integers: all finite, subnormals not flushed."""
    smallest = np.array(2.0**-140, np.float32)  # vanishes if the processor flushes subnormals
    finite = int(np.max(raw.view("<u2") & np.uint16(0x7C00), initial=0)) < 0x7C00
    return finite and float(np.multiply(smallest, _HALF_SCALE)) > 0


@cache
def _float8_values(name: str) -> NDArray[np.float32]:
    """Return the 256 values of an 8-bit float type, indexed by bit pattern."""
    codes = np.arange(256)
    if name == "float8_e8m0fnu":  # an exponent alone; its last code is NaN
        powers = np.ldexp(1.0, codes - 127)
        powers[255] = np.nan
        return powers.astype(np.float32)
    exponent_bits, bias = _FLOAT8_LAYOUT[name]
    mantissa_bits = 7 - exponent_bits
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
    # Exponent 0 means subnormal numbers: no leading one, the smallest normal power.
    power = np.ldexp(1.0, np.maximum(exponent, 1) - bias)
    values = (sign * (fraction + (exponent > 0)) * power).astype(np.float32)
    if name.endswith("fnuz"):
        values[0x80] = np.nan  # "uz": no negative zero, whose pattern is the one NaN
    elif name == "float8_e4m3fn":
        values[(codes & 0x7F) == 0x7F] = np.nan  # "fn": one NaN pattern, no infinities
    else:
        top = exponent == 31
        values[top] = np.where(fraction[top] == 0, sign[top] * np.inf, np.nan)
    return values  # type: ignore[no-any-return]  # numpy's stubs lose the type in "where"


def narrowed_type(stored: str) -> str:
    """Return the type that factors are written in if they were read in type ``stored``.

    Half precision is unchanged, 8-bit floats become bfloat16, everything else float32.
    """
    dtype = _WIDER.get(stored, stored)
    return dtype if dtype in _LARGEST else "float32"


def round_to(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return numbers rounded to a floating-point type, ties to even; too large ones are infinite.

    Examples
    --------
    >>> round_to(np.array([1.00390625, 1.01171875]), "bfloat16").tolist()
    [1.0, 1.015625]
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "float16":  # at once: float32 in between would round twice
            return values.astype(np.float16).astype(np.float64)
        return round_float32(values.astype(np.float32), dtype).astype(np.float64)


def round_float32(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Return finite float32 numbers rounded to a floating-point type, ties to even."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding just below half of the last digit, and one more if it is odd, rounds ties to even. In
    # place, in one array: memory is what takes the time.
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded &= np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def narrow(values: NDArray[np.floating[Any]], dtype: str, name: str) -> NDArray[Any]:
    """Return numbers in a stored type, rounded to nearest even: bfloat16 as its bits in uint16.

    Parameters
    ----------
    values
        Finite numbers.
    dtype
        ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    name
        Name of the numbers for the message, for example ``"A of 'q_proj'"``.

    Raises
    ------
    InputError
        A number is too large for the type.
    """
    with np.errstate(over="ignore"):  # refused below, by name
        narrow32 = np.ascontiguousarray(values, dtype=np.float32)
        stored: NDArray[Any] = narrow32 if dtype != "float16" else values.astype(np.float16)
    if dtype == "bfloat16":
        bits = round_float32(narrow32, dtype).view(np.uint32)
        bits >>= np.uint32(16)
        stored = bits.astype(np.uint16)
        del narrow32, bits
    if not np.isfinite(to_float32(stored, dtype)).all():
        largest = float(np.abs(values).max())
        message = (
            f"{name} would hold {largest:.3g}, which is too large for {dtype}, the type it is "
            f"written in (limit {_LARGEST[dtype]:.3g}). Write it to a format that stores float32: "
            "format='peft' (command line: --to peft)."
            if dtype != "float32"
            else f"{name} holds {largest:.3g}, too large for float32, the type it is written in."
        )
        raise InputError(message)
    return np.ascontiguousarray(stored)


def to_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return stored numbers as float32, exactly."""
    raw = np.ascontiguousarray(stored, raw_dtype(dtype))
    out = np.empty(raw.shape, result_dtype(dtype))
    widen(raw, dtype, out)
    return out


def is_exact(values: NDArray[np.floating[Any]], dtype: str) -> bool:
    """Return True if a stored type represents every one of the numbers exactly."""
    try:
        return bool(np.array_equal(to_float32(narrow(values, dtype, ""), dtype), values))
    except InputError:
        return False
