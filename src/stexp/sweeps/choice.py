"""The best cell of a search, fold by fold."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from typing_extensions import TypedDict  # that of typing carries no annotations before Python 3.12

from stexp.errors import InputError
from stexp.evaluation.records import Scores, read_json
from stexp.sweeps.jobs import Job

CORRELATIONS = ("pearson_acg", "pearson_heg50")


class OnTest(TypedDict):
    """What ``metrics.json`` says of the test spots as a whole."""

    scores: Scores


def choose(cells: Sequence[Job], by: str) -> pd.DataFrame:
    """The best cell of every fold by a value of ``provenance.json``, with its scores on the held-out side.

    Returns
    -------
    DataFrame
        A row for each data set, protocol, model, seed and fold: the values of the axes that were chosen, `by`,
        and ``pearson_acg`` and ``pearson_heg50`` of the test spots, which had no part in the choice.

    Raises
    ------
    InputError
        A run has no such value.
    """
    rows = []
    for job in cells:
        value = read_json(job.output_dir / "provenance.json").get(by)
        if not isinstance(value, int | float):
            raise InputError(
                f"{job.output_dir} has no {by}; protocol={job.protocol} keeps no validation spots, or "
                f"model={job.model} is a closed form, which learns from them"
            )
        scores = read_json(job.output_dir / "metrics.json", OnTest)["scores"]
        where = {"data": job.data, "protocol": job.protocol, "model": job.model, "seed": job.seed, "fold": job.fold}
        rows.append({**where, **job.cell, by: value, **{key: scores.get(key) for key in CORRELATIONS}})
    table = pd.DataFrame(rows)
    best = table.groupby(["data", "protocol", "model", "seed", "fold"], sort=False)[by].idxmax()
    return table.loc[best].reset_index(drop=True)
