"""Three small sections of Xenium with an H&E image that was photographed on its side."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from PIL import Image

PIXEL_UM = 0.2125
EXTENT_UM = np.array([400.0, 320.0])
HE_UM = 0.5
MARGIN_PX = 40.0
GENES = [f"G{i:03d}" for i in range(36)]
CONTROLS = {
    "NegControlProbe_00042": "Negative Control Probe",
    "NegControlCodeword_0500": "Negative Control Codeword",
    "UnassignedCodeword_0006": "Unassigned Codeword",
}
SIZE = tuple(np.round(EXTENT_UM[::-1] / HE_UM + 2 * MARGIN_PX).astype(int))  # width along Xenium's y
STEP = HE_UM / PIXEL_UM
MATRIX = np.array(
    [[0, STEP, -MARGIN_PX * STEP], [-STEP, 0, EXTENT_UM[1] / PIXEL_UM + MARGIN_PX * STEP], [0, 0, 1]]
)  # from the H&E image, turned by a quarter, to Xenium


def write(root: Path, seed: int = 0) -> None:
    """Sections a (`outs`), b_outs and c, as versions 3 and 1 of the software write them, of three patients."""
    for i, (folder, prefix) in enumerate([("a/outs", "a/a"), ("b_outs", "b"), ("c", "c/c")]):
        write_section(root / folder, seed + i, old=prefix == "c/c")
        write_image(root / prefix, seed + i)


def place(um: np.ndarray) -> np.ndarray:
    """Pixels of the H&E image of places in micrometres, by hand: right is up there, down is right."""
    return np.column_stack([(EXTENT_UM[1] - um[:, 1]) / HE_UM, um[:, 0] / HE_UM]) + MARGIN_PX


def write_section(folder: Path, seed: int = 0, old: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One folder; returns its transcripts and its cells. `old`: numbers as cell ids, names as bytes, no kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    transcripts, cells = draw(seed, old)
    own = transcripts.copy()
    if old:
        own["feature_name"] = own["feature_name"].str.encode("utf-8")
    else:
        own["is_gene"] = own["feature_name"].isin(GENES)
        own["codeword_category"] = np.where(own["is_gene"], "predesigned_gene", "negative_control_probe")
    own.to_parquet(folder / "transcripts.parquet", index=False)
    cells.to_parquet(folder / "cells.parquet", index=False)
    (folder / "cells.csv.gz").write_bytes(gzip.compress(cells.to_csv(index=False).encode()))
    write_matrix(folder / "cell_feature_matrix.h5", transcripts, cells)
    about = {"major_version": 4, "run_name": "made up", "region_name": "Region_1", "pixel_size": PIXEL_UM}
    (folder / "experiment.xenium").write_text(json.dumps(about))
    return transcripts, cells


def draw(seed: int = 0, old: bool = False, n: int = 9000, n_cells: int = 110) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Transcripts all over the section, every third gene of which grows frequent to the right, and cells."""
    rng = np.random.default_rng([seed, 1])
    um = (rng.uniform(0, EXTENT_UM, (n, 2))).astype(np.float32)
    base = np.random.default_rng(9).gamma(1.0, 1.0, len(GENES)) + 0.2
    slope = np.where(np.arange(len(GENES)) % 3 == 0, 2.5, 0.0)
    weight = base * np.exp(slope * (um[:, :1] / EXTENT_UM[0] - 0.5))
    gene = (weight.cumsum(axis=1) / weight.sum(axis=1, keepdims=True) < rng.random((n, 1))).sum(axis=1)
    names = np.array([*GENES, *CONTROLS])[gene]
    names[rng.random(n) < 0.03] = "NegControlProbe_00042"
    names[rng.random(n) < 0.02] = "UnassignedCodeword_0006"
    centres = rng.uniform(10, EXTENT_UM - 10, (n_cells, 2))
    ids = (
        np.arange(1, n_cells + 1)
        if old
        else np.array([f"aaaa{chr(97 + i // 26)}{chr(97 + i % 26)}ab-1" for i in range(n_cells)])
    )
    apart = np.linalg.norm(um[:, None] - centres, axis=2)
    own = np.where(apart.min(axis=1) < 15, apart.argmin(axis=1), -1)
    cell = np.where(own < 0, -1, ids[own]) if old else np.where(own < 0, "UNASSIGNED", ids[own])
    transcripts = pd.DataFrame(
        {
            "transcript_id": np.arange(n),
            "cell_id": cell,
            "overlaps_nucleus": 0,
            "feature_name": names,
            "x_location": um[:, 0],
            "y_location": um[:, 1],
            "z_location": np.float32(10),
            "qv": rng.uniform(5, 40, n).astype(np.float32),
        }
    )
    cells = pd.DataFrame({"cell_id": ids, "x_centroid": centres[:, 0], "y_centroid": centres[:, 1], "cell_area": 70.0})
    return transcripts, cells


def write_matrix(path: Path, transcripts: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """``cell_feature_matrix.h5``: transcripts of quality 20 and more by cell, controls among the features."""
    counts = by_cell(transcripts, cells, 20)
    matrix = sp.csc_matrix(counts.to_numpy().T.astype(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array([str(cell) for cell in counts.index], dtype="S")
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
        group["shape"] = np.array(matrix.shape, dtype=np.int32)
        features = group.create_group("features")
        features["id"] = np.array([*(f"ENSG{i:011d}" for i in range(len(GENES))), *CONTROLS], dtype="S")
        features["name"] = np.array(list(counts.columns), dtype="S")
        features["feature_type"] = np.array([*["Gene Expression"] * len(GENES), *CONTROLS.values()], dtype="S")
        features["genome"] = np.array(["Unknown"] * counts.shape[1], dtype="S")
    return counts


def by_cell(transcripts: pd.DataFrame, cells: pd.DataFrame, min_qv: float) -> pd.DataFrame:
    """Transcripts of each cell and feature, counted by pandas."""
    good = transcripts[transcripts["qv"] >= min_qv]
    table = pd.crosstab(good["cell_id"], good["feature_name"])
    return table.reindex(index=cells["cell_id"], columns=[*GENES, *CONTROLS], fill_value=0)


def write_image(prefix: Path, seed: int = 0) -> None:
    """``<prefix>_he_image.ome.tif``, noise on a ramp along Xenium's x, and the matrix that belongs to it."""
    noise = np.random.default_rng([seed, 3]).integers(0, 60, (SIZE[1], SIZE[0], 3))
    ramp = np.linspace(40, 190, SIZE[1])[:, None, None] * np.array([1.0, 0.6, 0.8])
    picture = Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))
    picture.save(prefix.with_name(f"{prefix.name}_he_image.ome.tif"), format="TIFF")
    write_alignment(prefix.with_name(f"{prefix.name}_he_imagealignment.csv"))


def write_alignment(file: Path, matrix: np.ndarray = MATRIX) -> None:
    file.write_text("".join(",".join(str(value) for value in row) + "\n" for row in matrix.tolist()))
