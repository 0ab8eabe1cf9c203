"""Unpickling of torch files without importing or calling anything that a pickle names.

A pickle is a program for a small machine whose dangerous instruction is "import this and call
it". This unpickler looks every name up in a fixed table of harmless stand-ins; a name that is not
in the table is an error. The rule is that of ``torch.load(weights_only=True)``, and stricter:
tensors, plain containers, numbers and strings. No tensor is read: each becomes a record of its
storage, offset and shape. torch is not needed.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from lora_analysis.errors import MalformedFileError, UnsupportedMethodError
from lora_analysis.storage.dtypes import BITS
from lora_analysis.storage.limits import MAX_TENSOR_DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "",  # its count is in bytes, and the tensor states the type
}
_DTYPES: Final = frozenset(name for name, _ in BITS.values())


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """Numbers stored outside the pickle; ``count`` in elements, or in bytes if untyped."""

    key: str
    dtype: str
    count: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it; offset and strides are in elements, all unchecked."""

    storage: PickledStorage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Named:
    """A storage class or number type of torch, by name."""

    text: str


def unpickle(path: Path, stream: io.BytesIO) -> Any:
    """Return the next object of ``stream``, tensors as :class:`PickledTensor`.

    Raises
    ------
    MalformedFileError
        It is not a pickle, or an inconsistent one.
    UnsupportedMethodError
        It names anything beyond tensors and plain containers.
    """
    try:
        return _Unpickler(path, stream).load()
    except (MalformedFileError, UnsupportedMethodError):
        raise
    except RecursionError as error:
        message = f"{path}: the pickle nests too deeply."
        raise MalformedFileError(message) from error
    except Exception as error:  # a damaged program fails in any way a program can
        message = f"{path}: the pickle is damaged ({type(error).__name__}: {str(error)[:80]})."
        raise MalformedFileError(message) from error


# The implementation in Python, not the one in C: its memory follows the file's real length,
# that in C reserves whatever a single number in the file asks for.
class _Unpickler(pickle._Unpickler):  # type: ignore[misc,name-defined,unused-ignore]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined,unused-ignore]

    def __init__(self, path: Path, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _Named(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Named(name)
        if f"{module}.{name}" in _STAND_INS:
            return _STAND_INS[f"{module}.{name}"]
        message = (
            f"{self._path}: the pickle asks for '{module}.{name}', which is not part of a plain "
            "file of tensors and could run code. Save the tensors alone, as safetensors."
        )
        raise UnsupportedMethodError(message)

    def persistent_load(self, pid: Any) -> PickledStorage:
        kind, named, key, _location, count, *rest = pid
        if kind != "storage" or not isinstance(named, _Named) or type(count) is not int:
            _refuse("an unknown kind of storage")
        first = 0
        if rest and rest[0] is not None:  # a view into a storage, in files before torch 1.6
            _, first, count = rest[0]
        return PickledStorage(str(key), named.text, count, first)

    def load_build(self) -> None:
        """Drop the state that follows an object: for a state dict, its version numbers."""
        self.stack.pop()  # type: ignore[attr-defined,unused-ignore]
        if type(self.stack[-1]) is not OrderedDict:  # type: ignore[attr-defined,unused-ignore]
            _refuse("a state for an object that has none")

    dispatch[pickle.BUILD[0]] = load_build


def _refuse(problem: str) -> NoReturn:
    raise pickle.UnpicklingError(problem)


def _ordered_dict(*items: Any) -> OrderedDict[Any, Any]:
    # Entries follow one by one; a copy of an earlier dictionary would cost more than its bytes.
    if items:
        _refuse("a dictionary made from another")
    return OrderedDict()


def _set(items: Any = ()) -> Any:
    # The list itself, uncopied: DeepSpeed's dumps hold a set of names that nothing needs.
    if not isinstance(items, list | tuple):
        _refuse("a set of something other than a list")
    return items


def _size(items: Any) -> tuple[int, ...]:
    if len(items) > MAX_TENSOR_DIMENSIONS:
        _refuse("a shape of too many dimensions")
    return tuple(items)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> PickledTensor:
    if not isinstance(storage, PickledStorage):
        _refuse("a tensor without numbers")
    dtype = next((item.text for item in rest if isinstance(item, _Named)), storage.dtype)
    if len(shape) != len(strides) or len(shape) > MAX_TENSOR_DIMENSIONS:
        _refuse("a tensor whose shape and strides differ")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *strides)):
        _refuse("a tensor of an impossible shape")
    return PickledTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_rest: Any) -> PickledTensor:
    if not isinstance(tensor, PickledTensor):
        _refuse("a parameter that is not a tensor")
    return tensor


_STAND_INS: Final[dict[str, Callable[..., Any]]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
