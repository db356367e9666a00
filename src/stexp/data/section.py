"""One tissue section: its image and the counts measured on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.slides.slide import Slide
from stexp.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Section:
    """A tissue section with counts, and its slide where there is one.

    Parameters
    ----------
    name
        Unique within a data set.
    patient
        Donor; splits by patient keep all sections of one donor together.
    spots : AnnData, n_spots x n_genes
        ``X`` raw UMI counts (CSR), ``obsm["spatial"]`` (x, y) in level-0 pixels of the slide,
        ``obs["array_x"]``, ``obs["array_y"]`` integer array coordinates, >= 0.
    slide
        Opened lazily; None for a section of which only the counts are at hand.
    um_per_px
        Micrometres per level-0 pixel; None: what the slide's file says, and None where that says nothing.
    files
        The files the section was read from; their content is the data manifest.

    Raises
    ------
    InputError
        Duplicate spots or genes, counts that are not raw, positions that are missing, array
        coordinates that are not whole numbers >= 0, spots outside the image.
    """

    name: str
    patient: str
    spots: ad.AnnData
    slide: Slide | None = None
    um_per_px: float | None = None
    files: tuple[Path, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        spots, name = self.spots, self.name
        for what, label in (("section name", name), ("patient", self.patient)):
            if (
                not 0 < len(label) <= 100
                or set(label) & set("/\\:")
                or label.startswith(".")
                or not label.isprintable()
            ):
                raise InputError(
                    f"{what} {label[:100]!r} cannot name a folder; 1 to 100 printable characters without slashes, "
                    f"colons and a leading dot would fit"
                )
        if spots.n_obs == 0 or spots.n_vars == 0:
            raise InputError(f"section {name}: {spots.n_obs} spots x {spots.n_vars} genes; need at least one of each")
        for what, index in (("spots", spots.obs_names), ("genes", spots.var_names)):
            if not index.is_unique:
                twice = index[index.duplicated()].unique()
                raise InputError(f"section {name}: {len(twice)} duplicate {what} ({_some(twice)})")
        if not sp.issparse(spots.X) or spots.X.format != "csr":
            spots.X = sp.csr_matrix(spots.X)
        check_counts(spots.X.data, f"section {name}")
        self._check_positions()
        self._check_scale()
        empty = int((self.total_counts == 0).sum())
        if empty:
            log.warning(
                "section %s: %d of %d spots have no counts; they stay, with expression zero", name, empty, len(self)
            )

    def _check_positions(self) -> None:
        spots, name = self.spots, self.name
        xy = spots.obsm.get("spatial")
        if xy is None or np.shape(xy) != (spots.n_obs, 2):
            raise InputError(f"section {name}: positions must be {spots.n_obs} rows of (x, y), got {np.shape(xy)}")
        if not np.isfinite(xy).all():
            raise InputError(f"section {name}: {int((~np.isfinite(xy)).any(1).sum())} spots have no pixel position")
        lacking = [column for column in ("array_x", "array_y") if column not in spots.obs]
        if lacking:
            raise InputError(f"section {name}: obs lacks the array coordinates {', '.join(lacking)}")
        array = spots.obs[["array_x", "array_y"]].to_numpy(float)
        if not (np.isfinite(array) & (array >= 0) & (array < 2**31) & (array == np.round(array))).all():
            raise InputError(f"section {name}: array coordinates must be whole numbers >= 0")
        spots.obs[["array_x", "array_y"]] = array.astype(np.int64)
        if self.slide is not None:
            width, height = self.slide.size
            outside = n_outside(xy, width, height)
            if outside:
                raise InputError(
                    f"section {name}: {outside} of {len(xy)} spots lie outside the image ({width} x {height} px); "
                    + what_would_fit(pd.DataFrame(xy, index=spots.obs_names, dtype=float), width, height)
                )

    def _check_scale(self) -> None:
        known = None if self.slide is None else self.slide.um_per_px
        if known is None:
            return
        if self.um_per_px is None:
            object.__setattr__(self, "um_per_px", known)
        elif max(known, self.um_per_px) > 1.1 * min(known, self.um_per_px):
            log.warning(
                "section %s: um_per_px %.4g was given, the file %s says %.4g; the given one counts",
                self.name,
                self.um_per_px,
                self.slide.path.name,
                known,
            )

    def __len__(self) -> int:
        return self.spots.n_obs

    @property
    def genes(self) -> pd.Index:
        return self.spots.var_names

    @property
    def xy_px(self) -> np.ndarray:
        """Spot centres, (n_spots, 2), level-0 pixels."""
        return np.asarray(self.spots.obsm["spatial"], dtype=np.float64)

    @property
    def array_xy(self) -> np.ndarray:
        """Array coordinates, (n_spots, 2), integers."""
        return self.spots.obs[["array_x", "array_y"]].to_numpy(np.int64)

    @property
    def total_counts(self) -> np.ndarray:
        """Counts per spot over the whole transcriptome, (n_spots,)."""
        return np.asarray(self.spots.X.sum(axis=1), dtype=np.float64).ravel()

    def take(self, spots: np.ndarray) -> Section:
        """The section with the spots of a mask (n_spots,) only."""
        return self if spots.all() else replace(self, spots=self.spots[spots].copy())

    def counts(self, genes: Iterable[str]) -> np.ndarray:
        """Raw counts of `genes`, (n_spots, G) float32; NaN in columns of genes not measured here."""
        where = self.genes.get_indexer(list(genes))
        out = np.full((len(self), len(where)), np.nan, dtype=np.float32)
        measured = where >= 0
        out[:, measured] = self.spots.X[:, where[measured]].toarray()
        return out


def check_counts(values: np.ndarray, where: str) -> None:
    """Raise InputError unless `values` are raw counts: finite, whole and not negative."""
    if values.size == 0:
        return
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InputError(f"{where}: {bad} counts are NaN or infinite; raw counts are needed")
    bad = int((values < 0).sum())
    if bad:
        raise InputError(f"{where}: {bad} counts are negative; raw counts are needed")
    bad = int((values != np.round(values)).sum())
    if bad:
        raise InputError(f"{where}: {bad} counts are fractional (normalised?); raw counts are needed")


def join(counts: ad.AnnData, positions: pd.DataFrame, where: str) -> ad.AnnData:
    """Inner join of counts and positions on the spot id, in the order of the counts.

    Parameters
    ----------
    counts : AnnData, rows named by spot id
    positions
        Index spot id; columns array_x, array_y, pixel_x, pixel_y.
    where
        What the join is about, for messages.

    Raises
    ------
    InputError
        No id in common, or an id twice on one side.
    """
    for side, index in (("counts", counts.obs_names), ("positions", positions.index)):
        if not index.is_unique:
            twice = index[index.duplicated()].unique()
            raise InputError(f"{where}: {len(twice)} spot ids occur twice in the {side} ({_some(twice)})")
    keep = counts.obs_names.intersection(positions.index, sort=False)
    lost_counts, lost_positions = counts.n_obs - len(keep), len(positions) - len(keep)
    if len(keep) == 0:
        raise InputError(
            f"{where}: counts and positions have no spot id in common: {lost_counts} ids like "
            f"{_some(counts.obs_names[:1])} in the counts, {lost_positions} like {_some(positions.index[:1])} "
            f"in the positions"
        )
    if lost_counts or lost_positions:
        level = logging.WARNING if 2 * len(keep) < max(counts.n_obs, len(positions)) else logging.INFO
        log.log(
            level,
            "%s: %d spots joined; left over: %d counts without a position, %d positions without counts",
            where,
            len(keep),
            lost_counts,
            lost_positions,
        )
    spots = counts[keep].copy()
    rows = positions.loc[keep]
    spots.obs["array_x"], spots.obs["array_y"] = rows["array_x"].to_numpy(), rows["array_y"].to_numpy()
    spots.obsm["spatial"] = rows[["pixel_x", "pixel_y"]].to_numpy(np.float64)
    return spots


def _some(names: Iterable, n: int = 3) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def n_outside(xy: np.ndarray, width: int, height: int) -> int:
    return int(((xy < 0) | (xy >= (width, height))).any(axis=1).sum())


def what_would_fit(positions: pd.DataFrame, width: int, height: int) -> str:
    xy = positions.to_numpy()
    if n_outside(xy[:, ::-1], width, height) == 0:
        return "with x and y swapped all would fit"
    outside = n_outside(xy, width, height)
    if outside <= max(1, len(xy) // 10):  # another resolution would put more of them outside
        worst = np.maximum(-xy, xy - (width, height)).max(axis=1).argmax()
        x, y = xy[worst]
        return (
            f"the other {len(xy) - outside} lie inside; farthest out is spot {positions.index[worst]} at "
            f"({x:g}, {y:g}){', a negative position' if min(x, y) < 0 else ''}"
        )
    if (xy < 0).any():
        return "some positions are negative"
    scale = float((np.array([width, height]) / xy.max(axis=0)).min())
    return f"positions times {scale:.3g} or less would fit: were they measured on another resolution of this image?"
