"""Quality of spots, tiles and sections: measured and flagged, never dropped unless asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F

from stexp.data.cache import kept_array
from stexp.data.section import Section
from stexp.data.slides.tiles import TileSpec
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
OF_TILES = ("tissue", "blur", "pen", "fold", "od_red", "od_green", "od_blue", "red", "green", "blue")

VERSION = 1  # of what is measured on a tile; raise when the same tile gives other numbers
BLUR_UM = 1.0  # um/px at which blur is measured
CELL_UM = (
    16.0  # side of the squares whose mean colour is judged: wider than a nucleus, narrower than a stroke or a fold
)
GREENEST, DENSE = 0.05, 0.15  # optical densities from which on a square is tissue, see `measure`
INK_OD, INK_RED, INK_GREY = 0.3, 0.2, 0.2  # see `measure`
FOLD = 0.2  # saturation minus intensity, see `measure`
TILES_AT_ONCE_PX = 1 << 21

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

    min_counts: float | None
    min_genes: float | None
    min_tissue: float | None
    max_blur: float | None
    max_pen: float | None
    max_fold: float | None
    stands_apart: float | None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = 1 if name in ("min_tissue", "max_blur", "max_pen", "max_fold") else np.inf
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= most):
                fits = "from 0 to 1" if most == 1 else "of at least 0"
                raise InputError(f"data.quality.{name}={value}: a number {fits}, or null, would fit")


def inspect(section: Section, tiles: np.ndarray | None, spec: TileSpec, thresholds: Thresholds) -> pd.DataFrame:
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
    for flag, (measure, name) in FLAGS.items():
        limit, value = getattr(thresholds, name), table[measure].to_numpy(float)
        if limit is None:
            continue
        # a comparison with NaN is false: what was not measured is not flagged
        raised[flag] = value < limit if name.startswith("min") else value > limit
    if "blurred" in raised and "off_tissue" in raised:
        raised["blurred"] &= ~raised["off_tissue"]  # glass has nothing to be sharp
    return [";".join(flag for flag, where in raised.items() if where[i]) for i in range(len(table))]


def _kept_measures(tiles: np.ndarray, um_per_px: float | None) -> np.ndarray:
    """`measure` of a tile store, kept in ``quality`` beside the folder of the store."""
    store = Path(tiles.filename)
    folder = store.parents[1] / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    scale = "" if um_per_px is None else f"-{um_per_px:.4f}"
    path = folder / f"{store.stem}{scale}-v{VERSION}.npy"

    def compute() -> np.ndarray:
        log.info("measuring the quality of %d tiles", len(tiles))
        return measure(tiles, um_per_px)

    return kept_array(path, (len(tiles), len(OF_TILES)), compute)


def measure(tiles: np.ndarray, um_per_px: float | None) -> np.ndarray:
    """What tiles show besides tissue of good quality.

    Parameters
    ----------
    tiles : (N, px, px, 3) uint8
        Array, memory map or tile store; some are read at a time.
    um_per_px
        Micrometres per pixel of the tiles; None: taken for `BLUR_UM`.

    Returns
    -------
    (N, 10) float64, the columns of `OF_TILES`
        ``tissue`` : share of the area that absorbs green more than red and blue, as haematoxylin and eosin do
        (Ruifrok & Johnston 2001), by `GREENEST` in optical density, or all three by `DENSE`, and is no ink. Glass is
        nearly grey and pale: in HER2+ 0.00 to 0.04, and 0.02 to 0.08.

        ``blur`` : blur metric of Crete et al. 2007 (doi 10.1117/12.702790) at `BLUR_UM`: how little of the
        differences between neighbouring pixels a further blur takes away; 0 sharp, 1 blurred. Tiles that are coarser
        are taken as they are. NaN for tiles without any difference, or too small. Tiles of HER2+ have 0.29..0.53, of
        a Visium section after two JPEG compressions 0.40..0.60, both after a Gaussian of 3 um 0.69 and more.

        ``pen`` : share of ink. Blue and green ink absorb red more than green (by `INK_RED`), which no mixture of
        the stains does; black ink absorbs all colours strongly (2 `INK_OD`) and alike (within `INK_GREY`). Red ink
        looks like eosin and blood and is not told apart.

        ``fold`` : share of tissue whose saturation exceeds its intensity by `FOLD`: thicker tissue is darker and more
        saturated (Bautista & Yagi 2010, doi 10.4103/2153-3539.73320; Kothari et al. 2013, doi
        10.4103/2153-3539.117448). A hint only: dense nuclei come near to it (the lymphoid follicle of a mouse colon
        is flagged), and where the stain is pale a fold stays below it.

        ``od_red``, ..., ``red``, ... : optical density, -log10 of the light that passes (0..1), and colour (0..255),
        means over tissue; NaN without tissue.

    Notes
    -----
    Colours are judged as means over squares of `CELL_UM`. Thresholds of a pixel are constants here, shares of a tile
    that are too much are `Thresholds`.
    """
    if len(tiles.shape) != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8:
        raise InputError(f"tiles must be (N, H, W, 3) uint8, got {tiles.shape} {tiles.dtype}")
    out = np.empty((len(tiles), len(OF_TILES)))
    at_once = max(1, TILES_AT_ONCE_PX // (tiles.shape[1] * tiles.shape[2]))
    console = Console(stderr=True)
    quiet = not console.is_terminal or len(tiles) < 2000
    starts = range(0, len(tiles), at_once)
    for start in track(starts, "measuring tiles", console=console, transient=True, disable=quiet):
        chunk = torch.from_numpy(np.array(tiles[start : start + at_once])).permute(0, 3, 1, 2).float()
        out[start : start + at_once] = _measure(chunk, um_per_px or BLUR_UM).double().numpy()
    return out


def _measure(tiles: torch.Tensor, um_per_px: float) -> torch.Tensor:
    """`measure` of (B, 3, h, w) colours 0..255, (B, 10)."""
    if um_per_px < BLUR_UM:
        size = [max(1, round(n * um_per_px / BLUR_UM)) for n in tiles.shape[2:]]
        tiles, um_per_px = F.interpolate(tiles, size, mode="bilinear", antialias=True), BLUR_UM
    side = min(max(1, round(CELL_UM / um_per_px)), *tiles.shape[2:])
    colour = F.avg_pool2d(tiles, side).flatten(2)  # (B, 3, cells)
    density = -torch.log10((colour.clamp(max=254) + 1) / 255)
    red, green, blue = density.unbind(1)
    tissue = (green - (red + blue) / 2 > GREENEST) | (density.mean(1) > DENSE)
    darkest, palest = density.amax(1), density.amin(1)
    ink = (darkest > INK_OD) & (red - green > INK_RED)
    ink |= (palest > 2 * INK_OD) & (darkest - palest < INK_GREY)
    tissue &= ~ink
    saturation = 1 - colour.amin(1) / colour.amax(1).clamp(min=1)
    fold = tissue & (saturation - colour.mean(1) / 255 > FOLD)
    shares = [mask.float().mean(1) for mask in (tissue, ink, fold)]
    weight = tissue.float() / tissue.sum(1, keepdim=True)  # 0 / 0 is NaN without tissue
    means = [(weight[:, None] * values).sum(2) for values in (density, colour)]
    luminance = (tiles * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    return torch.cat([torch.stack([shares[0], blur(luminance), *shares[1:]], dim=1), *means], dim=1)


def blur(image: torch.Tensor, width: int = 9) -> torch.Tensor:
    """Blur metric of Crete et al. 2007 of images (B, h, w): 0 sharp, 1 blurred; (B,).

    Notes
    -----
    Where the window of `width` pixels (theirs) would reach beyond the image, differences are not counted.
    """
    if min(image.shape[1:]) < width + 1:
        return torch.full((len(image),), torch.nan)
    worst = []
    for axis, window in ((1, (width, 1)), (2, (1, width))):
        blurred = F.avg_pool2d(image[:, None], window, stride=1)[:, 0].diff(dim=axis).abs()
        sharp = image.diff(dim=axis).abs().narrow(axis, width // 2, blurred.shape[axis])
        lost = (sharp - blurred).clamp(min=0).sum((1, 2))
        whole = sharp.sum((1, 2))
        worst.append((whole - lost) / whole)  # 0 / 0 is NaN
    return torch.maximum(*worst)


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
    found: list[list[str]] = [[] for _ in range(len(summaries))]
    for name, least in APART.items():
        values = summaries[name].to_numpy(float)
        scale = np.log1p(values) if name.startswith("median") else values
        there = np.isfinite(scale)
        if z is None or there.sum() < MIN_SECTIONS:
            continue
        middle = np.median(scale[there])
        spread = max(np.median(np.abs(scale[there] - middle)) / 0.6745, least)
        for i in np.flatnonzero(there & (np.abs(scale - middle) > z * spread)):
            digits = 0 if name.startswith("median") else 2
            shown = (f"{x:.{digits}f}" for x in (values[i], np.median(values[there])))
            found[i].append("{} {} (median {}, z {:+.1f})".format(name, *shown, (scale[i] - middle) / spread))
    return ["; ".join(names) for names in found]


def leave_out(
    sections: list[Section],
    flags: list[str],
    thresholds: Thresholds,
    spec: TileSpec,
    tiles_of: Callable[[Section], np.ndarray],
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
