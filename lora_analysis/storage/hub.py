"""What of a repository on a model hub is fetched, into the hub's own cache.

Through the package ``huggingface_hub`` (extra ``hf``), which is imported when a name leads to a
repository. Its environment variables hold: ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME``,
``HF_TOKEN``. The list of files with their sizes comes first: what is chosen from it and how large
that may be is decided before anything is downloaded. Every request ends in bounded time.
"""

from __future__ import annotations

import shutil
import sys
import threading
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lora_analysis.errors import InputError, MalformedFileError, MissingExtraError, SourceError
from lora_analysis.storage import hub_choice
from lora_analysis.storage.documents import read_json_object
from lora_analysis.storage.hub_choice import SAFE
from lora_analysis.storage.hub_names import PREFIX, HubName, Snapshot, hub_name, names_a_file
from lora_analysis.storage.limits import (
    HUB_ANSWER_SECONDS,
    HUB_BYTES_PER_SECOND,
    HUB_TIMEOUT,
    MAX_HUB_ADAPTER_BYTES,
    MAX_HUB_FILES,
    MAX_HUB_MODEL_BYTES,
    MAX_INDEX_BYTES,
)
from lora_analysis.storage.places import nothing_there

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

T = TypeVar("T")
_MOST_ASKED: Final = 16


def fetch_adapter(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> Snapshot:
    """Fetch the files that adapters consist of, see `hub_choice.adapter_files`.

    A file that is named itself is fetched whatever it is, with the configurations in its folder.

    Raises
    ------
    SourceError
        The source names no repository, it, the revision or the path in it cannot be had in time,
        or the files exceed `MAX_HUB_ADAPTER_BYTES` or the free disk space.
    MissingExtraError
        An address, and the extra is not installed.
    """
    name = _named(source)
    if names_a_file(name.inside):
        return _fetch_file(name, MAX_HUB_ADAPTER_BYTES)
    listing = _listing(name)
    files = hub_choice.adapter_files(listing.paths, allow_pickle=allow_pickle)
    return _with_path(_fetch(name, listing, files, MAX_HUB_ADAPTER_BYTES), name)


def fetch_model(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> Snapshot:
    """Fetch one whole model: its configuration, and its index of safetensors or its only file.

    The shards that the index names are left to whoever reads them (`fetch_files`). A GGUF file
    must be named itself.

    Raises
    ------
    SourceError, MissingExtraError
        As for `fetch_adapter`, with the limit `MAX_HUB_MODEL_BYTES`.
    """
    name = _named(source)
    if names_a_file(name.inside):
        return _fetch_file(name, MAX_HUB_MODEL_BYTES)
    listing = _listing(name)
    configs = hub_choice.model_configs(listing.paths)
    found = _fetch(name, listing, configs, MAX_HUB_MODEL_BYTES)
    if any(path.endswith(f"{SAFE}.index.json") for path in configs):
        return _with_path(found, name)
    weights = hub_choice.whole_model_files(listing.paths, SAFE)
    if not weights and allow_pickle:
        indices = [path for path in configs if path.endswith(".bin.index.json")]
        shards = [shard for index in indices for shard in _shards(found.path / index)]
        weights = shards or hub_choice.whole_model_files(listing.paths, ".bin")
    elif len(weights) > 1:
        raise _several_models(found, weights)
    if "adapter_config.json" in configs and not hub_choice.is_whole_model(weights):
        return _with_path(found, name)  # which opening it says
    if not weights:
        raise _no_model(found)
    return _with_path(_fetch(name, listing, weights, MAX_HUB_MODEL_BYTES), name)


def fetch_files(found: Snapshot, names: Sequence[str]) -> None:
    """Fetch files of a snapshot's folder by name.

    Raises
    ------
    SourceError
        They cannot be had.
    """
    name = HubName(found.repo, found.commit, found.inside, f"{PREFIX}{found.repo}")
    _fetch(name, _listing(name), names, MAX_HUB_MODEL_BYTES)


def fetch_pretrained(source: str | os.PathLike[str], *, revision: str | None = None) -> Snapshot:
    """Fetch one whole model as `fetch_model` does, with its tokenizer or image processor.

    Raises
    ------
    SourceError, MissingExtraError
        As for `fetch_model`.
    """
    name = _named(source)
    found = fetch_model(str(replace(name, revision=revision) if revision else name))
    indices = found.path.glob(f"*{SAFE}.index.json") if found.path.is_dir() else ()
    shards = [shard for index in indices for shard in _shards(index)]
    pinned = replace(name, revision=found.commit)
    listing = _listing(pinned)
    files = [*hub_choice.next_to_weights(listing.paths), *shards]
    _fetch(pinned, listing, list(dict.fromkeys(files)), MAX_HUB_MODEL_BYTES)
    return found


def _no_model(found: Snapshot) -> SourceError:
    here = found.address(found.path)
    return SourceError(
        f"{here}: no safetensors file lies there. Another file is fetched by its own address, as "
        f"{PREFIX}{found.repo}/model.gguf, a sub-folder's as {PREFIX}{found.repo}/unet."
    )


def _several_models(found: Snapshot, files: Sequence[str]) -> SourceError:
    listed = ", ".join(f"'{file}'" for file in files[:6]) + (", ..." if len(files) > 6 else "")
    return SourceError(
        f"{found.address(found.path)}: {len(files)} safetensors files and no index: {listed}. Pass "
        f"the address of one, as {PREFIX}{found.repo}/{files[0]}."
    )


def _shards(index: Path) -> list[str]:
    stated = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    names = stated.values() if isinstance(stated, dict) else ()
    return sorted({name for name in names if isinstance(name, str)})


def _fetch_file(name: HubName, limit: int) -> Snapshot:
    """Fetch one file that was named, and the configurations beside it."""
    folder, _, file = name.inside.rpartition("/")
    place = replace(name, inside=folder)
    listing = _listing(place)
    files = hub_choice.file_and_configs(listing.paths, file)
    return _with_path(_fetch(place, listing, files, limit), name)


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


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files of one commit inside a path, with their sizes if the hub states them.

    ``folder`` is where the commit lies in the hub's cache; ``local`` says that only what lies there
    can be had, and why.
    """

    commit: str
    folder: Path
    sizes: Mapping[str, int | None]
    local: str = ""

    @property
    def paths(self) -> list[str]:
        return list(self.sizes)


def _listing(name: HubName) -> _Listing:
    """Return the files inside the path that a name leads to.

    Raises
    ------
    SourceError
        There is no such repository or revision, or the hub does not answer and nothing is cached.
    """
    listing = _whole_listing(name)
    start = f"{name.inside}/" if name.inside else ""
    inside = {p.removeprefix(start): n for p, n in listing.sizes.items() if p.startswith(start)}
    return replace(listing, sizes=inside)


def _whole_listing(name: HubName) -> _Listing:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return _cached_listing(name, "HF_HUB_OFFLINE is set")
    try:
        return _asked_listing(name)
    except (
        errors.RepositoryNotFoundError,
        errors.GatedRepoError,
        errors.RevisionNotFoundError,
    ) as error:
        raise _refusal(name, error) from error
    except Exception as error:  # noqa: BLE001 - the HTTP client's, another in every major version
        try:
            return _cached_listing(name, "the hub cannot be reached")
        except SourceError:
            raise _refusal(name, error) from error


# Listings of commits, which never change: a model's shards are fetched one by one.
_ASKED: Final[dict[tuple[str, str, str], _Listing]] = {}


def _asked_listing(name: HubName) -> _Listing:
    """Return what the hub lists for a revision; it states the sizes in the same answer."""
    from huggingface_hub import HfApi, constants

    endpoint = str(constants.ENDPOINT)
    if name.revision and (listing := _ASKED.get((endpoint, name.repo, name.revision))):
        return listing
    info = in_time(
        lambda: HfApi(endpoint=endpoint).model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=HUB_TIMEOUT
        ),
        HUB_ANSWER_SECONDS,
    )
    sizes = {
        one.rfilename: one.size
        for one in info.siblings or ()
        if ".." not in PurePosixPath(one.rfilename).parts and not one.rfilename.startswith("/")
    }
    listing = _Listing(str(info.sha), _cache_of(name.repo) / "snapshots" / str(info.sha), sizes)
    if len(_ASKED) >= _MOST_ASKED:
        _ASKED.clear()
    _ASKED[endpoint, name.repo, listing.commit] = listing
    return listing


def _cache_of(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    # Resolved as the client does, so that its paths are equal to these.
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=repo, repo_type="model")


def _cached_listing(name: HubName, why: str) -> _Listing:
    """Return what lies in the cache of a revision; raise if nothing does."""
    cache, commit = _cache_of(name.repo), name.revision or "main"
    reference = cache / "refs" / commit
    if ".." not in PurePosixPath(commit).parts and reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace")[:64].strip()
    folder = cache / "snapshots" / commit
    if "/" in commit or not folder.is_dir():
        raise _not_cached(name, why)
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return _Listing(commit, folder, sizes, why)


def _not_cached(name: HubName, why: str) -> SourceError:
    start = "" if name.spelled.startswith(PREFIX) else f"{nothing_there(name.spelled)} On the hub: "
    shown = HubName(name.repo, name.revision)
    return SourceError(f"{start}{shown} is not in the local cache, or not whole, and {why}.")


def _fetch(name: HubName, listing: _Listing, files: Sequence[str], limit: int) -> Snapshot:
    """Fetch files of a listing, by their paths inside the name's path, within a limit of bytes."""
    found = Snapshot(name.repo, listing.commit, listing.folder, name.inside)
    if listing.local:
        if not files or not all((found.path / file).is_file() for file in files):
            raise _not_cached(name, listing.local)
        return found
    chosen = [file for file in files if file in listing.sizes]
    sizes = {file: _size(found, file, listing) for file in chosen}
    _check_sizes(found, sizes, limit)
    total = sum(sizes.values())
    seconds = HUB_ANSWER_SECONDS + HUB_TIMEOUT * len(sizes) + total / HUB_BYTES_PER_SECOND
    try:
        in_time(lambda: _download(name, found, chosen), seconds)
    except InputError:
        raise
    except Exception as error:
        raise _refusal(name, error) from error
    return found


def _size(found: Snapshot, file: str, listing: _Listing) -> int:
    """Return the size of a file, asked for alone if the listing has none."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    size = listing.sizes[file]
    if size is None:
        inside = f"{found.inside}/{file}" if found.inside else file
        endpoint = str(constants.ENDPOINT)
        url = hf_hub_url(found.repo, inside, revision=found.commit, endpoint=endpoint)
        try:
            size = in_time(
                lambda: get_hf_file_metadata(url, timeout=HUB_TIMEOUT).size, HUB_ANSWER_SECONDS
            )
        except Exception as error:
            raise _refusal(HubName(found.repo, found.commit, spelled=PREFIX), error) from error
    if size is None:
        message = f"{found.address(found.path / file)}: the hub does not state its size."
        raise SourceError(message)
    return size


def _check_sizes(found: Snapshot, sizes: Mapping[str, int], limit: int) -> None:
    """Raise if files are too many or too large, before any is downloaded."""
    where, total = found.address(found.path), sum(sizes.values())
    for file, size in sizes.items():
        if file.endswith(".json") and size > MAX_INDEX_BYTES:
            message = (
                f"{where}/{file}: {size:,} bytes are too many for this file "
                f"(limit {MAX_INDEX_BYTES:,})."
            )
            raise MalformedFileError(message)
    if total > limit:
        largest = max(sizes, key=sizes.__getitem__)
        message = (
            f"{where}: the {len(sizes)} files to fetch have {_gigabytes(total)} in all (limit "
            f"{_gigabytes(limit)}); the largest is '{largest}', {_gigabytes(sizes[largest])}. "
            "Pass the address of the file that is meant, or download it first."
        )
        raise SourceError(message)
    if len(sizes) > MAX_HUB_FILES:
        message = (
            f"{where}: {len(sizes):,} files to fetch are too many (limit {MAX_HUB_FILES:,}). Pass "
            "the address of a folder or file in it."
        )
        raise SourceError(message)
    missing = sum(size for file, size in sizes.items() if not (found.path / file).exists())
    disk = next(folder for folder in (found.folder, *found.folder.parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if missing > free:
        message = (
            f"{where}: {_gigabytes(missing)} are to be fetched, and the disk of the cache {disk} "
            f"has {_gigabytes(free)} free. Make room, or set HF_HOME to a folder on another disk."
        )
        raise SourceError(message)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def _download(name: HubName, found: Snapshot, files: Iterable[str]) -> None:
    """Fetch files one after the other, in this thread: others would outlast a time limit."""
    from huggingface_hub import hf_hub_download

    # By the revision's own name first, so that the cache knows it when the hub cannot be reached.
    revision = name.revision
    for file in files:
        inside = f"{found.inside}/{file}" if found.inside else file
        path = hf_hub_download(
            found.repo, inside, revision=revision, etag_timeout=HUB_TIMEOUT, **_progress()
        )
        if Path(path) != found.path / file:
            message = (
                f"{HubName(name.repo, name.revision)} changed while it was fetched: its commit was "
                f"{found.commit}. Run again."
            )
            raise SourceError(message)
        revision = found.commit


def in_time(work: Callable[[], T], seconds: float) -> T:
    """Return what the work returns; raise TimeoutError if it takes longer, retries included.

    What still waits for an answer then is left behind in a thread that no program waits for.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        message = f"no answer within {seconds:,.0f} s in all"
        raise TimeoutError(message)
    return results[0]


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
        text = f"{shown} is not in the local cache, or not whole, and the hub cannot be reached."
    elif isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        text = f"{shown} could not be fetched: the hub answered {status}."
    else:
        first = (str(error).splitlines() or [""])[0]
        text = f"{shown} could not be fetched: {type(error).__name__}: {first}"
    return SourceError(f"{start}{text}")
