"""What of a repository on a model hub is fetched, into the hub's own cache.

Through the package ``huggingface_hub`` (extra ``hf``), which is imported when a name leads to a
repository. Its environment variables hold: ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME``,
``HF_TOKEN``.
"""

from __future__ import annotations

import logging
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import InputError, MissingExtraError, SourceError
from lora_analysis.storage.containers import PICKLE_SUFFIXES
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.hub_names import PREFIX, HubName, Snapshot, hub_name, names_a_file
from lora_analysis.storage.limits import MAX_INDEX_BYTES
from lora_analysis.storage.places import nothing_there

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

_SAFE: Final = ".safetensors"
# Other containers of adapters without pickles, asked for where there is no safetensors file. A GGUF
# file of another name may be a whole model, of which repositories hold a dozen.
_OTHERS: Final = ("*[Ll][Oo][Rr][Aa]*.gguf", "*adapter*.gguf", "*.npz")
_CONFIGS: Final = ("*config.json", "*manifest.json", "*.index.json")
# What turns text or images into a model's inputs.
_BESIDE_WEIGHTS: Final = ("*.json", "*.txt", "*.model", "*.jinja")
# What a training run leaves beside an adapter, and the shards of a whole model.
_NOT_ADAPTERS: Final = (
    "*tokenizer_config.json",
    "*optimizer*",
    "*scheduler*",
    "*rng_state*",
    "*training_args*",
    "model-*-of-*",
    "*/model-*-of-*",
    "pytorch_model-*-of-*",
    "*/pytorch_model-*-of-*",
)
_WHOLE_MODELS: Final = ("model", "diffusion_pytorch_model")


def fetch_adapter(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> Snapshot:
    """Fetch what adapters are made of: configurations, safetensors files and their indices.

    Where a repository has no safetensors file, ``.npz`` files and GGUF files named as adapters;
    torch files only where pickles are allowed. States of optimisers and shards of whole models
    are left. A file that is named itself is fetched whatever it is.

    Raises
    ------
    SourceError
        The source names no repository, or it, the revision or the path in it cannot be had.
    MissingExtraError
        An address, and the extra is not installed.
    """
    name = _named(source)
    if names_a_file(name.inside):
        return _fetch_file(name)
    pickles = tuple(f"*{suffix}" for suffix in sorted(PICKLE_SUFFIXES)) if allow_pickle else ()
    wanted = (*_CONFIGS, f"*{_SAFE}", *pickles)
    found = _fetch(name, wanted, _NOT_ADAPTERS)
    if not any(found.path.rglob(f"*{_SAFE}")):
        _fetch(replace(name, revision=found.commit), _OTHERS)
    return _with_path(found, name)


def fetch_model(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> Snapshot:
    """Fetch one whole model: its configuration, and its index of safetensors or its only file.

    The shards that the index names are left to whoever reads them (`fetch_files`). A GGUF file
    must be named itself.

    Raises
    ------
    SourceError, MissingExtraError
        As for `fetch_adapter`.
    """
    name = _named(source)
    if names_a_file(name.inside):
        return _fetch_file(name)
    found = _fetch(name, ("config.json", "adapter_config.json", "*.index.json"), ("*/*",))
    pinned = replace(name, revision=found.commit)
    if any(found.path.glob(f"*{_SAFE}.index.json")):
        return _with_path(found, name)
    suffixes = (_SAFE, ".bin") if allow_pickle else (_SAFE,)
    for wanted in _model_files(found.path, suffixes):
        _fetch(pinned, wanted, ("*/*",))
        if _complete(found.path, wanted):
            return _with_path(found, name)
    if not (found.path / "adapter_config.json").is_file():
        raise _no_model(found)
    return _with_path(found, name)


def fetch_files(found: Snapshot, names: Sequence[str]) -> None:
    """Fetch files of a snapshot's folder by name.

    Raises
    ------
    SourceError
        They cannot be had.
    """
    literal = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    _fetch(HubName(found.repo, found.commit, found.inside, f"{PREFIX}{found.repo}"), literal)


def fetch_pretrained(source: str | os.PathLike[str], *, revision: str | None = None) -> Snapshot:
    """Fetch one whole model as `fetch_model` does, with its tokeniser or image processor.

    Raises
    ------
    SourceError, MissingExtraError
        As for `fetch_adapter`.
    """
    name = _named(source)
    found = fetch_model(str(replace(name, revision=revision) if revision else name))
    shards = [one for index in found.path.glob(f"*{_SAFE}.index.json") for one in _shards(index)]
    _fetch(replace(name, revision=found.commit), (*_BESIDE_WEIGHTS, *shards), ("*/*",))
    return found


def _no_model(found: Snapshot) -> SourceError:
    here = found.address(found.path)
    return SourceError(
        f"{here}: no safetensors file lies there. Another file is fetched by its own address, as "
        f"{PREFIX}{found.repo}/model.gguf, a sub-folder's as {PREFIX}{found.repo}/unet."
    )


def _model_files(folder: Path, suffixes: Sequence[str]) -> Iterator[list[str]]:
    """Yield what to ask for, one after the other, until it is there."""
    for suffix in suffixes:
        for index in sorted(folder.glob(f"*{suffix}.index.json")):
            yield _shards(index)
        yield from ([f"{whole}{suffix}"] for whole in _WHOLE_MODELS)
        yield [f"*{suffix}"]


def _shards(index: Path) -> list[str]:
    stated = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    names = stated.values() if isinstance(stated, dict) else ()
    # In brackets a special character stands for itself.
    return sorted({re.sub(r"([*?[])", r"[\1]", name) for name in names if isinstance(name, str)})


def _complete(folder: Path, wanted: Sequence[str]) -> bool:
    return bool(wanted) and all(any(folder.glob(pattern)) for pattern in wanted)


def _fetch_file(name: HubName) -> Snapshot:
    """Fetch one file that was named, and the configurations beside it."""
    folder, _, file = name.inside.rpartition("/")
    literal = re.sub(r"([*?[])", r"[\1]", file)
    found = _fetch(replace(name, inside=folder), (literal, *_CONFIGS), ("*/*",))
    return _with_path(found, name)


def _with_path(found: Snapshot, name: HubName) -> Snapshot:
    """Return the snapshot with the path that was asked for; raise where it is not there."""
    whole = replace(found, inside=name.inside)
    if not whole.path.exists():
        what = f"'{name.inside}', or no file in it that" if name.inside else "file that"
        message = (
            f"{whole.address(whole.folder)} has no {what} is fetched (safetensors, .npz, GGUF "
            "named as an adapter; torch files with allow_pickle=True or --allow-pickle)."
        )
        raise SourceError(message)
    return whole


def _named(source: str | os.PathLike[str]) -> HubName:
    """Return the repository a source names, if it can be asked for."""
    name = hub_name(source)
    if name is None:
        raise nothing_there(source)
    if find_spec("huggingface_hub") is None:
        install = "pip install 'lora-analysis[hf]'"
        if name.spelled.startswith(PREFIX):
            message = f"{name} is on a hub, which needs huggingface-hub. Install it: {install}"
            raise MissingExtraError(message)
        text = f"{nothing_there(source)} If it names a repository on a hub: {install}"
        raise SourceError(text)
    return name


def _fetch(name: HubName, wanted: Sequence[str], ignored: Sequence[str] = ()) -> Snapshot:
    """Fetch the files of a repository that match, inside the path that is asked for."""
    from huggingface_hub import snapshot_download

    start = f"{name.inside}/" if name.inside else ""
    try:
        with _without_remarks():
            folder = snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=[f"{start}{pattern}" for pattern in wanted],
                ignore_patterns=[f"{start}{pattern}" for pattern in ignored],
                **_progress(),
            )
    except Exception as error:
        # The errors of the HTTP client come through, of another client in every major version.
        raise _refusal(name, error) from error
    return Snapshot(name.repo, Path(folder).name, Path(folder), name.inside)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keep off stderr that a pattern matched no file: several are tried, one after the other."""
    log = logging.getLogger("huggingface_hub._snapshot_download")

    def worth_saying(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    log.addFilter(worth_saying)
    try:
        yield
    finally:
        log.removeFilter(worth_saying)


def _progress() -> dict[str, Any]:
    """Return the bars' class where none are to be seen: stderr is no terminal."""
    if sys.stderr.isatty():
        return {}
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # it is there

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return {"tqdm_class": Silent}


def _refusal(name: HubName, error: Exception) -> InputError:
    """Return what a failed request means, in one line."""
    from huggingface_hub import errors

    shown = HubName(name.repo, name.revision)
    start = "" if name.spelled.startswith(PREFIX) else f"{nothing_there(name.spelled)} On the hub: "
    login = "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        text = f"{shown} is gated. Accept its terms on its page, then {login}."
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"{shown} does not exist, or is private; if you may read it, {login}."
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{PREFIX}{name.repo} has no revision '{name.revision}'."
    elif isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if _offline(error) else "the hub cannot be reached"
        text = f"{shown} is not in the local cache, or not whole, and {why}."
    elif isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        text = f"{shown} could not be fetched: the hub answered {status}."
    else:
        first = (str(error).splitlines() or [""])[0]
        text = f"{shown} could not be fetched: {type(error).__name__}: {first}"
    return SourceError(f"{start}{text}")


def _offline(error: Exception) -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or "OfflineMode" in type(error.__cause__).__name__
