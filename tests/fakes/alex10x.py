"""Two sections of Wu et al. as deposited at Zenodo, three of 10x as they come for download."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from fakes.visium import array, draw_counts, picture, write_h5, write_mtx, write_spatial

from stexp.data.readers.alex10x import TENX


def write(root: Path, seed: int = 0) -> None:
    """CID4290, 1160920F (no full-resolution image), block1 and block2 of one patient, FFPE."""
    for i, name in enumerate(("CID4290", "1160920F")):
        positions = array(seed + i)
        counts = draw_counts(positions[positions["in_tissue"] == 1], seed + i)
        # the deposit has symbols alone
        write_mtx(root / "filtered_count_matrices" / f"{name}_filtered_count_matrix", counts, i == 0, one_column=True)
        spatial = root / "spatial" / f"{name}_spatial"
        write_spatial(spatial, seed + i)
        positions.to_csv(spatial / "tissue_positions_list.csv", index=False, header=False)
        metadata = pd.DataFrame(
            {"nCount_RNA": counts.sum(axis=1), "subtype": "ER", "patientid": name, "Classification": "Stroma"}
        )
        metadata.loc[metadata.index[0], "Classification"] = "Invasive cancer"
        (root / "metadata").mkdir(exist_ok=True)
        metadata.to_csv(root / "metadata" / f"{name}_metadata.csv")
    for i, title in enumerate(TENX.values(), start=2):
        positions = array(seed + i)
        counts = draw_counts(positions[positions["in_tissue"] == 1], seed + i)
        write_spatial(root / title / "spatial", seed + i)
        positions.to_csv(root / title / "spatial" / "tissue_positions_list.csv", index=False, header=False)
        write_h5(root / title / f"{title}_filtered_feature_bc_matrix.h5", counts)
        picture(seed + i).save(root / title / f"{title}_image.tif")
