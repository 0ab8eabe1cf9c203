"""What every writer of two factors asks of an adapter before it writes a byte."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.adapter import LowRankUpdate
from lora_analysis.errors import InputError, UnsupportedMethodError
from lora_analysis.storage.adapter_fields import refuse_more_than_factors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from lora_analysis.adapter import Adapter


def factors_alone(
    adapter: Adapter, format: str, refuse: Callable[[LowRankUpdate], None]
) -> dict[str, LowRankUpdate]:
    """Return the updates of an adapter that is nothing but low-rank updates of known scale.

    Parameters
    ----------
    adapter, format
        What is written, and as what, for messages.
    refuse
        Raises for an update that the format cannot say.

    Raises
    ------
    InputError
        There are no modules, or one is a dense update.
    UnsupportedMethodError
        More than the factors was trained.
    ScaleError
        A scale is not known.
    """
    refuse_more_than_factors(adapter.config, adapter.label, f"which {format} files cannot say.")
    if adapter.saved_modules:
        message = (
            f"{adapter.label} also trained '{next(iter(adapter.saved_modules))}' in full, which a "
            f"file of {format} cannot hold. It is not written."
        )
        raise UnsupportedMethodError(message)
    updates = {}
    for name, update in adapter.items():
        if not isinstance(update, LowRankUpdate):
            message = f"'{name}' in {adapter.label} is a dense update; a LoRA file holds A and B."
            raise InputError(message)
        refuse(update)
        update.known_scale()
        updates[name] = update
    if not updates:
        message = f"{adapter.label} adapts no module; there is nothing to write."
        raise InputError(message)
    return updates


def float32(factor: NDArray[np.floating], name: str) -> NDArray[np.float32]:
    """Return numbers as float32; refuse those that it cannot hold."""
    with np.errstate(over="ignore"):  # refused below, with the module's name
        stored = np.ascontiguousarray(factor, dtype=np.float32)
    if not np.isfinite(stored).all():
        message = f"A factor of '{name}' is too large for float32, the type it is written in."
        raise InputError(message)
    return stored


def saved(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file's bytes, the same for the same numbers.

    The library writes several entries of metadata in an order that changes from run to run.
    """
    from safetensors.numpy import save

    content = save(dict(tensors), metadata=dict(metadata))
    if len(metadata) < 2:
        return content
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
