"""A model hub on loopback: the routes that huggingface_hub asks, over folders of bytes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """Repositories by name: revision → commit, commit → files; what was asked is kept."""

    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    gives_parts: bool = True
    states_sizes: bool = True
    # Requests whose path holds one of these get no answer, until the server ends.
    silent: set[str] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)

    def commit(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        self.files[repo, digest.hexdigest()] = files
        self.refs.setdefault(repo, {})[revision] = digest.hexdigest()
        return digest.hexdigest()

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {
            path.split("/resolve/")[1].partition("/")[2]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        part = self.headers.get("Range") if self.hub.gives_parts else None
        self.hub.requests.append(("PART" if part else self.command, path))
        if any(one in path for one in self.hub.silent):
            self.hub.over.wait()
            return None
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo in self.hub.broken:
            return self._send(500)
        if repo not in self.hub.refs:
            return self._send(401, X_Error_Code="RepoNotFound")
        if repo in self.hub.gated:
            return self._send(403, X_Error_Code="GatedRepo")
        rest = parts[4:] if api else parts[2:]
        rest = rest or ["revision", "main"]  # as the API calls the default one
        what, revision, name = rest[0], rest[1], "/".join(rest[2:])
        if revision == "refs":
            revision, name = "/".join(rest[1:4]), "/".join(rest[4:])
        commit = self.hub.refs[repo].get(revision, revision)
        files = self.hub.files.get((repo, commit))
        if files is None:
            return self._send(404, X_Error_Code="RevisionNotFound")
        if what == "revision":
            sized = self.hub.states_sizes and "blobs" in urlsplit(self.path).query
            siblings = [
                {"rfilename": one} | ({"size": len(content)} if sized else {})
                for one, content in files.items()
            ]
            return self._json({"id": repo, "sha": commit, "siblings": siblings})
        if what == "tree":
            return self._json([_entry(one, content) for one, content in files.items()])
        if name not in files:
            return self._send(404, X_Error_Code="EntryNotFound")
        if part:
            first, last = (int(one) for one in part.removeprefix("bytes=").split("-"))
            stated = f"bytes {first}-{last}/{len(files[name])}"
            return self._send(206, files[name][first : last + 1], Content_Range=stated)
        return self._send(200, files[name], ETag=f'"{_blob(files[name])}"', X_Repo_Commit=commit)

    def _json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), Content_Type="application/json")


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": _blob(content)}


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serve a hub from a thread, on a free port."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
