"""Hashes of what is there of a data set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from stexp.data.digests import checksum
from stexp.data.download.sources import Entry
from stexp.errors import InputError
from stexp.files import write_atomically

RECORD = ".stexp-downloads.json"
"""In the root: hashes of files as they arrived, and of what archives held."""


class Record:
    """Hashes of the files of a root, from when they arrived."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / RECORD
        try:
            self.facts: dict[str, dict] = _checked(self.path.read_bytes()) if self.path.exists() else {}
        except ValueError as error:
            raise InputError(f"{self.path} is damaged ({error}); delete it, and files are taken as they are") from None

    def expected(self, file: Entry) -> str | None:
        return file.hash or self.facts.get(file.path, {}).get("hash")

    def parts(self, file: Entry) -> dict[str, str | None]:
        """Hashes by path: of the file or, where it was unpacked, of what it held; None where nothing states one."""
        members, path = self.facts.get(file.path, {}).get("members"), self.root / file.path
        if members and (file.unpack or not path.exists()):
            return {name: f"sha256:{member['sha256']}" for name, member in members.items()}
        by_hand = [self.root / name for name in file.gives or [file.path.removesuffix(".gz")]]
        inside = [inner for given in by_hand for inner in [given, *given.rglob("*")] if inner.is_file()]
        if path.exists() or not inside or not all(given.exists() for given in by_hand):
            return {file.path: self.expected(file)}
        return {inner.relative_to(self.root).as_posix(): None for inner in inside}

    def note(self, file: Entry, paths: list[Path]) -> None:
        """Record the hashes of a file, and of what it held."""
        hashes = {path.relative_to(self.root).as_posix(): file_hash(path) for path in paths}
        own = hashes.pop(file.path, None)
        members = {name: {"sha256": digest.removeprefix("sha256:")} for name, digest in hashes.items()}
        self.facts[file.path] = {"hash": own, "members": members}
        write_atomically(self.path, json.dumps(self.facts, indent=1, sort_keys=True))


def _checked(text: bytes) -> dict[str, dict]:
    """Facts as `Record.note` writes them; ValueError where they are something else."""
    try:
        facts = json.loads(text)
        for fact in facts.values():
            hashes = [fact["hash"], *(member["sha256"] for member in fact.get("members", {}).values())]
            if not all(value is None or isinstance(value, str) for value in hashes):
                raise TypeError(hashes)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("it holds something else") from error
    return facts


def file_hash(path: Path, kind: str = "sha256") -> str:
    """``kind:hex`` of a file; ``git-sha1`` is git's name of its content, SHA-1 of ``blob <size>\\0`` and the bytes."""
    digest = hashlib.new(kind.removeprefix("git-"), usedforsecurity=False)
    if kind == "git-sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    return f"{kind}:{checksum(path, digest)}"


def mismatch(path: Path, expected: str | None) -> str:
    """Hash of a file and the one that is expected, where they differ; else empty."""
    actual = expected and file_hash(path, expected.partition(":")[0])
    return "" if actual == expected else f"({actual}, expected {expected})"
