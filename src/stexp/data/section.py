"""One tissue section: its image and the counts measured on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.kept_counts import KeptCounts, digest_of, smallest
from stexp.data.shown import facts_table, one_line
from stexp.data.slides.slide import Slide
from stexp.errors import InputError, listed

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
    cohort
        Name of the data set that is tested and trains nothing; empty: the one that trains.
    kept
        The file of the cache that ``spots.X`` is mapped from, whose counts were checked before they were written; it
        counts as long as that is the matrix of `spots`.

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
    cohort: str = ""
    kept: KeptCounts | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        name = self.name
        if self.kept is not None and self.kept.matrix is not self.spots.X:
            object.__setattr__(self, "kept", None)
        for subject, label in (("section name", name), ("patient", self.patient)):
            check_name(label, subject)
        spots = self.spots
        if spots.n_obs == 0 or spots.n_vars == 0:
            raise InputError(f"section {name}: {spots.n_obs} spots x {spots.n_vars} genes; need at least one of each")
        for subject, index in (("spots", spots.obs_names), ("genes", spots.var_names)):
            if not index.is_unique:
                twice = index[index.duplicated()].unique()
                raise InputError(f"section {name}: {len(twice)} duplicate {subject} ({listed(twice)})")
            if not "".join(map(str, index)).isprintable():
                strange = [str(item) for item in index if not str(item).isprintable()]
                raise InputError(
                    f"section {name}: {len(strange)} {subject} have characters in their name that cannot be printed "
                    f"(first: {strange[0][:60]!r})"
                )
        self._check_positions()
        object.__setattr__(self, "spots", _in_final_types(spots))
        if self.kept is None:
            check_counts(self.spots.X.data, f"section {name}")
        self._check_scale()
        empty = int((self.total_counts == 0).sum())
        if empty and self.kept is None:  # else it was said when the section was read
            log.warning(
                "section %s: %d of %d spots have no counts; they stay, with expression zero", name, empty, len(self)
            )

    def __repr__(self) -> str:
        return one_line(self._facts())

    def _repr_html_(self) -> str:
        return facts_table(f"Section {self.name}", self._facts())

    def _facts(self) -> dict[str, str]:
        """What a section holds, in words."""
        size = None if self.slide is None else "{} x {} px".format(*self.slide.size)
        return {
            "section": self.name,
            "patient": self.patient,
            "spots": str(len(self)),
            "genes": str(len(self.genes)),
            "image": "none" if self.slide is None else f"{self.slide.path.name}, {size}",
            "scale": "unknown" if self.um_per_px is None else f"{self.um_per_px:.4g} um/px",
        }

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
        if self.slide is not None:
            width, height = self.slide.size
            outside = n_outside(xy, width, height)
            if outside:
                raise InputError(
                    f"section {name}: {outside} of {len(xy)} spots lie outside the image ({width} x {height} px); "
                    + what_would_fit(pd.DataFrame(xy, index=spots.obs_names, dtype=float), width, height)
                )

    def _check_scale(self) -> None:
        of_slide = None if self.slide is None else self.slide.um_per_px
        if of_slide is None:
            return
        if self.um_per_px is None:
            object.__setattr__(self, "um_per_px", of_slide)
        elif self.kept is None and max(of_slide, self.um_per_px) > 1.1 * min(of_slide, self.um_per_px):
            log.warning(
                "section %s: um_per_px %.4g was given, the file %s says %.4g; the given one counts",
                self.name,
                self.um_per_px,
                self.image.path.name,
                of_slide,
            )

    def __len__(self) -> int:
        return self.spots.n_obs

    @property
    def image(self) -> Slide:
        """`slide` of a section that has one."""
        if self.slide is None:
            raise ValueError(f"section {self.name} has no image")
        return self.slide

    @property
    def genes(self) -> pd.Index:
        return self.spots.var_names

    @property
    def xy_px(self) -> np.ndarray:
        """Spot centres, (n_spots, 2), level-0 pixels."""
        return np.asarray(self.spots.obsm["spatial"], dtype=np.float64)

    @property
    def xy_um(self) -> np.ndarray:
        """Spot centres, (n_spots, 2) float32, micrometres; NaN where the scale is unknown."""
        return (self.xy_px * (np.nan if self.um_per_px is None else self.um_per_px)).astype(np.float32)

    @property
    def array_xy(self) -> np.ndarray:
        """Array coordinates, (n_spots, 2), integers."""
        return self.spots.obs[["array_x", "array_y"]].to_numpy(np.int64)

    @property
    def total_counts(self) -> np.ndarray:
        """Counts per spot over the whole transcriptome, (n_spots,)."""
        if self.kept is not None:
            return self.kept.total.copy()
        return np.asarray(self.spots.X.sum(axis=1), dtype=np.float64).ravel()

    def made(self, what: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays that depend on the counts and on `what` alone, from the cache where the section is kept there."""
        return make() if self.kept is None else self.kept.made(what, make)

    def take(self, spots: np.ndarray) -> Section:
        """The section with the spots of a mask (n_spots,) only."""
        if spots.all():
            return self
        own = self.spots[spots].copy()
        return replace(self, spots=own, kept=None if self.kept is None else self.kept.take(spots, own.X))

    def counts(self, genes: Iterable[str]) -> np.ndarray:
        """Raw counts of `genes`, (n_spots, G) float32; NaN in columns of genes not measured here."""
        genes = list(genes)
        out = self.panel_counts(genes).toarray()
        out[:, self.genes.get_indexer(genes) < 0] = np.nan
        return out

    def panel_counts(self, genes: Sequence[str]) -> sp.csr_matrix:
        """Raw counts of `genes`, (n_spots, G) float32; columns of genes not measured here are empty."""
        part = self.stored_counts(genes)
        arrays = part["data"].astype(np.float32), part["indices"].astype(np.int32), part["indptr"]
        return sp.csr_matrix(arrays, shape=(len(self), len(genes)))

    def stored_counts(self, genes: Sequence[str]) -> dict[str, np.ndarray]:
        """`panel_counts` as ``data``, ``indices`` and ``indptr`` of a CSR matrix, in the smallest types that fit."""
        where = self.genes.get_indexer(list(genes))
        measured = np.flatnonzero(where >= 0)

        def select() -> dict[str, np.ndarray]:
            part = sp.csr_matrix(self.spots.X[:, where[measured]], dtype=np.float32)
            part.sum_duplicates()
            return {"data": smallest(part.data), "indices": smallest(measured[part.indices]), "indptr": part.indptr}

        return self.made(f"panel-{digest_of(genes)}", select)


def check_name(label: str, subject: str) -> None:
    """Raise InputError unless `label` can name a folder, and is no option of a command."""
    if (
        not 0 < len(label) <= 100
        or set(label) & set("/\\:")
        or label.startswith((".", "-"))
        or label != label.strip()
        or not label.isprintable()
    ):
        raise InputError(
            f"{subject} {label[:100]!r} cannot name a folder; 1 to 100 printable characters without slashes, colons, "
            f"blanks around them and a leading dot or minus would fit"
        )


def _in_final_types(spots: ad.AnnData) -> ad.AnnData:
    """The same with CSR counts and whole array coordinates: itself where it has them, else a copy of what changes."""
    if spots.is_view:
        spots = spots.copy()
    is_csr = sp.issparse(spots.X) and spots.X.format == "csr"
    is_whole = all(spots.obs[column].dtype == np.int64 for column in ("array_x", "array_y"))
    if is_csr and is_whole:
        return spots
    obs = spots.obs.copy()
    obs[["array_x", "array_y"]] = obs[["array_x", "array_y"]].to_numpy(float).astype(np.int64)
    return ad.AnnData(
        spots.X if is_csr else sp.csr_matrix(spots.X),
        obs=obs,
        var=spots.var.copy(),
        obsm=dict(spots.obsm),
        layers=dict(spots.layers),
        uns=dict(spots.uns),
    )


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
