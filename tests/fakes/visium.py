"""Four small sections of three patients as SpaceRanger 1, 2 and 3 lay them out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from PIL import Image

PITCH_PX = 40.0
MARGIN_PX = 40.0
HIRES = 0.25
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
SIZE = (330, 250)  # of the full-resolution image


def write(root: Path, seed: int = 0) -> None:
    """Sections a and b (SpaceRanger 1 and 2) of patient P1, c (3) of P2, d (3, hires image only) of P3."""
    for i, (name, version, outs) in enumerate([("a", 1, True), ("b", 2, False), ("c", 3, True), ("d", 3, False)]):
        folder = root / name / "outs" if outs else root / name
        write_section(folder, version, seed + i)
    (root / "d" / "image.png").unlink()
    (root / "a" / "outs" / "image.png").rename(root / "a" / "a_HE.png")
    (root / "patients.csv").write_text("section,patient\na,P1\nb,P1\nc,P2\nd,P3\n")


def write_section(folder: Path, version: int, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One ``outs``; returns its counts (in-tissue barcodes x genes) and its table of positions."""
    positions = array(seed)
    counts = draw_counts(positions[positions["in_tissue"] == 1], seed)
    (folder / "spatial").mkdir(parents=True, exist_ok=True)
    if version == 1:
        write_mtx(folder / "filtered_feature_bc_matrix", counts)
        positions.to_csv(folder / "spatial" / "tissue_positions_list.csv", index=False, header=False)
    else:
        write_h5(folder / "filtered_feature_bc_matrix.h5", counts, version=version)
        if version == 2:
            positions.to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
        else:
            positions.to_parquet(folder / "spatial" / "tissue_positions.parquet", index=False)
    write_spatial(folder / "spatial", seed)
    picture(seed).save(folder / "image.png")
    return counts, positions


def write_aggr(folder: Path, seed: int = 0) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """``outs`` of ``spaceranger aggr`` of samples LV1, LB2, LP3 of two donors; counts and positions of each."""
    samples, joint, places = {}, [], []
    for number, name in enumerate(("LV1", "LB2", "LP3"), start=1):
        positions = array(seed, rows=7 - number)  # barcodes of all slides are the same
        positions["barcode"] = positions["barcode"].str.removesuffix("1") + str(number)
        counts = draw_counts(positions[positions["in_tissue"] == 1], seed + number)
        write_spatial(folder / "spatial" / name, seed + number)
        (folder / "spatial" / name / "aligned_fiducials.jpg").unlink()
        factors = folder / "spatial" / name / "scalefactors_json.json"
        factors.write_text(json.dumps(json.loads(factors.read_text()) | {"gem_id": number}))
        picture(seed + number).save(folder.parent / f"{name}.png")
        samples[name] = (counts, positions)
        joint.append(counts)
        places.append(positions)
    write_h5(folder / "filtered_feature_bc_matrix.h5", pd.concat(joint))
    pd.concat(places).to_csv(folder / "aggr_tissue_positions.csv", index=False)
    table = pd.DataFrame({"library_id": list(samples), "molecule_h5": "molecule_info.h5", "Donor": ["P1", "P2", "P1"]})
    table.to_csv(folder / "aggregation.csv", index=False)
    return samples


def write_cytassist(folder: Path, microscope: bool, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``outs`` of a CytAssist slide; `microscope`: SpaceRanger was given the image of a microscope, too."""
    counts, positions = write_section(folder, 2, seed)
    own = picture(seed + 1).resize((150, 140) if microscope else SIZE)
    own.save(folder / "spatial" / "cytassist_image.tiff")
    if microscope:
        own.save(folder / "spatial" / "aligned_tissue_image.jpg")
    else:
        (folder / "image.png").unlink()
    return counts, positions


def array(seed: int = 0, rows: int = 6, columns: int = 6) -> pd.DataFrame:
    """A hexagonal array, spots of odd rows shifted by half a pitch, in random order, two spots outside the tissue."""
    rng = np.random.default_rng([seed, 1])
    row, column = (grid.ravel() for grid in np.mgrid[0:rows, 0:columns])
    column = 2 * column + row % 2
    table = pd.DataFrame(
        {
            "barcode": [f"{''.join(rng.choice(list('ACGT'), 12))}{i:02d}-1" for i in range(len(row))],
            "in_tissue": (np.arange(len(row)) >= 2).astype(int),
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": np.round(MARGIN_PX + row * PITCH_PX * np.sqrt(3) / 2, 2),
            "pxl_col_in_fullres": np.round(MARGIN_PX + column * PITCH_PX / 2, 2),
        }
    )
    return table.sample(frac=1, random_state=seed).reset_index(drop=True)


def draw_counts(positions: pd.DataFrame, seed: int = 0, n_genes: int = 80) -> pd.DataFrame:
    """Barcodes in another order than the positions; genes G000, ..., every fourth of which rises from left to right."""
    rng = np.random.default_rng([seed, 2])
    mean = np.random.default_rng(n_genes).gamma(1.0, 6.0, n_genes) + 0.5
    slope = np.where(np.arange(n_genes) % 4 == 0, 2.0, 0.0)
    across = positions["array_col"].to_numpy() / positions["array_col"].max() - 0.5
    mean = mean * np.exp(slope * across[:, None]) * rng.gamma(8.0, 1 / 8, (len(positions), 1))
    genes = [f"G{i:03d}" for i in range(n_genes)]
    table = pd.DataFrame(rng.poisson(mean), index=positions["barcode"].to_numpy(), columns=genes)
    return table.sort_index()


def gene_ids(symbols: pd.Index) -> list[str]:
    """Ensembl ids as a human reference has them, one a column."""
    return [f"ENSG{i:011d}" for i in range(len(symbols))]


def write_h5(
    path: Path, counts: pd.DataFrame, version: int = 3, types: list[str] | None = None, genome: str = "GRCh38"
) -> None:
    """10x HDF5; version 1 and 2 of the file format are those of SpaceRanger's elders: one group a genome."""
    matrix = sp.csc_matrix(counts.to_numpy().T.astype(np.int32))
    ids = np.array(gene_ids(counts.columns), dtype="S")
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version >= 2 else genome)
        group["barcodes"] = np.array(list(counts.index), dtype="S")
        group["data"], group["indices"] = matrix.data, matrix.indices.astype(np.int64)
        group["indptr"], group["shape"] = matrix.indptr.astype(np.int64), np.array(matrix.shape, dtype=np.int32)
        if version >= 2:
            features = group.create_group("features")
            features["id"], features["name"] = ids, np.array(list(counts.columns), dtype="S")
            features["feature_type"] = np.array(types or ["Gene Expression"] * len(ids), dtype="S")
            features["genome"] = np.array([genome] * len(ids), dtype="S")
        else:
            group["genes"], group["gene_names"] = ids, np.array(list(counts.columns), dtype="S")


def write_mtx(folder: Path, counts: pd.DataFrame, packed: bool = True, one_column: bool = False) -> None:
    """``matrix.mtx``, ``features.tsv``, ``barcodes.tsv``; `one_column`: features by symbol alone."""
    folder.mkdir(parents=True, exist_ok=True)
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(counts.to_numpy().T), field="integer")
    features = pd.DataFrame({"id": gene_ids(counts.columns), "symbol": counts.columns, "type": "Gene Expression"})
    features = features[["symbol"]] if one_column else features
    features.to_csv(folder / "features.tsv", sep="\t", header=False, index=False)
    pd.Series(counts.index).to_csv(folder / "barcodes.tsv", header=False, index=False)
    for path in sorted(folder.iterdir()) if packed else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def write_spatial(folder: Path, seed: int = 0) -> None:
    """Scale factors, and the pictures that SpaceRanger makes of the image."""
    factors = {
        "spot_diameter_fullres": 65 * PITCH_PX / 100,
        "tissue_hires_scalef": HIRES,
        "fiducial_diameter_fullres": 105 * PITCH_PX / 100,
        "tissue_lowres_scalef": HIRES / 3,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scalefactors_json.json").write_text(json.dumps(factors))
    image = picture(seed)
    for name, scale in (("tissue_hires_image.png", HIRES), ("tissue_lowres_image.png", HIRES / 3)):
        image.resize((round(SIZE[0] * scale), round(SIZE[1] * scale))).save(folder / name)
    image.save(folder / "aligned_fiducials.jpg")


def picture(seed: int = 0) -> Image.Image:
    """Noise on a colour that changes from left to right, so that tiles say something of the counts."""
    noise = np.random.default_rng([seed, 3]).integers(0, 60, (SIZE[1], SIZE[0], 3))
    ramp = np.linspace(40, 190, SIZE[0])[None, :, None] * np.array([1.0, 0.6, 0.8])
    return Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))
