"""``stexp.compare``: paired differences of scores over sections and patients."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from stexp.api.score import Score
from stexp.api.typed import typed
from stexp.arguments import check
from stexp.errors import InputError, did_you_mean
from stexp.evaluation.metrics import SCORES
from stexp.reporting.tables import tabulate
from stexp.runs.scored import read_scored_run


@typed
def compare(scores: Sequence[Score], metric: str = "pearson_acg", baseline: str | None = None) -> pd.DataFrame:
    """Differences of methods over the same held-out sections, with interval and test.

    Parameters
    ----------
    scores
        Of one data set and protocol. Scores of one name are folds and seeds of one method.
    metric
        ``pearson_acg``, ``pearson_heg50``, ``mse`` or another column of :attr:`Score.table`.
    baseline
        Name of the method, or of a floor such as ``"colour ridge"``, that the others are held against; None: the
        method of the last score.

    Returns
    -------
    DataFrame
        A row for each other method: ``difference`` (method less baseline, mean over sections), ``low`` and ``high`` of
        its 95 % interval (NaN where nothing can be resampled), ``over_patients``: whether it covers other patients,
        ``p`` of a sign-flip test and ``p_holm``, corrected for all rows, and what they are over.

    Raises
    ------
    InputError
        Fewer than two methods, and scores of other sections, spots or genes.

    Examples
    --------
    >>> stexp.compare([ours.score, theirs])
    >>> stexp.compare([model.score], baseline="colour ridge")
    >>> stexp.compare([stexp.Score("runs/stnet-B"), stexp.Score("runs/mine-B")], metric="pearson_heg50")
    """
    if not scores or not all(isinstance(score, Score) for score in scores):
        raise InputError("scores: a list of those of stexp.evaluate or model.score would fit")
    check("metric", metric, str)
    if metric not in SCORES:
        raise InputError(f"metric={metric}: choose {', '.join(SCORES)}{did_you_mean(metric, SCORES)}")
    names = list(dict.fromkeys(score.name for score in scores))
    if len(names) == 1 and baseline is None:
        raise InputError(
            f"scores are all of {names[0]}; another method's, or baseline= with the name of a floor, would fit"
        )
    runs = [read_scored_run(score.folder) for score in scores]
    kinds = {(run.metrics["data"], run.scored_as) for run in runs}
    if len(kinds) > 1:
        raise InputError(f"scores are of different data or protocols: {', '.join(sorted(map(' '.join, kinds)))}")
    folds = {run.fold for run in runs}
    for name in names:
        own = {run.fold for run, score in zip(runs, scores, strict=True) if score.name == name}
        if own != folds:
            raise InputError(
                f"scores of {name} are of fold {', '.join(sorted(own))}, others of {', '.join(sorted(folds - own))}; "
                f"scores of the same folds would fit"
            )
    title = " ".join(next(iter(kinds)))
    table = tabulate(title, runs, metric, baseline or names[-1], False, [score.name for score in scores])
    return table.comparisons.astype({"low": float, "high": float}).set_index("method")
