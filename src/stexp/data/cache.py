"""Arrays that are computed once and kept in the cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

log = logging.getLogger(__name__)


def kept_array(path: Path, shape: tuple[int, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array kept at `path`; computed and written first where there is none of this shape.

    Several processes may ask for it at once. One that is there is read without a lock, for which a read-only cache
    has no place.
    """
    array = _load(path, shape)
    if array is not None:
        return array
    with FileLock(f"{path}.lock"):
        array = _load(path, shape)
        if array is None:
            if path.exists():
                log.warning("%s is damaged; computing it again", path)
            array = compute()
            part = path.with_suffix(".part.npy")
            np.save(part, array)
            os.replace(part, path)
    return array


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        array = np.load(path)
    except (ValueError, EOFError, OSError):
        array = None
    return array if array is not None and array.shape == shape else None
