"""Content hashes of files and tables, by which a changed input is seen."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import stexp
from stexp.data.progress import track
from stexp.data.rows import Rows, blocks

IMPORTED = time.time()
LIBRARIES = ("numpy", "scipy", "scikit-learn", "pillow")
WHOLE_BYTES = 256 << 20
"""Size up to which a file is hashed whole."""


State = tuple[str, int, int, int, int]
"""Path of a file, its size, the times of its last changes, and its number in the file system."""
_digests: dict[State, str] = {}


def file_digest(path: str | Path) -> str:
    """Content hash of a file; above 256 MB, of its size and 64 blocks spread over it; of a .mrxs, with its folder.

    Of a folder (an element of a zarr store) that of all files in it, by their names. A file is read once in a process
    as long as its size, times and number stay.
    """
    path = Path(path)
    if path.is_dir():
        parts = sorted(part for part in path.rglob("*") if part.is_file())
        together = " ".join(f"{part.relative_to(path).as_posix()} {file_digest(part)}" for part in parts)
        return hashlib.blake2b(together.encode(), digest_size=16).hexdigest()
    state = state_of(path)
    own = _digests.get(state)
    if own is None:
        own = _digests[state] = _hash(path, state[1])
    if path.suffix.lower() != ".mrxs":
        return own
    parts = sorted(part for part in path.with_suffix("").glob("*") if part.is_file())
    together = " ".join([own, *(f"{part.name} {file_digest(part)}" for part in parts)])
    return hashlib.blake2b(together.encode(), digest_size=16).hexdigest()


def state_of(path: Path) -> State:
    """What is another after every change of a file: nobody sets the last time, nor the number of the file."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def remember(states: Mapping[State, str]) -> None:
    """Take hashes of files in these states as they were calculated before, by another process."""
    _digests.update(states)


def _hash(path: Path, size: int) -> str:
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    whole = size <= WHOLE_BYTES
    starts = range(0, size, 1 << 22) if whole else np.linspace(0, size - (1 << 20), 64, dtype=np.int64).tolist()
    length = 1 << 22 if whole else 1 << 20
    with path.open("rb") as file:
        for start in track(starts, len(starts), f"hashing {path.name}: blocks"):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def checksum(path: Path, digest: hashlib._Hash) -> str:
    """Hex digest of all of a file, which continues what `digest` holds."""
    size, block = path.stat().st_size, 1 << 22
    with path.open("rb") as file:
        for _ in track(range(0, size, block), -(-size // block), f"hashing {path.name}: blocks"):
            digest.update(file.read(block))
    return digest.hexdigest()


def content_digest(*parts: str | Rows) -> str:
    """Hash of texts, and of tables (N, ...) of numbers or texts of one type, block by block, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{len(part.encode())}:{part}".encode())
            continue
        for block in blocks(len(part)):
            array = np.ascontiguousarray(part[block])
            if array.dtype.hasobject:
                raise TypeError("objects have no bytes to hash; numbers, or texts as str arrays, do")
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        digest.update(b"end")
    return digest.hexdigest()


@functools.cache
def code_digest() -> str:
    """Hash of our own code, and of the versions of what it calculates with: what is kept of a calculation is made anew
    after every change of them. Of code that changed since it was imported, another one every time."""
    digest = hashlib.blake2b(stexp.__version__.encode(), digest_size=16)
    try:
        digest.update(" ".join(map(version, LIBRARIES)).encode())
        for path in sorted(Path(str(stexp.__file__)).parent.rglob("*.py")):
            if path.is_file():  # an editor's lock is a link that leads nowhere
                digest.update(path.read_bytes())
                if path.stat().st_mtime >= IMPORTED:
                    digest.update(os.urandom(16))
    except (OSError, PackageNotFoundError):  # nobody can tell what the code is
        digest.update(os.urandom(16))
    return digest.hexdigest()
