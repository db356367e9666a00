"""What a trained method leaves in its run folder for scoring, and for retrieving again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from stexp.config import build, other_protocols, write_atomically
from stexp.data.datamodule import SpotDataModule
from stexp.data.genes import normalise
from stexp.data.quality import Thresholds, inspect
from stexp.data.section import Section
from stexp.data.slides import pictures as report_pictures
from stexp.evaluation import predictions
from stexp.evaluation.audit import audit
from stexp.evaluation.floors import SpotTable, ceiling_per_gene, colour_statistics, predict_floors, unit_square
from stexp.protocol import Protocol
from stexp.runs.provenance import git_state, manifest

TRAINING = ("train", "validation")  # what floors, like retrieval, may learn from


def write_results(
    folder: Path,
    cfg: DictConfig,
    data: SpotDataModule,
    model,
    outputs: list[dict],
    chosen: dict,
    features: np.ndarray,
    best_checkpoint: bool,
) -> None:
    """Write ``predictions.h5ad``, ``floors.h5ad``, ``audit.json`` and, of a retrieval method, ``embeddings.h5ad``."""
    made = {key: torch.cat([output[key] for output in outputs]).cpu() for key in outputs[0] if key != "obs"}
    made = {key: (value.float() if value.is_floating_point() else value).numpy() for key, value in made.items()}
    if "neighbours" in made:
        made["neighbours"] = model.retrieved_rows[made["neighbours"]]
    if "obs" in outputs[0]:
        made["obs"] = pd.concat([output["obs"] for output in outputs], ignore_index=True)
    made["obs"] = pd.concat([made.get("obs"), quality_of_test(data, build(cfg.data.quality))], axis=1)
    colour = colours(data)
    reference: list[str] = []
    if getattr(model, "reference_embedding", None) is not None:
        reference = model.reference_sections
        table = embedding_table(
            data,
            model.reference_rows,
            model.reference_embedding.cpu().numpy(),
            made["image_embedding"],
            features,
            colour,
        )
        predictions.write(table, folder / "embeddings.h5ad")
    write_scored_files(folder, cfg, data, made, features, colour, chosen)
    facts = {
        "patient_of": {section.name: section.patient for section in data.sections},
        "train": data.names("train"),
        "validation": data.names("validation"),
        "test": data.names("test"),
        "reference": reference,
        "panel_saw_test": data.panel_saw,
        "checkpoint": "best" if best_checkpoint else "last",
        "k_chosen_on": "validation" if "k_validation_pearson" in chosen else "given",
        "published_settings": data.protocol.published,
        "spot_context": getattr(model, "spot_context", None),
    }
    write_atomically(folder / "audit.json", json.dumps(audit(data.protocol, facts), indent=1))


def changed_data(folder: Path, sections: list[Section]) -> list[str]:
    """Sections whose files or patient are no longer what the run in `folder` read, and those with an image it lacks."""
    recorded = predictions.read_json(folder / "provenance.json", "data_manifest")["data_manifest"]
    patient_of = predictions.read_json(folder / "audit.json", "facts")["facts"].get("patient_of", {})
    today = manifest([section for section in sections if section.name in recorded])
    changed = {name for name in recorded if today.get(name) != recorded[name]}
    # sections without an image may have been left out, by the split or for genes they do not measure
    changed |= {section.name for section in sections if section.name not in recorded and section.slide is not None}
    changed |= {
        section.name for section in sections if section.patient != patient_of.get(section.name, section.patient)
    }
    return sorted(changed)


def write_scored_files(
    folder: Path,
    cfg: DictConfig,
    data: SpotDataModule,
    made: dict,
    features: np.ndarray,
    colour: np.ndarray,
    chosen: dict,
) -> None:
    """Write the two files that scoring reads, and ``pictures.h5``, from what a method `made` of the test spots.

    Its ``neighbours`` are rows of the data's spots.
    """
    test, train = data.rows("test"), data.rows(*TRAINING)
    adata = predictions.make_predictions(
        data.spots.iloc[test],
        data.panel,
        observed=data.target[test],
        predicted=made["predicted"],
        counts=data.counts[test],
        xy_px=data.xy_px[test],
        mean_train=data.target[train].mean(axis=0),
        uncertainty=made.get("uncertainty"),
        obs=made.get("obs"),
        embedding=made.get("image_embedding"),
    )
    predictions.add_images(adata, [section for section in data.sections if section.name in data.names("test")])
    if "neighbours" in made:
        predictions.add_neighbours(adata, data.spots, made["neighbours"], made["neighbour_weights"])
    write_pictures(folder / report_pictures.NAME, data, adata)
    adata.uns["stexp"] = {
        "protocol": json.dumps(asdict(data.protocol)),
        "model": cfg.model.name,
        "fold": str(data.fold),
        "data": cfg.data.name,
        "config": OmegaConf.to_yaml(cfg, resolve=True),
        "commit": str(git_state()["commit"]),
        "data_manifest": json.dumps(manifest(data.sections)),
        "chosen": json.dumps(chosen),
    }
    predictions.write(adata, folder / "predictions.h5ad")
    floors = ad.AnnData(obs=adata.obs, var=adata.var)
    floors.uns["ceiling"] = {}
    for protocol in {data.protocol.name: data.protocol, **other_protocols(data.protocol)}.values():
        layers, ceiling = floors_under(protocol, data, features, colour)
        floors.uns["ceiling"][protocol.name] = ceiling
        for name, values in layers.items():
            floors.layers[f"{protocol.name}:{name}"] = values
    predictions.write(floors, folder / "floors.h5ad")


def write_pictures(path: Path, data: SpotDataModule, adata: ad.AnnData) -> None:
    """Write the slides of the test sections, and the tiles of those references that count most, as methods see them."""
    test = [section for section in data.sections if section.name in data.names("test") and section.slide is not None]
    budget = report_pictures.SLIDE_BYTES // max(1, len(test))
    slides = {}
    for section in test:
        xy = adata.obsm["spatial"][(adata.obs["section"] == section.name).to_numpy()]
        slides[section.name] = report_pictures.picture(section.slide, xy, data.tile.side_px(section), budget)
    sheet = None
    if "neighbours" in adata.obsm:
        names = predictions.heaviest_references(adata)
        rows = data.spots.index.get_indexer(names)
        with_image = {section.name for section in data.sections if section.slide is not None}
        rows = rows[data.spots["section"].iloc[rows].isin(with_image).to_numpy()][: report_pictures.REFERENCES]
        if len(rows):
            sheet = report_pictures.sheet(list(data.spots.index[rows]), tiles_of(data, rows))
    report_pictures.write(path, slides, sheet)


def tiles_of(data: SpotDataModule, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Tiles of the spots `rows`, (px, px, 3) uint8, one by one, in bounded memory."""
    for start in range(0, len(rows), data.eval_batch_size):
        yield from data.tiles(rows[start : start + data.eval_batch_size]).numpy()


def floors_under(
    protocol: Protocol, data: SpotDataModule, features: np.ndarray | None, colour: np.ndarray | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Floors of the test spots and the ceiling of each test section, on the truth scale of `protocol`.

    Returns
    -------
    floors : dict of (Q, G)
    ceiling : dict of section -> (G,)
    """
    expression, xy = np.empty_like(data.target), np.empty_like(data.xy_px)
    ceiling = {}
    for section in data.sections:
        here = np.flatnonzero(data.spots["section"] == section.name)
        expression[here] = normalise(data.counts[here], section.total_counts, protocol)
        xy[here] = unit_square(data.xy_px[here])
        if section.name in data.names("test"):
            ceiling[section.name] = ceiling_per_gene(data.counts[here], section.total_counts, protocol, seed=data.seed)

    def table(rows: np.ndarray) -> SpotTable:
        spots = data.spots.iloc[rows]
        return SpotTable(
            expression=expression[rows],
            log_depth=np.log1p(spots["total_counts"].to_numpy()),
            section=spots["section"].to_numpy(str),
            patient=spots["patient"].to_numpy(str),
            xy=xy[rows],
            colour=None if colour is None else colour[rows],
            features=None if features is None else features[rows],
        )

    return predict_floors(table(data.rows(*TRAINING)), table(data.rows("test"))), ceiling


def colours(data: SpotDataModule) -> np.ndarray:
    """`colour_statistics` of every spot's tile as a method sees it, (n_spots, 9); NaN for spots without an image."""
    out = np.full((len(data.spots), 9), np.nan)
    with_image = [section.name for section in data.sections if section.slide is not None]
    rows = np.flatnonzero(data.spots["section"].isin(with_image))
    for part in np.array_split(rows, -(-len(rows) // data.eval_batch_size)):
        out[part] = colour_statistics(data.tiles(part).numpy())
    return out


def quality_of_test(data: SpotDataModule, thresholds: Thresholds) -> pd.DataFrame:
    """The ``qc_`` columns of the test spots, in their order."""
    data.setup()
    stores = iter(data.bank.stores)
    tiles = {section.name: next(stores) for section in data.sections if section.slide is not None}
    test = [section for section in data.sections if section.name in data.names("test")]
    for section in test:
        inspect(section, tiles[section.name], data.tile, thresholds)
    columns = pd.concat(
        [section.spots.obs.filter(like="qc_").add_prefix(f"{section.name}:", axis=0) for section in test]
    )
    return columns.loc[data.spots.index[data.rows("test")]].reset_index(drop=True)


def embedding_table(
    data: SpotDataModule,
    reference_rows: np.ndarray,
    reference: np.ndarray,
    query: np.ndarray,
    features: np.ndarray,
    colour: np.ndarray,
) -> ad.AnnData:
    """All that retrieval and floors need to be done again without the encoders; spots without genes.

    ``obsm``: ``spot_embedding`` of what may be retrieved from, ``image_embedding`` of the test spots,
    ``features`` and ``colour`` of spots with a tile; NaN elsewhere.
    """
    adata = ad.AnnData(obs=data.spots[["section", "patient", "spot", "role"]].copy())
    for name, rows, values in (
        ("spot_embedding", reference_rows, reference),
        ("image_embedding", data.rows("test"), query),
    ):
        adata.obsm[name] = np.full((len(data.spots), values.shape[1]), np.nan, dtype=np.float32)
        adata.obsm[name][rows] = values
    adata.obsm["features"], adata.obsm["colour"] = features, colour
    return adata
