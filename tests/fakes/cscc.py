"""The layout of GSE144240 on a small scale: three sections of two patients, one of them packed."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

SECTIONS = {"P2_ST_rep1": "GSM4284316", "P2_ST_rep2": "GSM4284317", "P10_ST_rep1": "GSM4284325"}
PACKED = "P2_ST_rep1"
STEP_PX, MARGIN = 30.0, 60
GENES = [f"GENE{i}" for i in range(76)] + ["KRT5", "COL1A1", "CD74", "HLA-A"]


def write(root: Path, seed: int = 0) -> None:
    """Files as GEO names them, 24 spots a section on tissue and as many beside it."""
    root.mkdir(parents=True, exist_ok=True)
    for i, (name, number) in enumerate(SECTIONS.items()):
        rng = np.random.default_rng([seed, i])
        y, x = np.divmod(np.arange(98), 14)
        lattice = (x + y) % 2 == 0  # the array of 1,934 spots has no others
        x, y = x[lattice] + 3, y[lattice] + 5
        on_tissue = x < 10
        new_x, new_y = (v[on_tissue] + rng.uniform(-0.05, 0.05, on_tissue.sum()).round(3) for v in (x, y))
        selection = pd.DataFrame({"x": x[on_tissue], "y": y[on_tissue], "new_x": new_x, "new_y": new_y})
        selection["pixel_x"] = MARGIN + STEP_PX * (new_x - 3)
        selection["pixel_y"] = MARGIN + STEP_PX * (new_y - 5)

        tumour = 1 / (1 + np.exp(6.5 - x))  # from left to right
        mean = np.random.default_rng(seed).gamma(1.0, 4.0, len(GENES)) * np.where(on_tissue, 1.0, 0.05)[:, None]
        mean[:, ::3] *= np.exp(2 * tumour - 1)[:, None]
        counts = pd.DataFrame(rng.poisson(mean), columns=GENES, index=[f"{a}x{b}" for a, b in zip(x, y, strict=True)])
        counts = counts.drop(index="5x7").sample(frac=1, random_state=i)  # it stays in the selection

        side = int(6 * STEP_PX) + 2 * MARGIN
        across = 1 / (1 + np.exp(-(np.arange(side + 30) - side / 2) / STEP_PX))
        colour = np.array([235, 190, 215]) - across[:, None] * np.array([90, 110, 40])
        pixels = (colour + rng.normal(0, 8, (side, side + 30, 3))).clip(0, 255).astype(np.uint8)
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, "JPEG", quality=90)

        files = {
            f"{number}_{name}_stdata.tsv": counts.to_csv(sep="\t").encode(),
            f"{number}_spot_data-selection-{name}.tsv": selection.to_csv(sep="\t", index=False).encode(),
            f"{number}_{name}.jpg": picture.getvalue(),
        }
        for file, content in files.items():
            if name == PACKED:
                (root / f"{file}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (root / file).write_bytes(content)
