"""``open_base``: recognize a source, find its files and configuration, and open its weights.

Weights in safetensors and torch files, plain or quantized, are read by `FileSource`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.bases.memory_source import ArraySource, ModelSource
from lora_analysis.bases.quantized import Quantized, quantized_weights, tiles
from lora_analysis.bases.sanity_checks import file_findings
from lora_analysis.bases.tensor_names import matrix_shape, quantized_error
from lora_analysis.bases.weight import TensorSource
from lora_analysis.errors import BaseWeightError, SourceError, UnknownFormatError
from lora_analysis.linalg import is_torch_module
from lora_analysis.storage.documents import PICKLE_SUFFIXES, read_json_object
from lora_analysis.storage.dtypes import FLOATING, raw_dtype
from lora_analysis.storage.hub import fetch_model
from lora_analysis.storage.records import refuse_unfinished
from lora_analysis.storage.source_names import addresses_in_errors, existing_path
from lora_analysis.storage.tensor_reader import iter_blocks, part_of, read_elements
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from lora_analysis.bases.weight import Tiles
    from lora_analysis.storage.safetensors import TensorInfo
    from lora_analysis.storage.source_names import Snapshot
    from lora_analysis.storage.tensors import TensorFiles

# In this order: a folder with two copies of a model is read without pickles.
_NAMES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX: Final = ".index.json"
_GGUF: Final = ".gguf"
# Unsupported storages whose tensors look like those of others, by quant_method in the config.
_UNSUPPORTED = frozenset(
    {
        "aqlm", "auto-round", "bitnet", "eetq", "fp_quant", "higgs", "hqq", "intel/auto-round",
        "quanto", "quark", "sinq", "spqr", "torchao", "vptq",
    }
)  # fmt: skip


def open_base(
    source: str | os.PathLike[str] | Mapping[str, Any] | Any, *, allow_pickle: bool = False
) -> BaseWeights:
    """Open the frozen weights of a base model; their values are read on demand.

    Parameters
    ----------
    source
        A safetensors, torch or GGUF file, the index of a sharded one, a folder with such a model
        (a hub's cache folder too), a live ``torch.nn.Module`` (its frozen weights, even if adapters
        are attached), or a mapping of module names to arrays ``(d_out, d_in)``. A ``config.json``
        next to the file names the family, which decides the orientation of matrices. Quantized
        weights are decoded block by block as they are read: fp8, MXFP8, MXFP6, MXFP4, NVFP4,
        ComfyUI's files, GGUF (with the extra ``quantized``), bitsandbytes, compressed-tensors,
        GPTQ, AWQ; types that may mean several things are refused. If no local path has the name,
        one whole model is fetched from a repository on a hub (extra ``hf``), named as in
        :func:`lora_analysis.read_adapter`.
    allow_pickle
        Read files of ``torch.save``: their tensors alone, nothing they name is run.

    Raises
    ------
    SourceError
        The path does not exist, it cannot be fetched, or the folder has no single model.
    UnknownFormatError
        The format is not supported, or it is a pickle and ``allow_pickle`` is false.
    MalformedFileError
        A file is damaged.
    MissingExtraError
        It is a GGUF file and the package ``gguf`` is not installed.
    TypeError
        The source has none of these types.
    """
    if is_torch_module(source):
        live = getattr(source, "config", None)
        fields: dict[str, Any] = getattr(live, "to_dict", dict)()
        model_type = getattr(live, "model_type", None)
        if isinstance(model_type, str):
            fields = {**fields, "model_type": model_type}
        label = type(source).__name__
        name = getattr(live, "_name_or_path", None) or None
        return BaseWeights(ModelSource(source, label), label=label, config=fields, name=name)
    if isinstance(source, Mapping):
        label = "the given arrays"
        return BaseWeights(ArraySource(source, label), label=label, name=None)
    if path := existing_path(source):
        base = _open_stored(path, allow_pickle=allow_pickle)
        base.path = path
        return base
    snapshot = fetch_model(source, allow_pickle=allow_pickle)
    with addresses_in_errors(snapshot):
        base = _open_stored(
            snapshot.path, snapshot.name, allow_pickle=allow_pickle, snapshot=snapshot
        )
    base.snapshot = snapshot
    return base


def as_base(source: Any) -> BaseWeights:
    """Return open base weights unchanged; open any other source."""
    return source if isinstance(source, BaseWeights) else open_base(source)


def _open_stored(
    path: Path,
    label: str | None = None,
    *,
    allow_pickle: bool,
    snapshot: Snapshot | None = None,
) -> BaseWeights:
    refuse_unfinished(path)
    file = model_file(path) if path.is_dir() else path
    label = label or _label(path, file)
    if file.name.endswith(_GGUF):
        from lora_analysis.bases.gguf_source import open_gguf

        return open_gguf(file, label)
    if snapshot is not None and file.name.endswith(f".safetensors{_INDEX}"):
        from lora_analysis.storage.hub import HubShards

        files: TensorFiles = HubShards(file, snapshot)
    else:
        suffixes = (".safetensors", *PICKLE_SUFFIXES)
        if not file.name.endswith((*suffixes, *(suffix + _INDEX for suffix in suffixes))):
            message = (
                f"{file}: base weights are read from safetensors, torch (.bin, .pt) and GGUF files "
                "and their indices only. Save the model again with safe_serialization=True."
            )
            raise UnknownFormatError(message)
        files = open_tensors(file, allow_pickle=allow_pickle)
    config = _config(file.with_name("config.json"))
    findings = file_findings(files, label)
    source = FileSource(files, label, config)
    return BaseWeights(source, label=label, config=config, findings=findings)


def _label(path: Path, file: Path) -> str:
    """Return a short name: the folder's, the file's, or the repository's in a hub's cache."""
    for folder in (path, *path.absolute().parents):
        if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
            return folder.name.removeprefix("models--").rpartition("--")[2]
    return (file.parent if file.name in _NAMES else file).absolute().name


def model_file(folder: Path) -> Path:
    """Return the file or index of the model in a folder, which may be a hub's cache folder.

    Raises
    ------
    SourceError
        There is none, or several.
    """
    # A hub's cache has models--owner--name/snapshots/<commit>, whose entries are links to blobs.
    # The commit is that of branch "main", or the only one.
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if snapshots.is_dir():
        commits = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
        if main.is_file() and main.stat().st_size <= 256:
            commit = main.read_text(encoding="utf-8", errors="replace").strip()
            commits = [entry for entry in commits if entry.name == commit] or commits
        if len(commits) != 1:
            listed = ", ".join(entry.name for entry in commits[:6]) or "none"
            message = (
                f"{folder}: it holds several snapshots, or none: {listed}. "
                "Pass the one that is meant."
            )
            raise SourceError(message)
        folder = commits[0]
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    names = sorted(entry.name for entry in folder.iterdir())
    for suffix in (".safetensors", _GGUF, ".bin"):
        weights = [name for name in names if name.endswith(suffix)]
        indices = [name for name in names if name.endswith(suffix + _INDEX)]
        if "adapter_config.json" not in names and len(indices or weights) == 1:
            return folder / (indices or weights)[0]
    listed = ", ".join(names[:6]) or "nothing"
    hint = "It looks like an adapter's folder. " if "adapter_config.json" in names else ""
    message = (
        f"{folder}: no model.safetensors and no other single file of weights. {hint}"
        f"The folder holds: {listed}."
    )
    raise SourceError(message)


def _config(config: Path) -> dict[str, Any]:
    """Return a model's ``config.json``, empty if there is none.

    modelopt writes the quantization to a separate file too; older versions only there.
    """
    fields = read_json_object(config) if config.is_file() else {}
    modelopt = config.with_name("hf_quant_config.json")
    if "quantization_config" not in fields and modelopt.is_file():
        quantization = read_json_object(modelopt).get("quantization")
        if isinstance(quantization, dict):
            fields["quantization_config"] = {"quant_method": "modelopt", **quantization}
    return fields


class _RawFiles:
    """Tensors of one file or its shards: values, and raw elements (`RawTensors`)."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self.infos: Mapping[str, TensorInfo] = files.infos

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor's values."""
        return self._files.read(name)

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return the elements ``start`` to ``stop`` of a tensor as stored, flat."""
        return read_elements(self._files.file_of(name), self.infos[name], start, stop)

    def blocks(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix, or one of a stack, tile by tile."""
        info = self.infos[name]
        shape = matrix_shape(name, info.shape) if index is None else info.shape[1:]
        if shape == info.shape:
            yield from self._files.blocks(name)
        elif info.strides is not None:
            values = self.read(name)
            matrix = values[index] if index is not None else values.reshape(shape)
            yield slice(0, shape[0]), slice(0, shape[1]), np.asarray(matrix, np.float32)
        else:
            size = raw_dtype(info.dtype).itemsize * shape[0] * shape[1]
            part = part_of(info, shape, info.start + (index or 0) * size)
            yield from iter_blocks(self._files.file_of(name), part)


class FileSource(TensorSource):
    """The weights of a base in files.

    Parameters
    ----------
    files
        The stored tensors.
    label
        The base's name, for messages.
    config
        The model's ``config.json``; its ``quantization_config`` decides if tensors do not.
    """

    def __init__(self, files: TensorFiles, label: str, config: Mapping[str, Any]) -> None:
        self._stored = _RawFiles(files)
        self._label = label
        quantization = config.get("quantization_config", config.get("compression_config"))
        self._config: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else {}
        self._makers = quantized_weights(self._stored, self._config, label, files.metadata)
        self._quantized: dict[str, Quantized] = {}
        plain = []
        for name in files.infos:
            path, _, last = name.rpartition(".")
            stem, _, ending = name.removesuffix("_inv").rpartition("_")
            # The codes, scales and states next to a quantized weight of another name.
            owners = [f"{path}.weight", path.removesuffix(".quant_state")]
            owners += [stem] if ending != "bias" else []
            is_companion = last != "bias" and any(owner in self._makers for owner in owners)
            if name in self._makers or not is_companion:
                plain.append(name)
        self._names = list(dict.fromkeys([*plain, *self._makers]))

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors, and of the weights that quantized tensors make."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the decoded tensor."""
        quantized = self._quantized_weight(name)
        return self._stored.infos[name].shape if quantized is None else quantized.shape

    def dtype(self, name: str) -> str:
        """Return the stored type; for codes, the name of the storage."""
        quantized = self._quantized_weight(name)
        return self._stored.infos[name].dtype if quantized is None else quantized.storage

    def storage(self, name: str) -> str:
        """Return the storage of a quantized weight, "" if the tensor is not quantized."""
        quantized = self._quantized_weight(name)
        return "" if quantized is None else quantized.storage

    def is_plain(self, name: str) -> bool:
        """Return True if the tensor is stored as plain numbers; nothing is assembled for it."""
        return name not in self._makers

    def transposed(self, name: str) -> bool | None:
        """Return the orientation of a quantized storage; None if the tensor is not quantized."""
        quantized = self._quantized_weight(name)
        return None if quantized is None else quantized.transposed

    def tiles(self, name: str, index: int | None) -> Tiles:
        """Yield a matrix tile by tile."""
        quantized = self._quantized_weight(name)
        if quantized is None:
            return self._stored.blocks(name, index)
        return tiles(quantized, self._stored, index)

    def squared_errors(self, name: str, index: int | None) -> Tiles | None:
        """Yield the expected squared rounding errors; None if the tensor is not quantized."""
        quantized = self._quantized_weight(name)
        return None if quantized is None else tiles(quantized, self._stored, index, errors=True)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor of any shape."""
        return self._stored.read(name)

    def refuse_unreadable(self, name: str) -> None:
        """Raise if the tensor belongs to a storage that is not supported."""
        method = str(self._config.get("quant_method", ""))
        if self._quantized_weight(name) is not None and method in _UNSUPPORTED:
            raise quantized_error(self._label, name, method)
        if self._quantized_weight(name) is None and (dtype := self.dtype(name)) not in FLOATING:
            stateless = f"{name}.absmax" in self._stored.infos
            kind = "bitsandbytes 4-bit without its quant_state"
            raise quantized_error(self._label, name, kind if stateless else f"stored as {dtype}")

    def _quantized_weight(self, name: str) -> Quantized | None:
        """Return a quantized weight, assembled at first use; None if it is not quantized."""
        if name in self._makers and name not in self._quantized:
            quantized = self._makers[name]()
            if min(quantized.shape, default=0) < 1:
                message = (
                    f"{self._label}: '{name}' ({quantized.storage}) has shape {quantized.shape}."
                )
                raise BaseWeightError(message)
            self._quantized[name] = quantized
        return self._quantized.get(name)
