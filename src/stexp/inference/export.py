"""A finished run as a folder that predicts without its data."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stexp import __version__, construct
from stexp.config import to_plain
from stexp.data.slides.pictures import BANK_TILES, Sheet, sheet
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.metrics import mean_pearson

if TYPE_CHECKING:
    import torch

    from stexp.inference.model_folder import Bank
    from stexp.inference.trained import TrainedMethod
    from stexp.runs.finished import Run

log = logging.getLogger(__name__)


CHECKED = 512  # held-out spots that an exported model must predict as its run did


ALIKE = 0.1  # of the standard deviation of the predictions: more than precision explains


def exported_run(run: Path) -> Path:
    """``<run>/model.stexp``, exported first where it is not there, or of an earlier training or format."""
    from stexp.data.slides.tiles import file_digest
    from stexp.inference import model_folder

    folder = run / "model.stexp"
    if (folder / "model.json").is_file():
        facts = predictions.read_json(folder / "model.json")
        of_checkpoint = facts.get("trained", {}).get("checkpoint") == file_digest(_checkpoint(run))
        if of_checkpoint and facts.get("format") == model_folder.FORMAT:
            return folder
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
    from stexp.inference import confidence, model_folder
    from stexp.inference.expected import expected_accuracy
    from stexp.inference.trained import TrainedMethod
    from stexp.runs.finished import Run

    if bank not in ("float32", "float16"):
        raise InputError(f"bank={bank}: choose float32 or float16")
    source = Run(run)
    facts, weights = _facts(source)
    references = source.bank()
    if references is None and (bank != "float32" or prototypes is not None):
        raise InputError(f"{facts['method']} does not retrieve: it has no bank to compress")
    names = source.panel if references is None else references.genes
    genes = pd.DataFrame(index=pd.Index(names, name="gene"))
    genes["in_panel"] = genes.index.isin(source.panel)
    model = TrainedMethod(facts, weights, references)
    facts["reproduces"] = _check(source, model)

    runs = [source, *(Run(Path(fold)) for fold in folds or [])]
    _check_folds(runs)
    accuracy, sections = expected_accuracy(runs, list(genes.index))
    known_of, calibration, known = confidence.learn(runs, model, list(genes.index), alpha)
    facts |= known_of
    genes = genes.join(accuracy).join(calibration)
    facts["expected"] = {"runs": [each.folder.resolve().name for each in runs], "sections": sections}
    if references is not None:
        facts["bank"] = {"spots": len(references), "of": len(references), "embedding": bank}
        if bank != "float32" or prototypes is not None:
            references = _compress(references, bank, prototypes)
            loss = _loss(source, model, TrainedMethod(facts, weights, references))
            facts["bank"] |= {"spots": len(references), "loss": loss}
    output.parent.mkdir(parents=True, exist_ok=True)
    facts["digest"] = model_folder.write(
        output, facts, weights, references, genes, bank, _tiles(source, references), known
    )
    return facts


def _tiles(source: Run, references: Bank | None) -> Sheet | None:
    """Small tiles of the references that have an image, of every so many-th where they are very many."""
    if references is None:
        return None
    from stexp.runs.results import tiles_of

    spots = source.data.spots
    rows = spots.index.get_indexer(references.spots().index)
    with_image = [section.name for section in source.sections if section.slide is not None]
    rows = rows[spots["section"].iloc[rows].isin(with_image).to_numpy()]
    rows = rows[:: max(1, math.ceil(len(rows) / BANK_TILES))]
    return sheet(list(spots.index[rows]), tiles_of(source.data, rows)) if len(rows) else None


def _checkpoint(run: Path) -> Path:
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    if not (best.is_file() or last.is_file()):
        raise InputError(f"{run} has no checkpoint; {predictions.AGAIN}")
    return best if best.is_file() else last


def _facts(source: Run) -> tuple[dict, dict[str, torch.Tensor]]:
    """``model.json`` and the weights."""
    from stexp.data.slides.tiles import file_digest
    from stexp.training.checkpoints import load_checkpoint

    cfg, path = source.cfg, _checkpoint(source.folder)
    checkpoint = load_checkpoint(path)
    state = checkpoint["SpotDataModule"]
    node = {key: value for key, value in to_plain(cfg.model).items() if key != "name"}
    method = construct.get_object(node["_target_"])
    if getattr(method, "batching", "spots") != "spots":
        raise InputError(
            f"{cfg.model.name} cannot predict a slide: it reads whole sections, and a slide is read tile by tile"
        )
    encoder, features = to_plain(cfg.image_encoder), None
    sizes = {"n_genes": len(state["panel"]), "n_positions": state["array_size"]}
    weights = {f"model.{key}": value for key, value in checkpoint["state_dict"].items()}
    if "image_encoder" in node:
        node["image_encoder"], _ = _without_weights(node["image_encoder"])
    if "n_features" in inspect.signature(method).parameters:
        import pytorch_lightning as pl

        pl.seed_everything(cfg.seed, verbose=False)  # random weights are those of the run's seed
        features, built = _without_weights(encoder, with_weights=True)
        weights |= {f"features.{key}": value for key, value in built.state_dict().items()}
        sizes["n_features"] = built.num_features
    trained = [section for section in source.data.sections if section.name in source.data.names("train")]
    scales = {section.name: section.um_per_px for section in trained}
    known = [um for um in scales.values() if um is not None]
    if known and max(known) > 1.1 * min(known) and state["tile_um"] is None:
        log.warning("tiles of raw pixels at %.3g to %.3g um/px: a slide is read at the median", min(known), max(known))
    facts = {
        "method": cfg.model.name,
        "model": node,
        "sizes": sizes,
        "features_by": features,
        "k": source.chosen.get("k"),
        "panel": state["panel"],
        "protocol": asdict(source.protocol),
        "data": cfg.data.name,
        "fold": str(source.before.uns["stexp"]["fold"]),
        "tile": {
            "px": state["tile_px"],
            "um": state["tile_um"],
            "trained_um_per_px": float(np.median(known)) if len(known) == len(scales) else None,
            "um_per_px": scales,
        },
        "stain": state["stain"],
        "precision": source.record["precision"],
        "channels_last": bool(cfg.hardware.channels_last),
        "stexp": __version__,
        "licences": {
            "weights": _licence(encoder),
            "data": cfg.data.get("licence") or "not stated; that of the training data holds for the reference spots",
        },
        "trained": {
            "run": source.folder.resolve().name,
            "checkpoint": file_digest(path),
            **{key: source.record.get(key) for key in ("command", "commit", "dirty", "date", "data_manifest")},
            "sections": {role: source.data.names(role) for role in ("train", "validation", "test", "reference")},
        },
    }
    return facts, weights


def _without_weights(node: dict, with_weights: bool = False) -> tuple[dict, Any]:
    """An image encoder's arguments that fetch nothing, its input normalisation as numbers; and the encoder."""
    known = inspect.signature(construct.get_object(node["_target_"])).parameters
    arguments = {key: value for key, value in node.items() if key == "_target_" or key in known}
    bare = arguments | {"pretrained": False, "checkpoint": None}
    encoder = construct.build(arguments if with_weights else bare)
    numbers = {key: getattr(encoder, key).flatten().tolist() for key in ("mean", "std")}
    return bare | numbers, encoder


def _licence(encoder: dict) -> str:
    import timm

    if not encoder.get("pretrained") and not encoder.get("checkpoint"):
        return "trained from random weights"
    card = encoder.get("card")
    if card:
        return f"{card['licence']} ({card['url']})"
    if encoder.get("checkpoint"):
        return f"that of {Path(encoder['checkpoint']).name}, which is not known here"
    config = timm.get_pretrained_cfg(encoder.get("architecture") or encoder["name"])
    return (config and config.license) or "not stated by timm"


def _check(source: Run, model: TrainedMethod) -> dict:
    """Whether the model predicts held-out spots from their tiles as the run did; by how much it differs."""
    import torch

    from stexp.data.batches import SpotIndex

    rows = source.data.rows("test")[:CHECKED]
    made = []
    for part in np.array_split(rows, math.ceil(len(rows) / 64)):
        try:
            batch = source.data.batch(SpotIndex(torch.from_numpy(part), image=False))
            made.append(model.encode(source.data.tiles(part), batch.xy_um, batch.array_xy))
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"{model.facts['method']} cannot predict a slide: it needs more than the tile of a spot"
            ) from error
    arrays = {key: torch.cat([each[key] for each in made]).numpy() for key in made[0]}
    if model.bank is not None:
        arrays = model.retrieve(arrays["image_embedding"], model.panel, spread=False)
    predicted = arrays["predicted"]
    before = source.before.layers["predicted"][: len(rows)]
    difference = np.abs(predicted - before)
    if not difference.mean() <= ALIKE * max(before.std(), 1e-6):
        raise InputError(
            f"the exported model does not predict the held-out spots of {source.folder} as the run did: "
            f"{difference.mean():.3g} apart on average"
        )
    return {
        "spots": len(rows),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
    }


def _check_folds(runs: list[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if (run.cfg.model.name, run.protocol) != (first.cfg.model.name, first.protocol):
            raise InputError(f"folds: {run.folder} is of another method or protocol than {first.folder}")
    folds = [str(run.before.uns["stexp"]["fold"]) for run in runs]
    if len(set(folds)) < len(folds):
        raise InputError(f"folds: a fold is given twice ({', '.join(folds)})")


def _compress(bank: Bank, dtype: str, prototypes: int | None) -> Bank:
    if prototypes is not None:
        if not (isinstance(prototypes, int) and 1 <= prototypes <= len(bank)):
            raise InputError(
                f"prototypes={prototypes}: a whole number from 1 to {len(bank)}, the references, would fit"
            )
        from scipy.spatial import cKDTree
        from sklearn.cluster import MiniBatchKMeans

        clusters = MiniBatchKMeans(prototypes, random_state=0, n_init=1, batch_size=4096).fit(bank.embedding)
        bank = bank.take(np.unique(cKDTree(bank.embedding).query(clusters.cluster_centers_)[1]))
    # as they come back from the file
    return replace(bank, embedding=bank.embedding.astype(dtype).astype(np.float32))


def _loss(source: Run, full: TrainedMethod, small: TrainedMethod) -> dict:
    """What a compressed bank costs on the held-out spots, over the panel."""
    query = source.kept.obsm["image_embedding"][source.data.rows("test")]
    section = source.before.obs["section"].to_numpy(str)
    observed = source.before.layers["observed"]
    whole, less = (each.retrieve(query, each.panel, spread=False)["predicted"] for each in (full, small))
    return {
        "pearson_with_full": mean_pearson(whole, less, section),
        "pearson_acg_full": mean_pearson(observed, whole, section),
        "pearson_acg": mean_pearson(observed, less, section),
    }
