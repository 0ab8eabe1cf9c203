"""The tensors of one safetensors file, or of the shards an index names, under one roof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.limits import BLOCK_ELEMENTS, MAX_INDEX_BYTES
from lora_analysis.storage.safetensors import Header, TensorInfo, iter_blocks, read_header
from lora_analysis.storage.safetensors import read_tensor as _read_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INDEX_SUFFIX = ".safetensors.index.json"


class TensorFiles:
    """Named tensors over one or several safetensors files; headers are read once.

    Parameters
    ----------
    path
        What was opened: the file, or the index.
    headers
        Header of each file.
    places
        Tensor name → the file it lies in.
    """

    __slots__ = ("_places", "files", "infos", "metadata", "path")

    def __init__(
        self, path: Path, headers: Mapping[Path, Header], places: Mapping[str, Path]
    ) -> None:
        self.path = path
        self.files = tuple(headers)
        self.metadata: Mapping[str, str] = {
            key: value for header in headers.values() for key, value in header.metadata.items()
        }
        self.infos: Mapping[str, TensorInfo] = {
            name: headers[file].tensors[name] for name, file in places.items()
        }
        self._places = dict(places)

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, read now."""
        return _read_tensor(self._places[name], self.infos[name])

    def blocks(
        self, name: str, *, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """Yield one matrix tile by tile, as float32 in a reused buffer."""
        return iter_blocks(self._places[name], self.infos[name], elements=elements)

    def file_of(self, name: str) -> Path:
        """Return the file a tensor lies in."""
        return self._places[name]


class LazyTensors(Mapping[str, "NDArray[Any]"]):
    """Tensors under other names, each read when it is asked for."""

    def __init__(self, tensors: TensorFiles, stored_names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._stored_names = dict(stored_names)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._tensors.read(self._stored_names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def __len__(self) -> int:
        return len(self._stored_names)


def open_tensors(path: Path) -> TensorFiles:
    """Open a safetensors file, or the index of a sharded one (``*.safetensors.index.json``).

    Raises
    ------
    MalformedFileError
        A header is damaged, the index names files outside its folder, or a shard does not hold
        what the index says.
    SourceError
        A file is missing.
    """
    if path.name.endswith(".json"):
        return _open_index(path)
    header = read_header(path)
    return TensorFiles(path, {path: header}, dict.fromkeys(header.tensors, path))


def _open_index(path: Path) -> TensorFiles:
    shard_names = read_json_object(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_names, dict) or not shard_names:
        message = f"{path}: a sharded model's index needs a 'weight_map' of tensors to files."
        raise MalformedFileError(message)
    files = {
        shard: _shard_path(path, shard) for shard in dict.fromkeys(_strings(path, shard_names))
    }
    headers = {file: read_header(file) for file in files.values()}
    places = {name: files[shard] for name, shard in shard_names.items()}
    for name, file in places.items():
        if name not in headers[file].tensors:
            message = f"{path}: tensor {name!r} is said to be in {file.name}, which lacks it."
            raise MalformedFileError(message)
    return TensorFiles(path, headers, places)


def _strings(path: Path, shard_names: Mapping[str, object]) -> list[str]:
    for tensor, shard in shard_names.items():
        if not isinstance(shard, str):
            message = f"{path}: 'weight_map' gives {shard!r} as the file of tensor {tensor!r}."
            raise MalformedFileError(message)
    return [shard for shard in shard_names.values() if isinstance(shard, str)]


def _shard_path(index: Path, shard: str) -> Path:
    """Return where a shard lies; its name may not lead out of the index's folder."""
    parts = (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
    leads_out = ".." in parts or PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).drive
    if leads_out or "\0" in shard or not shard.endswith(".safetensors"):
        message = f"{index}: {shard!r} is no safetensors file inside the index's own folder."
        raise MalformedFileError(message)
    return index.parent / shard
