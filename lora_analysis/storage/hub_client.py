"""Requests to a model hub: lists of files with their sizes, and bounded downloads.

Through the package ``huggingface_hub`` (extra ``hf``), imported when a source names a repository.
It respects ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN``. Sizes are checked
before anything is downloaded, and every request ends in bounded time.
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
from lora_analysis.storage.limits import (
    HUB_ANSWER_SECONDS,
    HUB_BYTES_PER_SECOND,
    HUB_TIMEOUT,
    MAX_HUB_FILES,
    MAX_INDEX_BYTES,
)
from lora_analysis.storage.source_names import PREFIX, HubName, Snapshot, hub_name, not_found_error

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

T = TypeVar("T")
_MAX_LISTINGS: Final = 16


def repository_of(source: str | os.PathLike[str]) -> HubName:
    """Return the repository that a source names; raise if the extra for requests is missing."""
    name = hub_name(source)
    if name is None:
        raise not_found_error(source)
    if find_spec("huggingface_hub") is None:
        install = "pip install 'lora-analysis[hf]'"
        if name.spelled.startswith(PREFIX):
            message = f"{name} is on a hub, which needs huggingface-hub. Install it: {install}"
            raise MissingExtraError(message)
        message = f"{not_found_error(source)} If it names a repository on a hub: {install}"
        raise SourceError(message)
    return name


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one commit inside a path, with their sizes if the hub states them.

    ``folder`` is the commit's folder in the hub's cache. ``local`` is the reason why only files in
    that folder are available, empty if the hub answers.
    """

    commit: str
    folder: Path
    sizes: Mapping[str, int | None]
    local: str = ""

    @property
    def paths(self) -> list[str]:
        """Paths of the files."""
        return list(self.sizes)


def list_files(name: HubName) -> Listing:
    """List the files inside the path of a name.

    Raises
    ------
    SourceError
        There is no such repository or revision, or the hub does not answer and nothing is cached.
    """
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        listing = _list_cache(name, "HF_HUB_OFFLINE is set")
    else:
        try:
            listing = _ask_hub(name)
        except (
            errors.RepositoryNotFoundError,
            errors.GatedRepoError,
            errors.RevisionNotFoundError,
        ) as error:
            raise _request_error(name, error) from error
        except Exception as error:  # noqa: BLE001 - the HTTP client's, which changes with versions
            try:
                listing = _list_cache(name, "the hub cannot be reached")
            except SourceError:
                raise _request_error(name, error) from error
    folder = f"{name.inside}/" if name.inside else ""
    inside = {p.removeprefix(folder): n for p, n in listing.sizes.items() if p.startswith(folder)}
    return replace(listing, sizes=inside)


# Listings of commits, which never change: a model's shards are fetched one by one.
_LISTINGS: Final[dict[tuple[str, str, str], Listing]] = {}


def _ask_hub(name: HubName) -> Listing:
    """Request the list of a revision's files from the hub; the answer includes the sizes."""
    from huggingface_hub import HfApi, constants

    endpoint = str(constants.ENDPOINT)
    if name.revision and (listing := _LISTINGS.get((endpoint, name.repo, name.revision))):
        return listing
    info = in_time(
        lambda: HfApi(endpoint=endpoint).model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=HUB_TIMEOUT
        ),
        HUB_ANSWER_SECONDS,
    )
    sizes = {
        file.rfilename: file.size
        for file in info.siblings or ()
        if ".." not in PurePosixPath(file.rfilename).parts and not file.rfilename.startswith("/")
    }
    listing = Listing(str(info.sha), _cache_folder(name.repo) / "snapshots" / str(info.sha), sizes)
    if len(_LISTINGS) >= _MAX_LISTINGS:
        _LISTINGS.clear()
    _LISTINGS[endpoint, name.repo, listing.commit] = listing
    return listing


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    # Resolved as the client does, so that paths compare equal.
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=repo, repo_type="model")


def _list_cache(name: HubName, reason: str) -> Listing:
    """List the cached files of a revision; raise if there are none."""
    cache, commit = _cache_folder(name.repo), name.revision or "main"
    reference = cache / "refs" / commit
    if ".." not in PurePosixPath(commit).parts and reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace")[:64].strip()
    folder = cache / "snapshots" / commit
    if "/" in commit or not folder.is_dir():
        raise _not_cached_error(name, reason)
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return Listing(commit, folder, sizes, reason)


def _not_cached_error(name: HubName, reason: str) -> SourceError:
    start, repository = _message_start(name)
    return SourceError(
        f"{start}{repository} is not in the local cache, or not whole, and {reason}."
    )


def _message_start(name: HubName) -> tuple[str, HubName]:
    """Return the beginning of an error message, and the repository as it names it."""
    is_address = name.spelled.startswith(PREFIX)
    start = "" if is_address else f"{not_found_error(name.spelled)} On the hub: "
    return start, HubName(name.repo, name.revision)


def download(name: HubName, listing: Listing, files: Sequence[str], limit: int) -> Snapshot:
    """Download files of a listing, by their paths in it, up to a limit of bytes in all."""
    snapshot = Snapshot(name.repo, listing.commit, listing.folder, name.inside)
    if listing.local:
        if not files or not all((snapshot.path / file).is_file() for file in files):
            raise _not_cached_error(name, listing.local)
        return snapshot
    chosen = [file for file in files if file in listing.sizes]
    sizes = {file: _size(snapshot, file, listing) for file in chosen}
    _check_sizes(snapshot, sizes, limit)
    total = sum(sizes.values())
    seconds = HUB_ANSWER_SECONDS + HUB_TIMEOUT * len(sizes) + total / HUB_BYTES_PER_SECOND
    try:
        in_time(lambda: _download_files(name, snapshot, chosen), seconds)
    except InputError:
        raise
    except Exception as error:
        raise _request_error(name, error) from error
    return snapshot


def _size(snapshot: Snapshot, file: str, listing: Listing) -> int:
    """Return the size of a file; request it if the listing has none."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    size = listing.sizes[file]
    if size is None:
        inside = f"{snapshot.inside}/{file}" if snapshot.inside else file
        endpoint = str(constants.ENDPOINT)
        url = hf_hub_url(snapshot.repo, inside, revision=snapshot.commit, endpoint=endpoint)
        try:
            size = in_time(
                lambda: get_hf_file_metadata(url, timeout=HUB_TIMEOUT).size, HUB_ANSWER_SECONDS
            )
        except Exception as error:
            name = HubName(snapshot.repo, snapshot.commit, spelled=PREFIX)
            raise _request_error(name, error) from error
    if size is None:
        message = f"{snapshot.address(snapshot.path / file)}: the hub does not state its size."
        raise SourceError(message)
    return size


def _check_sizes(snapshot: Snapshot, sizes: Mapping[str, int], limit: int) -> None:
    """Raise if files are too many or too large, before any is downloaded."""
    address, total = snapshot.address(snapshot.path), sum(sizes.values())
    for file, size in sizes.items():
        if file.endswith(".json") and size > MAX_INDEX_BYTES:
            message = (
                f"{address}/{file}: {size:,} bytes are too many for this file "
                f"(limit {MAX_INDEX_BYTES:,})."
            )
            raise MalformedFileError(message)
    if total > limit:
        largest = max(sizes, key=sizes.__getitem__)
        message = (
            f"{address}: the {len(sizes)} files to fetch have {_gigabytes(total)} in all (limit "
            f"{_gigabytes(limit)}); the largest is '{largest}', {_gigabytes(sizes[largest])}. "
            "Pass the address of the file that is meant, or download it first."
        )
        raise SourceError(message)
    if len(sizes) > MAX_HUB_FILES:
        message = (
            f"{address}: {len(sizes):,} files to fetch are too many (limit {MAX_HUB_FILES:,}). "
            "Pass the address of a folder or file in it."
        )
        raise SourceError(message)
    missing = sum(size for file, size in sizes.items() if not (snapshot.path / file).exists())
    disk = next(folder for folder in (snapshot.folder, *snapshot.folder.parents) if folder.is_dir())
    free = shutil.disk_usage(disk).free
    if missing > free:
        message = (
            f"{address}: {_gigabytes(missing)} are to be fetched, and the disk of the cache {disk} "
            f"has {_gigabytes(free)} free. Make room, or set HF_HOME to a folder on another disk."
        )
        raise SourceError(message)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def _download_files(name: HubName, snapshot: Snapshot, files: Iterable[str]) -> None:
    """Download files one after the other in this thread; others would outlast a time limit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # not in its __all__

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    # No progress bars if stderr is not a terminal.
    options: dict[str, Any] = {} if sys.stderr.isatty() else {"tqdm_class": Silent}
    # First by the name of the revision, so that the cache has it when the hub cannot be reached.
    revision = name.revision
    for file in files:
        inside = f"{snapshot.inside}/{file}" if snapshot.inside else file
        path = hf_hub_download(
            snapshot.repo,
            inside,
            revision=revision,
            etag_timeout=HUB_TIMEOUT,
            **options,
        )
        if Path(path) != snapshot.path / file:
            message = (
                f"{HubName(name.repo, name.revision)} changed while it was fetched: its commit was "
                f"{snapshot.commit}. Run again."
            )
            raise SourceError(message)
        revision = snapshot.commit


_abandoned: list[threading.Thread] = []


def in_time(work: Callable[[], T], seconds: float) -> T:
    """Return the result of ``work``; raise TimeoutError if it takes longer, retries included.

    A request that is still waiting then is abandoned in a daemon thread. When it fails at last,
    huggingface_hub closes the client that all requests share: one that fails at that time is made
    once more.
    """
    try:
        return _in_time(work, seconds)
    except Exception as error:
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, TimeoutError | HfHubHTTPError):  # the hub answered, or never will
            raise
        _abandoned[:] = [thread for thread in _abandoned if thread.is_alive()]
        if not _abandoned:
            raise
        return _in_time(work, seconds)


def _in_time(work: Callable[[], T], seconds: float) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        _abandoned.append(thread)
        message = f"no answer within {seconds:,.0f} s in all"
        raise TimeoutError(message)
    return results[0]


def _request_error(name: HubName, error: Exception) -> InputError:
    """Return the error for a failed request, in one line."""
    from huggingface_hub import errors

    start, repository = _message_start(name)
    login = "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        text = f"{repository} is gated. Accept its terms on its page, then {login}."
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"{repository} does not exist, or is private; if you may read it, {login}."
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{PREFIX}{name.repo} has no revision '{name.revision}'."
    elif isinstance(error, errors.LocalEntryNotFoundError):
        text = (
            f"{repository} is not in the local cache, or not whole, and the hub cannot be reached."
        )
    elif isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        text = f"{repository} could not be fetched: the hub answered {status}."
    else:
        first = (str(error).splitlines() or [""])[0]
        text = f"{repository} could not be fetched: {type(error).__name__}: {first}"
    return SourceError(f"{start}{text}")
