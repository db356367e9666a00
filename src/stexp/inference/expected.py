"""How well a run predicted each gene of its held-out sections, beside the floors: what to expect on a new slide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stexp.data.datamodule import SpotDataModule
from stexp.evaluation import predictions
from stexp.evaluation.floors import ORACLES, by_floor
from stexp.evaluation.metrics import pearson_per_gene
from stexp.inference.any_gene import AnyGene, Inputs
from stexp.inference.intervals import PATIENTS
from stexp.models.method import Prediction
from stexp.runs.comparison import floors_under
from stexp.runs.finished import FinishedRun

log = logging.getLogger(__name__)

AT_ONCE = 2048  # genes outside the panel


@dataclass(frozen=True)
class Accuracy:
    """Of one held-out section.

    Parameters
    ----------
    section
        Its name, of a run whose blocks are held out with the block.
    patient
    pearson
        Index gene; ``pearson`` of the method, then a column a floor. NaN where a gene does not vary.
    """

    section: str
    patient: str
    pearson: pd.DataFrame


def measure_accuracy(runs: Sequence[FinishedRun], genes: list[str], beyond: Sequence[AnyGene | None]) -> list[Accuracy]:
    """Accuracy of the method and of the floors, oracles aside, in every held-out section of some runs.

    Parameters
    ----------
    beyond
        What predicts genes outside the panel of each run; None: nothing does.
    """
    accuracies = []
    for run, of_run in zip(runs, beyond, strict=True):
        tables = _of_panel(run)
        outside = [] if of_run is None else _outside(run, genes)
        inputs = of_run.inputs() if of_run is not None and outside else None
        for start in range(0, len(outside), AT_ONCE):
            part = outside[start : start + AT_ONCE]
            log.info("accuracy of genes outside the panel: %d of %d", start + len(part), len(outside))
            assert of_run is not None and inputs is not None  # there are genes outside
            of_part = _predicted(run, run.serve(part), of_run.predict, inputs)
            tables = {name: pd.concat([tables[name], table]) for name, table in of_part.items()}
        suffix = f" ({run.fold})" if run.protocol.hold_out == "block" else ""
        patient_of = dict(zip(run.predictions.obs["section"], run.predictions.obs["patient"], strict=True))
        accuracies += [Accuracy(name + suffix, str(patient_of[name]), table) for name, table in tables.items()]
    return accuracies


def expect(accuracies: Sequence[Accuracy], genes: list[str]) -> pd.DataFrame:
    """What to expect of every gene: its mean over held-out sections.

    Returns
    -------
    DataFrame
        Index `genes`. ``expected_pearson``; ``expected_floor``, that of the floor which is best for the gene, and
        ``expected_floor_name``; ``beats_floor``, NA where fewer than `PATIENTS` patients were held out that say so;
        ``n_held_out_sections`` in which the gene varied. NaN and an empty name where nothing is known.

    Notes
    -----
    The best floor is chosen per gene on the same spots, which favours the floor. Ridge floors of genes outside the
    panel share their penalty with up to 2,047 others; of ``consensus`` they are without the floor of random features.
    """
    mean = _mean(accuracies, genes)
    floors = mean.drop(columns="pearson")
    measured = floors.notna().any(axis=1)
    out = pd.DataFrame({"expected_pearson": mean["pearson"], "expected_floor": floors.max(axis=1)}, index=mean.index)
    out["expected_floor_name"] = ""
    out.loc[measured, "expected_floor_name"] = floors[measured].idxmax(axis=1)
    beats = (out["expected_pearson"] > out["expected_floor"]).astype("boolean")
    out["beats_floor"] = beats.mask(_n_patients(accuracies, genes) < PATIENTS)
    varied = [accuracy.pearson["pearson"].reindex(genes).notna() for accuracy in accuracies]
    out["n_held_out_sections"] = np.sum(varied, axis=0).astype(int)
    return out


def reliability_of_flags(accuracies: Sequence[Accuracy], genes: list[str]) -> dict | None:
    """How often it held on a patient what the other patients said of a gene: that it beats its best floor.

    Returns
    -------
    dict or None
        ``patients``; ``flags``, that others raised for a patient, and ``held``, the share of these (0..1) where the
        gene was above the floor that the others chose; ``missed``, the same share of the genes they did not flag.
        None for fewer than `PATIENTS` patients.
    """
    patients = sorted({accuracy.patient for accuracy in accuracies})
    if len(patients) < PATIENTS:
        return None
    outcomes: dict[bool, list[bool]] = {True: [], False: []}
    for patient in patients:
        others = _mean([each for each in accuracies if each.patient != patient], genes)
        own = _mean([each for each in accuracies if each.patient == patient], genes)
        floors = others.drop(columns="pearson")
        measured = others["pearson"].notna() & own["pearson"].notna() & floors.notna().any(axis=1)
        best = floors[measured].idxmax(axis=1)
        floor = np.array([own.at[gene, name] for gene, name in best.items()])
        flagged = (others["pearson"] > floors.max(axis=1))[measured].to_numpy()
        above = own["pearson"][measured].to_numpy() > floor
        for flag in outcomes:
            outcomes[flag] += above[flagged == flag].tolist()
    shares = {flag: round(float(np.mean(values)), 4) if values else None for flag, values in outcomes.items()}
    return {"patients": len(patients), "flags": len(outcomes[True]), "held": shares[True], "missed": shares[False]}


def _mean(accuracies: Sequence[Accuracy], genes: list[str]) -> pd.DataFrame:
    """Over sections, NaN left out; index `genes`."""
    tables = [accuracy.pearson.reindex(genes) for accuracy in accuracies]
    return pd.concat(tables, keys=range(len(tables))).groupby(level=1, sort=False).mean().reindex(genes)


def _n_patients(accuracies: Sequence[Accuracy], genes: list[str]) -> np.ndarray:
    """In how many patients each gene was measured, (len(genes),)."""
    measured: dict[str, np.ndarray] = {}
    for accuracy in accuracies:
        varied = accuracy.pearson["pearson"].reindex(genes).notna().to_numpy()
        measured[accuracy.patient] = varied | measured.get(accuracy.patient, False)
    return np.sum(list(measured.values()), axis=0)


def _of_panel(run: FinishedRun) -> dict[str, pd.DataFrame]:
    own = f"{run.protocol.name}:"
    floors = predictions.read(run.folder.path / "floors.h5ad", f"layers/{own}mean")
    layers = {key.removeprefix(own): floors.layers[key] for key in floors.layers if key.startswith(own)}
    section, scored = run.predictions.obs["section"].to_numpy(str), run.predictions.layers
    return _per_section(section, run.panel, scored["observed"], scored["predicted"], layers)


def _outside(run: FinishedRun, genes: list[str]) -> list[str]:
    """Genes outside the panel that can be retrieved and scored."""
    if run.protocol.truth != "gene" and run.protocol.library == "panel":
        log.warning("libraries are those of the panel: the accuracy of genes outside it is not measured")
    return run.outside_panel(genes)


def _predicted(
    run: FinishedRun, data: SpotDataModule, predict: Callable[[SpotDataModule], Prediction], inputs: Inputs
) -> dict[str, pd.DataFrame]:
    features, colour, random = inputs
    floors = floors_under(run.protocol, data, features, colour, random)
    section, predicted = run.predictions.obs["section"].to_numpy(str), predict(data).predicted.numpy()
    return _per_section(section, data.panel, data.target[data.rows("test")], predicted, floors)


def _per_section(
    section: np.ndarray,
    genes: list[str],
    observed: np.ndarray,
    predicted: np.ndarray,
    floors: Mapping[str, np.ndarray],
) -> dict[str, pd.DataFrame]:
    """Pearson of the method and of the floors, a table of genes for each held-out section."""
    columns = {"pearson": predicted, **{name: values for name, values in floors.items() if name not in ORACLES}}
    tables = {}
    for name in pd.unique(section):
        rows = section == name
        pearson = {key: pearson_per_gene(observed[rows], np.asarray(values)[rows]) for key, values in columns.items()}
        over_seeds = {
            key: np.mean([pearson[seed] for seed in seeds], axis=0) for key, seeds in by_floor(pearson).items()
        }
        tables[name] = pd.DataFrame(over_seeds, index=pd.Index(genes, name="gene"))
    return tables
