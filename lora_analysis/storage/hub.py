"""Fetch adapters and models from a hub into its cache: choose files by name, then download them.

An adapter of a few layers needs a few gigabytes of a large base. `HubShards` reads the headers of a
sharded model first, which are in the first kilobytes of the shards, and fetches a shard when one of
its tensors is read. If the hub does not serve the start of a file alone, all shards are fetched.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError, SourceError
from lora_analysis.storage.documents import PICKLE_SUFFIXES, read_json_object
from lora_analysis.storage.hub_client import download, in_time, list_files, repository_of
from lora_analysis.storage.limits import (
    BLOCK_ELEMENTS,
    HUB_ANSWER_SECONDS,
    HUB_TIMEOUT,
    MAX_HUB_ADAPTER_BYTES,
    MAX_HUB_MODEL_BYTES,
    MAX_INDEX_BYTES,
)
from lora_analysis.storage.safetensors import (
    Header,
    header_size,
    parse_header,
    read_header,
)
from lora_analysis.storage.source_names import PREFIX, HubName, Snapshot, names_a_file
from lora_analysis.storage.tensors import TensorFiles, shards_of

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_SAFETENSORS: Final = ".safetensors"
_CONFIGS: Final = ("*config.json", "*manifest.json", "*.index.json")
# Files of tokenizers and image processors.
_PROCESSORS: Final = ("*.json", "*.txt", "*.model", "*.jinja")
# Other containers of adapters without pickles, chosen if there is no safetensors file. A GGUF
# file of another name may be a whole model; repositories hold a dozen of those.
_OTHERS: Final = ("*[Ll][Oo][Rr][Aa]*.gguf", "*adapter*.gguf", "*.npz")
# Files that a training run leaves next to an adapter, and the shards of a whole model.
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
# The single file of a whole model, if there is a config.json next to it.
_WHOLE: Final = ("model.*", "model_*", "pytorch_model.*", "diffusion_pytorch_model.*")
_WHOLE_MODELS: Final = ("model", "diffusion_pytorch_model")

# Most headers are smaller; the rest of a larger one takes a second request.
_FIRST_REQUEST: Final = 2**18


def fetch_adapter(source: str | os.PathLike[str], *, allow_pickle: bool) -> Snapshot:
    """Fetch the files of adapters, see `select_adapter_files`.

    A source that names a file fetches it, of any kind, with the configurations in its folder.

    Raises
    ------
    SourceError
        The source names no repository; the repository, the revision or the path in it cannot be
        fetched in time; or the files exceed `MAX_HUB_ADAPTER_BYTES` or the free disk space.
    MissingExtraError
        The source is an address and the extra is not installed.
    """
    name = repository_of(source)
    if names_a_file(name.inside):
        return _fetch_file(name, MAX_HUB_ADAPTER_BYTES)
    listing = list_files(name)
    files = select_adapter_files(listing.paths, allow_pickle=allow_pickle)
    return _select_path(download(name, listing, files, MAX_HUB_ADAPTER_BYTES), name)


def fetch_model(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> Snapshot:
    """Fetch one whole model: its configuration, and its index of safetensors or its only file.

    Readers fetch the shards that the index names (`fetch_files`). A GGUF file is fetched only if
    the source names it.

    Raises
    ------
    SourceError, MissingExtraError
        As for `fetch_adapter`, with the limit `MAX_HUB_MODEL_BYTES`.
    """
    name = repository_of(source)
    if names_a_file(name.inside):
        return _fetch_file(name, MAX_HUB_MODEL_BYTES)
    listing = list_files(name)
    config_names = ("config.json", "adapter_config.json", "*.index.json")
    configs = [path for path in listing.paths if "/" not in path and _matches(path, config_names)]
    snapshot = download(name, listing, configs, MAX_HUB_MODEL_BYTES)
    if any(path.endswith(f"{_SAFETENSORS}.index.json") for path in configs):
        return _select_path(snapshot, name)
    weights = _whole_model_files(listing.paths, _SAFETENSORS)
    if not weights and allow_pickle:
        indices = [path for path in configs if path.endswith(".bin.index.json")]
        shards = [shard for index in indices for shard in _shards(snapshot.path / index)]
        weights = shards or _whole_model_files(listing.paths, ".bin")
    elif len(weights) > 1:
        listed = ", ".join(f"'{file}'" for file in weights[:6])
        listed += ", ..." if len(weights) > 6 else ""
        message = (
            f"{snapshot.address(snapshot.path)}: {len(weights)} safetensors files and no index: "
            f"{listed}. Pass the address of one, as {PREFIX}{snapshot.repo}/{weights[0]}."
        )
        raise SourceError(message)
    is_whole_model = any(_matches(path, _WHOLE) for path in weights)
    if "adapter_config.json" in configs and not is_whole_model:
        return _select_path(snapshot, name)  # the error of opening it says that it is an adapter
    if not weights:
        message = (
            f"{snapshot.address(snapshot.path)}: it has no safetensors file. Another file is "
            f"fetched by its own address, as {PREFIX}{snapshot.repo}/model.gguf, a sub-folder's as "
            f"{PREFIX}{snapshot.repo}/unet."
        )
        raise SourceError(message)
    return _select_path(download(name, listing, weights, MAX_HUB_MODEL_BYTES), name)


def fetch_files(snapshot: Snapshot, names: Sequence[str]) -> None:
    """Fetch files of a snapshot's folder by name.

    Raises
    ------
    SourceError
        They cannot be fetched.
    """
    spelled = f"{PREFIX}{snapshot.repo}"
    name = HubName(snapshot.repo, snapshot.commit, snapshot.inside, spelled)
    download(name, list_files(name), names, MAX_HUB_MODEL_BYTES)


def fetch_pretrained(source: str | os.PathLike[str], *, revision: str | None) -> Snapshot:
    """Fetch one whole model as `fetch_model` does, with its tokenizer or image processor.

    Raises
    ------
    SourceError, MissingExtraError
        As for `fetch_model`.
    """
    name = repository_of(source)
    snapshot = fetch_model(str(replace(name, revision=revision) if revision else name))
    folder = snapshot.path
    indices = folder.glob(f"*{_SAFETENSORS}.index.json") if folder.is_dir() else ()
    shards = [shard for index in indices for shard in _shards(index)]
    pinned = replace(name, revision=snapshot.commit)
    listing = list_files(pinned)
    processors = [path for path in listing.paths if "/" not in path and _matches(path, _PROCESSORS)]
    download(pinned, listing, list(dict.fromkeys([*processors, *shards])), MAX_HUB_MODEL_BYTES)
    return snapshot


def _shards(index: Path) -> list[str]:
    weight_map = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in names if isinstance(name, str)})


def _fetch_file(name: HubName, limit: int) -> Snapshot:
    """Fetch the file that was named, and the configurations in its folder."""
    parent, _, file = name.inside.rpartition("/")
    folder = replace(name, inside=parent)
    listing = list_files(folder)
    files = [
        path
        for path in listing.paths
        if "/" not in path and (path == file or _matches(path, _CONFIGS))
    ]
    return _select_path(download(folder, listing, files, limit), name)


def _select_path(snapshot: Snapshot, name: HubName) -> Snapshot:
    """Return the snapshot at the path that was named; raise if it does not exist."""
    whole = replace(snapshot, inside=name.inside)
    if not whole.path.exists():
        missing = f"'{name.inside}', or no file in it that" if name.inside else "file that"
        message = (
            f"{whole.address(whole.folder)} has no {missing} is fetched (safetensors, .npz, GGUF "
            "named as an adapter; torch files with allow_pickle=True or --allow-pickle)."
        )
        raise SourceError(message)
    return whole


def select_adapter_files(paths: Iterable[str], *, allow_pickle: bool) -> list[str]:
    """Return the files of adapters: configurations, indices and tensors.

    In a folder with an ``adapter_config.json``, tensors are the weights that it describes;
    elsewhere, all safetensors files but those of a whole model (recognized by its ``config.json``).
    Files of torch count if pickles are allowed and the folder has no safetensors file of the
    adapter; ``.npz`` and GGUF files if the repository has no safetensors file.
    """
    candidates = [path for path in paths if not _matches(path, _NEVER)]
    configs = [path for path in candidates if _matches(path, _CONFIGS)]
    suffixes = {_SAFETENSORS, *(PICKLE_SUFFIXES if allow_pickle else ())}
    tensors = [path for path in candidates if PurePosixPath(path).suffix in suffixes]
    folders: dict[str, list[str]] = {}
    for path in tensors:
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    chosen = [
        path
        for folder, paths in folders.items()
        for path in _adapter_tensors(folder, paths, configs)
    ]
    # If there is nothing but a model, the user asked for the model.
    chosen = chosen or tensors
    if not any(path.endswith(_SAFETENSORS) for path in chosen):
        chosen += [path for path in candidates if _matches(path, _OTHERS)]
    return list(dict.fromkeys([*configs, *chosen]))


def _adapter_tensors(folder: str, paths: list[str], configs: Collection[str]) -> list[str]:
    """Return the files of tensors in one folder that belong to an adapter."""
    prefix = f"{folder}/" if folder else ""
    if f"{prefix}adapter_config.json" in configs:
        described = [path for path in paths if _matches(path.removeprefix(prefix), _DESCRIBED)]
        return [path for path in described if path.endswith(_SAFETENSORS)] or described or paths
    if f"{prefix}config.json" in configs:
        return [path for path in paths if not _matches(path.removeprefix(prefix), _WHOLE)]
    return paths


def _whole_model_files(paths: Iterable[str], suffix: str) -> list[str]:
    """Return the file of a model without an index: by its usual name, or all candidates."""
    top = [path for path in paths if "/" not in path]
    for pattern in (*(f"{name}{suffix}" for name in _WHOLE_MODELS), f"*{suffix}"):
        if matches := [path for path in top if fnmatchcase(path, pattern)]:
            return matches
    return []


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


class HubShards(TensorFiles):
    """The tensors of a sharded model; a shard that is not in the cache is fetched to be read."""

    __slots__ = ("_checked", "_snapshot")

    def __init__(self, index: Path, snapshot: Snapshot) -> None:
        locations = shards_of(index)
        headers = {file: _header(file, snapshot) for file in dict.fromkeys(locations.values())}
        super().__init__(index, headers, locations)
        self._snapshot = snapshot
        self._checked = {file for file in headers if file.exists()}

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, read now."""
        self.file_of(name)
        return super().read(name)

    def blocks(
        self, name: str, *, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
        """Yield one matrix tile by tile, as float32 in a reused buffer."""
        self.file_of(name)
        yield from super().blocks(name, elements=elements)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor; fetch it if necessary."""
        file = super().file_of(name)
        if file not in self._checked:
            fetch_files(self._snapshot, [file.name])
            if read_header(file).tensors.get(name) != self.infos[name]:
                message = f"{file}: it differs from what the hub stated. Was it changed meanwhile?"
                raise MalformedFileError(message)
            self._checked.add(file)
        return file


def _header(file: Path, snapshot: Snapshot) -> Header:
    """Return a shard's header, from the hub if the shard is not in the cache."""
    if not file.exists():
        start = _first_bytes(file.name, snapshot, _FIRST_REQUEST)
        needed = header_size(file, start[0], start[1]) if start else 0
        if start and needed > len(start[0]):
            start = _first_bytes(file.name, snapshot, needed)
        if start and needed <= len(start[0]):
            return parse_header(file, start[0][:needed], start[1])
        fetch_files(snapshot, [file.name])
    return read_header(file)


def _first_bytes(name: str, snapshot: Snapshot, count: int) -> tuple[bytes, int] | None:
    """Return the first bytes of a file on the hub and its size; None if it serves no ranges."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not in its __all__
        build_hf_headers,
        get_session,
    )

    if constants.HF_HUB_OFFLINE:
        return None
    inside = f"{snapshot.inside}/{name}" if snapshot.inside else name
    url = hf_hub_url(snapshot.repo, inside, revision=snapshot.commit, endpoint=constants.ENDPOINT)
    headers = {**build_hf_headers(), "range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    try:
        return in_time(
            lambda: _request_range(get_session(), url, headers, count), HUB_ANSWER_SECONDS
        )
    except Exception:  # noqa: BLE001 - after any error of the client, the whole file is fetched
        return None


def _request_range(
    session: Any, url: str, headers: dict[str, str], count: int
) -> tuple[bytes, int] | None:
    # Streamed: a hub that ignores the range would send the whole file.
    with session.stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=HUB_TIMEOUT
    ) as answer:
        total = answer.headers.get("content-range", "").rpartition("/")[2]
        if answer.status_code != 206 or not total.isdecimal():
            return None
        start = bytearray()
        for chunk in answer.iter_bytes():
            start += chunk
            if len(start) >= count:
                break
        return bytes(start[:count]), int(total)
