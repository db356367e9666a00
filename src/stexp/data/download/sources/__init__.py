"""Where public data sets come from: one yaml per data set, read here and written nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import yaml

from stexp.errors import InputError, did_you_mean

SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A file of a data set at its source.

    Parameters
    ----------
    path
        Where it belongs, relative to the root.
    url
        Where it comes from: addresses, or files of a mirror, in the order in which they are tried.
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
    url: tuple[str, ...]
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
    hub
        Data set of the Hugging Face hub that has them, ``owner/name``, in place of `files`.
    common, of_section
        Files at the hub: patterns of those that every section needs, and of those that are a ``{section}``'s.
    """

    files: tuple[Entry, ...] = ()
    nested: str | None = None
    hub: str = ""
    common: tuple[str, ...] = ()
    of_section: tuple[str, ...] = ()


def read_source(name: str) -> Source:
    """The source of a data set; the yaml's ``base`` stands before addresses that are relative, and before paths."""
    file = SOURCES / f"{name}.yaml"
    if not file.is_file():
        names = sorted(path.stem for path in SOURCES.glob("*.yaml"))
        raise InputError(
            f"no public source of {name} is known; there are {', '.join(names)}{did_you_mean(name, names)}"
        )
    content = _tuples(yaml.safe_load(file.read_text(encoding="utf-8")))
    base, listed = content.pop("base", ""), content.pop("files", {})
    files = []
    for path, facts in listed.items():
        facts = _tuples(facts)
        url = facts.pop("url", quote(path))
        files.append(Entry(path, tuple(urljoin(base, u) for u in ([url] if isinstance(url, str) else url)), **facts))
    return Source(tuple(files), **content)


def mirrored(files: list[Entry], mirror: str | Path | Iterable[str]) -> list[Entry]:
    """The same files at addresses, or in folders, that have them under the same relative paths."""
    mirrors = [str(mirror)] if isinstance(mirror, str | Path) or not isinstance(mirror, Iterable) else [*mirror]
    if not mirrors:
        raise InputError("data.mirror=[]: one folder or address at least would fit, or null")
    for mirror in map(str, mirrors):
        if not mirror or (urlsplit(mirror).scheme not in ("http", "https") and not Path(mirror).is_dir()):
            raise InputError(f"data.mirror={mirror}: neither a folder nor an address with http:// or https://")
    return [replace(file, url=tuple(_under(str(each), file.path) for each in mirrors)) for file in files]


def _under(mirror: str, path: str) -> str:
    is_address = urlsplit(mirror).scheme in ("http", "https")
    return f"{mirror.rstrip('/')}/{quote(path)}" if is_address else str(Path(mirror) / path)


def _tuples(facts: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
