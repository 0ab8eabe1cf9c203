"""A sharded model on a hub: its headers at once, a shard when the first of its tensors is read.

An adapter that touches a few layers needs a few gigabytes of a large base. What the shards hold is
in their first kilobytes, which a hub gives out alone; one that does not has all shards fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.headers import Header, TensorInfo, header_size, parse_header, read_header
from lora_analysis.storage.hub import fetch_files, in_time
from lora_analysis.storage.limits import BLOCK_ELEMENTS, HUB_ANSWER_SECONDS, HUB_TIMEOUT
from lora_analysis.storage.tensors import TensorFiles, shards_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from lora_analysis.storage.hub_names import Snapshot

# Most headers are smaller; of a larger one the rest is asked for.
_START: Final = 2**18


class HubShards(TensorFiles):
    """The tensors of a sharded model; a shard that is not in the cache is fetched to be read."""

    __slots__ = ("_checked", "_snapshot")

    def __init__(self, index: Path, snapshot: Snapshot) -> None:
        places = shards_of(index)
        headers = {file: _header(file, snapshot) for file in dict.fromkeys(places.values())}
        super().__init__(index, headers, places)
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
        """Return the file a tensor lies in, fetched if it has to be."""
        file = super().file_of(name)
        if file not in self._checked:
            fetch_files(self._snapshot, [file.name])
            _check(file, name, self.infos[name])
            self._checked.add(file)
        return file


def _check(file: Path, name: str, wanted: TensorInfo) -> None:
    if read_header(file).tensors.get(name) != wanted:
        message = f"{file}: it does not hold what the hub said of it. Was it changed meanwhile?"
        raise MalformedFileError(message)


def _header(file: Path, snapshot: Snapshot) -> Header:
    """Return a shard's header, from the hub where the shard is not in the cache."""
    if not file.exists():
        start = _first_bytes(file.name, snapshot, _START)
        needed = header_size(file, start[0], start[1]) if start else 0
        if start and needed > len(start[0]):
            start = _first_bytes(file.name, snapshot, needed)
        if start and needed <= len(start[0]):
            return parse_header(file, start[0][:needed], start[1])
        fetch_files(snapshot, [file.name])
    return read_header(file)


def _first_bytes(name: str, snapshot: Snapshot, count: int) -> tuple[bytes, int] | None:
    """Return the first bytes of a file on the hub and its size; None where it gives no parts."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are there
        build_hf_headers,
        get_session,
    )

    if constants.HF_HUB_OFFLINE:
        return None
    inside = f"{snapshot.inside}/{name}" if snapshot.inside else name
    url = hf_hub_url(snapshot.repo, inside, revision=snapshot.commit, endpoint=constants.ENDPOINT)
    asked = {**build_hf_headers(), "range": f"bytes=0-{count - 1}", "accept-encoding": "identity"}
    try:
        return in_time(lambda: _part(get_session(), url, asked, count), HUB_ANSWER_SECONDS)
    except Exception:  # noqa: BLE001 - whatever the client says: then the whole file is asked for
        return None


def _part(session: Any, url: str, headers: dict[str, str], count: int) -> tuple[bytes, int] | None:
    # Streamed: a hub that takes no notice of the range would send the whole file.
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
