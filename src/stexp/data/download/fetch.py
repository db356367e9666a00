"""Data sets from their public sources into ``data.root``: resumable, verified, half a file never taken for a whole.

Where the files are stands in ``sources/<name>.yaml``, one per data set, and nowhere else.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import pooch
from filelock import FileLock

from stexp.data.download.hub import SCHEME, download_from_hub, hub_files
from stexp.data.download.record import Record, mismatch
from stexp.data.download.sources import Entry, mirrored, read_source
from stexp.data.download.transfer import Failed, download
from stexp.data.progress import track
from stexp.errors import InputError, in_one_line, listed
from stexp.files import replacing

log = logging.getLogger(__name__)


def fetch(
    name: str,
    root: str | Path,
    sections: Iterable[str] | str | int | None = None,
    mode: str = "auto",
    mirror: str | Path | Iterable[str] | None = None,
    keep_archives: bool = False,
) -> None:
    """Bring the files of a data set into `root` that are not there yet, and verify all of them.

    Parameters
    ----------
    name
        Of a file in ``sources``.
    root, sections
        Folder of the data set, whose other files are left alone; only what these sections need, by default all.
    mode
        ``auto``: fetch what is missing, refuse what does not verify; ``replace``: fetch that again; ``never``: nothing.
    mirror
        Addresses or folders that have the same relative paths, tried in order in place of the public source.
    keep_archives
        Whether archives stay after they were unpacked.

    Raises
    ------
    InputError
        Files that do not verify, too little space, a source that does not deliver; the next call goes on from there.
    """
    if mode not in ("auto", "never", "replace"):
        raise InputError(f"data.download={mode}: choose auto, never or replace")
    if mode == "never":
        return
    source, root, replace = read_source(name), Path(root), mode == "replace"
    wanted = {str(section) for section in ([sections] if isinstance(sections, str | int) else sections or ())}
    if source.hub:
        files = hub_files(source, root, wanted)
    else:
        first = Path(source.files[0].path).parts[0]
        if source.nested and not (root / first).exists() and (root / source.nested / first).exists():
            root = root / source.nested
        files = [file for file in source.files if not wanted or not file.sections or wanted & {*file.sections}]
    if mirror is not None:
        files = mirrored(files, mirror)
    to_come, unstated = _verify(name, Record(root), files, replace)
    if to_come or (unstated and os.access(root, os.W_OK)):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".stexp-downloads.lock"):  # another process may have brought some in between
            record = Record(root)
            to_come, unstated = _verify(name, record, [*to_come, *unstated], replace)
            for file in unstated:
                record.note(file, [root / part for part in record.parts(file)])
            if to_come:
                _bring(name, record, to_come, replace, keep_archives)
    if unstated:
        log.info("%s: %d files were there and nothing states their hash: taken as they are", name, len(unstated))
    log.info("%s: %d of %d files are there and verify", name, len(files), len(files))


def _verify(name: str, record: Record, files: list[Entry], replace: bool) -> tuple[list[Entry], list[Entry]]:
    """The files that are to come, and those that are there and that nothing states the hash of."""
    root, wrong, to_come, unstated = record.root, [], [], []
    for file in files:
        parts = record.parts(file)
        present = [part for part in parts if (root / part).is_file()]
        problems = [f"{part} {problem}" for part in present if (problem := mismatch(root / part, parts[part]))]
        wrong += problems
        if problems or len(present) < len(parts) or (file.unpack and file.path in parts):
            to_come.append(file)
        elif None in parts.values():
            unstated.append(file)
    if wrong and not replace:
        raise InputError(
            f"{name}: {len(wrong)} of {len(files)} files in {root} do not verify: {listed(wrong)}; move them away, or "
            f"data.download=replace fetches them again"
        )
    return to_come, unstated


def _bring(name: str, record: Record, files: list[Entry], replace: bool, keep_archives: bool) -> None:
    """Put files, and what they hold, where they belong, and record them."""
    size, free = sum(file.size or 0 for file in files), shutil.disk_usage(record.root).free
    started = sum(part.stat().st_size for part in record.root.rglob(".*.download/**/*") if part.is_file())
    size = max(0, size - started)
    space = f"{name}: {len(files)} files are to come, {size / 1e6:,.1f} MB where stated; {free / 1e6:,.1f} MB are free"
    if size > free:
        raise InputError(f"{space} in {record.root}")
    log.info(space)
    failed, unreachable = [], set[str]()
    for file in track(files, len(files), f"{name}: files"):
        target, expected = record.root / file.path, file.hash if replace else record.expected(file)
        stage = target.with_name(f".{target.name}.download")  # whatever is half done is in there
        try:
            stage.mkdir(parents=True, exist_ok=True)
            arrived = not file.unpack or not target.is_file() or bool(mismatch(target, expected))
            if arrived or (replace and expected is None):
                _transfer(file, stage / target.name, expected, unreachable)
                os.replace(stage / target.name, target)
            try:
                record.note(file, [target, *(_unpack(target, stage) if file.unpack else ())])
            except InputError:
                if arrived:  # so that the next call fetches it again; one that lay there is the user's
                    target.unlink(missing_ok=True)
                raise
            if file.unpack and not keep_archives:
                target.unlink()
            shutil.rmtree(stage)
        except (Failed, InputError, OSError) as error:
            failed.append(f"{file.path} ({in_one_line(error)})")
    if failed:
        raise InputError(
            f"{name}: {len(failed)} of {len(files)} files did not arrive: {listed(failed)}; {len(files) - len(failed)} "
            f"are finished, the same command goes on from there; data.download=never does with what is in {record.root}"
        )


def _transfer(file: Entry, path: Path, expected: str | None, unreachable: set[str]) -> None:
    """Write the right bytes of a file to `path`, from the first of its addresses that has them."""
    reasons = []
    for url in file.url:
        try:
            if url.startswith(SCHEME):
                download_from_hub(url, path)
            elif urlsplit(url).scheme in ("http", "https"):
                download(url, path, unreachable)
            else:
                with replacing(path) as part:
                    shutil.copyfile(url, part)
            problem = mismatch(path, expected) or _other_size(path, file)
        except (Failed, InputError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
            reasons.append(in_one_line(error))
            continue
        if not problem:
            return
        path.unlink()
        reasons.append(f"wrong bytes {problem}")
    raise Failed("; ".join(reasons))


def _other_size(path: Path, file: Entry) -> str:
    size = path.stat().st_size
    return "" if file.hash or file.size in (None, size) else f"({size} of {file.size})"


def _unpack(archive: Path, stage: Path) -> list[Path]:
    """Files of a tar or a single .gz, unpacked beside it by way of `stage`, all of them or none."""
    with TemporaryDirectory(dir=stage) as folder:
        try:
            if ".tar" in archive.suffixes:
                shutil.unpack_archive(archive, folder, filter=_plain)
            else:
                pooch.Decompress("gzip", os.path.join(folder, archive.stem))(str(archive), "download", None)
        except (shutil.ReadError, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise InputError(f"cannot be unpacked: {error}") from None
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        targets = {path: archive.parent / path.relative_to(folder) for path in files}
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    return list(targets.values())


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """What may be unpacked of a tar: no links, by which some Pythons' own filter can be escaped."""
    if not (member.isreg() or member.isdir()):
        raise tarfile.FilterError(f"{member.name!r} is a link or a device")
    return tarfile.data_filter(member, folder)
