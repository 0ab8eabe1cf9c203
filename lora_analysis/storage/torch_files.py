"""Files that ``torch.save`` wrote, in both its formats, read tensor by tensor and never executed.

Since torch 1.6 a file is a zip archive: ``data.pkl`` describes the tensors, and each storage is a
separate member. Before, a sequence of pickles was followed by the storages one after another. Both
store the numbers plainly, and every size that the pickles state is checked against the bytes that
exist before memory is reserved.

A pickle is a program for a small machine whose dangerous instruction is "import this and call
it". The unpickler looks every name up in a fixed table of harmless stand-ins; a name that is not
in the table is an error. The rule is that of ``torch.load(weights_only=True)``, and stricter:
tensors, plain containers, numbers and strings. No tensor is read: each becomes a record of its
storage, offset and shape. torch is not needed.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from lora_analysis.errors import MalformedFileError, UnknownFormatError, UnsupportedMethodError
from lora_analysis.storage.documents import is_text, is_zip, pickle_error, regular_file_size
from lora_analysis.storage.dtypes import BITS
from lora_analysis.storage.limits import (
    MAX_NESTING,
    MAX_PICKLE_BYTES,
    MAX_TENSOR_DIMENSIONS,
    MAX_TENSORS,
)
from lora_analysis.storage.safetensors import Header, TensorInfo, quote
from lora_analysis.storage.zip_archives import zip_members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
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

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_ITEM_BYTES: Final = {name: -(-bits // 8) for name, bits in BITS.values()}


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


@dataclass(frozen=True, slots=True)
class Pickle:
    """Content of a torch file.

    Attributes
    ----------
    path
        The file.
    content
        Dictionaries, lists, tuples, numbers and strings as saved, each tensor a
        :class:`PickledTensor`. Formats read further settings (alpha, a step count) from it.
    storages
        Key of a storage → its byte range.
    """

    path: Path
    content: Any
    storages: Mapping[str, tuple[int, int]]

    def header(self, *keys: str) -> Header:
        """Return the tensors in the dictionary at ``keys``, for example ``"model"``, by name.

        Names of nested dictionaries are joined by dots; members of lists are named by their index.
        Other values are skipped.

        Raises
        ------
        MalformedFileError
            A key is missing, a name occurs twice, or a tensor does not fit its storage.
        """
        content = self.content
        for key in keys:
            if not isinstance(content, dict) or key not in content:
                message = f"{self.path}: it holds no '{'.'.join(keys)}'."
                raise MalformedFileError(message)
            content = content[key]
        tensors: dict[str, TensorInfo] = {}
        for name, tensor in _walk(self.path, content, "", MAX_NESTING):
            if name in tensors or not is_text(name):
                problem = "two tensors are" if name in tensors else "half a character in a tensor"
                message = f"{self.path}: {problem} called {quote(name)}."
                raise MalformedFileError(message)
            storage, item = tensor.storage, _ITEM_BYTES.get(tensor.dtype)
            start, stop = self.storages.get(storage.key, (0, 0))
            claimed = (storage.first + storage.count) * _ITEM_BYTES.get(storage.dtype, 1)
            if item is None:
                reason = f"it has the unknown type {quote(tensor.dtype)}"
            elif min(storage.count, storage.first) < 0 or claimed > stop - start:
                reason = f"its storage claims {storage.count:,} numbers, the file has fewer"
            else:
                steps = zip(tensor.shape, tensor.strides, strict=True)
                # Elements from the first to the last one.
                span = 0 if 0 in tensor.shape else 1 + sum((n - 1) * step for n, step in steps)
                first = tensor.offset + storage.first
                begin, end = start + first * item, start + (first + span) * item
                # Strides of zero could make a huge tensor of one number.
                if end <= stop and math.prod(tensor.shape) <= (stop - start) // item:
                    strides = None if _is_contiguous(tensor) else tensor.strides
                    info = TensorInfo(name, tensor.dtype, tensor.shape, begin, end, strides)
                    tensors[name] = info
                    continue
                reason = f"{tensor.dtype} {tensor.shape} is larger than what the file holds for it"
            message = f"{self.path}: tensor {quote(name)}: {reason}."
            raise MalformedFileError(message)
        return Header({}, tensors)


def read_pickle(path: Path, *, allow_pickle: bool) -> Pickle:
    """Return the content of a torch file; no tensor is read.

    Raises
    ------
    UnknownFormatError
        ``allow_pickle`` is false.
    MalformedFileError
        The file is damaged, compressed, or not from ``torch.save``.
    UnsupportedMethodError
        It names more than tensors and plain containers.
    """
    if not allow_pickle:
        raise pickle_error(path)
    if not is_zip(path):
        return _read_sequence(path)
    members = zip_members(path)
    described = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(described) != 1:
        message = f"{path}: a zip archive without the data.pkl that torch.save writes."
        raise MalformedFileError(message)
    folder = described[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and _bytes(path, order.start, order.stop) != b"little":
        message = f"{path}: saved on a big-endian machine. Save it again as safetensors."
        raise UnknownFormatError(message)
    data_pkl = members[described[0]]
    if data_pkl.stop - data_pkl.start > MAX_PICKLE_BYTES:
        message = f"{path}: its data.pkl is too large (limit {MAX_PICKLE_BYTES:,} bytes)."
        raise MalformedFileError(message)
    content = unpickle(path, io.BytesIO(_bytes(path, data_pkl.start, data_pkl.stop)))
    data = f"{folder}data/"
    storages = {
        name.removeprefix(data): (member.start, member.stop)
        for name, member in members.items()
        if name.startswith(data)
    }
    return Pickle(path, content, storages)


def _read_sequence(path: Path) -> Pickle:
    """Read the format from before torch 1.6: magic, version, system, content, keys, storages."""
    size = regular_file_size(path)
    stream = io.BytesIO(_bytes(path, 0, min(size, MAX_PICKLE_BYTES)))
    if unpickle(path, stream) != _MAGIC:
        message = f"{path}: a pickle that torch.save did not write. Save it as safetensors."
        raise UnknownFormatError(message)
    unpickle(path, stream)
    system, content, keys = (unpickle(path, stream) for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        message = f"{path}: saved on a big-endian machine. Save it again as safetensors."
        raise UnknownFormatError(message)
    items = {
        tensor.storage.key: _ITEM_BYTES.get(tensor.storage.dtype, 1)
        for _, tensor in _walk(path, content, "", MAX_NESTING)
    }
    storages = {}
    stop = stream.tell()
    with path.open("rb") as file:
        for key in keys if isinstance(keys, list) else ():
            file.seek(stop)
            count = int.from_bytes(file.read(8), "little")  # before the numbers of each storage
            start = stop + 8
            stop = start + count * items.get(str(key), 1)
            if stop > size:
                message = f"{path}: a storage claims {count:,} numbers, the file is shorter."
                raise MalformedFileError(message)
            storages[str(key)] = start, stop
    return Pickle(path, content, storages)


def _walk(path: Path, content: Any, name: str, depth: int) -> Iterator[tuple[str, PickledTensor]]:
    """Yield the tensors inside nested containers, each under the path of keys to it."""
    visited = 0
    stack = [(content, name, depth)]
    while stack:
        node, path_to_node, levels_left = stack.pop()
        visited += 1
        if visited > 4 * MAX_TENSORS or levels_left < 0:
            message = f"{path}: its dictionaries hold too much or are nested too deeply."
            raise MalformedFileError(message)
        if isinstance(node, PickledTensor):
            yield path_to_node, node
        elif isinstance(node, dict | list | tuple):
            entries = node.items() if isinstance(node, dict) else enumerate(node)
            prefix = f"{path_to_node}." if path_to_node else ""
            children = [
                (value, f"{prefix}{key}", levels_left - 1)
                for key, value in entries
                if isinstance(value, PickledTensor | dict | list | tuple)
            ]
            stack.extend(reversed(children))


def _is_contiguous(tensor: PickledTensor) -> bool:
    if 0 in tensor.shape:
        return True
    expected = 1
    for n, step in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _bytes(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)
