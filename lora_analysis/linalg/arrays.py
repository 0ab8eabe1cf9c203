"""Arrays: the element type of the kernels, those of other libraries, and what entries show.

torch is recognized if it is loaded, and never imported. Damage shows in a matrix's entries: one
large entry, long runs of zeros.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lora_analysis.errors import InputError

Float = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
# A single entry may be all that was learned if there are fewer than this.
FEW_ENTRIES: Final = 16


def namespace(array: Any) -> Any:
    """Return the module whose functions fit an array, by the array API standard.

    numpy itself for its arrays (a wrapper would only cost its import), the wrapped torch for
    tensors.
    """
    if isinstance(array, np.ndarray | np.generic):
        return np
    from array_api_compat import array_namespace

    return array_namespace(array)


def is_torch_module(value: object) -> bool:
    """Return True for a ``torch.nn.Module``; without torch loaded, nothing can be one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def is_tensor(value: object) -> bool:
    """Return True for a ``torch.Tensor``, a parameter included."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: object) -> bool:
    """Return True for a numpy array or a tensor."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def missing_values(tensor: Any) -> str:
    """Return why a tensor does not hold all of its values in this process; "" if it does.

    The text follows the tensor's name in a message, and ends with what to do.
    """
    if getattr(tensor, "is_meta", False):
        return (
            "is on the meta device and holds no values, as a model does that was offloaded or "
            "not loaded. Load it without offloading, or read the saved adapter."
        )
    if hasattr(tensor, "full_tensor"):
        return (
            "is sharded over several processes (DTensor). Gather it first with full_tensor(), or "
            "read the saved adapter."
        )
    if hasattr(tensor, "ds_id") and not tensor.numel():
        return (
            "is partitioned by DeepSpeed ZeRO-3. Call this inside "
            "deepspeed.zero.GatheredParameters(list(model.parameters())), or read the saved "
            "adapter."
        )
    if type(tensor).__name__ == "FlatParameter" or not tensor.numel():
        return (
            "holds no values in this process. If FSDP shards the model, call this inside "
            "FullyShardedDataParallel.summon_full_params(model), or read the saved adapter."
        )
    return ""


def to_numpy(value: Any, subject: str = "The tensor") -> NDArray[Any]:
    """Return the numbers of an array or tensor as numpy array.

    A tensor is copied to the CPU, without its gradient. Floating-point types that numpy does not
    have, such as bfloat16, become float32, which holds all of their values.

    Parameters
    ----------
    value
        Anything that `numpy.asarray` takes, or a tensor on any device.
    subject
        Beginning of the message, if a tensor does not hold its values.

    Raises
    ------
    InputError
        The tensor is on the meta device or a part of a sharded one.
    """
    if not is_tensor(value):
        return np.asarray(value)
    if reason := missing_values(value):
        message = f"{subject} {reason}"
        raise InputError(message)
    tensor = value.detach()
    if tensor.is_floating_point() and tensor.element_size() <= 2:
        tensor = tensor.float()
    result: NDArray[Any] = tensor.to("cpu", copy=True).numpy()
    return result


def stored_values(value: Any, subject: str) -> tuple[str, NDArray[Any]]:
    """Return the name of an array's or tensor's type, and a copy of its numbers, bit for bit.

    Types that numpy does not have come as unsigned integers of their width.
    """
    if not is_tensor(value):
        array = np.array(value)
        return array.dtype.name, array
    if reason := missing_values(value):
        message = f"{subject} {reason}"
        raise InputError(message)
    torch = sys.modules["torch"]
    tensor = value.detach().to("cpu", copy=True).contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype == torch.bfloat16:
        return name, tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return name, tensor.view(torch.uint8).numpy()
    return name, tensor.numpy()


def peak_and_rest(values: NDArray[Any]) -> tuple[float, Float]:
    """Return the largest absolute entry, and all entries in float64 with that one set to zero.

    Parameters
    ----------
    values
        Real entries of any shape, at least one.

    Returns
    -------
    tuple
        The entry and a flat copy.
    """
    rest = values.astype(np.float64).ravel()
    index = int(np.argmax(np.abs(rest)))
    peak, rest[index] = abs(float(rest[index])), 0.0
    return peak, rest


def zero_runs(zeros: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first index of each run of True values, and the first index after it.

    Examples
    --------
    >>> starts, stops = zero_runs(np.array([True, True, False, True]))
    >>> starts.tolist(), stops.tolist()
    ([0, 3], [2, 4])
    """
    edges = np.flatnonzero(zeros[1:] != zeros[:-1]) + 1
    bounds = np.concatenate(([0], edges, [zeros.size]))
    is_run = zeros[bounds[:-1]]
    return bounds[:-1][is_run], bounds[1:][is_run]
