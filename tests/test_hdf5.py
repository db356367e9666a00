"""HDF5 files that lead elsewhere, or announce more than they hold."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
from fakes import visium as fake

from stexp.data.readers.formats import read_counts
from stexp.data.slides.grid import read_coordinates
from stexp.errors import InputError


def write(path) -> None:
    if path.suffix == ".h5":
        fake.write_h5(path, fake.draw_counts(fake.array()))
    else:
        ad.AnnData(sp.csr_matrix(np.eye(6, dtype=np.float32))).write_h5ad(path)


DATA = {".h5": "matrix/data", ".h5ad": "X/data"}


def to_link(path, elsewhere) -> None:
    with h5py.File(path, "r+") as file:
        del file[DATA[path.suffix]]
        file[DATA[path.suffix]] = h5py.ExternalLink(str(elsewhere), DATA[path.suffix])


def to_external_storage(path, elsewhere) -> None:
    with h5py.File(path, "r+") as file:
        values = file[DATA[path.suffix]][:]
        del file[DATA[path.suffix]]
        raw = elsewhere.with_suffix(".raw")
        raw.write_bytes(values.tobytes())
        file.create_dataset(DATA[path.suffix], values.shape, values.dtype, external=[(str(raw), 0, values.nbytes)])


def to_virtual(path, elsewhere) -> None:
    with h5py.File(path, "r+") as file:
        values = file[DATA[path.suffix]]
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = h5py.VirtualSource(str(elsewhere), DATA[path.suffix], values.shape)
        del file[DATA[path.suffix]]
        file.create_virtual_dataset(DATA[path.suffix], layout)


def to_nested_link(path, elsewhere) -> None:
    """A link that nobody would read, below a group of one's own."""
    with h5py.File(path, "r+") as file:
        file.create_group("uns/mine")["x"] = h5py.ExternalLink(str(elsewhere), "/")


@pytest.mark.parametrize("change", [to_link, to_external_storage, to_virtual, to_nested_link])
@pytest.mark.parametrize("ending", [".h5", ".h5ad"])
def test_content_in_another_file_is_refused(tmp_path, change, ending):
    path, elsewhere = tmp_path / f"c{ending}", tmp_path / f"secret{ending}"
    write(path)
    write(elsewhere)
    read_counts(path)
    change(path, elsewhere)
    with pytest.raises(InputError, match=r"is a link to the file|lies in another file") as caught:
        read_counts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".h5", ".h5ad"])
def test_data_that_only_seem_small_are_refused_before_they_are_read(tmp_path, ending):
    path = tmp_path / f"c{ending}"
    write(path)
    with h5py.File(path, "r+") as file:
        del file[DATA[ending]]
        file.create_dataset(DATA[ending], (1 << 42,), np.float32, chunks=(1 << 20,), compression="gzip")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"needs about [\d.]+ GB of memory, [\d.]+ GB are free"):
        read_counts(path)


def test_groups_that_hold_themselves_are_walked_once(tmp_path):
    write(tmp_path / "c.h5")
    with h5py.File(tmp_path / "c.h5", "r+") as file:
        file["matrix/features/again"] = file["matrix"]
        file["matrix/soft"] = h5py.SoftLink("/matrix/features")
        file["nowhere"] = h5py.SoftLink("/nothing")
    assert read_counts(tmp_path / "c.h5").n_vars == 80


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("2 3 999999999999", "announce 999999999999 entries, more than its size can hold"),
        ("2000000000 3 1", "2000000000 features x 3 barcodes, but 2 features and 3 barcodes"),
        ("2 2000000000 1", "2 features x 2000000000 barcodes"),
    ],
)
def test_an_mtx_that_announces_more_than_it_holds_is_refused(tmp_path, head, message):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "features.tsv").write_text("ENSG1\tA\nENSG2\tB\n")
    (folder / "barcodes.tsv").write_text("x\ny\nz\n")
    (folder / "matrix.mtx").write_text(f"%%MatrixMarket matrix coordinate integer general\n{head}\n1 1 5\n")
    with pytest.raises(InputError, match=message):
        read_counts(folder)
    scipy.io.mmwrite(folder / "matrix.mtx", np.array([[1, 0, 2], [0, 3, 4]]))  # a dense one is read
    assert read_counts(folder).X.toarray().tolist() == [[1, 0], [0, 3], [2, 4]]


def test_coordinates_that_lead_elsewhere_are_refused(tmp_path):
    for name in ("c.h5ad", "secret.h5ad"):
        ad.AnnData(np.ones((3, 1), np.float32), obsm={"spatial": np.arange(6.0).reshape(3, 2)}).write_h5ad(
            tmp_path / name
        )
    assert len(read_coordinates(tmp_path / "c.h5ad")) == 3
    with h5py.File(tmp_path / "c.h5ad", "r+") as file:
        del file["obsm/spatial"]
        file["obsm/spatial"] = h5py.ExternalLink(str(tmp_path / "secret.h5ad"), "obsm/spatial")
    with pytest.raises(InputError, match=r"^coordinates .* obsm/spatial is a link to the file"):
        read_coordinates(tmp_path / "c.h5ad")
