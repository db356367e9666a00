"""Three small sections of Visium HD, each with bins of 2, 8 and 16 um and segmented cells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from fakes.visium import write_h5
from PIL import Image

N_BINS = 66  # of 2 um a side, so that squares of 8, 16 and 24 um are cut at the edge
BIN_PX = 4.0  # of 2 um: 0.5 um/px
MARGIN_PX = 40.0
HIRES = 0.25
SIZE = (360, 380)
GENES = [f"G{i:03d}" for i in range(30)]


def write(root: Path, seed: int = 0) -> None:
    """Sections a, b (`outs`) and c (bare), of three patients; c as SpaceRanger 3 leaves it, without cells."""
    for i, name in enumerate("abc"):
        write_section(root / name if name == "c" else root / name / "outs", name, seed + i, cells=name != "c")


def write_section(folder: Path, name: str, seed: int = 0, cells: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One ``outs``; returns the counts of its bins of 2 um on tissue, and the table of all their positions."""
    fine = bins(2)
    counts = draw_counts(fine[fine["in_tissue"] == 1], seed)
    for size in (2, 8, 16):
        own = bins(size)
        values = counts if size == 2 else sums(counts, size, set(own.loc[own["in_tissue"] == 1, "barcode"]))
        write_bins(folder / "binned_outputs" / f"square_{size:03d}um", size, own, values, seed)
    write_spatial(folder / "spatial", 2, seed)
    picture(seed).save(folder / f"{name}_tissue_image.tif")
    if cells:
        write_cells(folder / "segmented_outputs", seed)
    return counts, fine


def bins(size: int) -> pd.DataFrame:
    """Positions of all bins of one size, on a slightly turned array; a corner is off tissue."""
    n = -(-N_BINS * 2 // size)
    row, column = (grid.ravel() for grid in np.mgrid[0:n, 0:n])
    x = (column + 0.5) * BIN_PX * size / 2
    y = (row + 0.5) * BIN_PX * size / 2
    corner = (row * size < 40) & (column * size < 40 - row * size)
    return pd.DataFrame(
        {
            "barcode": [f"s_{size:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)],
            "in_tissue": (~corner).astype(int),
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": MARGIN_PX + y - 0.02 * x,
            "pxl_col_in_fullres": MARGIN_PX + x + 0.02 * y,
        }
    )


def draw_counts(positions: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Few counts a bin; every third gene rises from left to right."""
    rng = np.random.default_rng([seed, 2])
    mean = np.random.default_rng(7).gamma(1.0, 0.2, len(GENES)) + 0.02
    across = positions["array_col"].to_numpy() / N_BINS - 0.5
    slope = np.where(np.arange(len(GENES)) % 3 == 0, 2.0, 0.0)
    values = rng.poisson(mean * np.exp(slope * across[:, None]))
    return pd.DataFrame(values, index=positions["barcode"].to_numpy(), columns=GENES)


def sums(counts: pd.DataFrame, size: int, kept: set[str]) -> pd.DataFrame:
    """Counts of larger bins, added up name by name: the obvious way."""
    total: dict[str, np.ndarray] = {}
    for barcode, values in zip(counts.index, counts.to_numpy(), strict=True):
        row, column = (int(part) * 2 // size for part in barcode.removesuffix("-1").split("_")[2:])
        name = f"s_{size:03d}um_{row:05d}_{column:05d}-1"
        if name in kept:
            total[name] = total.get(name, 0) + values
    return pd.DataFrame(total, index=counts.columns).T.sort_index()


def write_bins(folder: Path, size: int, positions: pd.DataFrame, counts: pd.DataFrame, seed: int = 0) -> None:
    """One folder ``square_<n>um``."""
    write_spatial(folder / "spatial", size, seed)
    positions.to_parquet(folder / "spatial" / "tissue_positions.parquet", index=False)
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts)


def write_spatial(folder: Path, size: int, seed: int = 0) -> None:
    """Scale factors, and pictures; both images were given, as is always so of HD."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = {
        "spot_diameter_fullres": BIN_PX * size / 2,
        "bin_size_um": float(size),
        "microns_per_pixel": 2 / BIN_PX,
        "regist_target_img_scalef": HIRES,
        "tissue_lowres_scalef": HIRES / 4,
        "fiducial_diameter_fullres": 400.0,
        "tissue_hires_scalef": HIRES,
    }
    (folder / "scalefactors_json.json").write_text(json.dumps(factors))
    small = picture(seed).resize((round(SIZE[0] * HIRES), round(SIZE[1] * HIRES)))
    small.save(folder / "tissue_hires_image.png")
    small.save(folder / "aligned_tissue_image.jpg")
    small.save(folder / "cytassist_image.tiff")


def write_cells(folder: Path, seed: int = 0, n: int = 90) -> tuple[pd.DataFrame, np.ndarray]:
    """``segmented_outputs``: octagons at random centres, the last of which has an outline and no counts."""
    rng = np.random.default_rng([seed, 5])
    centres = MARGIN_PX + rng.uniform(10, N_BINS * BIN_PX - 10, (n, 2))
    angle = np.arange(9) * np.pi / 4
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[x + 8 * np.cos(a), y + 8 * np.sin(a)] for a in angle]]},
            "properties": {"cell_id": i + 1},
        }
        for i, (x, y) in enumerate(centres)
    ]
    across = (centres[:, :1] - MARGIN_PX) / (N_BINS * BIN_PX) - 0.5
    slope = np.where(np.arange(len(GENES)) % 3 == 0, 2.0, 0.0)
    names = [f"cellid_{i + 1:09d}-1" for i in range(n - 1)]
    counts = pd.DataFrame(rng.poisson(3 * np.exp(slope * across))[:-1], index=names, columns=GENES)
    write_spatial(folder / "spatial", 2, seed)
    (folder / "cell_segmentations.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    write_h5(folder / "filtered_feature_cell_matrix.h5", counts)
    return counts, centres


def picture(seed: int = 0) -> Image.Image:
    """Noise on a colour that changes from left to right."""
    noise = np.random.default_rng([seed, 3]).integers(0, 60, (SIZE[1], SIZE[0], 3))
    ramp = np.linspace(40, 190, SIZE[0])[None, :, None] * np.array([1.0, 0.6, 0.8])
    return Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))
