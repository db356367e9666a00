"""Quality of spots and sections: measured and flagged, never dropped unless asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from stexp.arguments import NotNegative, Share, checked
from stexp.data.cache import kept_array
from stexp.data.section import Section
from stexp.data.slides.store import TileStore, file_of
from stexp.data.slides.tiles import TileSpec
from stexp.data.tile_measures import OF_TILES, VERSION, measure
from stexp.errors import InputError

log = logging.getLogger(__name__)

FLAGS = {
    "few_counts": ("n_counts", "min_counts"),
    "few_genes": ("n_genes", "min_genes"),
    "off_tissue": ("tissue", "min_tissue"),
    "blurred": ("blur", "max_blur"),
    "pen": ("pen", "max_pen"),
    "fold": ("fold", "max_fold"),
}
"""Flag -> what is measured, and the threshold it is held against."""

OF_COUNTS = ("n_counts", "n_genes")

APART = {
    "median_counts": 0.1,
    "median_genes": 0.1,
    "tissue": 0.03,
    "blur": 0.02,
    "od_red": 0.03,
    "od_green": 0.03,
    "od_blue": 0.03,
}
"""What sections are compared by -> a spread between sections that is nothing to speak of (of counts and genes: of
their natural logarithm). Few sections can agree by chance; differences are measured in no smaller unit."""
MIN_SECTIONS = 4  # of which one can stand apart from the others


@checked("data.quality")
@dataclass(frozen=True)
class Thresholds:
    """What counts as poor; None: not judged.

    Parameters
    ----------
    min_counts, min_genes
        Counts, and genes with a count, of a spot.
    min_tissue, max_pen, max_fold
        Shares of a tile's area, 0..1.
    max_blur
        0 (sharp) .. 1.
    stands_apart
        Robust z-score beyond which a section stands apart from the others.
    """

    min_counts: NotNegative | None
    min_genes: NotNegative | None
    min_tissue: Share | None
    max_blur: Share | None
    max_pen: Share | None
    max_fold: Share | None
    stands_apart: NotNegative | None


def inspect(section: Section, tiles: TileStore | None, spec: TileSpec, thresholds: Thresholds) -> pd.DataFrame:
    """Measure and flag every spot of a section.

    Parameters
    ----------
    section
        Its ``spots.obs`` gets the columns ``qc_n_counts``, ``qc_n_genes``, ``qc_tissue``, ``qc_blur``, ``qc_pen``,
        ``qc_fold`` and ``qc_flags``.
    tiles : (n_spots, px, px, 3) uint8, or None
        The section's tiles, as `stexp.data.slides.tiles.open_tiles` gives them for `spec`; None without an image.

    Returns
    -------
    DataFrame
        Index spot; the columns of `OF_COUNTS` and `OF_TILES` (NaN where there is no tile), and ``flags``: names of
        `FLAGS`, joined by ``;``.
    """
    measured = np.full((len(section), len(OF_TILES)), np.nan)
    if tiles is not None:
        measured = _kept_measures(tiles, _um_per_tile_px(section, spec))
    table = pd.DataFrame(measured, columns=list(OF_TILES), index=section.spots.obs_names)
    table.insert(0, "n_counts", section.total_counts.astype(np.int64))
    table.insert(1, "n_genes", np.asarray((section.spots.X > 0).sum(axis=1)).ravel().astype(np.int64))
    table["flags"] = _flags(table, thresholds)
    for name in ("n_counts", "n_genes", "tissue", "blur", "pen", "fold", "flags"):
        section.spots.obs[f"qc_{name}"] = table[name]
    return table


def _flags(table: pd.DataFrame, thresholds: Thresholds) -> list[str]:
    raised = {}
    for flag, (column, name) in FLAGS.items():
        limit, value = getattr(thresholds, name), table[column].to_numpy(float)
        if limit is None:
            continue
        # a comparison with NaN is false: what was not measured is not flagged
        raised[flag] = value < limit if name.startswith("min") else value > limit
    if "blurred" in raised and "off_tissue" in raised:
        raised["blurred"] &= ~raised["off_tissue"]  # glass has nothing to be sharp
    return [";".join(flag for flag, where in raised.items() if where[i]) for i in range(len(table))]


def _kept_measures(tiles: TileStore, um_per_px: float | None) -> np.ndarray:
    """`measure` of a tile store, kept in ``quality`` beside the folder of the store."""
    store = file_of(tiles)
    folder = store.parents[1] / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    scale = "" if um_per_px is None else f"-{um_per_px:.4f}"
    path = folder / f"{store.stem}{scale}-v{VERSION}.npy"

    def compute() -> np.ndarray:
        log.info("measuring the quality of %d tiles", len(tiles))
        return measure(tiles, um_per_px)

    return kept_array(path, (len(tiles), len(OF_TILES)), compute)


def summarise(section: Section, table: pd.DataFrame) -> dict:
    """What to know of a section: its size, medians over spots, means over tissue, spots by flag.

    Parameters
    ----------
    table
        Of `inspect`.
    """
    raised = table["flags"].str.split(";")
    size = None if section.slide is None else section.slide.size
    tissue = table["tissue"].fillna(0)  # of which every square weighs the same
    stain = {name: (tissue * table[name]).sum() / tissue.sum() if tissue.any() else np.nan for name in OF_TILES[4:]}
    return {
        "section": section.name,
        "patient": section.patient,
        "spots": len(section),
        "genes": len(section.genes),
        "median_counts": float(table["n_counts"].median()),
        "min_counts": int(table["n_counts"].min()),
        "no_counts": int((table["n_counts"] == 0).sum()),
        "median_genes": float(table["n_genes"].median()),
        "um_per_px": section.um_per_px,
        "image_width": None if size is None else size[0],
        "image_height": None if size is None else size[1],
        "tissue": float(table["tissue"].mean()),
        "blur": float(table["blur"].dropna().median()),
        **stain,
        **{flag: int(raised.map(lambda names, flag=flag: flag in names).sum()) for flag in FLAGS},
        "flagged": int((table["flags"] != "").sum()),
        "left_out": sum(section.spots.uns.get("left_out", {}).values()),
    }


def stands_apart(summaries: pd.DataFrame, z: float | None) -> list[str]:
    """Which sections stand apart from the others, and by what.

    Parameters
    ----------
    summaries
        A row of `summarise` per section.
    z
        Modified z-score of Iglewicz & Hoaglin (1993), 0.6745 x (value - median) / MAD over sections, beyond which a
        section stands apart; None: none does. The MAD counts as no less than what `APART` says.

    Returns
    -------
    list of str
        By section: ``""``, or such as ``"median_counts 648 (median 9549, z -9.1)"``, joined by ``"; "``.
    """
    differences: list[list[str]] = [[] for _ in range(len(summaries))]
    for name, least in APART.items():
        values = summaries[name].to_numpy(float)
        scale = np.log1p(values) if name.startswith("median") else values
        measured = np.isfinite(scale)
        if z is None or measured.sum() < MIN_SECTIONS:
            continue
        middle = np.median(scale[measured])
        spread = max(np.median(np.abs(scale[measured] - middle)) / 0.6745, least)
        for i in np.flatnonzero(measured & (np.abs(scale - middle) > z * spread)):
            digits = 0 if name.startswith("median") else 2
            shown = (f"{x:.{digits}f}" for x in (values[i], np.median(values[measured])))
            differences[i].append("{} {} (median {}, z {:+.1f})".format(name, *shown, (scale[i] - middle) / spread))
    return ["; ".join(names) for names in differences]


def leave_out(
    sections: list[Section],
    flags: list[str],
    thresholds: Thresholds,
    spec: TileSpec,
    tiles_of: Callable[[Section], TileStore],
) -> list[Section]:
    """Sections without the spots that have one of `flags`; how many is logged, and kept in ``spots.uns["left_out"]``.

    Parameters
    ----------
    tiles_of
        Opens the tiles of a section for `spec`; not called where counts alone decide.

    Raises
    ------
    InputError
        No flag of that name, its threshold is null, or a section would keep no spot.
    """
    for flag in flags:
        if flag not in FLAGS:
            raise InputError(f"data.leave_out: no flag is called {flag}; choose from {', '.join(FLAGS)}")
        if getattr(thresholds, FLAGS[flag][1]) is None:
            raise InputError(f"data.leave_out={flag} needs a threshold; data.quality.{FLAGS[flag][1]} is null")
    by_counts = all(FLAGS[flag][0] in OF_COUNTS for flag in flags)
    kept = []
    for section in sections:
        tiles = None if by_counts or section.slide is None else tiles_of(section)
        raised = inspect(section, tiles, spec, thresholds)["flags"].str.split(";")
        poor = {flag: raised.map(lambda names, flag=flag: flag in names).to_numpy(bool) for flag in flags}
        out = np.logical_or.reduce(list(poor.values()))
        if out.all():
            raise InputError(
                f"section {section.name}: all {len(section)} spots are flagged {', '.join(flags)}; "
                f"change data.quality, or leave the section out (data.sections=)"
            )
        if out.any():
            counted = {flag: int(where.sum()) for flag, where in poor.items() if where.any()}
            log.info(
                "section %s: %d of %d spots left out (%s)",
                section.name,
                out.sum(),
                len(section),
                ", ".join(f"{n} {flag}" for flag, n in counted.items()),
            )
            spots = section.spots[~out].copy()
            spots.uns["left_out"] = {"spots": int(out.sum())}
            section = replace(section, spots=spots)
        kept.append(section)
    return kept


def _um_per_tile_px(section: Section, spec: TileSpec) -> float | None:
    return None if section.um_per_px is None else section.um_per_px * spec.side_px(section) / spec.px
