"""What a reader read, on record in the cache, so that a second start reads no source file that did not change."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stexp.data.cache import write_whole
from stexp.data.digests import State, file_digest, remember, state_of
from stexp.data.kept_sections import keeping, open_counts
from stexp.data.parallel import on_all_cores
from stexp.data.progress import track
from stexp.data.readers.paths import user_path
from stexp.data.section import Section
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

log = logging.getLogger(__name__)

READERS = "stexp.data.readers."
MOST_FILES = 100_000
"""Of a data set's folders, beyond which it is read anew rather than looked through for changes."""

SETTLED_S = 2.0
"""How long a file must have been as it is for its size and times to stand for its content: clocks tick."""

Stamp = dict[str, dict[str, list[int]]]
"""Folder -> name -> size and time of change of what lies in it."""


def read_once(reader: Mapping[str, Any], cache_dir: str | Path, read: Callable[[], list[Section]]) -> list[Section]:
    """The sections of a reader: from the cache where all they came from is unchanged, else read and kept there.

    Parameters
    ----------
    reader
        Config of the reader; one that is not of stexp may do anything, and is asked every time.
    read
        Reads them.
    """
    folder = user_path(cache_dir) / "sections"
    if not str(reader["_target_"]).startswith(READERS) or not _is_writable(folder):
        return read()
    path = folder / f"{_key(reader)}.json"
    sections = _recorded(path, folder)
    if sections is not None:
        return sections
    roots = [str(root) for value in reader.values() if isinstance(value, str) and (root := user_path(value)).exists()]
    before, began = _stamp(roots, [], folder.parent), time.time()
    with keeping(folder), _heard() as messages:
        sections = read()
    if before is not None and before == _stamp(roots, [], folder.parent):  # else what was read may be gone
        _record(path, roots, sections, messages, began)
    return sections


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _key(reader: Mapping[str, Any]) -> str:
    """Hash of the reader's config and of the code that reads."""
    digest = hashlib.blake2b(json.dumps(dict(reader), sort_keys=True, default=str).encode(), digest_size=12)
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    digest.update(f"{os.getcwd()} {Path.home()}".encode())  # which paths may be relative to
    return digest.hexdigest()


@contextmanager
def _heard() -> Iterator[list[tuple[str, int, str]]]:
    """Warnings of a reading, to be said again when it is not done again."""
    messages: list[tuple[str, int, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("stexp.data.slides"):
                return  # slides are opened again, and say it themselves
            messages.append((record.name, record.levelno, record.getMessage()))

    listener, root = Listener(logging.WARNING), logging.getLogger("stexp")
    root.addHandler(listener)
    try:
        yield messages
    finally:
        root.removeHandler(listener)


def _record(path: Path, roots: list[str], sections: list[Section], messages: list, began: float) -> None:
    """Write what :func:`_recorded` needs; nothing where that would not tell a change.

    Parameters
    ----------
    began
        Time before the reading, in seconds since 1970.
    """
    files = {file for section in sections for file in section.files}
    whole = all(section.kept is not None and not section.kept.part for section in sections)
    if not sections or not whole or any(file.is_dir() for file in files):
        return
    folders = sorted({str(file.parent) for file in files})
    stamp = _stamp(roots, folders, path.parent.parent)
    if stamp is None:
        return
    digests = on_all_cores(sorted(files), len(files), "hashing files of sections", _state_and_digest)
    settled = [[*state, own] for state, own in digests if max(state[2:4]) < (began - SETTLED_S) * 1e9]
    facts = {
        "roots": roots,
        "folders": folders,
        "stamp": stamp,
        "digests": {state[0]: own for state, own in digests},
        "settled": settled,
        "messages": messages,
        "sections": [
            {
                "name": section.name,
                "patient": section.patient,
                "um_per_px": section.um_per_px,
                "slide": None if section.slide is None else str(section.slide.path),
                "files": [str(file) for file in section.files],
                "counts": section.kept.path.name,
                "bytes": section.kept.path.stat().st_size,
            }
            for section in sections
            if section.kept is not None
        ],
    }
    try:
        write_whole(path, json.dumps(facts).encode())
    except InputError as error:
        log.warning("%s", error)


def _state_and_digest(file: Path) -> tuple[State, str]:
    return state_of(file), file_digest(file)


def _recorded(path: Path, folder: Path) -> list[Section] | None:
    """The sections on record; None where there is no record, something changed, or a file of the cache is gone."""
    try:
        facts = json.loads(path.read_bytes())
        if _stamp(facts["roots"], facts["folders"], folder.parent) != facts["stamp"]:
            return None
        remember({(name, *state): own for name, *state, own in facts["settled"]})
        if any(file_digest(file) != digest for file, digest in facts["digests"].items()):
            return None
        rows = facts["sections"]
        sections = [_open(row, folder) for row in track(rows, len(rows), "opening sections")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if path.exists():
            log.info("the data are read anew: %s", error)
        return None
    for name, level, message in facts["messages"]:
        logging.getLogger(name).log(level, "%s", message)
    return sections


def _open(row: Mapping[str, Any], folder: Path) -> Section:
    counts = folder / row["counts"]
    if counts.stat().st_size != row["bytes"]:
        raise OSError(f"{counts} is damaged")
    spots, kept = open_counts(counts)
    return Section(
        name=row["name"],
        patient=row["patient"],
        spots=spots,
        slide=None if row["slide"] is None else Slide(row["slide"]),
        um_per_px=row["um_per_px"],
        files=tuple(Path(file) for file in row["files"]),
        kept=kept,
    )


def _stamp(roots: list[str], folders: list[str], cache: Path) -> Stamp | None:
    """What lies in and below some places, and in some folders, but for the cache; None where it is too much to see."""
    stamp: Stamp = {}
    waiting, n_files = [*map(Path, roots)], 0
    for root in waiting:  # grows
        if root.is_file():
            folders = [*folders, str(root.parent)]
        elif str(root) not in stamp and root != cache:
            stamp[str(root)] = entries = _entries(root)
            n_files += len(entries)
            waiting += [root / name for name, facts in entries.items() if not facts and not name.startswith(".")]
        if n_files > MOST_FILES:
            return None
    for folder in folders:
        if folder not in stamp:
            stamp[folder] = _entries(Path(folder))
    return stamp


def _entries(folder: Path) -> dict[str, list[int]]:
    """Name -> size and times of change of what lies in a folder; nothing of a folder in it, or of a closed one."""
    try:
        with os.scandir(folder) as inside:
            entries = sorted(inside, key=lambda entry: entry.name)
    except PermissionError:
        return {}
    # no reader reads a log, and commands may be writing theirs
    entries = [entry for entry in entries if not entry.name.startswith(".") and not entry.name.endswith(".log")]
    return {entry.name: [] if entry.is_dir() else _facts(entry) for entry in entries}


def _facts(entry: os.DirEntry) -> list[int]:
    try:
        stat = entry.stat()
    except OSError:  # a link that leads nowhere
        stat = entry.stat(follow_symlinks=False)
    # nobody sets the last time, which files that were moved together share, nor the number of a file
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
