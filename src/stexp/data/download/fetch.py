"""Data sets from their public sources into ``data.root``: resumable, verified, half a file never taken for a whole.

Where the files are stands in ``sources/<name>.yaml``, one per data set, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from stexp.data.download.archives import unpack
from stexp.data.download.hub import SCHEME, download_from_hub, hub_files
from stexp.data.download.record import Record, file_hash, mismatch
from stexp.data.download.sources import Entry, mirrored, read_source
from stexp.data.download.transfer import Failed, Patience, Unreachable, discard, download, length
from stexp.data.progress import progress
from stexp.errors import InputError, listed

log = logging.getLogger(__name__)

WORKERS = 4
"""Files that are read, or downloaded, at a time."""


def fetch(
    name: str,
    root: str | Path,
    sections: Iterable[str] | str | int | None = None,
    mode: str = "auto",
    mirror: str | Path | Iterable[str] | None = None,
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
        Addresses (https or http) or folders that have the same relative paths, in place of the public source; one,
        or several that are tried in order.
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
    source, root = read_source(name), Path(root)
    wanted = {str(section) for section in ([sections] if isinstance(sections, str | int) else sections or ())}
    if source.hub:
        files = hub_files(source, root, wanted)
    else:
        first = Path(source.files[0].path).parts[0]
        if source.nested and not (root / first).exists() and (root / source.nested / first).exists():
            root = root / source.nested
        files = [file for file in source.files if not wanted or not file.sections or wanted & {*file.sections}]
    if mirror is not None:
        files = mirrored(files, [str(mirror)] if isinstance(mirror, str | Path) else [*mirror])
    _Fetch(name, root, files, mode == "replace", keep_archives, patience or Patience()).run()


class _Fetch:
    """One call of `fetch`, its files chosen."""

    def __init__(
        self, name: str, root: Path, files: list[Entry], replace: bool, keep_archives: bool, patience: Patience
    ) -> None:
        self.name, self.root, self.files = name, root, files
        self.replace, self.keep_archives, self.patience = replace, keep_archives, patience
        self.stop, self.unreachable = threading.Event(), set[str]()
        self.record: Record

    def run(self) -> None:
        states = self.unverified(self.files)
        if set(states.values()) == {"kept"} and not os.access(self.root, os.W_OK):
            log.warning("%s: %d files have no hash to verify; %s is read-only", self.name, len(states), self.root)
            return
        if states:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".stexp-downloads.lock"):
                self.complete(self.unverified(list(states)))  # another process may have brought some in between
        log.info("%s: %d of %d files are there and verify", self.name, len(self.files), len(self.files))

    def unverified(self, files: list[Entry]) -> dict[Entry, str]:
        """State of the files that need something; InputError where one is wrong and not to be replaced."""
        self.record = Record(self.root)
        with ThreadPoolExecutor(WORKERS) as pool:  # hashing leaves the interpreter free
            states = dict(zip(files, pool.map(self.record.state, files), strict=True))
        wrong = [detail for state, detail in states.values() if state == "wrong"]
        if wrong and not self.replace:
            raise InputError(
                f"{self.name}: {len(wrong)} of {len(files)} files in {self.root} do not verify: {listed(wrong)}; move "
                f"them away, or data.download=replace fetches them again"
            )
        return {file: state for file, (state, _) in states.items() if state != "verified"}

    def complete(self, states: dict[Entry, str]) -> None:
        """Bring and unpack what is not there; keep the record."""
        kept = [file for file, state in states.items() if state == "kept"]
        for file in kept:
            self.record.note_as_is(file)
        if kept:
            log.info(
                "%s: %d files were there and nothing states their hash: taken as they are, recorded in %s and compared "
                "from now on",
                *(self.name, len(kept), self.record.path),
            )
        rest = {file: state for file, state in states.items() if state != "kept"}
        if not rest:
            return
        self.announce([file for file, state in rest.items() if state != "packed"], len(self.files) - len(rest))
        failed = self.bring_all(rest)
        if failed:
            raise InputError(
                f"{self.name}: {len(failed)} of {len(rest)} files did not arrive: {listed(failed)}; "
                f"{len(rest) - len(failed)} are finished, the same command goes on from there; data.download=never "
                f"does with what is in {self.root}"
            )
        if unstated := sum(not file.hash for file in rest):
            log.info("%s: the source states no hash of %d files: recorded in %s", self.name, unstated, self.record.path)

    def announce(self, files: list[Entry], present: int) -> None:
        """Say how much is to come; InputError where the disk has not that much."""
        to_come = sum(max(0, file.size - length(_part(self.root / file.path))) for file in files if file.size)
        unknown = sum(file.size is None for file in files)
        more = f" and {unknown} of unknown size" if unknown else ""
        free = shutil.disk_usage(self.root).free
        message = (
            f"{self.name}: {present} of {len(self.files)} files are there, {len(files)} are to come "
            f"({_bytes(to_come)}{more}); {_bytes(free)} are free in {self.root}"
        )
        if to_come > free:
            raise InputError(message)
        log.info(message)

    def bring_all(self, files: dict[Entry, str]) -> list[str]:
        """Bring every file; what failed, and why. Anything unforeseen, and an interrupt, ends all of them."""
        failed = []
        at_hub = any(url.startswith(SCHEME) for file in files for url in file.url)  # whose client has its own threads
        with progress(len(files), self.name, "files") as advance, ThreadPoolExecutor(1 if at_hub else WORKERS) as pool:
            jobs = {pool.submit(self.bring, file, state == "packed"): file for file, state in files.items()}
            try:
                for job in as_completed(jobs):
                    try:
                        job.result()
                    except (Failed, InputError) as error:
                        failed.append(f"{jobs[job].path} ({error})")
                    advance(1)
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return sorted(failed)

    def bring(self, file: Entry, packed: bool) -> None:
        """Put a file, or what it holds, where it belongs, and record it."""
        target, expected = self.root / file.path, file.hash if self.replace else self.record.expected(file)
        try:
            if not packed:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.transfer(file, expected)
                os.replace(_part(target), target)
                discard(_part(target))
            facts: dict[str, object] = {"from": file.url[0], "hash": expected or file_hash(target, "sha256")}
            if file.unpack:
                members = unpack(target, target.parent, self.replace)
                folder = Path(file.path).parent
                facts["members"] = {(folder / name).as_posix(): member for name, member in members.items()}
            if file.unpack or not file.hash or file.url[0].startswith(SCHEME):
                self.record.note(file, facts)
            if file.unpack and not self.keep_archives:
                target.unlink()
        except OSError as error:  # a full disk, no permission
            raise Failed(error.strerror or str(error)) from None

    def transfer(self, file: Entry, expected: str | None) -> None:
        """Bring the right bytes of a file beside its place, from the first of its addresses that has them."""
        part, reasons = _part(self.root / file.path), []
        for url in file.url:
            try:
                self.copy(url, part, file.size)
            except (Failed, InputError) as error:
                reasons.append(str(error))
                continue
            problem = mismatch(part, file.size, expected)
            if not problem:
                return
            discard(part)
            reasons.append(f"wrong bytes {problem}")
        raise Failed("; ".join(reasons))

    def copy(self, url: str, part: Path, size: int | None) -> None:
        host = urlsplit(url).netloc
        if url.startswith(SCHEME):
            download_from_hub(url, part)
        elif urlsplit(url).scheme not in ("http", "https"):
            if not Path(url).is_file():
                raise Failed(f"{url} does not exist")
            discard(part)
            shutil.copyfile(url, part)
        elif host in self.unreachable:
            raise Failed(f"no connection to {host}")
        else:
            try:
                download(url, part, size, self.patience, self.stop)
            except Unreachable:
                self.unreachable.add(host)
                raise


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


def _bytes(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
