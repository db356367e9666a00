"""HDF5 files: whole or not there when they are written, looked over before anything of them is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from stexp.data.readers.memory import check_fits
from stexp.errors import InputError
from stexp.files import naming, replacing

MEMORY_TIMES = 2
"""Memory that a data set takes while it is read and brought into its final type, in units of its own size."""


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to write to, which takes the place of `path` when the block ends well.

    It is made in memory: HDF5 cannot close a file of which a write failed, and ends in a segmentation fault.

    Raises
    ------
    OSError
        The disk is full, or does not take the file; it is raised when the block ends.
    """
    memory = {"driver": "core", "backing_store": False, "block_size": 1 << 20}
    with naming(path), h5py.File(path.name, "w", **memory) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    with replacing(path) as part:
        part.write_bytes(image)


@contextmanager
def open_hdf5(path: Path, subject: str, names: Collection[str] = ("/",)) -> Iterator[h5py.File]:
    """An HDF5 file whose content lies in it, and fits into memory.

    Parameters
    ----------
    subject
        What the messages call the file, before its path.
    names
        Groups and data sets that will be read, and must fit into memory; by default all.

    Raises
    ------
    InputError
        A link or a data set leads to another file, or what the data sets announce does not fit into memory.
    OSError
        No HDF5 file, or a damaged one.
    """
    label = f"{subject} {path}".lstrip()
    with h5py.File(path, "r") as file:
        _check_within(file, label, "", set())
        visited: set[int] = set()
        n_bytes = sum(_n_bytes(file.get(name), visited) for name in names)
        check_fits(MEMORY_TIMES * n_bytes, label)
        yield file


def _check_within(group: h5py.Group, label: str, prefix: str, visited: set[int]) -> None:
    """Refuse whatever below a group leads out of the file, each object once; no link out of it is followed."""
    for key in group:
        name, link = f"{prefix}{key}", group.get(key, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise InputError(f"{label}: {name} is a link to the file {link.filename}; a file that holds all would fit")
        if isinstance(link, h5py.SoftLink):
            continue  # what it leads to has a link of its own
        item = group[key]
        if _is_new(item, visited):
            if isinstance(item, h5py.Group):
                _check_within(item, label, f"{name}/", visited)
            elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                raise InputError(f"{label}: {name} lies in another file; a file that holds all would fit")


def _n_bytes(item: h5py.Group | h5py.Dataset | None, visited: set[int]) -> int:
    """Bytes of all data sets below, each once, by whichever link; none of a link that leads nowhere."""
    if item is None or not _is_new(item, visited):
        return 0
    if isinstance(item, h5py.Group):
        return sum(_n_bytes(item.get(key), visited) for key in item)
    return item.size * item.dtype.itemsize if isinstance(item, h5py.Dataset) and item.shape else 0


def _is_new(item: h5py.Group | h5py.Dataset, visited: set[int]) -> bool:
    address = h5py.h5o.get_info(item.id).addr
    is_new = address not in visited
    visited.add(address)
    return is_new
