"""Data sets from their public sources into ``data.root``: resumable, verified, half a file never taken for a whole.

Where the files are stands in ``sources/<name>.yaml``, one per data set, and nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout
from omegaconf import DictConfig

from stexp.config import write_atomically
from stexp.data.download.archives import unpack
from stexp.data.download.sources import Entry, mirrored, read_source
from stexp.data.download.transfer import (
    Failed,
    Patience,
    Unreachable,
    discard,
    download,
    file_hash,
    length,
    mismatch,
    not_whole,
    size_at,
)
from stexp.errors import InputError

log = logging.getLogger(__name__)

RECORD = ".stexp-downloads.json"
"""In the root: SHA-256 of files whose source states no hash, and of what archives held."""


def fetch_configured(data: DictConfig) -> None:
    """`fetch` as a data set's config says: ``source``, ``download``, ``mirror``, ``keep_archives``; none, nothing."""
    if data.get("source") is not None:
        settings = (data.download, data.get("mirror"), data.get("keep_archives", False))
        fetch(data.source, data.root, data.sections, *settings)


def fetch(
    name: str,
    root: str | Path,
    sections: Iterable[str] | str | int | None = None,
    mode: str = "auto",
    mirror: str | Path | None = None,
    keep_archives: bool = False,
    patience: Patience | None = None,
) -> None:
    """Bring the files of a data set into `root` that are not there yet, and verify all of them.

    Parameters
    ----------
    name
        Of a file in ``sources``.
    root
        Folder of the data set. A folder with a part of it is completed; other files in it are left alone.
    sections
        Only the files that these need; default all.
    mode
        ``auto``: fetch what is missing, refuse what is there and does not verify; ``replace``: fetch that again
        too; ``never``: nothing at all.
    mirror
        Address (https or http) or folder that has the same relative paths, in place of the public source.
    keep_archives
        Whether archives stay after they were unpacked.

    Raises
    ------
    InputError
        Files that do not verify, too little space, a source that does not deliver. What is finished by then is
        whole, what is not goes on where it was when called again.
    """
    if mode not in ("auto", "never", "replace"):
        raise InputError(f"data.download={mode}: choose auto, never or replace")
    if mode == "never":
        return
    source, root, patience = read_source(name), Path(root), patience or Patience()
    if source.by_hand and not (root / source.needs).exists():
        raise InputError(f"{name} is not in {root} and cannot be downloaded for you: {source.by_hand}")
    if not source.files:
        return
    first = Path(source.files[0].path).parts[0]
    if source.nested and not (root / first).exists() and (root / source.nested / first).exists():
        root = root / source.nested
    wanted = {str(section) for section in ([sections] if isinstance(sections, str | int) else sections or ())}
    files = [file for file in source.files if not wanted or not file.sections or wanted & {*file.sections}]
    if mirror is not None:
        files = mirrored(files, str(mirror))
    present = sum(length(root / file.path) for file in files)
    if present > 1e9:
        log.info("%s: verifying %s in %s", name, _bytes(present), root)
    todo = _not_verified(files, root, _read_record(root), mode, name)
    if set(todo.values()) == {"kept"} and not os.access(root, os.W_OK):
        log.warning("%s: %d files in %s have no hash to verify, and none can be recorded there", name, len(todo), root)
        return
    if todo:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):  # somebody else may have brought some of them while this one waited
            known = _read_record(root)
            todo = _not_verified(list(todo), root, known, mode, name)
            _complete(name, len(files), todo, root, known, mode == "replace", keep_archives, patience)
    log.info("%s: %d of %d files are there and verify", name, len(files), len(files))


# ------------------------------------------------------------------ what is there


def _not_verified(files: list[Entry], root: Path, known: dict, mode: str, name: str) -> dict[Entry, str]:
    """The files that need something, and their state; refused where one is wrong, unless it is to be replaced."""
    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter free
        found = dict(zip(files, pool.map(lambda file: _find(file, root, known.get(file.path, {})), files), strict=True))
    wrong = [detail for state, detail in found.values() if state == "wrong"]
    if wrong and mode != "replace":
        raise InputError(
            f"{name}: {len(wrong)} of {len(files)} files in {root} do not verify: {_some(wrong)}; move them away, or "
            f"data.download=replace fetches them again"
        )
    return {file: state for file, (state, _) in found.items() if state != "verified"}


def _find(file: Entry, root: Path, known: dict) -> tuple[str, str]:
    """State of a file, and what is wrong with it.

    ``verified``; ``kept``: there, with nothing to compare it with; ``packed``: an archive that waits to be
    unpacked; ``missing``; ``wrong``.
    """
    path = root / file.path
    if not file.unpack and path.exists():
        expected = file.hash or known.get("hash")
        wrong = mismatch(path, file.size, expected) or ("" if file.hash else not_whole(path, file.path))
        return ("wrong", f"{file.path} {wrong}") if wrong else ("verified" if expected else "kept", "")
    members = known.get("members", {})
    there = [name for name in members if (root / name).is_file()]
    for name in there:
        wrong = mismatch(root / name, members[name]["size"], f"sha256:{members[name]['sha256']}")
        if wrong:
            return "wrong", f"{name} {wrong}"
    if members and len(there) == len(members):
        return "verified", ""
    if file.unpack and path.exists():
        wrong = mismatch(path, file.size, file.hash or known.get("hash"))
        return ("wrong", f"{file.path} {wrong}") if wrong else ("packed", "")
    return ("kept" if not members and _by_hand(file, root) else "missing"), ""


def _by_hand(file: Entry, root: Path) -> list[Path]:
    """The files that somebody unpacked from an archive or a .gz, where all of `gives` is there."""
    gives = file.gives or ((file.path.removesuffix(".gz"),) if file.path.endswith(".gz") else ())
    if not gives or not all((root / name).exists() for name in gives):
        return []
    there = [root / name for name in gives]
    inside = [path for folder in there if folder.is_dir() for path in folder.rglob("*")]
    return sorted(path for path in there + inside if path.is_file())


def _read_record(root: Path) -> dict:
    path = root / RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(facts, dict) for facts in record.values()):
            raise ValueError("not a table of files")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it, and what is there is recorded again as it is"
        ) from None
    return record


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    lock = FileLock(root / ".stexp-downloads.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("somebody else is downloading into %s; waiting", root)
        held = lock.acquire()
    with held:
        yield


# ------------------------------------------------------------------ bringing the rest


def _complete(
    name: str,
    n_files: int,
    todo: dict[Entry, str],
    root: Path,
    known: dict,
    overwrite: bool,
    keep_archives: bool,
    patience: Patience,
) -> None:
    """Fetch and unpack what is not there; keep the record."""
    noting, stop, unreachable = threading.Lock(), threading.Event(), set()

    def note(file: Entry, facts: dict) -> None:
        with noting:
            known[file.path] = facts
            write_atomically(root / RECORD, json.dumps(known, indent=1, sort_keys=True))

    kept = [file for file, state in todo.items() if state == "kept"]
    for file in kept:
        note(file, _as_it_is(file, root))
    if kept:
        log.info(
            "%s: %d files were there and nothing states their hash: taken as they are, recorded in %s and compared "
            "from now on",
            *(name, len(kept), root / RECORD),
        )
    todo = {file: state for file, state in todo.items() if state != "kept"}
    if not todo:
        return
    with requests.Session() as session:
        asked = [file for file, state in todo.items() if state != "packed"]
        total = _announce(f"{name}: {n_files - len(todo)} of {n_files} files are there", asked, root, session, patience)
        begun = sum(length(_part(file, root)) for file in asked)
        with _progress(name, len(todo), total, begun) as advance:

            def bring(file: Entry) -> None:
                target = root / file.path
                expected = file.hash or (None if overwrite else known.get(file.path, {}).get("hash"))
                if todo[file] != "packed":
                    host = urlsplit(file.url).netloc
                    if host in unreachable:
                        raise Failed(f"no connection to {host}")
                    try:
                        _transfer(file, expected, _part(file, root), session, patience, stop, advance)
                    except Unreachable:
                        unreachable.add(host)
                        raise
                    os.replace(_part(file, root), target)
                    discard(_part(file, root))
                expected = expected or file_hash(target, "sha256")  # of what `_transfer` found whole
                if file.unpack:
                    folder = Path(file.path).parent
                    members = unpack(target, target.parent, overwrite)
                    members = {(folder / member).as_posix(): facts for member, facts in members.items()}
                    note(file, {"from": file.url, "hash": expected, "members": members})
                    if not keep_archives:
                        target.unlink()
                elif not file.hash:
                    note(file, {"from": file.url, "hash": expected})
                advance(0, 1)

            failed = _in_parallel(bring, list(todo), stop, patience.workers)
    if failed:
        raise InputError(
            f"{name}: {len(failed)} of {len(todo)} files did not arrive: {_some(failed)}; {len(todo) - len(failed)} "
            f"are finished, the same command goes on from there; data.download=never does with what is in {root}"
        )
    unstated = sum(not file.hash for file in todo)
    if unstated:
        log.info("%s: the source states no hash of %d files: recorded in %s", name, unstated, root / RECORD)


def _in_parallel(bring: Callable[[Entry], None], files: list[Entry], stop: threading.Event, workers: int) -> list[str]:
    """Bring every file; what failed, and why. Anything unforeseen, and an interrupt, ends all of them."""
    failed = []
    with ThreadPoolExecutor(workers) as pool:
        under_way = {pool.submit(bring, file): file for file in files}
        try:
            for done in as_completed(under_way):
                try:
                    done.result()
                except (Failed, InputError) as error:
                    failed.append(f"{under_way[done].path} ({error})")
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(failed)


def _transfer(
    file: Entry,
    expected: str | None,
    part: Path,
    session: requests.Session,
    patience: Patience,
    stop: threading.Event,
    advance: Callable[[int], None],
) -> None:
    """Bring the right bytes to `part`; wrong ones are thrown away and asked for once more."""
    for last in (False, True):
        if urlsplit(file.url).scheme in ("http", "https"):
            download(session, file.url, part, patience, file.size, expected is not None, stop, advance)
        else:
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.url, part)
            except FileNotFoundError:
                raise Failed(f"{file.url} does not exist") from None
            advance(length(part))
        wrong = mismatch(part, file.size, expected) or ("" if expected else not_whole(part, file.path))
        if not wrong:
            return
        advance(-length(part))
        discard(part)
        if last:
            raise Failed(f"wrong bytes, twice {wrong}")
        log.warning("%s: wrong bytes %s; asking once more", file.path, wrong)


def _part(file: Entry, root: Path) -> Path:
    target = root / file.path
    return target.with_name(f".{target.name}.part")


def _as_it_is(file: Entry, root: Path) -> dict:
    """The record of a file, or of what somebody unpacked of it, for want of anything to compare it with."""
    if not file.unpack and (root / file.path).exists():
        return {"hash": file_hash(root / file.path, "sha256")}
    members = {}
    for path in _by_hand(file, root):
        digest = file_hash(path, "sha256").removeprefix("sha256:")
        members[path.relative_to(root).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    return {"members": members}


def _announce(there: str, files: list[Entry], root: Path, session: requests.Session, patience: Patience) -> int | None:
    """Say how much is to come, and refuse where it does not fit. Returns the bytes of all, where all are known."""
    unreachable = set()

    def size_of(file: Entry) -> int | None:
        address = urlsplit(file.url)
        if file.size is not None or address.netloc in unreachable:
            return file.size
        if address.scheme not in ("http", "https"):
            return length(Path(file.url))
        try:
            return size_at(session, file.url, patience)
        except Unreachable:  # which the download will say
            unreachable.add(address.netloc)
            return None

    with ThreadPoolExecutor(patience.workers) as pool:
        sizes = list(pool.map(size_of, files))
    told = sum(size for size in sizes if size is not None)
    left = max(0, told - sum(length(_part(file, root)) for file in files))
    unknown = sizes.count(None)
    free = shutil.disk_usage(root).free
    more = f" and {unknown} of unknown size" if unknown else ""
    to_come = f"{there}, {len(files)} are to come ({_bytes(left)}{more}); {_bytes(free)} are free in {root}"
    if left > free:
        raise InputError(to_come)
    log.info(to_come)
    return None if unknown else told


@contextmanager
def _progress(name: str, files: int, total: int | None, begun: int) -> Iterator[Callable[..., None]]:
    """A function that is told of bytes and files: a bar on a terminal, else a line of the log now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console, telling = Console(stderr=True), threading.Lock()
    done, finished, started, said = begun, 0, time.monotonic(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{name} 0/{files}", total=total, completed=begun)

        def advance(n_bytes: int, n_files: int = 0) -> None:
            nonlocal done, finished, said
            with telling:
                done, finished, now = done + n_bytes, finished + n_files, time.monotonic()
                bar.update(task, completed=done, description=f"{name} {finished}/{files}")
                if bar.disable and now - said > 10:
                    said, speed = now, _bytes((done - begun) / (now - started))
                    log.info("%s: %d of %d files, %s, %s/s", name, finished, files, _bytes(done), speed)

        yield advance


def _bytes(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def _some(texts: list[str], show: int = 3) -> str:
    return ", ".join(texts[:show]) + (f" and {len(texts) - show} more" if len(texts) > show else "")
