"""A local server that does what servers do to people: stalls, drops, cuts, redirects, serves wrong or other bytes."""

from __future__ import annotations

import hashlib
import io
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stexp.data.download import sources, transfer
from stexp.data.download.fetch import fetch
from stexp.data.download.record import RECORD

TRIES = 3


def content(seed: str, size: int = 300_000) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size)


class Site:
    """Files by path, and for each path what happens to its next requests; then it is served as it should be."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.mishaps: dict[str, list[Callable]] = {}
        self.asked: list[tuple[str, str | None]] = []  # path, Range; of GET
        self.tags: Callable[[bytes], dict] = lambda body: {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def times(self, path: str) -> int:
        return Counter(path for path, _ in self.asked)[path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    @property
    def name(self) -> str:
        return self.path[1:].partition("?")[0]

    def do_HEAD(self) -> None:
        body = self.site.files.get(self.name)
        tags = {} if body is None else self.site.tags(body)
        self.reply(404 if body is None else 200, {"Content-Length": len(body or b""), **tags})

    def do_GET(self) -> None:
        path = self.name
        self.site.asked.append((path, self.headers["Range"]))
        mishaps = self.site.mishaps.get(path, [])
        if mishaps:
            mishaps.pop(0)(self)
        elif path not in self.site.files:
            self.reply(404, {"Content-Length": 0})
        else:
            self.serve(self.site.files[path])

    def reply(self, status: int, headers: dict, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def serve(self, body: bytes, ranges: bool = True, up_to: int | None = None, **headers: object) -> None:
        """The file, or the rest of it that was asked for if it is still the same."""
        tags, start, status = self.site.tags(body), 0, 200
        same = self.headers["If-Range"] in (None, *tags.values())
        if ranges and self.headers["Range"] and same:
            start, status = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(body):
                return self.reply(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": 0})
            headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}", **headers}
        headers = {"Content-Length": len(body) - start, **tags, **headers}
        self.reply(status, {k: v for k, v in headers.items() if v is not None}, body[start:up_to])
        return None

    def hang_up(self) -> None:
        """Close at once, without the goodbye of TCP."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile, self.wfile = io.BytesIO(), io.BytesIO()


# mishaps: the file stops half way, or something else comes in its place


def half(handler: Handler, then: Callable = lambda handler: None) -> None:
    body = handler.site.files[handler.name]
    start = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    handler.serve(body, up_to=start + (len(body) - start) // 2)
    handler.close_connection = True
    then(handler)


def stall(handler: Handler) -> None:
    half(handler, silence)


def drop(handler: Handler) -> None:
    half(handler, lambda handler: handler.hang_up())


def silence(handler: Handler) -> None:
    handler.close_connection = True
    handler.rfile.read(1)  # until the other side gives up


def vanish(handler: Handler) -> None:
    handler.hang_up()


def no_range(handler: Handler) -> None:
    handler.serve(handler.site.files[handler.name], ranges=False)


def status(code: int, **headers: str) -> Callable:
    return lambda handler: handler.reply(
        code, {"Content-Length": 0} | {name.replace("_", "-"): value for name, value in headers.items()}
    )


def changed(body: bytes) -> Callable:
    """Half of the file as it was; from then on it is another one."""

    def mishap(handler: Handler) -> None:
        half(handler)
        handler.site.files[handler.name] = body

    return mishap


@contextmanager
def serving() -> Iterator[Site]:
    """A site that is there for as long as the block lasts."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    server.daemon_threads = True
    server.handle_error = lambda *args: None
    site.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


def publisher(site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes the source of a data set ``toy`` with the files it is given, and returns the root."""
    monkeypatch.setattr(sources, "SOURCES", folder / "sources")
    monkeypatch.setattr(transfer, "TIMEOUT_S", (2, 0.5))
    monkeypatch.setattr(transfer, "RETRIES", TRIES - 1)
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))
    (folder / "sources").mkdir()

    def publish(files: dict[str, dict], **top: object) -> Path:
        listed = {"base": f"{site.url}/", "files": files, **top}
        (folder / "sources" / "toy.yaml").write_text(yaml.safe_dump(listed, sort_keys=False))
        return folder / "root"

    return publish


def stated(body: bytes) -> dict:
    """What a source states of a file, as git does."""
    return {"size": len(body), "hash": "git-sha1:" + hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()}


def bring(root: Path, **settings: object) -> None:
    fetch("toy", root, **settings)


def left_over(root: Path) -> list[str]:
    return sorted({path.name for path in root.rglob(".*")} - {RECORD, ".stexp-downloads.lock"})
