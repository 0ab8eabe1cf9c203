"""Arrays of other libraries as numpy arrays; torch is recognized if loaded, never imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_analysis.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
