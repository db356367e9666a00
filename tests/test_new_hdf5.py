"""HDF5 on a disk that fills up while it is written: no crash, no part, an error that names the file."""

from __future__ import annotations

import errno
from pathlib import Path

import h5py
import numpy as np
import pytest

from stexp.data.hdf5 import new_hdf5


def fill(file: h5py.File) -> None:
    random = np.random.default_rng(0)
    for i in range(20):
        file.create_dataset(f"group{i}/values", data=random.normal(size=(30, 40)), compression="gzip")
        file[f"group{i}"].attrs["text"] = "word " * 50
        file[f"group{i}/names"] = np.array([f"name {j}" for j in range(30)], dtype=h5py.string_dtype())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with new_hdf5(tmp_path / "new.h5") as file:
        fill(file)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        fill(file)
    with h5py.File(tmp_path / "new.h5") as new, h5py.File(tmp_path / "plain.h5") as plain:
        assert list(new) == list(plain)
        np.testing.assert_array_equal(new["group7/values"], plain["group7/values"])
        assert new["group3"].attrs["text"] == plain["group3"].attrs["text"]
        assert list(new["group9/names"].asstr()) == list(plain["group9/names"].asstr())


@pytest.mark.parametrize("room", [0, 96, 30_000])
def test_a_disk_that_is_full_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch, room: int) -> None:
    def write_bytes(part: Path, content: bytes) -> int:
        with part.open("wb") as file:
            file.write(content[:room])
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "new.h5"
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match=r"No space left on device: .*/new\.h5") as caught, new_hdf5(path) as file:
        fill(file)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["new.h5"]


def test_another_error_of_the_block_is_that_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_hdf5(tmp_path / "new.h5") as file:
        fill(file)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
