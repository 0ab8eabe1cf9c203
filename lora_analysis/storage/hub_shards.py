"""Sharded models on a hub: read all headers first, fetch a shard when one of its tensors is read.

An adapter of a few layers needs a few gigabytes of a large base. The headers are in the first
kilobytes of the shards, which most hubs serve alone; without that, all shards are fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lora_analysis.errors import MalformedFileError
from lora_analysis.storage.hub import fetch_files
from lora_analysis.storage.hub_client import in_time
from lora_analysis.storage.limits import BLOCK_ELEMENTS, HUB_ANSWER_SECONDS, HUB_TIMEOUT
from lora_analysis.storage.safetensors import (
    Header,
    header_size,
    parse_header,
    read_header,
)
from lora_analysis.storage.tensors import TensorFiles, shards_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from lora_analysis.storage.hub_names import Snapshot

# Most headers are smaller; the rest of a larger one takes a second request.
_FIRST_REQUEST: Final = 2**18


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
