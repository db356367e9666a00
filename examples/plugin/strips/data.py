"""A data set: sections of strips, light ones and dark ones, whose genes follow the colour of the tissue."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import csr_matrix

from stexp.data.section import Section
from stexp.data.slides.slide import Slide

SIDE, STEP, STRIP = 640, 40, 160  # pixels: of an image, between spots, of a strip


def read_strips(root: str | Path, patients: int = 3, genes: int = 40) -> list[Section]:
    """One section a patient; its image is drawn into `root` where it is not there yet.

    A reader of files would look for images and counts under `root`, and return the same: a Section has raw counts
    (spots x genes), their place in pixels (x, y) of the image and as whole numbers on the array.
    """
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    return [_section(folder, number, genes) for number in range(patients)]


def _section(folder: Path, number: int, genes: int) -> Section:
    name, rng = f"S{number + 1}", np.random.default_rng(number)
    across = (np.arange(SIDE) // STRIP + number) % 2  # dark strips
    path = folder / f"{name}.png"
    if not path.exists():
        colour = np.where(across[None, :, None], [120, 60, 130], [230, 160, 200])
        noise = rng.normal(0, 12, (SIDE, SIDE, 1))
        Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(path)
    array_y, array_x = np.divmod(np.arange((SIDE // STEP - 1) ** 2), SIDE // STEP - 1)
    xy_px = (np.column_stack([array_x, array_y]) + 1) * STEP
    dark = across[xy_px[:, 0].clip(max=SIDE - 1)]
    answer = np.random.default_rng(99).normal(0, 1, genes)  # of each gene to dark tissue
    counts = rng.poisson(20 * np.exp(dark[:, None] * answer))
    spots = ad.AnnData(
        csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"array_x": array_x, "array_y": array_y}, index=[f"{x}x{y}" for x, y in xy_px]),
        var=pd.DataFrame(index=[f"GENE{i:02d}" for i in range(genes)]),
        obsm={"spatial": xy_px.astype(float)},
    )
    return Section(name, f"P{number + 1}", spots, Slide(path), um_per_px=2.0)
