"""Named arrays that are calculated in seconds to minutes, and kept in the cache by content."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from stexp.data.cache import locked
from stexp.data.digests import content_digest
from stexp.errors import InputError
from stexp.files import replacing

log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""To wait for another process that makes the same; it may be stopped."""


def kept_arrays(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Named arrays kept at `path`; made and written first where there are none, or they are not those written.

    Where the cache cannot be written to, which is said once, they are made again every time.

    Parameters
    ----------
    path
        An npz, whose name says all that the arrays depend on.
    make
        Arrays of numbers or text.
    """
    arrays = _load(path)
    if arrays is not None:
        return arrays
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path, PATIENCE_S))
        except (InputError, OSError) as error:
            _say_once(path.parent, str(error))
            return make()
        arrays = _load(path)
        if arrays is None:
            if path.exists():
                log.warning("%s is damaged; making it again", path)
            arrays = make()
            try:
                _write(path, arrays)
            except OSError as error:
                _say_once(path.parent, error.strerror or str(error))
    return arrays


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by number: what a section or floor is called may be no name of a file."""
    facts = {"names": np.array(json.dumps(list(arrays))), "digest": np.array(_digest(arrays))}
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, **facts, **{str(n): array for n, array in enumerate(arrays.values())})  # type: ignore[arg-type]


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """What `_write` wrote; None where there is nothing, or something else."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(part.file_size for part in file.zip.infolist()) > path.stat().st_size:
                return None  # packed: it could unpack to anything
            names = json.loads(str(file["names"]))
            arrays = {name: file[str(n)] for n, name in enumerate(names)}
            return arrays if str(file["digest"]) == _digest(arrays) else None
    except Exception as error:  # NumPy and zipfile raise errors of every kind at damaged bytes
        log.debug("%s: %r", path, error)
        return None


def _digest(arrays: dict[str, np.ndarray]) -> str:
    return content_digest(*(part for name, array in arrays.items() for part in (name, np.atleast_1d(array))))


@functools.cache
def _say_once(folder: Path, reason: str) -> None:
    log.warning("nothing is kept in %s, where the next run would find it: %s", folder, reason)
