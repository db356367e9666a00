"""Named arrays in the cache: made once, believed only where they are what was written."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from stexp.data import kept_arrays as module
from stexp.data.kept_arrays import kept_arrays

WANTED = {
    "x": np.arange(6.0).reshape(2, 3),
    "x.npy": np.array([1, 2], dtype=np.uint16),
    "../../file": np.array(["a", "bc"]),
    "file": np.array('{"a": []}'),
    "names": np.zeros((0, 3), dtype=np.float32),
}
"""Whatever sections and floors are called."""


def make() -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in WANTED.items()}


def unasked() -> dict[str, np.ndarray]:
    pytest.fail("made again")


def assert_wanted(arrays: dict[str, np.ndarray]) -> None:
    assert list(arrays) == list(WANTED)
    for name, array in WANTED.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    kept_arrays(tmp_path / "kept.npz", make)
    return tmp_path / "kept.npz"


def test_what_was_made_is_read(path):
    assert_wanted(kept_arrays(path, unasked))
    assert {file.name for file in path.parent.iterdir()} == {"kept.npz", ".kept.npz.lock"}


@pytest.mark.slow
def test_no_bit_can_differ_and_nothing_else_be_read(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert_wanted(kept_arrays(path, make))
            path.write_bytes(whole)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def packed() -> bytes:
    """A few kilobytes that unpack to 100 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("names.npy", b"\0" * 100_000_000)
    return buffer.getvalue()


def of_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array([pickle.dumps], dtype=object))
    return buffer.getvalue()


def huge_header() -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("names.npy", header.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"PK\3\4",
        lambda: npz(other=np.zeros(3)),
        lambda: npz(names=np.array('["x"]'), digest=np.array("0" * 32)),
        lambda: npz(names=np.array('["x"]'), digest=np.array("0" * 32), **{"0": np.zeros(3)}),
        lambda: npz(names=np.array("not json")),
        packed,
        of_objects,
        huge_header,
        lambda: io.BytesIO(np.lib.format.magic(1, 0)).getvalue(),
    ],
)
def test_what_is_something_else_is_made_anew_and_that_is_said(path, content, caplog):
    path.write_bytes(content())
    assert_wanted(kept_arrays(path, make))
    assert caplog.text.count("kept.npz is damaged") == 1
    assert_wanted(kept_arrays(path, unasked))


def test_where_nothing_can_be_kept_that_is_said_once(tmp_path, caplog):
    (tmp_path / "folder").write_text("")
    for name in ("a.npz", "b.npz"):
        assert_wanted(kept_arrays(tmp_path / "folder" / name, make))
    assert caplog.text.count("nothing is kept in") == 1


def test_who_waits_for_a_process_that_is_stopped_makes_it_in_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    with FileLock(tmp_path / ".kept.npz.lock"):
        assert_wanted(kept_arrays(tmp_path / "kept.npz", make))
    assert not (tmp_path / "kept.npz").exists()


def test_an_error_of_what_is_made_is_raised_and_nothing_is_left(tmp_path):
    def fail() -> dict[str, np.ndarray]:
        raise OSError("of the data")

    with pytest.raises(OSError, match="of the data"):
        kept_arrays(tmp_path / "kept.npz", fail)
    assert not (tmp_path / "kept.npz").exists()
    assert_wanted(kept_arrays(tmp_path / "kept.npz", make))
