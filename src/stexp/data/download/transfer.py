"""One file over HTTP by pooch's downloader: tried again, resumed where it broke off, never two versions glued."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from urllib.parse import urljoin, urlsplit

import pooch
import requests
from urllib3.exceptions import MaxRetryError

log = logging.getLogger(__name__)

PROGRESS = 1 << 20
"""Bytes after which an attempt that broke off counts as progress, and the tries start again."""

_BROKE_OFF = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


@dataclass(frozen=True)
class Patience:
    """How long and how often a source is tried; times in seconds."""

    connect: float = 10.0
    stall: float = 30.0  # without a byte
    tries: int = 4  # in a row without progress
    pause: float = 1.0  # before the second try; then doubled
    longest_pause: float = 60.0  # a source that asks for more is given up


class Failed(Exception):
    """A file that cannot be had now, and why."""


class Unreachable(Failed):
    """Nobody answers at the host."""


def download(url: str, part: Path, size: int | None, patience: Patience, stop: Event) -> None:
    """Write what `url` holds to `part`, going on where an earlier attempt broke off.

    Parameters
    ----------
    size
        Bytes that the file must have, where that is known.
    stop
        Set by the caller to end the download at the next block.

    Raises
    ------
    Failed
        With the reason, in words for the user. What came so far stays in `part`.
    """
    tries = 0
    while True:
        before = length(part)
        try:
            return _attempt(url, part, size, patience, stop)
        except requests.RequestException as error:
            reason, may_pass, asked_pause = _explain(error, url, part)
            tries = 1 if length(part) - before >= PROGRESS else tries + 1
            pause = max(patience.pause * 2 ** (tries - 1), asked_pause)
            if not may_pass or tries >= patience.tries or pause > patience.longest_pause:
                kind = Unreachable if error.args and isinstance(error.args[0], MaxRetryError) else Failed
                raise kind(f"{reason}; tried {tries} times") from None
        log.info("%s: %s; trying again in %.3g s", url.rsplit("/", 1)[-1], reason, pause)
        if stop.wait(pause):
            raise Failed("interrupted")


def _attempt(url: str, part: Path, size: int | None, patience: Patience, stop: Event) -> None:
    note = part.with_suffix(".version")  # the address, and what tells this version of the file from others
    noted_url, _, version = note.read_text().partition("\n") if note.exists() else ("", "", "")
    total = size

    def begin(response: requests.Response, **_: object) -> None:
        nonlocal total
        if response.is_redirect:
            target = urljoin(response.url, response.headers["Location"])
            if urlsplit(response.url).scheme == "https" != urlsplit(target).scheme:
                raise Failed(f"redirected from {response.url} to {target}, which is not safe")
            return
        resumes = response.status_code == 206
        span = response.headers.get("Content-Range", "")
        changed = resumes and not (span.startswith(f"bytes {have}-") and _version(response) == version)
        if changed or (response.ok and not resumes) or response.status_code == 416:  # 416: longer than the file is
            file.truncate(0)
        if changed:
            raise requests.ConnectionError("part of another file")
        if not response.ok:
            return  # the downloader raises
        if response.headers.get("Content-Encoding", "identity") != "identity" and not url.endswith(".gz"):
            raise Failed(f"the source packs the file on the way ({response.headers['Content-Encoding']})")
        response.raw.headers.pop("Content-Encoding", None)  # a .gz stays one
        note.write_text(f"{url}\n{_version(response)}")
        if not response.headers.get("Content-Length", "0").isdigit():
            raise Failed("the source's headers make no sense")
        to_come = int(response.headers.get("Content-Length", "0"))
        total = to_come + have * resumes if to_come else size
        if size not in (None, total):
            raise Failed(f"the source has {total:,} bytes, {size:,} are expected")
        if to_come > shutil.disk_usage(part.parent).free:
            raise Failed(f"{to_come:,} bytes are to come, less are free on the disk")

    def advance(_: int) -> None:
        if stop.is_set():
            raise Failed("interrupted")
        if size is not None and file.tell() > size:
            raise Failed(f"the source sends more than the {size:,} bytes that are expected")

    with part.open("ab") as file:
        have = file.tell()
        if have and have == size and noted_url == url:
            return  # interrupted between the last byte and the caller's check
        headers = {"Accept-Encoding": "identity", "User-Agent": "stexp"}
        if have and noted_url == url and version:
            headers |= {"Range": f"bytes={have}-", "If-Range": version}
        progress = SimpleNamespace(total=0, update=advance, reset=lambda: None, close=lambda: None)
        timeout = (patience.connect, patience.stall)
        pooch.HTTPDownloader(progress, 1 << 16, timeout=timeout, headers=headers, hooks={"response": begin})(
            url, file, None
        )
        if total is not None and file.tell() < total:
            raise requests.ConnectionError("the source ended early")


def _version(response: requests.Response) -> str:
    """What tells two versions of a file apart, else empty; a weak ETag does not promise the same bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _explain(error: requests.RequestException, url: str, part: Path) -> tuple[str, bool, float]:
    """What went wrong, whether it may pass, and the seconds that the source asks to wait."""
    host = urlsplit(url).netloc
    if isinstance(error, requests.HTTPError):
        status, after = error.response.status_code, error.response.headers.get("Retry-After", "")
        passing = status in (408, 416, 429) or status >= 500
        return f"{status} {error.response.reason}", passing, float(after) if after.isdigit() else 0
    if isinstance(error, requests.exceptions.SSLError):
        return f"{host} cannot prove that it is itself", False, 0
    if error.args and isinstance(error.args[0], MaxRetryError):
        return f"no connection to {host}", True, 0
    return f"{type(error).__name__} of {host} after {length(part):,} bytes", isinstance(error, _BROKE_OFF), 0


def length(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def discard(part: Path) -> None:
    """Delete a part and what is noted of it."""
    part.unlink(missing_ok=True)
    part.with_suffix(".version").unlink(missing_ok=True)
