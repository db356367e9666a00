"""A finished run as a folder that predicts without its data."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stexp.arguments import Between, check
from stexp.data.batches import SpotIndex
from stexp.data.digests import file_digest
from stexp.data.section import Section
from stexp.data.slides.pictures import BANK_TILES, Sheet, sheet
from stexp.data.slides.stain import measured_tiles
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.evaluation.records import read_metrics
from stexp.inference import intervals, model_folder, out_of_distribution, slide_checks, training_slides
from stexp.inference.any_gene import any_gene, predict_together
from stexp.inference.description import describe_model
from stexp.inference.expected import expect, measure_accuracy, reliability_of_flags
from stexp.inference.model_facts import read_json
from stexp.inference.model_folder import ExportedModel
from stexp.inference.prototype_bank import AnyBank, PrototypeBank
from stexp.inference.references import bank_of, compress, without_references
from stexp.inference.trained import TrainedMethod
from stexp.runs.finished import FinishedRun
from stexp.runs.folder import RunFolder
from stexp.runs.tiles import tiles_of, with_image

log = logging.getLogger(__name__)


CHECKED = 512  # held-out spots that an exported model must predict as its run did
ALIKE = 0.1  # of the standard deviation of the predictions: more than precision explains
AT_ONCE = 64  # tiles


def exported_run(run: Path) -> Path:
    """``<run>/model.stexp``, exported first where it is not there, or of an earlier training or format."""
    folder = run / "model.stexp"
    if (folder / "model.json").is_file():
        facts, checkpoint = read_json(folder / "model.json"), RunFolder(run).checkpoint
        trained = facts.get("trained") if facts.get("format") == model_folder.FORMAT else None
        if isinstance(trained, dict) and trained.get("checkpoint") == file_digest(checkpoint):
            return folder  # what is wrong with it otherwise is said where it is read
    log.info("%s is exported to %s", run, folder)
    export(run, folder)
    return folder


def export(
    run: Path,
    output: Path,
    bank: str = "float32",
    prototypes: int | None = None,
    folds: list[str] | None = None,
    alpha: float | None = 0.1,
    sections: list[Section] | None = None,
) -> dict:
    """Write a finished run as a folder that :func:`stexp.load_model` reads.

    Parameters
    ----------
    run
        Its data must still be there.
    bank
        ``float32``, or ``float16``: half the space for the embeddings of the references.
    prototypes
        Keep only so many references: those nearest to the centres of as many clusters of their embeddings.
    folds
        Further runs of the same method, whose held-out sections count for the accuracy to expect of a gene and for
        intervals.
    alpha
        Share of spots that may lie outside of an interval, see
        :func:`stexp.inference.intervals.calibrate`; None: none. A compressed bank keeps the intervals of the full one.
    sections
        All sections of the run's data set, where they are at hand; None: they are read again.

    Returns
    -------
    dict
        ``model.json``. What compressing the bank costs stands under ``bank``.

    Raises
    ------
    InputError
        The run is not finished, its data changed, or its method needs more than tiles; or the exported model does
        not predict the held-out spots as the run did.
    """
    if bank not in ("float32", "float16"):
        raise InputError(f"bank={bank}: choose float32 or float16")
    check("alpha", alpha, Between | None)
    source = FinishedRun(RunFolder(run), sections)
    runs = [source, *(FinishedRun(RunFolder(Path(fold))) for fold in folds or [])]
    _check_folds(runs)
    facts, weights = describe_model(source)
    references = bank_of(source, weights)
    if references is None and (bank != "float32" or prototypes is not None):
        raise InputError(f"{facts['method']} does not retrieve: it has no bank to compress")
    model = TrainedMethod(facts, weights, references)
    if references is not None:
        weights = without_references(weights)
    facts["reproduces"] = _check(source, model)
    facts["exported"] = _exported_as([run.folder for run in runs], bank, prototypes, alpha)

    worth, genes = _worth(runs, source.panel if references is None else references.genes, alpha)
    facts |= worth
    facts["scores"] = [_scores(each) for each in runs]
    known, facts["known_tiles"] = _known_tiles(source, model)
    facts["looks"] = _looks(source)
    if references is not None:
        spots = len(references)  # unless prototypes stand for more
        if isinstance(references, PrototypeBank):
            spots = len(source.references(source.for_retrieval[1].reference))
        facts["bank"] = {"spots": len(references), "of": spots, "embedding": bank}
        if bank != "float32" or prototypes is not None:
            references = compress(references, bank, prototypes)
            loss = _loss(source, model, TrainedMethod(facts, weights, references))
            facts["bank"] |= {"spots": len(references), "loss": loss}
    output.parent.mkdir(parents=True, exist_ok=True)
    tiles = None if references is None else _tiles(source, references)
    facts["digest"] = model_folder.write(output, ExportedModel(facts, weights, references, genes, tiles, known), bank)
    return facts


def finished_export(
    run: Path,
    output: Path,
    bank: str = "float32",
    prototypes: int | None = None,
    folds: list[str] | None = None,
    alpha: float | None = 0.1,
) -> dict | None:
    """``model.json`` of a whole folder that `export` wrote with these arguments; None where there is another or none.

    What a killed export left beside it is deleted.
    """
    if not (output / "model.json").is_file():
        return None
    folders = [RunFolder(run), *(RunFolder(Path(folder)) for folder in folds or [])]
    facts = read_json(output / "model.json")
    if facts.get("exported") != _exported_as(folders, bank, prototypes, alpha):
        return None
    model_folder.clean(output)
    return model_folder.read(output).facts


def _exported_as(folders: Sequence[RunFolder], bank: str, prototypes: int | None, alpha: float | None) -> dict:
    """What tells one export from another: the checkpoints of its runs, and its options; plain values."""
    checkpoints = [file_digest(folder.checkpoint) for folder in folders]
    return {"checkpoints": checkpoints, "bank": bank, "prototypes": prototypes, "alpha": alpha}


def _worth(runs: Sequence[FinishedRun], genes: list[str], alpha: float | None) -> tuple[dict, pd.DataFrame]:
    """What the held-out sections of some runs say of the accuracy to expect, and of intervals.

    Returns
    -------
    dict
        ``expected`` and ``interval`` of ``model.json``.
    DataFrame
        ``genes.csv``.
    """
    source = runs[0]
    beyond = [any_gene(run) for run in runs]
    accuracies = measure_accuracy(runs, genes, beyond)
    table = pd.DataFrame({"in_panel": pd.Index(genes).isin(source.panel)}, index=pd.Index(genes, name="gene"))
    table = table.join(expect(accuracies, genes))
    expected = {
        "runs": [run.folder.path.resolve().name for run in runs],
        "sections": [accuracy.section for accuracy in accuracies],
        "flags": reliability_of_flags(accuracies, genes),
    }
    if alpha is None:
        return {"expected": expected, "interval": None}, table

    def held_out(part: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        both = zip(runs, beyond, strict=True)
        of_runs = (run.held_out(part, None if outside is None else outside.predict) for run, outside in both)
        observed, predicted, spread = zip(*of_runs, strict=True)
        return np.concatenate(observed), np.concatenate(predicted), np.concatenate(spread)

    with_spread = all(np.isfinite(run.predictions.layers["uncertainty"]).all() for run in runs)
    quantiles, interval = intervals.calibrate(held_out, genes, source.panel, _groups(runs), alpha, with_spread)
    return {"expected": expected, "interval": interval}, table.join(quantiles)


def _scores(run: FinishedRun) -> dict:
    """What a run scored on its held-out sections, with floors and ceiling; plain values."""
    metrics = read_metrics(run.folder.path)
    return {
        "protocol": run.protocol.name,
        "fold": run.fold,
        "scores": metrics["scores"],
        "floors": metrics["floors"],
        "ceiling": metrics["ceiling"],
        "n_spots": metrics["n_spots"],
        "n_genes": metrics["n_genes"],
    }


def _groups(runs: Sequence[FinishedRun]) -> intervals.Groups:
    patients, sections, places = [], [], []
    for run in runs:
        # blocks of a section are held out by several runs
        suffix = f" ({run.fold})" if run.protocol.hold_out == "block" else ""
        patients.append(run.predictions.obs["patient"].to_numpy(str))
        sections.append(np.char.add(run.predictions.obs["section"].to_numpy(str), suffix))
        places.append(run.predictions.obsm["spatial"])
    patient, section, xy_px = (np.concatenate(each) for each in (patients, sections, places))
    return intervals.group_spots(patient, section, xy_px, runs[0].protocol.hold_out)


def _known_tiles(source: FinishedRun, model: TrainedMethod) -> tuple:
    data, device = source.data, torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def embed(rows: np.ndarray) -> np.ndarray | None:
        arrays = _encode(source, model, rows, device)
        return arrays.get("image_embedding")

    model.to(device)
    learnt = out_of_distribution.learn(
        embed, data.spots, data.xy_px, data.rows("train", "validation"), data.rows("test")
    )
    model.to(torch.device("cpu"))
    return learnt


def _looks(source: FinishedRun) -> dict[str, dict]:
    """What the sections that trained or validated look like, by name."""
    data, looks = source.data, {}
    bank = data.open_tiles()
    trained = data.spots["role"].isin(("train", "validation")).to_numpy()
    with_image = [section for section in data.sections if section.slide is not None]
    for section, tiles in zip(with_image, bank.stores, strict=True):
        rows = np.flatnonzero(trained[data.rows_of(section)])
        if len(rows):
            some = np.stack([np.asarray(tiles[row]) for row in rows[measured_tiles(len(rows))]])  # colours as they are
            um = section.um_per_px and section.um_per_px * data.tile.side_px(section) / data.tile.px
            look = slide_checks.look(some, um)
            looks[section.name] = look | {"thumbnail": training_slides.fingerprint(section.image)}
    return looks


def _tiles(source: FinishedRun, references: AnyBank) -> Sheet | None:
    """Small tiles of the references that have an image, of every so many-th where they are very many.

    That of a prototype is the tile nearest to it.
    """
    names = references.spots().index
    if isinstance(references, PrototypeBank):
        named = source.named_prototypes(source.references(source.for_retrieval[1].reference))
        assert named is not None  # of a run whose bank is one of prototypes
        rows = named["row"].to_numpy()
    else:
        rows = source.data.spots.index.get_indexer(names)
    shown = np.flatnonzero(with_image(source.data)[rows] & (rows >= 0))
    shown = shown[:: max(1, math.ceil(len(shown) / BANK_TILES))]
    return sheet(list(names[shown]), tiles_of(source.data, rows[shown])) if len(shown) else None


def _encode(
    source: FinishedRun, model: TrainedMethod, rows: np.ndarray, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """What the model makes of the tiles of the data's spots `rows`."""
    made = []
    for part in np.array_split(rows, math.ceil(len(rows) / AT_ONCE)):
        batch = source.data.batch(SpotIndex(torch.from_numpy(part), image=False))
        made.append(model.encode(source.data.tiles(part, device), batch.xy_um, batch.array_xy))
    return {key: torch.cat([each[key] for each in made]).cpu().numpy() for key in made[0]}


def _check(source: FinishedRun, model: TrainedMethod) -> dict:
    """Whether the model predicts held-out spots from their tiles as the run did; by how much it differs."""
    data, rows = source.data, source.data.rows("test")
    first = (data.spots["section"] == data.names("test")[0]).to_numpy()[rows]
    rows = rows[first] if model.together else rows[:CHECKED]  # whole sections, where spots depend on each other
    arrays: dict[str, Any] = _encode(source, model, rows)
    if model.together:
        arrays = model.predict_together(arrays["image_embedding"], data.xy_um[rows])
    elif model.bank is not None:
        arrays = model.retrieve(arrays["image_embedding"], model.panel, spread=False)
    of_run = source.predictions.layers["predicted"][: len(rows)]
    difference = np.abs(arrays["predicted"] - of_run)
    if not difference.mean() <= ALIKE * max(of_run.std(), 1e-6):
        raise InputError(
            f"the exported model does not predict the held-out spots of {source.folder.path} as the run did: "
            f"{difference.mean():.3g} apart on average"
        )
    return {
        "spots": len(rows),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
    }


def _check_folds(runs: Sequence[FinishedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if (run.config["model"]["name"], run.protocol) != (first.config["model"]["name"], first.protocol):
            raise InputError(f"folds: {run.folder.path} is of another method or protocol than {first.folder.path}")
    folds = [run.fold for run in runs]
    if len(set(folds)) < len(folds):
        raise InputError(f"folds: a fold is given twice ({', '.join(folds)})")


def _loss(source: FinishedRun, full: TrainedMethod, small: TrainedMethod) -> dict:
    """What a compressed bank costs on the held-out spots, over the panel."""
    section = source.predictions.obs["section"].to_numpy(str)
    observed = source.predictions.layers["observed"]
    if full.together:
        whole, less = (predict_together(source, each, each.panel).predicted.numpy() for each in (full, small))
    else:
        query = source.for_retrieval[0].obsm["image_embedding"][source.data.rows("test")]
        whole, less = (each.retrieve(query, each.panel, spread=False)["predicted"] for each in (full, small))
    return {
        "pearson_with_full": mean_pearson(whole, less, section),
        "pearson_acg_full": mean_pearson(observed, whole, section),
        "pearson_acg": mean_pearson(observed, less, section),
    }
