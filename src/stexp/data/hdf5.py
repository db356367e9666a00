"""HDF5 files that are whole or not there, whatever the disk does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from stexp.files import naming, replacing


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
