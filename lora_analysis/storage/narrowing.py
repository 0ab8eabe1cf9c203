"""Numbers rounded to the types that files of adapters store: the reverse of reading them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.errors import InputError
from lora_analysis.storage.dtypes import raw_dtype, result_dtype, widen

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Stored type → the largest number it holds.
_LARGEST: Final = {
    "float16": 65504.0,
    "bfloat16": float.fromhex("0x1.fep127"),
    "float32": float(np.finfo(np.float32).max),
}
# 8-bit floats have too few digits to be rounded to; bfloat16 holds all their values.
_KEPT: Final = {"float8_e4m3fn": "bfloat16", "float8_e5m2": "bfloat16"}


def narrowed_type(stored: str) -> str:
    """Return the type that factors are written in, from that of the file they were read from.

    Half precision stays as it is, 8-bit floats become bfloat16, everything else float32.
    """
    kept = _KEPT.get(stored, stored)
    return kept if kept in _LARGEST else "float32"


def narrow(values: NDArray[np.floating[Any]], dtype: str, what: str) -> NDArray[Any]:
    """Return numbers in a stored type, rounded to nearest even: bfloat16 as its bits in uint16.

    Parameters
    ----------
    values
        Finite numbers.
    dtype
        ``"float16"``, ``"bfloat16"`` or ``"float32"``.
    what
        Name of the numbers for the message, for example ``"A of 'q_proj'"``.

    Raises
    ------
    InputError
        A number is too large for the type.
    """
    with np.errstate(over="ignore"):  # refused below, with the name
        narrow32 = np.ascontiguousarray(values, dtype=np.float32)
        stored: NDArray[Any] = narrow32 if dtype != "float16" else values.astype(np.float16)
    if dtype == "bfloat16":
        bits = narrow32.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        # Just below half of the last place, and one more for an odd one, rounds ties to even.
        stored = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    if not np.isfinite(widened(stored, dtype)).all():
        largest = float(np.abs(values).max())
        message = (
            f"{what} would hold {largest:.3g}, which is too large for {dtype}, the type it is "
            f"written in (limit {_LARGEST[dtype]:.3g}). Write it to a format that stores float32: "
            "format='peft' (command line: --to peft)."
            if dtype != "float32"
            else f"{what} holds {largest:.3g}, too large for float32, the type it is written in."
        )
        raise InputError(message)
    return np.ascontiguousarray(stored)


def widened(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return stored numbers as float32, exactly."""
    raw = np.ascontiguousarray(stored, raw_dtype(dtype))
    out = np.empty(raw.shape, result_dtype(dtype))
    widen(raw, dtype, out)
    return out


def is_exact(values: NDArray[np.floating[Any]], dtype: str) -> bool:
    """Return True if a stored type holds every one of the numbers as it is."""
    try:
        return bool(np.array_equal(widened(narrow(values, dtype, ""), dtype), values))
    except InputError:
        return False
