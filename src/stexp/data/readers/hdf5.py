"""HDF5 files of others, looked over before anything of them is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from stexp.data.readers.memory import check_fits
from stexp.errors import InputError

MEMORY_TIMES = 2
"""Memory that a data set takes while it is read and brought into its final type, in units of its own size."""


@contextmanager
def open_hdf5(path: Path, subject: str) -> Iterator[h5py.File]:
    """An HDF5 file whose content lies in it, and fits into memory.

    Raises
    ------
    InputError
        A link or a data set leads to another file, or what the data sets announce does not fit into memory.
    OSError
        No HDF5 file, or a damaged one.
    """
    with h5py.File(path, "r") as file:
        n_bytes = 0
        for name, item in _items(file, path, subject, "", set()):
            if isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    raise InputError(f"{subject} {path}: {name} lies in another file; a file that holds all would fit")
                n_bytes += item.size * item.dtype.itemsize if item.shape else 0
        check_fits(MEMORY_TIMES * n_bytes, f"{subject} {path}")
        yield file


def _items(
    group: h5py.Group, path: Path, subject: str, prefix: str, visited: set[int]
) -> Iterator[tuple[str, h5py.Group | h5py.Dataset]]:
    """Groups and data sets below a group, each once, without following a link out of the file."""
    for key in group:
        name = f"{prefix}{key}"
        link = group.get(key, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise InputError(
                f"{subject} {path}: {name} is a link to the file {link.filename}; a file that holds all would fit"
            )
        if isinstance(link, h5py.SoftLink):
            continue  # what it leads to has a link of its own
        item = group[key]
        address = h5py.h5o.get_info(item.id).addr
        if address in visited:
            continue
        visited.add(address)
        yield name, item
        if isinstance(item, h5py.Group):
            yield from _items(item, path, subject, f"{name}/", visited)
