"""A data set from a local server: what is missing comes, what is there is verified, archives are unpacked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from omegaconf import OmegaConf
from unreliable import Site, bring, content, half, left_over, silence, stated

from stexp.cli import prepare
from stexp.data.download.fetch import fetch
from stexp.data.download.record import RECORD, file_hash
from stexp.data.download.sources import SOURCES, read_source
from stexp.errors import InputError


def toy(site: Site) -> dict[str, dict]:
    files = {
        f"{section}/{kind}.bin": content(section + kind) for section in ("A1", "B1") for kind in ("counts", "image")
    }
    site.files |= files
    return {path: {"sections": [path[:2]], **stated(body)} for path, body in files.items()}


def test_only_what_is_missing_comes(site: Site, publish: Callable, caplog: pytest.LogCaptureFixture) -> None:
    root = publish(toy(site))
    (root / "A1").mkdir(parents=True)
    (root / "A1/counts.bin").write_bytes(site.files["A1/counts.bin"])
    with caplog.at_level("INFO"):
        bring(root)
    assert "toy: 3 files are to come, 0.9 MB where stated; " in caplog.text and " MB are free" in caplog.text
    assert site.times("A1/counts.bin") == 0 and len(site.asked) == 3
    assert {path: (root / path).read_bytes() for path in site.files} == site.files
    bring(root)
    assert len(site.asked) == 3


@pytest.mark.parametrize("sections", ["B1", ["B1"], ("B1",)])
def test_only_what_the_sections_need_comes(sections: object, site: Site, publish: Callable) -> None:
    root = publish({**toy(site), "genes.txt": stated(b"MALAT1")})
    site.files["genes.txt"] = b"MALAT1"
    bring(root, sections=sections)
    assert sorted(path for path, _ in site.asked) == ["B1/counts.bin", "B1/image.bin", "genes.txt"]


@pytest.mark.parametrize("damage", [b"", b"short", content("another")])
def test_what_does_not_verify_is_named_and_kept(damage: bytes, site: Site, publish: Callable) -> None:
    root = publish(toy(site))
    bring(root)
    (root / "A1/image.bin").write_bytes(damage)
    (root / "B1/image.bin").unlink()
    with pytest.raises(InputError, match=r"1 of 4 files in .* do not verify: A1/image.bin .*data.download=replace"):
        bring(root)
    assert (root / "A1/image.bin").read_bytes() == damage and not (root / "B1/image.bin").exists()
    bring(root, mode="never")
    assert len(site.asked) == 4
    bring(root, mode="replace")
    assert {path: (root / path).read_bytes() for path in site.files} == site.files
    assert site.times("A1/counts.bin") == 1 and len(site.asked) == 6


def test_files_without_a_stated_hash_are_recorded_and_then_verified(
    site: Site, publish: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    site.files |= {"x.bin": content("x"), "y.bin": content("y")}
    root = publish({"x.bin": {}, "y.bin": {}})
    root.mkdir()
    (root / "y.bin").write_bytes(b"put here by hand")
    with caplog.at_level("INFO"):
        bring(root)
    assert "1 files were there and nothing states their hash" in caplog.text
    record = json.loads((root / RECORD).read_text())
    assert record["x.bin"]["hash"] == "sha256:" + hashlib.sha256(content("x")).hexdigest()
    bring(root)
    assert site.times("x.bin") == 1 and site.times("y.bin") == 0
    (root / "y.bin").write_bytes(b"put here by hanD")
    with pytest.raises(InputError, match=r"1 of 2 files in .* do not verify: y.bin \(sha256:\w+, expected sha256:"):
        bring(root)
    (root / "x.bin").unlink()
    (root / "y.bin").unlink()
    site.files["x.bin"] = content("changed at its source")
    with pytest.raises(InputError, match=r"x.bin .wrong bytes"):
        bring(root)
    bring(root, mode="replace")  # the user takes the new one
    assert (root / "x.bin").read_bytes() == site.files["x.bin"]
    bring(root)
    (root / RECORD).write_text("{half")
    with pytest.raises(InputError, match=r"is damaged .* delete it"):
        bring(root)


def test_two_at_once_bring_every_file_once(site: Site, publish: Callable) -> None:
    root, errors = publish(toy(site)), []
    site.mishaps["A1/image.bin"] = [half]

    def run() -> None:
        try:
            bring(root)
        except BaseException as error:
            errors.append(error)

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert errors == [] and len(site.asked) == 4 + 1
    assert {path: (root / path).read_bytes() for path in site.files} == site.files


def test_a_process_that_is_killed_leaves_the_rest_to_one_that_waits(site: Site, publish: Callable) -> None:
    root, half_way = publish(toy(site)), threading.Event()
    site.mishaps["A1/image.bin"] = [lambda handler: half(handler, lambda handler: (half_way.set(), silence(handler)))]
    code = (
        f"from pathlib import Path; from stexp.data.download import sources, fetch\n"
        f"sources.SOURCES = Path({str(root.parent / 'sources')!r}); fetch.fetch('toy', {str(root)!r})"
    )
    first = subprocess.Popen([sys.executable, "-c", code])
    assert half_way.wait(60)
    second = subprocess.Popen([sys.executable, "-c", code])
    first.kill()
    first.wait()
    assert second.wait(60) == 0 and site.times("A1/image.bin") == 2
    assert {path: (root / path).read_bytes() for path in site.files} == site.files and left_over(root) == []


def test_too_little_space_is_said_before_anything_comes(
    site: Site, publish: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = publish({"x.bin": {}, **toy(site)})  # one whose size only its server knows
    site.files["x.bin"] = content("x")
    usage = shutil.disk_usage("/")._replace(free=1_100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"5 files are to come, 1.2 MB where stated; 1.1 MB are free"):
        bring(root)
    assert site.asked == []


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_a_mirror_takes_the_place_of_the_source(kind: str, site: Site, publish: Callable, tmp_path: Path) -> None:
    files, mirror = toy(site), tmp_path / "mirror"
    root = publish(files)
    for path, body in list(site.files.items()):
        (mirror / path).parent.mkdir(parents=True, exist_ok=True)
        (mirror / path).write_bytes(body)
        site.files[f"elsewhere/{path}"] = site.files.pop(path)
    where = mirror if kind == "folder" else f"{site.url}/elsewhere/"
    bring(root, mirror=where)
    assert all(file_hash(root / path, "git-sha1") == facts["hash"] for path, facts in files.items())
    shutil.rmtree(root)
    (mirror / "A1/image.bin").unlink()
    site.files["elsewhere/A1/image.bin"] = site.files["elsewhere/A1/counts.bin"]
    with pytest.raises(InputError, match=r"1 of 4 files .* A1/image.bin \((.*No such file|wrong bytes)"):
        bring(root, mirror=where)
    site.files |= {path: content(path.replace("/", "").removesuffix(".bin")) for path in files}
    (mirror / "A1/image.bin").mkdir()  # a folder in the place of a file
    bring(root, mirror=[str(where), f"{site.url}/absent", site.url])
    assert all(file_hash(root / path, "git-sha1") == facts["hash"] for path, facts in files.items())
    for wrong in ("nowhere", "", 5, []):
        with pytest.raises(InputError, match=r"data.mirror="):
            bring(root, mirror=wrong)


def test_a_config_says_what_is_fetched(site: Site, publish: Callable, tmp_path: Path) -> None:
    root = publish(toy(site))
    node = {"root": str(root), "sections": ["B1"], "source": "toy", "download": "never", "mirror": f"{site.url}/"}
    prepare.bring(OmegaConf.create(node))
    prepare.bring(OmegaConf.create({"root": str(root), "sections": None}))  # a data set without a source
    assert site.asked == []
    prepare.bring(OmegaConf.create(node | {"download": "auto"}))
    assert sorted(path.name for path in root.rglob("*.bin")) == ["counts.bin", "image.bin"]


def test_a_clone_of_the_source_is_a_root_too(site: Site, publish: Callable) -> None:
    root = publish(toy(site), nested="data")
    bring(root / "data")
    before = len(site.asked)
    bring(root)
    assert len(site.asked) == before


def archive(name: str = "spatial", odd: tarfile.TarInfo | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for member in (f"{name}/positions.csv", f"{name}/image.png"):
            info = tarfile.TarInfo(member)
            info.size = 1000
            file.addfile(info, io.BytesIO(content(member, 1000)))
        if odd is not None:
            file.addfile(odd)
    return out.getvalue()


def there(root: Path) -> set[str]:
    paths = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {path for path in paths if not path.startswith(".") and "/." not in path}


def test_archives_are_unpacked_and_what_they_held_is_verified(site: Site, publish: Callable) -> None:
    body = archive()
    site.files |= {"s1/spatial.tar.gz": body, "s2/spatial.tar.gz": body, "s2/image.jpg.gz": gzip.compress(b"pixels")}
    stated_md5 = {"hash": "md5:" + hashlib.md5(body).hexdigest(), "unpack": True, "gives": ["s1/spatial"]}
    stated_none = {"unpack": True, "gives": ["s2/spatial"]}
    files = {"s1/spatial.tar.gz": stated_md5, "s2/spatial.tar.gz": stated_none, "s2/image.jpg.gz": {"unpack": True}}
    bring(root := publish(files))
    names = {"s2/image.jpg"} | {
        f"{section}/spatial/{name}" for section in ("s1", "s2") for name in ("positions.csv", "image.png")
    }
    assert there(root) == names and left_over(root) == []
    assert (root / "s1/spatial/image.png").read_bytes() == content("spatial/image.png", 1000)
    assert (root / "s2/image.jpg").read_bytes() == b"pixels"
    bring(root)
    assert len(site.asked) == 3
    (root / "s1/spatial/image.png").unlink()
    bring(root)
    assert len(site.asked) == 4 and there(root) == names
    (root / "s2/spatial/image.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"1 of 3 files in .* do not verify: s2/spatial/image.png \(sha256:"):
        bring(root)
    bring(root, mode="replace", keep_archives=True)
    assert there(root) == names | {"s2/spatial.tar.gz"}
    (root / "s2/spatial/image.png").unlink()
    bring(root, keep_archives=True)  # from the archive that was kept
    assert site.times("s2/spatial.tar.gz") == 2 and there(root) == names | {"s2/spatial.tar.gz"}


def test_records_of_earlier_versions_are_read(site: Site, publish: Callable) -> None:
    """Those had sizes, and where a file came from."""
    site.files["counts.tsv.gz"] = gzip.compress(b"counts")
    root = publish(
        {
            "image.jpg.gz": {"unpack": True},
            "spatial.tar.gz": {"unpack": True, "gives": ["spatial"]},
            "counts.tsv.gz": {},
        }
    )

    def member(body: bytes) -> dict:
        return {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}

    (root / "spatial").mkdir(parents=True)
    (root / "image.jpg").write_bytes(b"pixels")
    (root / "spatial/positions.csv").write_bytes(b"0,0")
    record = {
        "image.jpg.gz": {"from": "https://a.org/x", "hash": "sha256:0", "members": {"image.jpg": member(b"pixels")}},
        "spatial.tar.gz": {"hash": "sha256:0", "members": {"spatial/positions.csv": member(b"0,0")}},
        "counts.tsv.gz": {"from": "x", "hash": "sha256:" + hashlib.sha256(site.files["counts.tsv.gz"]).hexdigest()},
    }
    (root / RECORD).write_text(json.dumps(record))
    bring(root)
    assert [path for path, _ in site.asked] == ["counts.tsv.gz"]
    (root / "image.jpg").write_bytes(b"pixelS")
    with pytest.raises(InputError, match=r"do not verify: image.jpg \(sha256"):
        bring(root)


def test_what_somebody_unpacked_is_taken_and_verified_from_then_on(site: Site, publish: Callable) -> None:
    site.files |= {"spatial.tar.gz": archive(), "counts.tsv.gz": gzip.compress(b"counts")}
    root = publish({"spatial.tar.gz": {"unpack": True, "gives": ["spatial"]}, "counts.tsv.gz": {}})
    (root / "spatial").mkdir(parents=True)
    (root / "counts.tsv").write_text("counts")
    with pytest.raises(InputError, match=r"1 of 1 files did not arrive: spatial.tar.gz"):  # an empty folder is nothing
        bring(root, mirror=root)
    (root / "spatial/positions.csv").write_text("mine")
    bring(root)
    bring(root)
    assert site.asked == []
    (root / "spatial/positions.csv").write_text("hers")
    with pytest.raises(InputError, match=r"spatial/positions.csv .sha256"):
        bring(root)


def link(kind: bytes, to: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("spatial/odd")
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>busy</html>", "damaged|not a compressed or uncompressed tar"),
        (archive()[:-700], "end-of-stream|unexpected end"),
        (archive("../spatial"), "outside the destination|'../spatial"),
        (archive(odd=link(tarfile.SYMTYPE, "/etc")), "a link or a device"),
        (archive(odd=link(tarfile.LNKTYPE, "spatial/image.png")), "a link or a device"),
        (archive(odd=link(tarfile.FIFOTYPE, "")), "a link or a device"),
    ],
)
def test_an_archive_that_cannot_be_unpacked_leaves_nothing(
    body: bytes, reason: str, site: Site, publish: Callable
) -> None:
    site.files["a/spatial.tar.gz"] = body
    root = publish({"a/spatial.tar.gz": {"unpack": True, "gives": ["a/spatial"]}})
    for _ in range(2):
        with pytest.raises(InputError, match=rf"1 of 1 files .*spatial.tar.gz \(cannot be unpacked.*({reason})"):
            bring(root)
    assert there(root) == set() and not (root / RECORD).exists() and site.times("a/spatial.tar.gz") == 2
    (root / "a").mkdir(exist_ok=True)
    (root / "a/spatial.tar.gz").write_bytes(body)
    with pytest.raises(InputError, match="cannot be unpacked"):
        bring(root)
    assert there(root) == {"a/spatial.tar.gz"}, "what somebody laid there stays"
    site.files["a/spatial.tar.gz"] = archive("/spatial")  # an absolute path lands inside
    bring(root, mode="replace")
    assert there(root) == {"a/spatial/positions.csv", "a/spatial/image.png"} and left_over(root) == []


# ------------------------------------------------------------------ the sources


@pytest.mark.parametrize("name", sorted(path.stem for path in SOURCES.glob("*.yaml")))
def test_every_source_is_safe_and_complete(name: str) -> None:
    source = read_source(name)
    assert source.files or source.hub
    for file in source.files:
        assert all(url.startswith("https://") for url in file.url) and file.sections
        assert not Path(file.path).is_absolute() and ".." not in Path(file.path).parts
        assert not file.unpack or file.path.endswith(".gz")
        kind, _, digest = (file.hash or "sha256:" + "0" * 64).partition(":")
        assert len(digest) == {"git-sha1": 40, "md5": 32, "sha256": 64}[kind]
    assert len({file.url for file in source.files}) == len({file.path for file in source.files}) == len(source.files)


def test_sources_hold_what_their_readers_need() -> None:
    kinds = {
        name: Counter(section for file in read_source(name).files for section in file.sections)
        for name in ("her2st", "cscc", "alex10x")
    }
    assert len(kinds["her2st"]) == 36 and set(kinds["her2st"].values()) == {3, 4}  # eight with labels
    assert sum(kinds["her2st"].values()) == 36 * 3 + 8
    assert len(kinds["cscc"]) == 12 and set(kinds["cscc"].values()) == {3}
    assert len(kinds["alex10x"]) == 9 and set(kinds["alex10x"].values()) == {3}
    urls = {file.path: file.url[0] for name in kinds for file in read_source(name).files}
    assert urls["ST-imgs/B/B4/BT10737_D2_HE.jpg"] == (
        "https://raw.githubusercontent.com/almaan/her2st/85df7411b987a7dec3feff9718b869a7a82091ec/data/"
        "ST-imgs/B/B4/BT10737_D2_HE.jpg"
    )
    assert urls["GSM4284327_P10_ST_rep3_stdata.tsv.gz"] == (
        "https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM4284nnn/GSM4284327/suppl/GSM4284327_P10_ST_rep3_stdata.tsv.gz"
    )


def test_names_that_do_not_fit_say_what_would(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no public source of her2 is known; there are alex10x.*did you mean her2st"):
        fetch("her2", tmp_path)
    with pytest.raises(InputError, match=r"data.download=always: choose auto, never or replace"):
        fetch("her2st", tmp_path, mode="always")


@pytest.mark.data
def test_real_sections_verify_without_a_network(real_data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(requests.Session, "request", lambda *args, **kwargs: pytest.fail("asked the network"))
    before = {path.name for path in (real_data / "her2st").iterdir()}
    fetch("her2st", real_data / "her2st", ["B4", "C2"])
    assert {path.name for path in (real_data / "her2st").iterdir()} == before  # a whole copy is only read
    fetch("her2st", tmp_path / "copy", ["B4"], mirror=real_data / "her2st")
    assert len([path for path in (tmp_path / "copy").rglob("*") if path.suffix in (".gz", ".tsv", ".jpg")]) == 3
