"""The number types of safetensors, and their exact float32 values where numpy has no such type."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import UnknownFormatError

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
"""Code in the file → our name and the bits of one element."""

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
"""Our name → the little-endian numpy type its bytes are read as."""

# Types whose bytes can be carried, but whose elements are not numbers of numpy: read for what
# knows how they are packed, and named in an error otherwise.
_CARRIED: Final[dict[str, str]] = {
    "complex64": "<c8",
    "float6_e2m3": "u1",
    "float6_e3m2": "u1",
    "float4_e2m1": "u1",
}

READABLE: Final = frozenset(_RAW)
"""Types whose elements are read as plain numbers."""

FLOAT8: Final = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})
"""8-bit floating-point numbers with a sign, of which all 256 values are tabulated."""

FLOATING: Final = frozenset({"float16", "bfloat16", "float32", "float64"}) | FLOAT8
"""Types that weights and factors may have. float8_e8m0fnu holds scales alone."""

# Exponent bits and the bias of the exponent.
_FLOAT8_LAYOUT: Final = {
    "float8_e4m3fn": (4, 7),
    "float8_e5m2": (5, 15),
    "float8_e4m3fnuz": (4, 8),
    "float8_e5m2fnuz": (5, 16),
}


# Where a half's sign, exponent and fraction lie in a float32, and the difference of the biases.
_HALF_BITS: Final = np.array(0x8FFFE000, np.uint32).view(np.int32)
_HALF_SCALE: Final = np.float32(2.0**112)


def is_floating(name: str) -> bool:
    """Return True if a stored type holds floating-point numbers, blocks of GGUF included."""
    return name in FLOATING or name.startswith("gguf_")


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
    """Return the numpy type that a tensor of type ``name`` is given out in."""
    if name == "float8_e8m0fnu" or (name in FLOATING and name != "float64"):
        return np.dtype(np.float32)
    return raw_dtype(name).newbyteorder("=")


def widen(raw: NDArray[Any], name: str, out: NDArray[Any]) -> None:
    """Write the values of ``raw`` (type ``name`` as read) to ``out``, which has its shape.

    ``out`` is float32, or any type where ``raw`` already is one of numpy's numbers. Exact for
    every type narrower than ``out``: bfloat16 is the upper half of a float32, and of
    each 8-bit type all 256 values are tabulated.
    """
    if name == "bfloat16":
        bits = out.view(np.uint32)
        np.copyto(bits, raw)
        # Two passes over what the cache holds are quicker than one that has to convert as it goes.
        np.multiply(bits, np.uint32(1 << 16), out=bits)
    elif name == "float16" and out.dtype == np.float32 and _as_bits(raw):
        _widen_half(raw, out)
    elif name in FLOAT8 or name == "float8_e8m0fnu":
        # No index is out of range; "clip" spares numpy the copy it makes in order to check.
        np.take(_float8_values(name), raw, out=out, mode="clip")
    else:
        out[...] = raw


def _as_bits(raw: NDArray[Any]) -> bool:
    """Say whether halves can be widened as integers: all finite, and subnormals computed with."""
    smallest = np.array(2.0**-140, np.float32)  # vanishes where the processor flushes subnormals
    finite = int(np.max(raw.view("<u2") & np.uint16(0x7C00), initial=0)) < 0x7C00
    return finite and float(np.multiply(smallest, _HALF_SCALE)) > 0


def _widen_half(raw: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Write finite halves as float32: their bits in its places, and a power of two.

    Five times as quick as numpy's own conversion, which takes one number at a time.
    """
    bits = out.view(np.int32)
    np.copyto(bits, raw.view("<i2"))  # the sign is carried to the top
    np.multiply(bits, np.int32(1 << 13), out=bits)
    np.bitwise_and(bits, _HALF_BITS, out=bits)
    np.multiply(out, _HALF_SCALE, out=out)


@cache
def _float8_values(name: str) -> NDArray[np.float32]:
    """Return the 256 values of an 8-bit float type, by their bit pattern."""
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
    # Exponent 0 holds the subnormal numbers: no leading one, the smallest normal power.
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
