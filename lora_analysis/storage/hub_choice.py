"""Which files of a repository belong to an adapter or to a model, chosen from their names alone."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from lora_analysis.storage.containers import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

SAFE: Final = ".safetensors"
CONFIGS: Final = ("*config.json", "*manifest.json", "*.index.json")
# What turns text or images into a model's inputs.
BESIDE_WEIGHTS: Final = ("*.json", "*.txt", "*.model", "*.jinja")
# Other containers of adapters without pickles, chosen if there is no safetensors file. A GGUF
# file of another name may be a whole model, of which repositories hold a dozen.
_OTHERS: Final = ("*[Ll][Oo][Rr][Aa]*.gguf", "*adapter*.gguf", "*.npz")
# What a training run leaves next to an adapter, and the shards of a whole model.
_NEVER: Final = (
    "*tokenizer_config.json",
    "*optimizer*",
    "*scheduler*",
    "*rng_state*",
    "*training_args*",
    "model-*-of-*",
    "*/model-*-of-*",
    "pytorch_model-*-of-*",
    "*/pytorch_model-*-of-*",
    "*diffusion_pytorch_model*-of-*",
)
# The weights next to an adapter_config.json that it describes: PEFT's, MLX's, AdapterHub's.
_DESCRIBED: Final = ("adapter*", "pytorch_adapter*", "*_adapters.*")
# The only file of a model, where a config.json next to it says that it is one.
_WHOLE: Final = ("model.*", "model_*", "pytorch_model.*", "diffusion_pytorch_model.*")
_WHOLE_MODELS: Final = ("model", "diffusion_pytorch_model")


def adapter_files(paths: Iterable[str], *, allow_pickle: bool) -> list[str]:
    """Return the files that adapters consist of: configurations, indices and tensors.

    In a folder with an ``adapter_config.json``, these are the weights that it describes; elsewhere
    all safetensors files but the weights of a whole model (recognized by its ``config.json``).
    Files of torch count if pickles are allowed and the folder has no safetensors file of the
    adapter; ``.npz`` and GGUF files if the repository has no safetensors file.
    """
    candidates = [path for path in paths if not _matches(path, _NEVER)]
    configs = [path for path in candidates if _matches(path, CONFIGS)]
    tensors = [path for path in candidates if _is_tensors(path, allow_pickle=allow_pickle)]
    folders: dict[str, list[str]] = {}
    for path in tensors:
        folders.setdefault(_folder(path), []).append(path)
    chosen = [path for group in folders.values() for path in _of_adapter(group, configs)]
    # A model that nothing else lies next to is what the user asked about.
    chosen = chosen or tensors
    if not any(path.endswith(SAFE) for path in chosen):
        chosen += [path for path in candidates if _matches(path, _OTHERS)]
    return list(dict.fromkeys([*configs, *chosen]))


def _of_adapter(paths: list[str], configs: Collection[str]) -> list[str]:
    """Return the files of tensors in one folder that belong to an adapter."""
    folder = _folder(paths[0])
    if _join(folder, "adapter_config.json") in configs:
        described = [path for path in paths if _matches(_file(path), _DESCRIBED)]
        return [path for path in described if path.endswith(SAFE)] or described or paths
    if _join(folder, "config.json") in configs:
        return [path for path in paths if not _matches(_file(path), _WHOLE)]
    return paths


def model_configs(paths: Iterable[str]) -> list[str]:
    """Return the configurations of a model and the indices of its weights."""
    names = ("config.json", "adapter_config.json", "*.index.json")
    return [path for path in paths if "/" not in path and _matches(path, names)]


def whole_model_files(paths: Iterable[str], suffix: str) -> list[str]:
    """Return the only file of a model without an index: by its name, or all that may be it."""
    top = [path for path in paths if "/" not in path]
    for wanted in (*(f"{name}{suffix}" for name in _WHOLE_MODELS), f"*{suffix}"):
        if matches := [path for path in top if fnmatchcase(path, wanted)]:
            return matches
    return []


def is_whole_model(paths: Iterable[str]) -> bool:
    """Return True if a file has the name that only the weights of a whole model have."""
    return any(_matches(path, _WHOLE) for path in paths)


def next_to_weights(paths: Iterable[str]) -> list[str]:
    """Return the files of a model's tokenizer or image processor."""
    return [path for path in paths if "/" not in path and _matches(path, BESIDE_WEIGHTS)]


def file_and_configs(paths: Iterable[str], name: str) -> list[str]:
    """Return one file, if it is there, and the configurations in its folder."""
    return [path for path in paths if "/" not in path and (path == name or _matches(path, CONFIGS))]


def _is_tensors(path: str, *, allow_pickle: bool) -> bool:
    suffix = PurePosixPath(path).suffix
    return suffix == SAFE or (allow_pickle and suffix in PICKLE_SUFFIXES)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
