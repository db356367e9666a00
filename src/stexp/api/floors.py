"""``stexp.floors``: what a method has to beat on the held-out spots of a fold, and what counting noise allows."""

from __future__ import annotations

import anndata as ad
import pandas as pd

from stexp.api.data import SpotDataModule
from stexp.api.score import ranked
from stexp.api.typed import typed
from stexp.data.rows import column_means, some_rows
from stexp.evaluation import predictions
from stexp.evaluation.score import score_under
from stexp.runs.comparison import TRAINING, ceilings_under, colours, floors_under, random_components
from stexp.runs.results import levels


@typed
def floors(data: SpotDataModule) -> pd.DataFrame:
    """Score simple predictors on the held-out spots, without training anything.

    Parameters
    ----------
    data
        One fold; its image encoder computes the features of three of the floors.

    Returns
    -------
    DataFrame
        Index ``name``; ``kind``: ``ceiling`` (what counting noise allows), ``floor``, or ``oracle`` (reads the counts
        of the test spots); and the scores of :attr:`stexp.api.score.Score.table`.

    Examples
    --------
    >>> stexp.floors(data)[["kind", "pearson_acg"]]
    """
    protocol, test, train = data.protocol, data.rows("test"), data.rows(*TRAINING)
    random = random_components(data)
    layers = floors_under(protocol, data, data.tile_features, colours(data), random)
    ceiling = ceilings_under(protocol, data)
    observed = predictions.make_predictions(
        data.spots.iloc[test],
        data.panel,
        observed=data.target[test],
        predicted=layers["mean"],
        counts=data.counts[test],
        xy_px=data.xy_px[test],
        mean_train=column_means(some_rows(levels(data), train)),
    )
    kept = ad.AnnData(obs=observed.obs, var=observed.var, uns={"ceiling": {protocol.name: ceiling}})
    for name, values in layers.items():
        kept.layers[f"{protocol.name}:{name}"] = values
    means, _ = score_under(protocol, protocol, observed, kept)
    table = ranked("", means)
    return table[table["kind"] != "method"]
