"""Arrays that are computed once and kept in the cache."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from stexp.errors import InputError
from stexp.files import replacing

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, patience: float = -1) -> Iterator[None]:
    """Hold the lock of a file of the cache; who comes second waits, and says so.

    Parameters
    ----------
    patience
        Seconds to wait; -1: without end.

    Raises
    ------
    TimeoutError
        Another process holds it for longer.
    InputError
        The folder cannot be written to.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("waiting for another process that is making %s", path.name)
            lock.acquire(timeout=patience)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise InputError(
            f"{path.parent} cannot be written to ({getattr(error, 'strerror', None) or error}), and {path.name} is not "
            f"there yet; data.cache_dir= or STEXP_CACHE names another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def kept_array(path: Path, shape: tuple[int, ...], compute: Callable[[], np.ndarray], kind: str = "f") -> np.ndarray:
    """The array kept at `path`, read whole; see `mapped_array`."""
    return np.array(mapped_array(path, shape, compute, kind))


def mapped_array(path: Path, shape: tuple[int, ...], compute: Callable[[], np.ndarray], kind: str = "f") -> np.ndarray:
    """The array kept at `path`, memory-mapped; computed and written first where there is none of this shape.

    Several processes may ask for it at once. One that is there is read without a lock, for which a read-only cache
    has no place.

    Parameters
    ----------
    kind
        Of its numbers, as NumPy abbreviates it.

    Raises
    ------
    InputError
        It cannot be written: the folder is read-only, or the disk full.
    """
    array = _load(path, shape, kind)
    if array is not None:
        return array
    with locked(path):
        array = _load(path, shape, kind)
        if array is None:
            if path.exists():
                log.warning("%s is damaged; computing it again", path)
            write_whole(path, *_npy(compute()))
            array = _load(path, shape, kind)
    if array is None:
        raise OSError(f"{path} is damaged as soon as it is written")
    return array


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file whole or not at all; its parts follow each other.

    Raises
    ------
    InputError
        The disk is full, or the folder cannot be written to; nothing is left behind.
    """
    try:
        with replacing(path) as beside, beside.open("wb") as file:
            for part in parts:
                file.write(part)
    except OSError as error:
        size = f"{sum(memoryview(part).nbytes for part in parts) / 1e6:.1f} MB"
        raise InputError(f"{path} ({size}) cannot be written: {error.strerror or error}") from error


def _npy(array: np.ndarray) -> tuple[bytes, memoryview]:
    """Header and numbers of a file of NumPy, without a copy of the numbers."""
    array, header = np.ascontiguousarray(array), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue(), array.reshape(-1).view(np.uint8).data


def _load(path: Path, shape: tuple[int, ...], kind: str) -> np.ndarray | None:
    """The array of a file, if it is one of such numbers of this shape; mapped first, so that no header is believed."""
    if not path.exists():
        return None
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError, OverflowError):
        return None
    return mapped if mapped.shape == shape and mapped.dtype.kind == kind else None
