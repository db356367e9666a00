"""Where public data sets come from: one yaml per data set, read here and written nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import yaml

from stexp.errors import InputError

SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A file of a data set at its source.

    Parameters
    ----------
    path, url
        Where it belongs, relative to the root, and where it comes from: an address, or a file of a mirror.
    size, hash
        Bytes, and ``git-sha1:``, ``md5:`` or ``sha256:`` with the hex digest; None where the source states none.
    sections
        The sections that need it; empty: all.
    unpack
        Whether it is an archive, unpacked into the folder that it belongs to.
    gives
        Of an archive: files or folders that show that somebody unpacked it.
    """

    path: str
    url: str
    size: int | None = None
    hash: str | None = None
    sections: tuple[str, ...] = ()
    unpack: bool = False
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """The files of a data set.

    Parameters
    ----------
    nested
        Folder that holds them in a clone of the source, where that may be the root.
    by_hand
        How to get them where a program may not.
    needs
        What is in the root once they were got by hand.
    """

    files: tuple[Entry, ...] = ()
    nested: str | None = None
    by_hand: str | None = None
    needs: str = ""


def read_source(name: str) -> Source:
    """The source of a data set; the yaml's ``base`` stands before addresses that are relative, and before paths."""
    file = SOURCES / f"{name}.yaml"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in SOURCES.glob("*.yaml")))
        raise InputError(f"no public source of {name} is known; there are {there}")
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    base, listed = content.pop("base", ""), content.pop("files", {})
    files = []
    for path, facts in listed.items():
        facts["url"] = urljoin(base, facts.get("url", quote(path)))
        files.append(Entry(path, **{key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}))
    return Source(tuple(files), **content)


def mirrored(files: list[Entry], mirror: str) -> list[Entry]:
    """The same files at an address, or in a folder, that has them under the same relative paths."""
    if urlsplit(mirror).scheme in ("http", "https"):
        return [replace(file, url=f"{mirror.rstrip('/')}/{quote(file.path)}") for file in files]
    if not Path(mirror).is_dir():
        raise InputError(f"data.mirror={mirror}: neither a folder nor an address with http:// or https://")
    return [replace(file, url=str(Path(mirror) / file.path)) for file in files]
