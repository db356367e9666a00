"""When not to trust a prediction: learnt when a run is exported, said of every slide that is predicted."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import torch

from stexp.data.slides.stain import measured_tiles
from stexp.inference import intervals as conformal
from stexp.inference import out_of_distribution, slide_checks
from stexp.inference.out_of_distribution import KnownTiles

if TYPE_CHECKING:
    from stexp.data.slides.slide import Slide
    from stexp.inference.trained import TrainedMethod
    from stexp.runs.finished import Run

log = logging.getLogger(__name__)


def learn(
    runs: list[Run], model: TrainedMethod, genes: list[str], alpha: float | None
) -> tuple[dict, pd.DataFrame, KnownTiles | None]:
    """Intervals from the held-out spots of `runs`; what the training tiles of the first look like.

    Parameters
    ----------
    model
        The first run as it is exported.
    alpha
        Share of spots outside of an interval; None: no intervals.

    Returns
    -------
    dict
        For ``model.json``: ``interval`` and ``known_tiles`` (None where there are none), ``looks`` of the sections.
    DataFrame
        Index `genes`, see :func:`stexp.inference.intervals.calibrate`; without columns where there are no intervals.
    KnownTiles or None
    """
    interval, table = None, pd.DataFrame(index=pd.Index(genes, name="gene"))
    if alpha is not None:
        table, interval = conformal.calibrate(runs, genes, alpha)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    known, about = out_of_distribution.learn(runs[0], model, device)
    model.to(torch.device("cpu"))
    return {"interval": interval, "known_tiles": about, "looks": _looks(runs[0])}, table, known


def _looks(source: Run) -> dict[str, dict]:
    data = source.data
    data.setup()
    stores = iter(data.bank.stores)
    tiles = {section.name: next(stores) for section in data.sections if section.slide is not None}
    looks = {}
    for section in data.sections:
        roles = data.spots["role"].to_numpy()[data.spots["section"] == section.name]
        rows = np.flatnonzero(np.isin(roles, ("train", "validation")))
        if len(rows):
            some = np.stack([np.asarray(tiles[section.name][row]) for row in rows[measured_tiles(len(rows))]])
            um = section.um_per_px and section.um_per_px * data.tile.side_px(section) / data.tile.px
            looks[section.name] = slide_checks.look(some, um)
    return looks


def add(
    adata: ad.AnnData,
    facts: dict,
    genes: pd.DataFrame,
    known: KnownTiles | None,
    tiles: Mapping[int, np.ndarray],
    slide: Slide,
    um: float | None,
    side_px: int,
) -> None:
    """Put into a prediction what is known of its worth.

    ``layers["lower"]``, ``layers["upper"]``; ``var["coverage_measured"]`` and ``var["interval_halfwidth"]``, its
    median over spots; ``obs["ood_distance"]``, ``obs["ood_percentile"]`` (0..1), ``obs["out_of_distribution"]``;
    and in ``uns["stexp"]`` the JSON texts ``interval``, ``checks``, and the sentence ``verdict``.

    Parameters
    ----------
    genes
        Of the model, with :data:`stexp.inference.intervals.COLUMNS` where it has intervals.
    tiles
        Some tiles of the slide, as they are.
    um, side_px
        Micrometres per level-0 pixel, and the side of a tile in these.
    """
    about = adata.uns["stexp"]
    about["interval"] = json.dumps(facts["interval"])
    if facts["interval"] is None:
        log.info("the model was exported without intervals")
    else:
        with_spread = facts["interval"]["spread"]
        here = genes.loc[adata.var_names]
        lower, upper = conformal.interval(adata.layers["predicted"], adata.layers["uncertainty"], here, with_spread)
        adata.layers["lower"], adata.layers["upper"] = lower, upper
        adata.var = adata.var.drop(columns=["interval_quantile", "interval_offset"])
        adata.var["interval_halfwidth"] = np.median(upper - lower, axis=0) / 2
    checks = slide_checks.judge(
        slide_checks.look(np.stack(list(tiles.values())), um and um * side_px / facts["tile"]["px"]),
        list(facts["looks"].values()),
        um=um,
        stated=slide.um_per_px,
        side_px=side_px,
        tile=facts["tile"],
        normalised=facts["stain"] is not None,
    )
    if known is None:
        log.info("%s embeds no tiles: whether they are like those of training is not said", facts["method"])
    else:
        limit = facts["known_tiles"]["limit"]
        distance, percentile = known.score(adata.obsm["image_embedding"])
        adata.obs["ood_distance"], adata.obs["ood_percentile"] = distance, percentile
        adata.obs["out_of_distribution"] = percentile > limit
        share = float((percentile > limit).mean())
        checks.append(slide_checks.strange(share, facts["known_tiles"]["held_out_share"]))
    about["checks"], about["verdict"] = json.dumps(checks), slide_checks.conclude(checks)


def lines(facts: dict) -> list[str]:
    """What an exported model knows of its own worth, for the terminal."""
    out, interval, known = [], facts["interval"], facts["known_tiles"]
    if interval is None:
        out.append("intervals: none (alpha=null)")
    elif interval["coverage"] is None:
        out.append(f"intervals: {interval['n_spots']} held-out spots are too few to say how often they hold")
    else:
        groups = [value for value in interval["coverage_by_group"].values() if value is not None]
        out.append(
            f"intervals of {1 - interval['alpha']:.0%}: {interval['coverage']:.1%} of held-out values inside "
            f"({min(groups):.1%} to {max(groups):.1%} by group), {interval['note']}"
        )
    if known is None:
        out.append("unlike training: not said, the method embeds no tiles")
    else:
        out.append(
            f"unlike training: {known['held_out_share']:.1%} of held-out tiles lie farther from it than "
            f"{known['limit']:.0%} of its {known['spots']} tiles lie from those of another {known['apart']}"
        )
    return [f"  {line}" for line in out]
