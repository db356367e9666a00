"""Small sections of HEST-1k: Visium, legacy ST with its axes turned, Xenium with controls."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from fakes.visium import PITCH_PX, array, draw_counts, picture

SKIN = 'Carcinoma of the skin, "in situ"'
METADATA = [  # dataset_title, id, organ, species, patient, st_technology
    (SKIN, "NCBI10", "Skin", "Homo sapiens", "Patient 1", "Visium"),
    (SKIN, "NCBI9", "Skin", "Homo sapiens", "patient1", "Visium"),
    (SKIN, "NCBI11", "Skin", "Homo sapiens", "Patient 2", "Spatial Transcriptomics"),
    ("Breast panel", "TENX95", "Breast", "Homo sapiens", "patient 2", "Xenium"),
    ("Another breast panel", "TENX97", "Breast", "Homo sapiens", "patient 2", "Xenium"),
    ("Mouse brain", "SPA3", "Brain", "Mus musculus", "", "Visium"),
]


def write(root: Path, seed: int = 0) -> None:
    """Four human sections of three donors; the metadata know of two more."""
    root.mkdir(parents=True, exist_ok=True)
    columns = ["dataset_title", "id", "organ", "species", "patient", "st_technology"]
    table = pd.DataFrame(METADATA, columns=columns).assign(
        image_filename=[f"{row[1]}.tif" for row in METADATA],
        pixel_size_um_embedded=0.26,
        pixel_size_um_estimated=2.5,
        hest_version_added="v1_0_0",
    )
    table.to_csv(root / "HEST_v1_1_0.csv", index=False)
    for i, name in enumerate(("NCBI9", "NCBI10", "NCBI11", "TENX95")):
        write_section(root, name, seed + i, turned=name == "NCBI11", controls=name == "TENX95")


def write_section(root: Path, name: str, seed: int = 0, turned: bool = False, controls: bool = False) -> ad.AnnData:
    """``st/<name>.h5ad`` and ``wsis/<name>.tif``; `turned`: ``array_row`` counts along x."""
    positions = array(seed)
    positions = positions[positions["in_tissue"] == 1].set_index("barcode")
    counts = draw_counts(positions.reset_index(), seed)
    positions = positions.loc[counts.index]
    if controls:
        counts["NegControlProbe_00042"], counts["BLANK_0006"] = 1, 2
    obs = positions.assign(in_tissue=True)
    if turned:
        obs = obs.rename(columns={"array_row": "array_col", "array_col": "array_row"})
    spots = ad.AnnData(
        sp.csr_matrix(counts.to_numpy(np.float32)),
        obs=obs,
        var=pd.DataFrame({"n_cells": 1}, index=counts.columns),
        obsm={"spatial": positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()},
        uns={"spatial": {"ST": {"scalefactors": {"spot_diameter_fullres": PITCH_PX}}}},
    )
    for folder in ("st", "wsis"):
        (root / folder).mkdir(exist_ok=True)
    spots.write_h5ad(root / "st" / f"{name}.h5ad")
    picture(seed).save(root / "wsis" / f"{name}.tif")
    return spots
