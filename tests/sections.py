"""Small synthetic sections for tests: images that no symmetry maps onto themselves, raw counts with structure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from PIL import Image

from stexp.data.section import Section
from stexp.data.slides.slide import Slide
from stexp.protocol import Protocol

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from stexp.data.datamodule import SpotDataModule


def slide_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise that never reaches white, (height, width, 3) uint8: every place looks different from every other."""
    return np.random.default_rng([seed, 7]).integers(0, 230, (height, width, 3), dtype=np.uint8)


def make_section(
    tmp_path: Path,
    name: str = "A1",
    patient: str = "A",
    n: int = 24,
    genes: int | Sequence[str] = 30,
    *,
    image: bool | np.ndarray = True,
    seed: int = 0,
    image_px: int = 96,
    xy_px: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    um_per_px: float | None = 0.5,
) -> Section:
    """A section with `n` spots on a square array, its image written to ``tmp_path/<name>.png``.

    Parameters
    ----------
    genes
        Their names, or how many (``g00``, ``g01``, ...).
    image
        True: noise; an array: those pixels; False: a section without a slide.
    image_px
        Height of the noise image; it is a quarter wider, so that swapped axes show.
    xy_px, counts
        Positions (n, 2) and raw counts (n, G) instead of the made-up ones. Made-up spots keep clear of the
        border by an eighth of the image; made-up counts are negative binomial, with means and a depth of
        their own per gene and spot, and a left-to-right gradient in every third gene.
    """
    rng = np.random.default_rng(seed)
    names = [f"g{i:02d}" for i in range(genes)] if isinstance(genes, int) else list(genes)
    across = int(np.ceil(np.sqrt(n)))
    array_y, array_x = np.divmod(np.arange(n), across)
    if xy_px is None:
        width, height = image_px * 5 // 4, image_px
        step = np.array([0.75 * width, 0.75 * height]) / max(across - 1, 1)
        xy_px = np.column_stack([array_x, array_y]) * step + (width / 8, height / 8)
    if counts is None:
        mean = np.random.default_rng(len(names)).gamma(1.0, 8.0, len(names))  # the same genes are high in all sections
        slope = np.where(np.arange(len(names)) % 3 == 0, 1.5, 0.0)
        mean = mean * np.exp(slope * (array_x / max(across - 1, 1) - 0.5)[:, None])
        mean = mean * rng.gamma(8.0, 1 / 8, (n, 1)) * rng.gamma(4.0, 1 / 4, (n, len(names)))
        counts = rng.poisson(mean)
    slide = None
    if image is not False:
        pixels = slide_pixels(image_px, image_px * 5 // 4, seed) if image is True else image
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path)
        slide = Slide(path)
    ids = [f"{x}x{y}" for x, y in zip(array_x, array_y, strict=True)]
    spots = ad.AnnData(
        sp.csr_matrix(np.asarray(counts, dtype=np.float32)),
        obs=pd.DataFrame({"array_x": array_x, "array_y": array_y}, index=ids),
        var=pd.DataFrame(index=names),
        obsm={"spatial": np.asarray(xy_px, dtype=np.float64)},
    )
    return Section(name, patient, spots, slide, um_per_px if slide else None)


def make_sections(
    tmp_path: Path, patients: int = 3, per_patient: int = 2, n_spots: int = 24, n_genes: int = 30, **kwargs
) -> list[Section]:
    """Sections A1, A2, ..., B1, B2, ... of patients A, B, ..., all with an image; `kwargs` go to `make_section`."""
    return [
        make_section(tmp_path, f"{chr(65 + p)}{s + 1}", chr(65 + p), n_spots, n_genes, seed=100 * p + s, **kwargs)
        for p in range(patients)
        for s in range(per_patient)
    ]


def make_data(folder: Path, protocol: Protocol, **kwargs) -> SpotDataModule:
    """Sections A1, A2, B1, B2 on the training side, C1, C2 held out; 25 spots each, a panel of all 30 genes."""
    from stexp.data.datamodule import SpotDataModule

    sizes = {"tile_px": 16, "batch_size": 16, "eval_batch_size": 20}
    panel, cache = [f"g{i:02d}" for i in range(30)], str(folder / "cache")
    sections = make_sections(folder, n_spots=25)
    return SpotDataModule(sections, protocol, "C", cache_dir=cache, augmentation="none", panel=panel, **sizes | kwargs)


def make_trainer(folder: Path, epochs: int = 1, **kwargs) -> pl.Trainer:
    """A trainer on the CPU that writes and says nothing."""
    import pytorch_lightning as pl

    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, default_root_dir=folder, **quiet | kwargs
    )
