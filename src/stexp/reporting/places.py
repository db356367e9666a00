"""Sections of predictions on their slides, and the spots in them."""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd

from stexp.evaluation import predictions


@dataclass(frozen=True)
class Place:
    """A section of the predictions on its slide; lengths in level-0 pixels.

    Parameters
    ----------
    rows : (n,) int
    xy : (n, 2)
    spacing, diameter
        Of its spots.
    um_per_px
        None where nobody says.
    image : (h, w, 3) uint8 or None
        The whole slide, reduced by `scale`.
    """

    name: str
    rows: np.ndarray
    xy: np.ndarray
    spacing: float
    diameter: float
    um_per_px: float | None
    image: np.ndarray | None
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the slide; of a section without one, what its spots take up."""
        if self.image is None:
            right, bottom = np.ceil(self.xy.max(axis=0) + self.spacing)
            return int(right), int(bottom)
        return round(self.image.shape[1] / self.scale), round(self.image.shape[0] / self.scale)


def places(adata: ad.AnnData) -> list[Place]:
    """The sections in their order."""
    section, out = adata.obs["section"].to_numpy(str), []
    for name in pd.unique(section):
        rows = np.flatnonzero(section == name)
        xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)[rows]
        entry = adata.uns.get("spatial", {}).get(name, {})
        factors, pitch = entry.get("scalefactors", {}), predictions.spacing(xy)
        um = factors.get("microns_per_pixel", adata.uns.get("stexp", {}).get("um_per_px"))
        out.append(
            Place(
                name=str(name),
                rows=rows,
                xy=xy,
                spacing=pitch,
                diameter=float(factors.get("spot_diameter_fullres", pitch / 2)),
                um_per_px=float(um) if um is not None and np.isfinite(um) else None,
                image=entry.get("images", {}).get("hires"),
                scale=float(factors.get("tissue_hires_scalef", 1)),
            )
        )
    return out


def spot_ids(adata: ad.AnnData) -> np.ndarray:
    """Ids of the spots within their section."""
    return adata.obs["spot"].to_numpy(str) if "spot" in adata.obs else adata.obs_names.to_numpy(str)
