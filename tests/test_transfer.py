"""One file from a server that does not behave: the right bytes arrive, or one line says why not."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from unreliable import (
    HASTY,
    Handler,
    Site,
    bring,
    changed,
    content,
    drop,
    half,
    left_over,
    no_range,
    other,
    silence,
    stall,
    stated,
    status,
    vanish,
)

from stexp.data.download.transfer import Failed, Patience, download
from stexp.errors import InputError


@pytest.mark.parametrize("mishaps", [[], [stall], [drop], [drop, drop], [silence], [vanish], [half], [stall, no_range]])
@pytest.mark.parametrize("hashed", [True, False])
def test_arrives_whole_in_spite_of(mishaps: list, hashed: bool, site: Site, publish: Callable) -> None:
    site.files["a/x.bin"], site.mishaps["a/x.bin"] = content("x"), list(mishaps)
    root = publish({"a/x.bin": stated(content("x")) if hashed else {}})
    bring(root)
    assert (root / "a/x.bin").read_bytes() == content("x") and left_over(root) == []
    assert site.times("a/x.bin") == 1 + len(mishaps) - mishaps.count(no_range)


def test_goes_on_from_the_byte_where_it_stopped(site: Site, publish: Callable) -> None:
    site.files["x.bin"], site.mishaps["x.bin"] = content("x"), [half] * 3  # more often than it is tried
    root = publish({"x.bin": {}})
    with pytest.raises(InputError, match=r"1 of 1 files did not arrive: x.bin \(.* after .*, 3 times\); 0 are"):
        bring(root)
    assert not (root / "x.bin").exists()
    so_far = (root / ".x.bin.part").stat().st_size
    assert content("x")[:so_far] == (root / ".x.bin.part").read_bytes() and so_far > len(content("x")) // 2
    bring(root)
    assert site.asked[-1] == ("x.bin", f"bytes={so_far}-")
    assert (root / "x.bin").read_bytes() == content("x")


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("tags", ["strong", "weak", "dated", "none", "careless"])
def test_two_versions_are_never_glued_together(tags: str, hashed: bool, site: Site, publish: Callable) -> None:
    old, new = content("old"), content("new")
    site.tags = {
        "strong": site.tags,
        "weak": lambda body: {"ETag": 'W/"same"'},
        "dated": lambda body: {"Last-Modified": f"Mon, 0{1 + (body == new)} Jan 2024 00:00:00 GMT"},
        "none": lambda body: {},
        "careless": lambda body: {"ETag": f'"{hashlib.md5(body).hexdigest()}"'},
    }[tags]
    site.files["x.bin"] = old
    site.mishaps["x.bin"] = [changed(new)]
    if tags == "careless":  # sends the rest of the new file, whatever If-Range says

        def careless(handler: Handler) -> None:
            del handler.headers["If-Range"]
            handler.serve(new)

        site.mishaps["x.bin"].append(careless)
    root = publish({"x.bin": stated(new) if hashed else {}})
    bring(root)
    assert (root / "x.bin").read_bytes() == new
    if tags in ("strong", "dated"):
        assert site.times("x.bin") == 2  # If-Range spares asking once more


def test_wrong_bytes_are_asked_for_once_more(site: Site, publish: Callable) -> None:
    right, wrong = content("right"), content("wrong")
    site.files["x.bin"], site.mishaps["x.bin"] = right, [other(wrong)]
    root = publish({"x.bin": stated(right)})
    bring(root)
    assert (root / "x.bin").read_bytes() == right and site.times("x.bin") == 2


def test_wrong_bytes_twice_are_refused_with_both_hashes(site: Site, publish: Callable) -> None:
    right, wrong = content("right"), content("wrong")
    site.files |= {"x.bin": wrong, "y.bin": content("y")}
    root = publish({"x.bin": stated(right), "y.bin": stated(content("y"))})
    with pytest.raises(InputError) as error:
        bring(root)
    message = str(error.value)
    assert stated(right)["hash"] in message and stated(wrong)["hash"] in message and "\n" not in message
    assert "1 of 2 files did not arrive: x.bin" in message and "1 are finished" in message
    assert site.times("x.bin") == 2 and not (root / "x.bin").exists() and left_over(root) == []
    assert (root / "y.bin").read_bytes() == content("y")
    site.files["x.bin"] = right
    bring(root)
    assert site.times("y.bin") == 1  # the same command goes on


@pytest.mark.parametrize("length", [100, 400_000])
def test_another_length_than_stated_is_refused_before_it_is_read(length: int, site: Site, publish: Callable) -> None:
    site.files["x.bin"] = content("x", length)
    with pytest.raises(InputError, match=f"the source has {length:,} bytes, 300,000 are expected"):
        bring(publish({"x.bin": stated(content("x"))}))
    assert site.times("x.bin") == 1


def test_more_than_stated_is_noticed_without_a_length(site: Site, publish: Callable) -> None:
    def endless(handler: Handler) -> None:
        handler.close_connection = True
        handler.serve(content("x", 2_000_000), Content_Length=None, **{"Content-Length": None, "Connection": "close"})

    site.mishaps["x.bin"] = [endless]
    with pytest.raises(InputError, match=r"more than the 300,000 bytes"):
        bring(publish({"x.bin": stated(content("x"))}))


@pytest.mark.parametrize(
    ("mishaps", "times"),
    [
        ([status(404)], 1),
        ([status(403)], 1),
        ([status(500), status(503)], 3),
        ([status(429, Retry_After="0")], 2),
        ([status(503, Retry_After="Mon, 01 Jan 2024 00:00:00 GMT")], 2),
        ([status(503, Retry_After="soon")], 2),
        ([status(502)] * 3, 3),
        ([status(429, Retry_After="3600")], 1),
    ],
)
def test_what_a_status_means(mishaps: list, times: int, site: Site, publish: Callable) -> None:
    site.files["x.bin"], site.mishaps["x.bin"] = content("x"), list(mishaps)
    root = publish({"x.bin": stated(content("x"))})
    if times == len(mishaps):
        with pytest.raises(InputError, match=r"x.bin \((404|403|502|429)"):
            bring(root)
    else:
        bring(root)
    assert site.times("x.bin") == times


def test_redirects_are_followed_and_keep_the_range(site: Site, publish: Callable) -> None:
    site.files["moved/x.bin"], site.mishaps["moved/x.bin"] = content("x"), [drop]
    site.mishaps["x.bin"] = [status(302, Location="/moved/x.bin"), status(307, Location=f"{site.url}/moved/x.bin")]
    root = publish({"x.bin": stated(content("x"))})
    bring(root)
    assert (root / "x.bin").read_bytes() == content("x")
    assert site.asked[-1][1] is not None


@pytest.mark.parametrize(("to", "why"), [("/x.bin", "more than five times"), ("ftp://127.0.0.1/x", "not safe")])
def test_redirects_that_lead_nowhere(to: str, why: str, site: Site, publish: Callable) -> None:
    site.mishaps["x.bin"] = [status(302, Location=to)] * 10
    with pytest.raises(InputError, match=why):
        bring(publish({"x.bin": stated(content("x"))}))


def test_a_safe_address_never_leads_to_an_unsafe_one(site: Site, tmp_path: Path) -> None:
    class Safe(requests.adapters.BaseAdapter):
        def send(self, request: requests.PreparedRequest, **kwargs: object) -> requests.Response:
            response = requests.Response()
            response.status_code, response.url, response.request = 302, request.url, request
            response.headers["Location"] = f"{site.url}/x.bin"
            return response

        def close(self) -> None:
            pass

    site.files["x.bin"] = content("x")
    with requests.Session() as session:
        session.mount("https://", Safe())
        with pytest.raises(Failed, match=r"redirected from https://data.org/x.bin to http://.*not safe"):
            download(session, "https://data.org/x.bin", tmp_path / "part", HASTY)
    assert site.asked == []


def test_an_interrupt_keeps_what_came(site: Site, tmp_path: Path) -> None:
    site.files["x.bin"], stop, came = content("x"), threading.Event(), []

    def tick(n: int) -> None:
        came.append(n)
        stop.set()

    with requests.Session() as session:
        with pytest.raises(Failed, match=r"interrupted"):
            download(session, f"{site.url}/x.bin", tmp_path / "part", HASTY, stop=stop, tick=tick)
        assert 0 < (tmp_path / "part").stat().st_size == sum(came) < len(content("x"))
        download(session, f"{site.url}/x.bin", tmp_path / "part", HASTY, tick=came.append)
    assert (tmp_path / "part").read_bytes() == content("x") and sum(came) == len(content("x"))


def test_a_host_that_is_not_there_is_tried_for_one_file_only(publish: Callable, monkeypatch) -> None:
    asked = []
    request = requests.Session.request
    monkeypatch.setattr(
        requests.Session,
        "request",
        lambda self, method, url, **kw: (asked.append(url), request(self, method, url, **kw))[1],
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}/"
    root = publish({f"{i}.bin": stated(content("x")) for i in range(20)}, base=base)
    with pytest.raises(
        InputError, match=r"20 of 20 files .* \(no connection to 127.0.0.1.* and 17 more; 0 are finished"
    ):
        bring(root, patience=Patience(pause=0.001, tries=2, workers=2))
    assert len(asked) <= 2 * 2
