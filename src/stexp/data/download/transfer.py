"""One file over HTTP by pooch, resumed where it broke off, never two versions glued."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import pooch
import requests
from urllib3.exceptions import MaxRetryError

TIMEOUT_S = (10, 30)  # until there is a connection, and without a byte
RETRIES = 3  # after 1, 2 and 3 s

pooch.get_logger().setLevel("WARNING")  # else it prints a line for every file


class Failed(Exception):
    """A file that cannot be had now, and why, in words for the user; pooch does not try again after it."""


def download(url: str, path: Path, unreachable: set[str]) -> None:
    """Write what `url` holds to `path`; what comes before a failure stays beside it.

    Hosts that nobody answers at are added to `unreachable`, and not asked again.
    """
    host = urlsplit(url).netloc
    if host in unreachable:
        raise Failed(f"no connection to {host}")
    source = pooch.Pooch(path.parent, "", {path.name: None}, {path.name: url}, retry_if_failed=RETRIES)
    try:
        source.fetch(path.name, downloader=_resume)
    except requests.RequestException as error:
        if error.args and isinstance(error.args[0], MaxRetryError):
            unreachable.add(host)
            raise Failed(f"no connection to {host} ({type(error).__name__})") from None
        raise Failed(str(error) if error.response is not None else f"{type(error).__name__} of {host}") from None


def _resume(url: str, output_file: str, source: pooch.Pooch) -> None:
    """Ask only for the rest of a part, where that is of the same address and version; a downloader for pooch."""
    part, note = source.abspath / "part", source.abspath / "version"
    address, _, version = note.read_text().partition("\n") if note.exists() else ("", "", "")
    with part.open("ab") as file:
        have = file.tell() if version and address == url else 0
        file.truncate(have)

        def begin(response: requests.Response, **_: object) -> None:
            status = response.status_code
            if urlsplit(url).scheme == "https" != urlsplit(response.url).scheme:
                raise Failed(f"redirected to {response.url}, which is not safe")
            if response.is_redirect or status in (408, 429) or status >= 500:
                return  # followed, or tried again
            if status not in (200, 206, 416):
                raise Failed(f"{status} {response.reason}")
            if response.headers.get("Content-Type", "").startswith("text/html"):
                raise Failed("a web page in place of the file")
            if status == 206 and not have:
                raise requests.ConnectionError("a part of the file, which was asked for whole")
            goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if status != 206 or not goes_on or _version(response) != version:
                file.truncate(0)
                if status != 200:
                    raise requests.ConnectionError("beyond the end of the file, or of another version")
            response.raw.headers.pop("Content-Encoding", None)  # a .gz stays packed
            response.raw.enforce_content_length = True  # to end early is an error
            note.write_text(f"{url}\n{_version(response)}")

        headers = {"Accept-Encoding": "identity", "User-Agent": "stexp"}
        headers |= {"Range": f"bytes={have}-", "If-Range": version} if have else {}
        http = pooch.HTTPDownloader(False, 1 << 16, timeout=TIMEOUT_S, headers=headers, hooks={"response": begin})
        http(url, file, source)
    os.replace(part, output_file)


def _version(response: requests.Response) -> str:
    """What tells two versions of a file apart, else empty; a weak ETag does not promise the same bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
