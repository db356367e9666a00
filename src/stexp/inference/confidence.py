"""What is known of a prediction's worth: its interval, and how unlike training its tiles are."""

from __future__ import annotations

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd

from stexp.evaluation.verdict import best_floor, label
from stexp.inference.intervals import PATIENTS
from stexp.inference.intervals import interval as interval_of
from stexp.inference.out_of_distribution import KnownTiles

log = logging.getLogger(__name__)


def add_intervals(adata: ad.AnnData, genes: pd.DataFrame, interval: dict | None, lowest: float = 0.0) -> None:
    """Put into a prediction how far it may be off.

    ``layers["lower"]``, ``layers["upper"]``; ``var["coverage_measured"]`` and ``var["interval_halfwidth"]``, its
    median over spots; in ``uns["stexp"]`` the JSON text ``interval``.

    Parameters
    ----------
    genes
        Those of `adata`, with `CALIBRATED`.
    interval
        Of ``model.json``; None: the model was exported without.
    lowest
        That the truth can be.
    """
    adata.uns["stexp"]["interval"] = json.dumps(interval)
    if interval is None:
        log.info("the model was exported without intervals")
        return
    predicted, spread = adata.layers["predicted"], adata.layers["uncertainty"]
    lower, upper = interval_of(predicted, spread, genes, interval["spread"], lowest)
    adata.layers["lower"], adata.layers["upper"] = lower, upper
    adata.var = adata.var.drop(columns=["interval_quantile", "interval_offset"])
    adata.var["interval_halfwidth"] = np.median(upper - lower, axis=0) / 2


def add_likeness(adata: ad.AnnData, known: KnownTiles, limit: float) -> float:
    """Put into ``obs`` how far tiles lie from those of training; returns the share (0..1) of those beyond `limit`.

    ``ood_distance``, ``ood_percentile`` (0..1) and ``out_of_distribution``; see
    :class:`~stexp.inference.out_of_distribution.KnownTiles`.
    """
    distance, percentile = known.score(adata.obsm["image_embedding"])
    adata.obs["ood_distance"], adata.obs["ood_percentile"] = distance, percentile
    adata.obs["out_of_distribution"] = percentile > limit
    return float((percentile > limit).mean())


def worth(facts: dict) -> str:
    """What a method scored on held-out sections beside its best floor, in a sentence; empty where none is on record.

    Parameters
    ----------
    facts
        ``model.json``; those of earlier versions hold no scores.
    """
    runs = [(run, floor) for run in facts.get("scores", []) if (floor := best_floor(run)) is not None]
    runs = [(run, floor) for run, floor in runs if run["scores"].get("pearson_acg") is not None]
    if not runs:
        return ""
    own = float(np.mean([run["scores"]["pearson_acg"] for run, _ in runs]))
    beside = float(np.mean([run["floors"][floor]["pearson_acg"] for run, floor in runs]))
    names = " and ".join(dict.fromkeys(label(floor) for _, floor in runs))
    relation = "above" if own > beside else "not above"
    folds = "1 fold is" if len(runs) == 1 else f"{len(runs)} folds are"
    few = f"; {folds} too few to call that a win" if own > beside and len(runs) < PATIENTS else ""
    return f"On held-out sections the model scored {own:.3f}, {relation} its best floor ({names}, {beside:.3f}){few}."


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
    flags = facts["expected"].get("flags")
    if flags is None:
        out.append(f"beats its floor: not said of any gene, it takes {PATIENTS} held-out patients (folds=)")
    elif flags["held"] is None:
        out.append(f"beats its floor: no gene, between {flags['patients']} patients")
    else:
        out.append(
            f"beats its floor: said of a gene by {flags['patients'] - 1} patients, it held on the next in "
            f"{flags['held']:.0%} of {flags['flags']} cases"
        )
    if known is None:
        out.append("unlike training: not said, the method embeds no tiles")
    else:
        out.append(
            f"unlike training: {known['held_out_share']:.1%} of held-out tiles lie farther from it than "
            f"{known['limit']:.0%} of its {known['spots']} tiles lie from those of another {known['apart']}"
        )
    return [f"  {line}" for line in out]
