"""Archives that came from elsewhere, unpacked without trusting them."""

from __future__ import annotations

import filecmp
import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from stexp.errors import InputError

LARGEST_RATIO = 200
"""Bytes that a byte of an archive may grow to; sparse count tables reach about 50, bombs 1000 and more."""
SMALL = 64 << 20
"""What any archive may grow to, bytes, where the disk has them."""

_DAMAGED = (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def unpack(archive: Path, folder: Path, replace: bool = False) -> dict[str, dict]:
    """Unpack a tar (plain or compressed) or a single .gz file; all of its files appear in `folder`, or none.

    Only regular files are written, with the permissions of new files. One of `folder` with other bytes is in the
    way, unless `replace`.

    Returns
    -------
    dict
        Path relative to `folder` -> ``{"size": bytes, "sha256": hex}``.

    Raises
    ------
    InputError
        An archive that is damaged, that holds paths outside of itself, links or devices, or that grows beyond
        `LARGEST_RATIO` or what is free on the disk; a file, or a link out of `folder`, in the way.
    """
    stage = folder / f".{archive.name}.unpacked"
    shutil.rmtree(stage, ignore_errors=True)  # of a run that was killed
    stage.mkdir()
    try:
        members = _write(archive, stage)
        for name in members:
            target = folder / name
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{archive.name} holds {name}, which a link in {folder} leads elsewhere; remove it")
            if not replace and target.exists() and not filecmp.cmp(stage / name, target, shallow=False):
                raise InputError(
                    f"{archive.name} holds {name}, which is in {folder} with other content; move it away, or "
                    f"data.download=replace"
                )
        for name in members:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)
        return members
    except _DAMAGED as error:
        raise InputError(f"{archive} is damaged ({error}); delete it to have it fetched again") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write(archive: Path, stage: Path) -> dict[str, dict]:
    """Size and SHA-256 of every file of an archive, now under `stage`."""
    members: dict[str, dict] = {}
    packed, free = archive.stat().st_size, shutil.disk_usage(stage).free
    limit = left = min(max(LARGEST_RATIO * packed, SMALL), free)
    for name, stream in _members(archive):
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
            raise InputError(f"{archive} holds {name!r}, a path outside of itself; nothing was unpacked")
        if stream is None:
            raise InputError(f"{archive} holds {name!r}, which is a link or a device; nothing was unpacked")
        (stage / path).parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with (stage / path).open("wb") as file:
            while block := stream.read(1 << 20):
                left -= len(block)
                if left < 0:
                    raise InputError(
                        f"{archive} ({packed / 1e6:,.1f} MB) grows beyond {limit / 1e6:,.0f} MB, with "
                        f"{free / 1e6:,.0f} MB free; nothing was unpacked"
                    )
                digest.update(block)
                file.write(block)
            members[str(path)] = {"size": file.tell(), "sha256": digest.hexdigest()}
    return members


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes] | gzip.GzipFile | None]]:
    """Name and content of everything but folders in an archive; None for what is no plain file."""
    if ".tar" not in archive.suffixes and archive.suffix != ".tgz":
        with gzip.open(archive) as stream:
            yield archive.name.removesuffix(".gz"), stream
        return
    with tarfile.open(archive) as file:
        for member in file:
            if not member.isdir():
                yield member.name, file.extractfile(member) if member.isreg() else None
        while file.fileobj.read(1 << 20):
            pass  # up to the checksum at the end, which tarfile does not reach
