"""Named tensors of any container: safetensors, torch files, ``.npz``, sharded models, memory.

Readers of formats use :class:`NamedTensors` and know no container. :class:`TensorFiles` implements
it for every container that stores plain numbers; GGUF, which must decode them, extends it, and
:class:`MemoryTensors` for objects in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.linalg import stored_values
from lora_analysis.storage.documents import PICKLE_SUFFIXES, is_pickle, is_zip, read_json_object
from lora_analysis.storage.dtypes import raw_dtype, result_dtype, widen
from lora_analysis.storage.limits import BLOCK_ELEMENTS, MAX_INDEX_BYTES
from lora_analysis.storage.safetensors import Header, TensorInfo, TensorSpec, read_header
from lora_analysis.storage.tensor_reader import (
    check_readable,
    iter_blocks,
    read_elements,
    read_tensor,
    tile_slices,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NamedTensors(Protocol):
    """The tensors of a container; names, types and shapes are available before any is read.

    Compared and hashed by identity: results that were read from a container are cached under it.
    """

    def __hash__(self) -> int: ...

    @property
    def path(self) -> Path:
        """The file or index that was opened."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds tensors."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Metadata of the container: strings by key."""

    @property
    def infos(self) -> Mapping[str, TensorSpec]:
        """Type and shape of each tensor by name, in the order of the file."""

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, read now; floats narrower than 32 bits come as float32, exactly."""

    def blocks(
        self, name: str, *, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """Yield one matrix tile by tile, as float32 in a reused buffer."""

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, for messages."""


class TensorFiles:
    """Named tensors over one or several files; headers are read once.

    Parameters
    ----------
    path
        The file or index that was opened.
    headers
        Header of each file.
    locations
        Tensor name → the file that holds it, which need not have been fetched yet.
    """

    __slots__ = ("files", "infos", "locations", "metadata", "path")

    def __init__(
        self, path: Path, headers: Mapping[Path, Header], locations: Mapping[str, Path]
    ) -> None:
        for name, file in locations.items():
            if name not in headers[file].tensors:
                message = f"{path}: tensor {name!r} is said to be in {file.name}, which lacks it."
                raise MalformedFileError(message)
        self.path = path
        self.files = tuple(headers)
        self.metadata: Mapping[str, str] = {
            key: value for header in headers.values() for key, value in header.metadata.items()
        }
        self.infos: Mapping[str, TensorInfo] = {
            name: headers[file].tensors[name] for name, file in locations.items()
        }
        self.locations: Mapping[str, Path] = dict(locations)

    @classmethod
    def of(cls, path: Path, header: Header) -> TensorFiles:
        """Return the tensors of one file with a header."""
        return cls(path, {path: header}, dict.fromkeys(header.tensors, path))

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, read now."""
        return read_tensor(self.locations[name], self.infos[name])

    def blocks(
        self, name: str, *, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """Yield one matrix tile by tile, as float32 in a reused buffer."""
        return iter_blocks(self.locations[name], self.infos[name], elements=elements)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self.locations[name]


class MemoryTensors:
    """Named tensors in memory: copies, so that they stay what they are if a training goes on.

    Parameters
    ----------
    label
        What holds the tensors, for messages. The path is ``memory/<label>/tensors``, two folders
        deep since readers look for configurations next to a file and one folder above it.
    tensors
        Arrays and tensors of any library, type and device.
    metadata
        Metadata as a file would state them.

    Raises
    ------
    InputError
        A tensor does not hold its values in this process.
    """

    __slots__ = ("_stored", "files", "infos", "metadata", "path")

    def __init__(
        self, label: str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path("memory", label.replace("/", "-"), "tensors")
        self.files: tuple[Path, ...] = ()
        self.metadata: Mapping[str, str] = dict(metadata or {})
        stored = {
            name: stored_values(value, f"{label}: '{name}'") for name, value in tensors.items()
        }
        self._stored = {name: raw for name, (_, raw) in stored.items()}
        self.infos: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, dtype, raw.shape) for name, (dtype, raw) in stored.items()
        }

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor; floats narrower than 32 bits come as float32, exactly."""
        raw, dtype = self._stored[name], self.infos[name].dtype
        values: NDArray[Any] = np.empty(raw.shape, result_dtype(dtype))
        widen(raw, dtype, values)
        return values

    def read_stored(self, name: str) -> NDArray[Any]:
        """Return one tensor as stored; types that numpy does not have come as their bits."""
        return self._stored[name]

    def blocks(
        self, name: str, *, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """Yield one matrix tile by tile, as float32."""
        whole = self.read(name)
        for rows, columns in tile_slices(whole.shape, elements):
            yield rows, columns, whole[rows, columns].astype(np.float32)

    def file_of(self, name: str) -> Path:  # noqa: ARG002
        """Return the label as a path."""
        return self.path


class LazyTensors(Mapping[str, "NDArray[Any]"]):
    """Tensors under new names, each read when it is accessed."""

    def __init__(self, tensors: NamedTensors, stored_names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._stored_names = dict(stored_names)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._tensors.read(self._stored_names[name])

    def read_stored(self, name: str) -> tuple[str, tuple[int, ...], Callable[[], NDArray[Any]]]:
        """Return type and shape of a tensor in its file, and a function that reads its bits."""
        key = self._stored_names[name]
        info = self._tensors.infos[key]
        return info.dtype, info.shape, partial(read_bits, self._tensors, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_names)

    def __len__(self) -> int:
        return len(self._stored_names)


def read_bits(tensors: NamedTensors, name: str) -> NDArray[Any]:
    """Return a tensor as its file stores it: types that numpy does not have as their bits."""
    info = tensors.infos[name]
    if isinstance(info, TensorInfo):
        file = tensors.file_of(name)
        check_readable(file, info)
        elements = read_elements(file, info, 0, info.elements)
        return elements.view(raw_dtype(info.dtype)).reshape(info.shape)
    return tensors.read_stored(name) if isinstance(tensors, MemoryTensors) else tensors.read(name)


def open_tensors(path: Path, *, allow_pickle: bool = False) -> TensorFiles:
    """Open a file of tensors, or the index of a sharded one (``*.index.json``).

    The container is recognized by its first bytes: safetensors, ``.npz``, or, if the caller allows
    it, a file of ``torch.save``, whose nested dictionaries are flattened (names joined by dots).

    Raises
    ------
    MalformedFileError
        A header is damaged, the index names files outside its folder, or a shard lacks a tensor
        that the index states.
    SourceError
        A file is missing.
    UnknownFormatError
        It is a pickle and ``allow_pickle`` is false.
    UnsupportedMethodError
        It is a pickle of more than tensors and plain containers.
    """
    if path.name.endswith(".json"):
        locations = shards_of(path)
        files = dict.fromkeys(locations.values())
        if missing := [file.name for file in files if not file.exists()]:
            verb = "does" if len(missing) == 1 else "do"
            message = (
                f"{path}: {len(missing)} of the {len(files)} shards that it names {verb} not "
                f"exist: {', '.join(missing[:6])}. Fetch the whole model."
            )
            raise SourceError(message)
        headers = {file: _header_of(file, allow_pickle=allow_pickle) for file in files}
        return TensorFiles(path, headers, locations)
    return TensorFiles.of(path, _header_of(path, allow_pickle=allow_pickle))


def _header_of(path: Path, *, allow_pickle: bool) -> Header:
    if not is_pickle(path):
        return read_header(path)
    if is_zip(path):  # an archive of arrays, or of a pickle
        from lora_analysis.storage.zip_archives import read_npz_header, zip_members

        if any(name.endswith(".npy") for name in zip_members(path)):
            return read_npz_header(path)
    from lora_analysis.storage.torch_files import read_pickle

    return read_pickle(path, allow_pickle=allow_pickle).header()


def shards_of(path: Path) -> dict[str, Path]:
    """Return the file that an index states for each tensor; none is opened.

    Raises
    ------
    MalformedFileError
        It is not an index, or names files outside its folder.
    """
    shard_names = read_json_object(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_names, dict) or not shard_names:
        message = f"{path}: a sharded model's index needs a 'weight_map' of tensors to files."
        raise MalformedFileError(message)
    suffix = PurePosixPath(path.name.removesuffix(".index.json")).suffix
    files: dict[str, Path] = {}
    for tensor, shard in shard_names.items():
        if not isinstance(shard, str):
            message = f"{path}: 'weight_map' gives {shard!r} as the file of tensor {tensor!r}."
            raise MalformedFileError(message)
        if shard not in files:
            # A shard must be inside the index's folder, under the names of any system.
            parts = (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
            is_absolute = PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).drive
            is_shard = shard.endswith(suffix) and ".." not in parts and "\0" not in shard
            if is_absolute or not is_shard or suffix not in {*PICKLE_SUFFIXES, ".safetensors"}:
                message = f"{path}: {shard!r} is not a {suffix} file inside the index's own folder."
                raise MalformedFileError(message)
            files[shard] = path.parent / shard
    return {name: files[shard] for name, shard in shard_names.items()}
