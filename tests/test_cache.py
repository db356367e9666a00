"""Kept arrays: computed once, believed only where the file is what it says, written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import tracemalloc

import numpy as np
import pytest
from filelock import FileLock

from stexp.data.cache import kept_array, locked, write_whole
from stexp.errors import InputError

WANTED = np.arange(12, dtype=np.float32).reshape(3, 4)


def header_of(shape: tuple[int, ...], dtype=np.float32) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def test_an_array_is_computed_once(tmp_path):
    path = tmp_path / "a.npy"
    np.testing.assert_array_equal(kept_array(path, (3, 4), lambda: WANTED), WANTED)
    np.testing.assert_array_equal(kept_array(path, (3, 4), lambda: pytest.fail("computed again")), WANTED)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".a.npy.lock", "a.npy"]
    for array in (np.zeros((0, 4), np.float32), np.arange(6.0).reshape(2, 3).T):
        kept_array(tmp_path / "b.npy", array.shape, lambda array=array: array)
        np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), array)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4",
        header_of((3, 4)) + bytes(47),  # a byte short
        header_of((3, 5)) + bytes(60),
        header_of((3, 4), np.int64) + bytes(96),
        header_of((10**9, 10**3)),
        header_of((2**62, 2**62)),
    ],
)
def test_a_file_that_is_not_what_it_says_is_computed_again_and_takes_no_memory(tmp_path, content, caplog):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    tracemalloc.start()
    np.testing.assert_array_equal(kept_array(path, (3, 4), lambda: WANTED), WANTED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000 and "is damaged; computing it again" in caplog.text
    np.testing.assert_array_equal(np.load(path), WANTED)


def test_a_full_disk_leaves_no_part_and_names_the_file(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)  # by then the part is there
    with pytest.raises(InputError, match=r"a\.npy .* cannot be written: No space left on device"):
        kept_array(tmp_path / "a.npy", (3, 4), lambda: WANTED)
    assert [file.name for file in tmp_path.iterdir()] == [".a.npy.lock"]
    (tmp_path / "b").write_text("before")
    with pytest.raises(InputError):
        write_whole(tmp_path / "b", b"after" * 20)
    assert (tmp_path / "b").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_to_is_said_to_be_and_what_is_there_is_read(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", WANTED)

    def refuse(self, timeout=None):
        raise PermissionError(13, "Permission denied", self.lock_file)

    monkeypatch.setattr(FileLock, "acquire", refuse)
    np.testing.assert_array_equal(kept_array(tmp_path / "a.npy", (3, 4), lambda: pytest.fail("computed")), WANTED)
    with pytest.raises(InputError, match=r"cannot be written to \(Permission denied\).*data\.cache_dir="):
        kept_array(tmp_path / "b.npy", (3, 4), lambda: WANTED)


def test_who_comes_second_waits_and_says_so(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    acquire = FileLock.acquire
    other = FileLock(tmp_path / ".a.npy.lock", is_singleton=False)
    acquire(other)

    def released_when_waited_for(self, timeout=None):
        if timeout == -1:
            other.release()
        return acquire(self, timeout=timeout)

    monkeypatch.setattr(FileLock, "acquire", released_when_waited_for)
    with locked(tmp_path / "a.npy"):
        assert "waiting for another process that is making a.npy" in caplog.text
