"""Counts and positions of one section, joined on the ids of their spots."""

from __future__ import annotations

import logging
import re

import anndata as ad
import numpy as np
import pandas as pd

from stexp.errors import InputError, listed

log = logging.getLogger(__name__)

WARN_SHARE = 0.05
"""A join that leaves over more than this share of either side is a warning."""
MOST_SHARE = 0.5
"""A join that leaves over this share of either side, or more, is refused."""

PLACE = re.compile(r"(|.*[^A-Za-z0-9])([ACGTN]{8,}[0-9]*|s_\d{3}um_\d{5}_\d{5}|\d+x\d+)(|[^A-Za-z0-9].*)", re.DOTALL)
"""An id: prefix, what names the place on the array (barcode, bin, coordinates), suffix.

Every slide of one kind has the same places, so that prefix and suffix alone tell samples apart: ``-1``, ``-2`` after
``aggr``, or a name of the sample that was set before or after."""

DEFAULTS = {("", ""), ("", "-1")}
"""Prefix and suffix that every sample has: they say nothing."""


def join(counts: ad.AnnData, positions: pd.DataFrame, where: str, complete: bool = False) -> ad.AnnData:
    """Inner join of counts and positions on the spot id, in the order of the counts.

    Parameters
    ----------
    counts : AnnData, rows named by spot id
    positions
        Index spot id; columns array_x, array_y, pixel_x, pixel_y, and in_tissue (bool) where some are outside: these
        and their counts are left out.
    where
        What the join is about, for messages.
    complete
        Whether the positions list every place of the array, so that counts elsewhere are a mistake.

    Returns
    -------
    AnnData
        Named by the ids of the counts.

    Raises
    ------
    InputError
        An id twice on one side; several samples in the positions; several in the counts, and nothing says which is
        that of the positions; half of the counts or of the positions on tissue, or more, left over.

    Notes
    -----
    Ids are compared as they stand. Only where none is common to both sides, prefix and suffix are disregarded: if one
    side names no sample by them, and (nearly) all places agree.
    """
    for side, index in (("counts", counts.obs_names), ("positions", positions.index)):
        if not index.is_unique:
            twice = index[index.duplicated()].unique()
            raise InputError(f"{where}: {len(twice)} spot ids occur twice in the {side} ({listed(twice)})")
    in_tissue = positions["in_tissue"].to_numpy(bool) if "in_tissue" in positions else np.ones(len(positions), bool)
    if not in_tissue.any():
        raise InputError(f"{where}: none of {len(positions)} spots is in tissue")
    rows, is_own = _match(counts.obs_names, positions.index, in_tissue, where)
    nowhere = is_own & (rows < 0)
    if complete and nowhere.any():
        raise InputError(
            f"{where}: {int(nowhere.sum())} of {int(is_own.sum())} barcodes with counts are not in the table of "
            f"positions (first: {counts.obs_names[nowhere][0]}), which lists every place of an array: is it cut?"
        )
    outside = (rows >= 0) & ~in_tissue[rows]
    if outside.any():
        log.info("%s: %d spots with counts are outside the tissue and left out", where, int(outside.sum()))
        if outside.all():
            raise InputError(f"{where}: all {len(outside)} spots with counts are outside the tissue")
    keep = (rows >= 0) & ~outside
    _judge(int(keep.sum()), int((is_own & ~outside).sum()), int(in_tissue.sum()), counts, positions, where)
    spots = counts[keep].copy()
    place = positions.iloc[rows[keep]]
    spots.obs["array_x"], spots.obs["array_y"] = place["array_x"].to_numpy(), place["array_y"].to_numpy()
    spots.obsm["spatial"] = place[["pixel_x", "pixel_y"]].to_numpy(np.float64)
    return spots


def _judge(
    n_joined: int, n_counts: int, n_positions: int, counts: ad.AnnData, positions: pd.DataFrame, where: str
) -> None:
    """Say, or refuse, what a join leaves over."""
    lost_counts, lost_positions = n_counts - n_joined, n_positions - n_joined
    share = max(lost_counts / max(n_counts, 1), lost_positions / n_positions)
    if share >= MOST_SHARE:
        raise InputError(
            f"{where}: {n_joined} spots would be joined of {n_counts} with counts (like {counts.obs_names[0]}) and "
            f"{n_positions} with a position on tissue (like {positions.index[0]}), which drops half of one side or "
            f"more; are they of the same section? Spots that are to be left out can be listed with in_tissue or "
            f"selected 0"
        )
    if lost_counts or lost_positions:
        log.log(
            logging.WARNING if share > WARN_SHARE else logging.INFO,
            "%s: %d spots joined; left over: %d counts without a position, %d positions without counts",
            where,
            n_joined,
            lost_counts,
            lost_positions,
        )


def _match(counts: pd.Index, positions: pd.Index, in_tissue: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Row of `positions` of each count, -1 where there is none, and which counts are of this sample."""
    exact = positions.get_indexer(counts)
    is_own = np.ones(len(counts), dtype=bool)
    if (exact >= 0).all() and _are_bins(counts) and _are_bins(positions):
        return exact, is_own  # what follows takes minutes for millions of them
    tags, places = split_ids(counts)
    position_tags, position_places = split_ids(positions)
    if position_places.duplicated().any():
        raise InputError(
            f"{where}: the positions are of several samples ({_counted(position_tags)}); those of one would fit"
        )
    if places.duplicated().any():
        tag = _own_tag(tags, places, position_tags, position_places, in_tissue, where)
        is_own = np.array([other == tag for other in tags])
        rows = np.where(is_own, position_places.get_indexer(places), -1)
        return rows, is_own
    if (exact >= 0).any():
        return exact, is_own
    rows = position_places.get_indexer(places)
    if not (rows >= 0).any():
        raise InputError(
            f"{where}: counts and positions have no spot id in common: {len(counts)} ids like {listed(counts[:1])} in "
            f"the counts, {len(positions)} like {listed(positions[:1])} in the positions"
        )
    _check_same_sample(counts, positions, tags, position_tags, rows, in_tissue, where)
    return rows, is_own


def _are_bins(names: pd.Index) -> bool:
    """Whether all ids begin and end as bins of one section of Visium HD do."""
    return {(name[:2], name[-2:]) for name in names} == {("s_", "-1")}


def _check_same_sample(
    counts: pd.Index,
    positions: pd.Index,
    tags: list[tuple[str, str]],
    position_tags: list[tuple[str, str]],
    rows: np.ndarray,
    in_tissue: np.ndarray,
    where: str,
) -> None:
    """Refuse ids that agree only without prefix and suffix, unless one side names no sample and all places agree."""
    n_joined = int(in_tissue[rows[rows >= 0]].sum())
    n_counts = len(counts) - int((~in_tissue[rows[rows >= 0]]).sum())
    lost = 1 - n_joined / max(n_counts, int(in_tissue.sum()))
    both_stated = not set(tags) <= DEFAULTS and not set(position_tags) <= DEFAULTS
    if both_stated or lost > WARN_SHARE:
        raise InputError(
            f"{where}: counts are named like {counts[0]}, positions like {positions[0]}; {n_joined} of {len(counts)} "
            f"counts and {int(in_tissue.sum())} positions agree but for what stands before or after, which is no "
            f"proof: all slides of a kind have the same barcodes. The same names on both sides would fit"
        )
    log.warning(
        "%s: ids of the counts (%s) and of the positions (%s) are joined without what stands before and after",
        where,
        counts[0],
        positions[0],
    )


def _own_tag(
    tags: list[tuple[str, str]],
    places: pd.Index,
    position_tags: list[tuple[str, str]],
    position_places: pd.Index,
    in_tissue: np.ndarray,
    where: str,
) -> tuple[str, str]:
    """Prefix and suffix of the sample, among several in the counts, that the positions are of."""
    stated = set(position_tags) - DEFAULTS
    if len(set(position_tags)) == 1 and stated and stated <= set(tags):
        return stated.pop()
    on_tissue = set(position_places[in_tissue])
    of_tag: dict[tuple[str, str], set[str]] = {}
    for tag, place in zip(tags, places, strict=True):
        of_tag.setdefault(tag, set()).add(place)
    # SpaceRanger counts all spots on tissue, so that the counts of another section have some elsewhere
    possible = [tag for tag, own in of_tag.items() if own <= on_tissue]
    if len(possible) != 1 or of_tag[possible[0]] != on_tissue:
        example = "".join((position_tags[0][0], position_places[0], position_tags[0][1]))
        raise InputError(
            f"{where}: the counts are of several samples ({_counted(tags)}), and nothing says which of them the "
            f"{len(on_tissue)} positions on tissue (like {example}) are of; counts of one sample, or positions named "
            f"like one of them, would fit"
        )
    log.warning(
        "%s: the counts are of several samples (%s); those of %s are taken: they alone have exactly the places of the "
        "positions",
        where,
        _counted(tags),
        _shown(possible[0]),
    )
    return possible[0]


def split_ids(names: pd.Index) -> tuple[list[tuple[str, str]], pd.Index]:
    """(prefix, suffix) of each id, and the place on the array that it names; an id of another kind is its place."""
    tags, places = [], []
    for name in names:
        match = PLACE.fullmatch(name)
        tags.append((match[1], match[3]) if match else ("", ""))
        places.append(match[2] if match else name)
    return tags, pd.Index(places, dtype=object)


def _counted(tags: list[tuple[str, str]]) -> str:
    n = pd.Series([_shown(tag) for tag in tags]).value_counts(sort=False)
    return ", ".join(f"{tag}: {count}" for tag, count in n.items())


def _shown(tag: tuple[str, str]) -> str:
    return "...".join(tag) if any(tag) else "without a suffix"
