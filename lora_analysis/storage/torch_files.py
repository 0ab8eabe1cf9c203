"""Files that ``torch.save`` wrote, in both its formats, read tensor by tensor and never executed.

Since torch 1.6 a file is a zip archive: ``data.pkl`` describes the tensors, and each storage is a
separate member. Before, a sequence of pickles was followed by the storages one after another. Both
store the numbers plainly; :mod:`~lora_analysis.storage.unpickling` reads the descriptions, and
every size they state is checked against the bytes that exist before memory is reserved.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError, UnknownFormatError
from lora_analysis.storage.documents import is_text, regular_file_size
from lora_analysis.storage.dtypes import BITS
from lora_analysis.storage.file_signatures import is_zip, pickle_refused
from lora_analysis.storage.limits import MAX_NESTING, MAX_PICKLE_BYTES, MAX_TENSORS
from lora_analysis.storage.safetensors import Header, TensorInfo, quote
from lora_analysis.storage.unpickling import PickledTensor, unpickle
from lora_analysis.storage.zip_archives import zip_members

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_ITEM_BYTES: Final = {name: -(-bits // 8) for name, bits in BITS.values()}


@dataclass(frozen=True, slots=True)
class Pickle:
    """Content of a torch file.

    Attributes
    ----------
    path
        The file.
    content
        Dictionaries, lists, tuples, numbers and strings as saved, each tensor a
        :class:`~lora_analysis.storage.unpickling.PickledTensor`. Formats read further settings
        (alpha, a step count) from it.
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
            tensors[name] = self._checked_info(name, tensor)
        return Header({}, tensors)

    def _checked_info(self, name: str, tensor: PickledTensor) -> TensorInfo:
        """Return a tensor with its byte range, checked against the file's size."""
        storage, item = tensor.storage, _ITEM_BYTES.get(tensor.dtype)
        start, stop = self.storages.get(storage.key, (0, 0))
        if item is None:
            reason = f"it has the unknown type {quote(tensor.dtype)}"
        elif min(storage.count, storage.first) < 0 or (
            (storage.first + storage.count) * _ITEM_BYTES.get(storage.dtype, 1) > stop - start
        ):
            reason = f"its storage claims {storage.count:,} numbers, the file has fewer"
        else:
            first = tensor.offset + storage.first
            span = _span(tensor)
            begin, end = start + first * item, start + (first + span) * item
            # Strides of zero could make a huge tensor of one number.
            if end <= stop and math.prod(tensor.shape) <= (stop - start) // item:
                strides = None if _is_contiguous(tensor) else tensor.strides
                return TensorInfo(name, tensor.dtype, tensor.shape, begin, end, strides)
            reason = f"{tensor.dtype} {tensor.shape} is larger than what the file holds for it"
        message = f"{self.path}: tensor {quote(name)}: {reason}."
        raise MalformedFileError(message)


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
        raise pickle_refused(path)
    return _read_archive(path) if is_zip(path) else _read_sequence(path)


def _read_archive(path: Path) -> Pickle:
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


def _span(tensor: PickledTensor) -> int:
    """Return the number of elements from the first to the last of a tensor in its storage."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))


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
