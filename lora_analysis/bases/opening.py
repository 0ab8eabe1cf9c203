"""``open_base``: recognize a source, find its file and configuration, and open its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.bases.base_weights import BaseWeights
from lora_analysis.bases.file_source import FileSource
from lora_analysis.bases.memory_source import ArraySource, ModelSource
from lora_analysis.bases.sanity_checks import file_findings
from lora_analysis.errors import SourceError, UnknownFormatError
from lora_analysis.linalg import is_torch_module
from lora_analysis.storage.documents import PICKLE_SUFFIXES, read_json_object
from lora_analysis.storage.hub import fetch_model
from lora_analysis.storage.records import refuse_unfinished
from lora_analysis.storage.source_names import existing_path, shown_errors
from lora_analysis.storage.tensors import open_tensors

if TYPE_CHECKING:
    import os

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
        return _open_live(source)
    if isinstance(source, Mapping):
        label = "the given arrays"
        return BaseWeights(ArraySource(source, label), label=label, name=None)
    if path := existing_path(source):
        base = _open_stored(path, allow_pickle=allow_pickle)
        base.path = path
        return base
    snapshot = fetch_model(source, allow_pickle=allow_pickle)
    with shown_errors(snapshot):
        base = _open_stored(
            snapshot.path, snapshot.name, allow_pickle=allow_pickle, snapshot=snapshot
        )
    base.snapshot = snapshot
    return base


def as_base(source: Any) -> BaseWeights:
    """Return base weights that are open already as they are; open any other source."""
    return source if isinstance(source, BaseWeights) else open_base(source)


def _open_stored(
    path: Path,
    label: str | None = None,
    *,
    allow_pickle: bool = False,
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


def _open_live(model: Any) -> BaseWeights:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", dict)
    fields: dict[str, Any] = to_dict()
    model_type = getattr(config, "model_type", None)
    if isinstance(model_type, str):
        fields = {**fields, "model_type": model_type}
    label = type(model).__name__
    name = getattr(config, "_name_or_path", None) or None
    return BaseWeights(ModelSource(model, label), label=label, config=fields, name=name)


def _commit_folder(folder: Path) -> Path:
    """Return the folder of one commit in a hub's cache folder: of branch "main", or the only one.

    The cache has ``models--owner--name/snapshots/<commit>``, whose entries are links to blobs.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    commits = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and main.stat().st_size <= 256:
        commit = main.read_text(encoding="utf-8", errors="replace").strip()
        commits = [entry for entry in commits if entry.name == commit] or commits
    if len(commits) == 1:
        return commits[0]
    names = ", ".join(entry.name for entry in commits[:6]) or "none"
    message = f"{folder}: it holds several snapshots, or none: {names}. Pass the one that is meant."
    raise SourceError(message)


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
    folder = _commit_folder(folder)
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
