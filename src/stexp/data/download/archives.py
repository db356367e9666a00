"""Archives that came from elsewhere, unpacked without trusting them."""

from __future__ import annotations

import filecmp
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from stexp.errors import InputError

LARGEST_RATIO = 200
"""Bytes that a byte of an archive may grow to; sparse count tables reach about 50, bombs 1000 and more."""
SMALL = 64 << 20
"""What any archive may grow to, bytes."""

_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # zipfile: encrypted
)


def unpack(archive: Path, folder: Path, replace: bool = False, limit: int | None = None) -> dict[str, dict]:
    """Unpack a tar (plain or compressed), zip or single .gz file; all of its files appear in `folder`, or none.

    Only regular files are written, with the permissions of new files.

    Parameters
    ----------
    archive, folder
        What to unpack, and what its paths are relative to. A file that is there already stays if it has the
        same bytes.
    replace
        Whether a file with other bytes may be replaced.
    limit
        Bytes that all files together may have; default `LARGEST_RATIO` times the archive, at least `SMALL`.

    Returns
    -------
    dict
        Path relative to `folder` -> ``{"size": bytes, "sha256": hex}``.

    Raises
    ------
    InputError
        An archive that is damaged, that holds paths outside of itself, links or devices, or that grows beyond
        the limit; a file in the way.
    """
    limit = limit or max(LARGEST_RATIO * archive.stat().st_size, SMALL)
    stage = folder / f".{archive.name}.unpacked"
    shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
    try:
        written = _write(archive, stage, limit)
        others = [
            name for name in written if (folder / name).exists() and not filecmp.cmp(stage / name, folder / name, False)
        ]
        if others and not replace:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise InputError(
                f"{archive.name} holds {others[0]}{more}, which is in {folder} with other content; move it away, or "
                f"data.download=replace"
            )
        for name in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)
        return written
    except _DAMAGED as error:
        raise InputError(f"{archive} is damaged ({error}); delete it to have it fetched again") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write(archive: Path, stage: Path, limit: int) -> dict[str, dict]:
    written: dict[str, dict] = {}
    left = limit
    for name, stream in _members(archive):
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
            raise InputError(f"{archive} holds {name!r}, a path outside of itself; nothing was unpacked")
        target = stage / path
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with target.open("wb") as file:
            while block := stream.read(1 << 20):
                left -= len(block)
                if left < 0:
                    raise InputError(
                        f"{archive} ({archive.stat().st_size / 1e6:,.1f} MB) grows beyond {limit / 1e6:,.0f} MB; "
                        f"nothing was unpacked"
                    )
                digest.update(block)
                file.write(block)
        written[str(path)] = {"size": target.stat().st_size, "sha256": digest.hexdigest()}
    return written


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every file in an archive; anything but files and folders is refused."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise InputError(f"{archive} holds {info.filename!r}, which is a link or a device; not unpacked")
                if not info.is_dir():
                    with file.open(info) as stream:
                        yield info.filename, stream
    elif ".tar" in archive.suffixes or archive.suffix == ".tgz":
        with tarfile.open(archive) as file:
            for member in file:
                if member.isreg():
                    yield member.name, file.extractfile(member)
                elif not member.isdir():
                    raise InputError(f"{archive} holds {member.name!r}, which is a link or a device; not unpacked")
            while file.fileobj.read(1 << 20):
                pass  # up to the checksum at the end, which tarfile does not reach
    else:
        with gzip.open(archive) as stream:
            yield archive.name.removesuffix(".gz"), stream
