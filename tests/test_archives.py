"""Archives: what they may hold, how far they may grow, and that all or nothing of one appears."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import pytest

from stexp.data.download import archives
from stexp.data.download.archives import unpack
from stexp.errors import InputError

FILES = {"a.txt": b"alpha", "deep/b.bin": bytes(range(256)) * 50}


def tarred(path: Path, files: dict[str, bytes], odd: tarfile.TarInfo | None = None, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        if odd is not None:
            file.addfile(odd)
    return path


def contents(folder: Path, archive: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != archive}


@pytest.mark.parametrize(
    ("kind", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("x.tar.xz", "w:xz")]
)
def test_holds_what_was_packed(kind: str, mode: str, tmp_path: Path) -> None:
    archive = tarred(tmp_path / kind, FILES, mode=mode)
    members = unpack(archive, tmp_path)
    assert contents(tmp_path, archive) == FILES
    assert members == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }


def test_a_single_gz_loses_its_ending(tmp_path: Path) -> None:
    archive = tmp_path / "image.jpg.gz"
    archive.write_bytes(gzip.compress(b"pixels"))
    assert list(unpack(archive, tmp_path)) == ["image.jpg"]
    assert (tmp_path / "image.jpg").read_bytes() == b"pixels"


@pytest.mark.parametrize("name", ["../out.txt", "deep/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:/out.txt"])
def test_paths_outside_are_refused_and_nothing_appears(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    archive = tarred(folder / "x.tar.gz", {"good.txt": b"good", name: b"bad"})
    with pytest.raises(InputError, match=r"a path outside of itself"):
        unpack(archive, folder)
    assert contents(tmp_path, archive) == {}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    odd = tarfile.TarInfo("odd")
    odd.type, odd.linkname = kind, "/etc/passwd"
    archive = tarred(tmp_path / "x.tar.gz", FILES, odd)
    with pytest.raises(InputError, match=r"'odd', which is a link or a device"):
        unpack(archive, tmp_path)
    assert contents(tmp_path, archive) == {}


@pytest.mark.parametrize("replace", [False, True])
def test_a_link_that_lies_in_the_folder_is_not_followed(replace: bool, tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "deep").symlink_to(outside)
    archive = tarred(folder / "x.tar.gz", FILES)
    with pytest.raises(InputError, match=r"deep/b.bin, which a link .* elsewhere"):
        unpack(archive, folder, replace)
    assert contents(tmp_path, archive) == {}
    (folder / "deep").unlink()
    (folder / "a.txt").symlink_to(outside / "a.txt")  # the link is replaced, not what it points to
    (outside / "a.txt").write_bytes(b"alpha")
    unpack(archive, folder, replace)
    assert not (folder / "a.txt").is_symlink() and contents(folder, archive) == FILES


@pytest.mark.parametrize("kind", ["x.gz", "x.tar.gz"])
def test_bombs_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, zeros = tmp_path / kind, bytes(3_000_000)
    if kind == "x.gz":
        archive.write_bytes(gzip.compress(zeros * 2))
    else:
        tarred(archive, {"1": zeros, "2": zeros})
    with monkeypatch.context() as strict:
        strict.setattr(archives, "SMALL", 5_000_000)  # of all files together
        with pytest.raises(InputError, match=r"grows beyond 5 MB"):
            unpack(archive, tmp_path)
    with monkeypatch.context() as full:
        usage = shutil.disk_usage("/")._replace(free=4_000_000)
        full.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(InputError, match=r"grows beyond 4 MB, with 4 MB free"):
            unpack(archive, tmp_path)
    assert contents(tmp_path, archive) == {}
    assert unpack(archive, tmp_path)


@pytest.mark.parametrize("kind", ["x.gz", "x.tar.gz"])
@pytest.mark.parametrize("damage", ["cut", "bytes", "nonsense"])
def test_damage_is_one_line_and_nothing_appears(kind: str, damage: str, tmp_path: Path) -> None:
    archive = tmp_path / kind
    content = hashlib.shake_256(b"x").digest(40_000)  # cannot be packed, so that a cut lies inside of it
    if kind == "x.gz":
        archive.write_bytes(gzip.compress(content))
    else:
        tarred(archive, {"1": b"whole", "2": content})
    packed = bytearray(archive.read_bytes())
    if damage == "bytes":
        packed[20_000:20_010] = bytes(10)
    archive.write_bytes({"cut": packed[:20_000], "bytes": packed, "nonsense": b"<html>not found</html>"}[damage])
    with pytest.raises(InputError, match=f"{kind} is damaged"):
        unpack(archive, tmp_path)
    assert contents(tmp_path, archive) == {}


def test_other_content_in_the_way_is_kept_unless_replaced(tmp_path: Path) -> None:
    archive = tarred(tmp_path / "x.tar.gz", FILES)
    (tmp_path / "a.txt").write_bytes(b"mine!")  # of the same length
    with pytest.raises(InputError, match=r"holds a.txt, which is in .* with other content"):
        unpack(archive, tmp_path)
    assert contents(tmp_path, archive) == {"a.txt": b"mine!"}
    unpack(archive, tmp_path, replace=True)
    assert contents(tmp_path, archive) == FILES
    unpack(archive, tmp_path)  # the same again is no conflict
    assert contents(tmp_path, archive) == FILES


def test_what_a_killed_run_left_is_no_harm(tmp_path: Path) -> None:
    archive = tarred(tmp_path / "x.tar.gz", FILES)
    left = tmp_path / ".x.tar.gz.unpacked" / "stale.txt"
    left.parent.mkdir()
    left.write_text("half")
    unpack(archive, tmp_path)
    assert contents(tmp_path, archive) == FILES
