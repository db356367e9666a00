"""One file from a server that does not behave: the right bytes arrive, or one line says why not."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from unreliable import (
    TRIES,
    Handler,
    Site,
    bring,
    changed,
    content,
    drop,
    half,
    left_over,
    no_range,
    silence,
    stall,
    stated,
    status,
    vanish,
)

from stexp.data.download.transfer import Failed, download
from stexp.errors import InputError


@pytest.mark.parametrize("mishaps", [[], [stall], [drop, drop], [silence], [vanish], [half], [half, no_range]])
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
    with pytest.raises(InputError, match=r"1 of 1 files did not arrive: x.bin \(.* of 127.0.0.1:\d+\); 0 are"):
        bring(root)
    so_far = (root / ".x.bin.download/part").read_bytes()
    assert not (root / "x.bin").exists()
    assert content("x").startswith(so_far) and len(so_far) > len(content("x")) // 2
    bring(root)
    assert site.asked[-1] == ("x.bin", f"bytes={len(so_far)}-")
    assert (root / "x.bin").read_bytes() == content("x")


@pytest.mark.parametrize("so_far", [content("x"), content("x") + b"more", content("y", 1000)])
def test_what_a_killed_run_left_is_completed_or_replaced(so_far: bytes, site: Site, publish: Callable) -> None:
    site.files["x.bin"], site.mishaps["x.bin"] = content("x"), [half] * 3
    root = publish({"x.bin": stated(content("x"))})
    with pytest.raises(InputError):
        bring(root)
    (root / ".x.bin.download/part").write_bytes(so_far)
    if so_far == content("y", 1000):  # as after a crash of the file system: only the hash can tell
        with pytest.raises(InputError, match="wrong bytes"):
            bring(root)
    bring(root)
    assert (root / "x.bin").read_bytes() == content("x") and left_over(root) == []


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
    site.files["x.bin"], site.mishaps["x.bin"] = old, [changed(new)]
    if tags == "careless":  # sends the rest of the new file, whatever If-Range says

        def careless(handler: Handler) -> None:
            del handler.headers["If-Range"]
            handler.serve(new)

        site.mishaps["x.bin"].append(careless)
    root = publish({"x.bin": stated(new) if hashed else {}})
    bring(root)
    assert (root / "x.bin").read_bytes() == new
    assert site.times("x.bin") == 2 + (tags == "careless")  # If-Range spares asking once more


def test_wrong_bytes_are_refused_with_both_hashes(site: Site, publish: Callable) -> None:
    right, wrong = content("right"), content("wrong")
    site.files |= {"x.bin": wrong, "y.bin": content("y")}
    root = publish({"x.bin": stated(right), "y.bin": stated(content("y"))})
    with pytest.raises(InputError, match=r"1 of 2 files did not arrive: x.bin .*1 are finished") as error:
        bring(root)
    assert stated(right)["hash"] in str(error.value) and stated(wrong)["hash"] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (root / "x.bin").exists()
    site.files["x.bin"] = right
    bring(root)
    assert site.times("y.bin") == 1 and (root / "x.bin").read_bytes() == right  # the same command goes on
    assert left_over(root) == []


def test_a_gz_stays_packed(site: Site, publish: Callable) -> None:
    site.mishaps["x.tsv.gz"] = [lambda handler: handler.serve(content("x"), **{"Content-Encoding": "gzip"})]
    bring(root := publish({"x.tsv.gz": stated(content("x"))}))
    assert (root / "x.tsv.gz").read_bytes() == content("x")


def test_a_page_in_place_of_a_file_is_never_recorded(site: Site, publish: Callable) -> None:
    site.files["x.bin"] = content("x")
    site.mishaps["x.bin"] = [lambda handler: handler.serve(b"log in", **{"Content-Type": "text/html; charset=utf-8"})]
    root = publish({"x.bin": {}})
    with pytest.raises(InputError, match=r"x.bin \(a web page"):
        bring(root)
    bring(root)
    assert (root / "x.bin").read_bytes() == content("x")


@pytest.mark.parametrize(
    ("mishaps", "times"),
    [
        ([status(404)], 1),
        ([status(403)], 1),
        ([status(500), status(503)], 3),
        ([status(429)], 2),
        ([status(502)] * 3, 3),
    ],
)
def test_what_a_status_means(mishaps: list, times: int, site: Site, publish: Callable) -> None:
    site.files["x.bin"], site.mishaps["x.bin"] = content("x"), list(mishaps)
    root = publish({"x.bin": stated(content("x"))})
    if times == len(mishaps):
        with pytest.raises(InputError, match=r"x.bin \((404|403|502)"):
            bring(root)
    else:
        bring(root)
    assert site.times("x.bin") == times


def test_redirects_are_followed_and_keep_the_range(site: Site, publish: Callable) -> None:
    site.files["moved/x.bin"], site.mishaps["moved/x.bin"] = content("x"), [half]
    site.mishaps["x.bin"] = [status(302, Location="/moved/x.bin"), status(307, Location=f"{site.url}/moved/x.bin")]
    root = publish({"x.bin": stated(content("x"))})
    bring(root)
    assert (root / "x.bin").read_bytes() == content("x")
    assert site.asked[-1][1] is not None


@pytest.mark.parametrize("to", ["/x.bin", "ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_redirects_that_lead_nowhere(to: str, site: Site, publish: Callable) -> None:
    site.mishaps["x.bin"] = [status(302, Location=to)] * 40
    root = publish({"x.bin": stated(content("x"))})
    with pytest.raises(InputError, match="1 of 1 files did not arrive"):
        bring(root)
    assert not (root / "x.bin").exists()


def test_a_safe_address_never_leads_to_an_unsafe_one(site: Site, tmp_path: Path, monkeypatch) -> None:
    def redirect(self, request: requests.PreparedRequest, **kwargs: object) -> requests.Response:
        response = requests.Response()
        response.status_code, response.url, response.request = 302, request.url, request
        response.headers["Location"] = f"{site.url}/x.bin"
        return response

    site.files["x.bin"] = content("x")
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", redirect)
    with pytest.raises(Failed, match=r"redirected to http://.*not safe"):
        download("https://data.org/x.bin", tmp_path / "x.bin", set())
    assert not (tmp_path / "x.bin").exists()


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(site: Site, publish: Callable, monkeypatch) -> None:
    site.files["x.bin"] = content("x")
    root = publish({"x.bin": {}})

    def no_space(self, url: str, file, pooch) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("pooch.HTTPDownloader.__call__", no_space)
        with pytest.raises(InputError, match=r"x.bin \(No space left on device"):
            bring(root)
    bring(root)
    assert (root / "x.bin").read_bytes() == content("x") and left_over(root) == []


def test_a_host_that_is_not_there_is_tried_for_one_file_only(publish: Callable, monkeypatch) -> None:
    asked, get = [], requests.get
    monkeypatch.setattr(requests, "get", lambda url, **settings: (asked.append(url), get(url, **settings))[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}/"
    root = publish({f"{i}.bin": stated(content("x")) for i in range(20)}, base=base)
    with pytest.raises(InputError, match=r"20 of 20 files .* \(no connection to 127.0.0.1.* and 15 more; 0 are"):
        bring(root)
    assert len(asked) == TRIES


def test_addresses_are_tried_in_order(site: Site, publish: Callable) -> None:
    site.files |= {"wrong/x.bin": content("wrong"), "right/x.bin": content("x"), "unasked/x.bin": content("x")}
    names = ("absent", "wrong", "right", "unasked")
    root = publish({"x.bin": {"url": [f"{name}/x.bin" for name in names], **stated(content("x"))}})
    bring(root)
    assert (root / "x.bin").read_bytes() == content("x")
    assert [path for path, _ in site.asked] == ["absent/x.bin", "wrong/x.bin", "right/x.bin"]


def test_wrong_bytes_of_another_address_are_not_gone_on_from(site: Site, publish: Callable) -> None:
    site.files |= {"a/x.bin": content("old"), "b/x.bin": content("x")}
    site.mishaps["a/x.bin"] = [half] * 3
    root = publish({"x.bin": {"url": ["a/x.bin", "b/x.bin"]}})
    bring(root)
    assert (root / "x.bin").read_bytes() == content("x") and site.asked[-1] == ("b/x.bin", None)
