"""What is there of a data set, and whether it is what it should be."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import zlib
from pathlib import Path

from stexp.data.digests import checksum
from stexp.data.download.sources import Entry
from stexp.errors import InputError
from stexp.files import write_atomically

RECORD = ".stexp-downloads.json"
"""In the root: SHA-256 of files whose source states no hash, and of what archives held."""


class Record:
    """Files of a root against the hashes of their source or, where it states none, those of when they arrived."""

    def __init__(self, root: Path) -> None:
        self.root, self.path, self._writing = root, root / RECORD, threading.Lock()
        try:
            self.facts: dict[str, dict] = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        except ValueError as error:
            raise InputError(
                f"{self.path} is damaged ({error}); delete it, and what is there is recorded again as it is"
            ) from None

    def expected(self, file: Entry) -> str | None:
        return file.hash or self.facts.get(file.path, {}).get("hash")

    def state(self, file: Entry) -> tuple[str, str]:
        """State of a file, and what is wrong with it.

        ``verified``; ``kept``: there, with nothing to compare it with; ``packed``: an archive that waits to be
        unpacked; ``missing``; ``wrong``.
        """
        members, path = self.facts.get(file.path, {}).get("members", {}), self.root / file.path
        if file.unpack or not path.exists():
            present = [name for name in members if (self.root / name).is_file()]
            for name in present:
                problem = mismatch(self.root / name, members[name]["size"], f"sha256:{members[name]['sha256']}")
                if problem:
                    return "wrong", f"{name} {problem}"
            if members and len(present) == len(members):
                return "verified", ""
        if path.exists():
            if problem := mismatch(path, file.size, self.expected(file)):
                return "wrong", f"{file.path} {problem}"
            return ("packed" if file.unpack else "verified" if self.expected(file) else "kept"), ""
        return ("kept" if not members and self._by_hand(file) else "missing"), ""

    def note(self, file: Entry, facts: dict) -> None:
        with self._writing:
            self.facts[file.path] = facts
            write_atomically(self.path, json.dumps(self.facts, indent=1, sort_keys=True))

    def note_as_is(self, file: Entry) -> None:
        """Record a file, or what somebody unpacked of it, for want of anything to compare it with."""
        if (self.root / file.path).exists():
            return self.note(file, {"hash": file_hash(self.root / file.path, "sha256")})
        members = {}
        for path in self._by_hand(file):
            digest = file_hash(path, "sha256").removeprefix("sha256:")
            members[path.relative_to(self.root).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
        return self.note(file, {"members": members})

    def _by_hand(self, file: Entry) -> list[Path]:
        """The files that somebody unpacked from an archive or a .gz, where all of `gives` is there."""
        gives = file.gives or ((file.path.removesuffix(".gz"),) if file.path.endswith(".gz") else ())
        paths = [self.root / name for name in gives]
        if not all(path.exists() for path in paths):
            return []
        inside = [inner for path in paths if path.is_dir() for inner in path.rglob("*")]
        return sorted(path for path in paths + inside if path.is_file())


def file_hash(path: Path, kind: str) -> str:
    """``kind:hex`` of a file; ``git-sha1`` is git's name of its content, SHA-1 of ``blob <size>\\0`` and the bytes."""
    digest = hashlib.new(kind.removeprefix("git-"), usedforsecurity=False)
    if kind == "git-sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    return f"{kind}:{checksum(path, digest)}"


def mismatch(path: Path, size: int | None, expected: str | None) -> str:
    """What a file has in place of what it should have; empty where nothing differs.

    Where no hash is `expected`: what shows that it is not whole, being empty, a web page, or gzip that breaks off.
    """
    if size not in (None, path.stat().st_size):
        return f"({path.stat().st_size:,} bytes, expected {size:,})"
    if expected:
        actual = file_hash(path, expected.partition(":")[0])
        return "" if actual == expected else f"({actual}, expected {expected})"
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if not start or start.startswith((b"<!doctype", b"<html")):
        return "(a web page)" if start else "(empty)"
    if ".gz" in path.suffixes:
        try:
            with gzip.open(path) as packed:
                while packed.read(1 << 20):
                    pass
        except (OSError, EOFError, zlib.error) as error:
            return f"(no whole gzip file: {error})"
    return ""
