"""One file over HTTP, in spite of sources that stall, drop, redirect, or change in between."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

log = logging.getLogger(__name__)

MANY = 1 << 20
"""Bytes after which an attempt that broke off counts as progress, and the tries start again."""


@dataclass(frozen=True)
class Patience:
    """How long and how often a source is tried; times in seconds."""

    connect: float = 10.0
    stall: float = 30.0  # without a byte
    tries: int = 4  # in a row without progress
    pause: float = 1.0  # before the second try; then doubled
    longest_pause: float = 60.0  # a source that asks for more is given up
    workers: int = 4


class Failed(Exception):
    """A file that cannot be had now, and why."""


class Unreachable(Failed):
    """Nobody answers at the host."""


class _Again(Exception):
    def __init__(self, why: str, after: float | None = None, unreachable: bool = False) -> None:
        super().__init__(why)
        self.after, self.unreachable = after, unreachable


def download(
    session: requests.Session,
    url: str,
    part: Path,
    patience: Patience,
    size: int | None = None,
    verified_later: bool = False,
    stop: threading.Event | None = None,
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """Write what `url` holds to `part`, going on where an earlier attempt broke off.

    A ``.json`` beside `part` keeps the source's ETag (or Last-Modified): a file that changed in between starts
    from its first byte, also where the source gives neither and nothing is known to verify the whole with.

    Parameters
    ----------
    size
        Bytes that the file must have, where that is known.
    verified_later
        Whether the caller compares a hash, so that bytes of two versions glued together would be noticed.
    stop
        Set by the caller to give up at the next block.
    tick
        Told the number of bytes that came; negative where some are thrown away.

    Raises
    ------
    Failed
        With the reason, in words for the user. What came so far stays in `part`.
    """
    stop, failures = stop or threading.Event(), 0
    while True:
        before = length(part)
        try:
            return _attempt(session, url, part, patience, size, verified_later, stop, tick)
        except _Again as error:
            failures = 1 if length(part) - before >= MANY else failures + 1
            if failures >= patience.tries:
                kind = Unreachable if error.unreachable else Failed
                raise kind(f"{error}, {failures} times") from None
            wait = min(patience.pause * 2 ** (failures - 1), patience.longest_pause)
            if error.after is not None:
                if error.after > patience.longest_pause:
                    raise Failed(f"{error}; the source asks to wait {error.after:.0f} s") from None
                wait = error.after
            log.info("%s: %s; trying again in %.3g s", url.rsplit("/", 1)[-1], error, wait)
            if stop.wait(wait):
                raise Failed("interrupted") from None


def size_at(session: requests.Session, url: str, patience: Patience) -> int | None:
    """Bytes that a file has at its source, as the source says without sending it; None where it does not.

    Raises
    ------
    Unreachable
        Nobody answers at the host.
    """
    try:
        with _open(session, "HEAD", url, {}, patience) as response:
            return int(response.headers["Content-Length"]) if response.status_code == 200 else None
    except _Again as error:
        if error.unreachable:
            raise Unreachable(str(error)) from None
        return None
    except (Failed, KeyError, ValueError):
        return None


def file_hash(path: Path, kind: str) -> str:
    """``kind:hex`` of a file; ``git-sha1`` is git's name of its content, SHA-1 of ``blob <size>\\0`` and the bytes."""
    digest = hashlib.new("sha1" if kind == "git-sha1" else kind, usedforsecurity=False)
    if kind == "git-sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


def mismatch(path: Path, size: int | None, expected: str | None) -> str:
    """What a file has in place of what it should have; empty where nothing differs."""
    if size is not None and path.stat().st_size != size:
        return f"({path.stat().st_size:,} bytes, expected {size:,})"
    have = file_hash(path, expected.partition(":")[0]) if expected else None
    return "" if have == expected else f"({have}, expected {expected})"


def not_whole(path: Path, name: str) -> str:
    """What shows that a file nobody states the hash of is not what it should be: empty, a web page, cut gzip."""
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if not start:
        return "(empty)"
    if start.startswith((b"<!doctype", b"<html")):
        return "(a web page)"
    if name.endswith(".gz"):
        try:
            with gzip.open(path) as packed:
                while packed.read(1 << 20):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            return f"(no whole gzip file: {error})"
    return ""


def length(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def discard(part: Path) -> None:
    """Delete a part and what is known of it."""
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


def _note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _attempt(
    session: requests.Session,
    url: str,
    part: Path,
    patience: Patience,
    size: int | None,
    verified_later: bool,
    stop: threading.Event,
    tick: Callable[[int], None],
) -> None:
    have, note = length(part), _read_note(part)
    headers = {}
    if have and note.get("url") == url and (note.get("version") or verified_later):
        if have == note.get("total"):
            return  # interrupted between the last byte and the caller's check
        headers["Range"] = f"bytes={have}-"
        if note.get("version"):
            headers["If-Range"] = note["version"]
    with _open(session, "GET", url, headers, patience) as response:
        if response.status_code == 416:  # what is here is longer than the file
            tick(-have)
            discard(part)
        start, total = _extent(response)
        if start and (start != have or note.get("version") != _version(response)):
            tick(-have)
            discard(part)
            raise _Again("the file changed at its source" if start == have else "the source sends another range")
        if size is not None and total not in (None, size):
            raise Failed(f"the source has {total:,} bytes, {size:,} are expected")
        if not start:
            tick(-have)
            part.unlink(missing_ok=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        _note_of(part).write_text(json.dumps({"url": url, "version": _version(response), "total": total}))
        try:
            with part.open("ab") as file:
                for block in response.raw.stream(1 << 16, decode_content=False):
                    file.write(block)
                    tick(len(block))
                    if stop.is_set():
                        raise Failed("interrupted")
                    if size is not None and total is None and file.tell() > size:
                        raise Failed(f"the source sends more than the {size:,} bytes that are expected")
        except (urllib3.exceptions.TimeoutError, TimeoutError):
            raise _Again(f"no byte for {patience.stall:g} s") from None
        except (urllib3.exceptions.HTTPError, ConnectionError):
            raise _Again(f"connection dropped after {_of(part, total)}") from None
    if total is not None and length(part) < total:
        raise _Again(f"ended after {_of(part, total)}")


def _of(part: Path, total: int | None) -> str:
    return f"{length(part):,} of {'unknown' if total is None else format(total, ',')} bytes"


def _read_note(part: Path) -> dict:
    try:
        note = json.loads(_note_of(part).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _version(response: requests.Response) -> str | None:
    """What tells two versions of a file apart; a weak ETag does not promise the same bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _extent(response: requests.Response) -> tuple[int, int | None]:
    """The first byte that a response sends, and the length of the whole file; its status where that is neither."""
    status, headers = response.status_code, response.headers
    try:
        if status == 206:
            span, _, total = headers["Content-Range"].removeprefix("bytes ").partition("/")
            return int(span.split("-")[0]), None if total == "*" else int(total)
        if status == 200:
            if headers.get("Content-Encoding", "identity") != "identity" and not response.url.endswith(".gz"):
                raise Failed(f"the source packs the file on the way ({headers['Content-Encoding']})")
            return 0, int(headers["Content-Length"]) if "Content-Length" in headers else None
    except (KeyError, ValueError):
        raise Failed("the source's headers make no sense") from None
    what = f"{status} {response.reason or ''}".strip()
    if status in (408, 416, 429) or status >= 500:
        raise _Again(what, after=_retry_after(headers.get("Retry-After")))
    raise Failed(what)


def _retry_after(text: str | None) -> float | None:
    """Seconds that a source asks to wait, given as a number or as a date."""
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _open(
    session: requests.Session, method: str, url: str, headers: dict[str, str], patience: Patience
) -> requests.Response:
    """The answer after at most five redirects, none of them from https to anything else."""
    headers = {**headers, "Accept-Encoding": "identity", "User-Agent": "stexp"}
    for _ in range(6):
        try:
            response = session.request(
                method,
                url,
                headers=headers,
                stream=True,
                timeout=(patience.connect, patience.stall),
                allow_redirects=False,
            )
        except requests.ReadTimeout:
            raise _Again(f"no answer for {patience.stall:g} s") from None
        except requests.exceptions.SSLError as error:
            raise Failed(f"{urlsplit(url).netloc} cannot prove that it is itself ({error})"[:300]) from None
        except requests.ConnectionError as error:
            # a connection that was made and then closed without a word is not a host that is not there
            dropped = isinstance(error.args[0] if error.args else None, urllib3.exceptions.ProtocolError)
            why = "connection dropped" if dropped else "no connection"
            raise _Again(f"{why} to {urlsplit(url).netloc}", unreachable=not dropped) from None
        except requests.RequestException as error:
            raise Failed(str(error)[:300]) from None
        if not response.is_redirect:
            return response
        target = urljoin(url, response.headers["Location"])
        response.close()
        schemes = ("https",) if urlsplit(url).scheme == "https" else ("https", "http")
        if urlsplit(target).scheme not in schemes:
            raise Failed(f"redirected from {url} to {target}, which is not safe")
        url = target
    raise Failed("redirected more than five times")
