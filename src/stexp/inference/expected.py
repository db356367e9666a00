"""How well a run predicted each gene of its held-out sections, beside the floors: what to expect on a new slide."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stexp.evaluation import predictions
from stexp.evaluation.floors import ORACLES
from stexp.evaluation.metrics import pearson_per_gene
from stexp.runs.results import floors_under

if TYPE_CHECKING:
    from stexp.runs.finished import Run

log = logging.getLogger(__name__)

AT_ONCE = 2048  # genes outside the panel


def expected_accuracy(runs: list[Run], genes: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Mean accuracy of every gene over the held-out sections of some runs.

    Genes outside a run's panel are retrieved from its embeddings.

    Returns
    -------
    DataFrame
        Index `genes`. ``expected_pearson``; ``expected_floor``, that of the floor which is best for the gene (oracles
        aside), and ``expected_floor_name``; ``beats_floor``; ``n_held_out_sections`` in which the gene varied. NaN,
        an empty name and False where nothing is known.
    list of str
        The held-out sections, of a run whose blocks are held out with the block.

    Notes
    -----
    The best floor is chosen per gene on the same spots, which favours the floor. Ridge floors of genes outside the
    panel share their penalty with up to 2,047 others.
    """
    tables: dict[str, pd.DataFrame] = {}
    for run in runs:
        of_run = _of_panel(run)
        outside = _outside(run, genes)
        for start in range(0, len(outside), AT_ONCE):
            part = outside[start : start + AT_ONCE]
            log.info("accuracy of genes outside the panel: %d of %d", start + len(part), len(outside))
            of_run = {name: pd.concat([of_run[name], table]) for name, table in _retrieved(run, part).items()}
        suffix = f" ({run.before.uns['stexp']['fold']})" if run.protocol.hold_out == "block" else ""
        tables |= {name + suffix: table for name, table in of_run.items()}
    stacked = pd.concat([table.reindex(genes) for table in tables.values()], keys=range(len(tables)))
    mean = stacked.groupby(level=1, sort=False).mean()  # leaves out NaN
    floors = mean.drop(columns="pearson")
    known = floors.notna().any(axis=1)
    out = pd.DataFrame({"expected_pearson": mean["pearson"], "expected_floor": floors.max(axis=1)}, index=mean.index)
    out["expected_floor_name"] = ""
    out.loc[known, "expected_floor_name"] = floors[known].idxmax(axis=1)
    out["beats_floor"] = (out["expected_pearson"] > out["expected_floor"]).to_numpy(bool)
    out["n_held_out_sections"] = stacked["pearson"].notna().groupby(level=1, sort=False).sum().astype(int)
    return out, list(tables)


def _of_panel(run: Run) -> dict[str, pd.DataFrame]:
    own = f"{run.protocol.name}:"
    floors = predictions.read(run.folder / "floors.h5ad", f"layers/{own}mean")
    layers = {key.removeprefix(own): floors.layers[key] for key in floors.layers if key.startswith(own)}
    return _per_section(run, run.panel, run.before.layers["observed"], run.before.layers["predicted"], layers)


def _outside(run: Run, genes: list[str]) -> list[str]:
    """Genes outside the panel that can be retrieved and scored."""
    if run.kept is None:
        return []
    if run.protocol.truth == "spot" and run.protocol.library == "panel":
        log.warning("libraries are those of the panel: the accuracy of genes outside it is not measured")
        return []
    return run.outside(genes)


def _retrieved(run: Run, genes: list[str]) -> dict[str, pd.DataFrame]:
    data, predicted, _ = run.retrieve(genes)
    floors, _ = floors_under(run.protocol, data, run.kept.obsm["features"], run.kept.obsm["colour"])
    return _per_section(run, genes, data.target[data.rows("test")], predicted, floors)


def _per_section(
    run: Run, genes: list[str], observed: np.ndarray, predicted: np.ndarray, floors: dict[str, np.ndarray]
) -> dict[str, pd.DataFrame]:
    """Pearson of the method and of the floors, a table of genes for each held-out section."""
    section, tables = run.before.obs["section"].to_numpy(str), {}
    columns = {"pearson": predicted, **{name: values for name, values in floors.items() if name not in ORACLES}}
    for name in pd.unique(section):
        here = section == name
        tables[name] = pd.DataFrame(
            {key: pearson_per_gene(observed[here], np.asarray(values)[here]) for key, values in columns.items()},
            index=pd.Index(genes, name="gene"),
        )
    return tables
