"""Finished runs of the paper's sweeps with made-up numbers, as far as tables and figures read them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from stexp.config import build
from stexp.sweeps.jobs import Job, jobs

GENES = ("GNAS", "FN1", "FASN", "RPL13", *(f"G{i}" for i in range(26)))
FLOORS = {"mean": 0.0, "colour_ridge": 0.15, "depth_oracle": 0.6}


WHOLE_AUDIT = {
    **{key: [] for key in ("train", "validation", "test", "reference", "panel_saw_test")},
    **{"checkpoint": "best", "k_chosen_on": "given", "published_settings": False, "spot_context": None},
}
WHOLE_DATA = {
    **{key: None for key in ("sections", "published_sections", "um_per_px", "tile_um")},
    **{"panel_file": None, "published_panel_file": None, "tile_px": 224, "tile_store": "raw", "leave_out": []},
    "_target_": "stexp.data.datamodule.SpotDataModule",
    "reader": {"_target_": "stexp.data.readers.demo.read_demo"},
    "quality": {"_target_": "stexp.data.quality.Thresholds"},
}
WHOLE_RECORD = {"commit": None, "dirty": None, "date": "", "precision": "32-true", "versions": {}, "stages": {}}


def cells(name: str, runs: Path, *overrides: str) -> list[Job]:
    return jobs(name, [*overrides, f"output_dir='{runs}'"])


def scores(acg: float) -> dict[str, float]:
    return {"pearson_acg": acg, "pearson_heg50": 1.5 * acg, "spearman_acg": acg, "mse": 1 - acg, "mae": 0.9 - acg}


def finish(job: Job, acg: float = 0.2, *, spots: int = 60, seed: int = 0, noise: float = 0.6) -> Path:
    """The folder of a finished cell; predictions follow the observed expression, the first gene best of all."""
    folder = job.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    config = {**job.settings, "fold": job.fold, "seed": job.seed, "output_dir": str(folder)}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    part = {
        "scores": scores(acg),
        "floors": {name: scores(value) for name, value in FLOORS.items()},
        "ceiling": {"pearson_acg": 0.8, "pearson_heg50": 0.9},
        "n_spots": spots,
        "n_constant_genes": 0,
    }
    metrics = {
        **part,
        "protocol": job.protocol,
        "fold": job.fold,
        "model": job.model,
        "data": job.data,
        "oracle_floors": ["depth_oracle"],
        "n_genes": len(GENES),
        "chosen": {"k": 200},
        "sections": {job.fold: part},
        "scored_as": {},
    }
    listed = job.settings["data"]["sections_of"]
    patient_of = {section: patient for patient, of in listed.items() for section in of}
    leak = {"name": "same_patient_in_training", "leak": True, "detail": ""}
    provenance = {
        **WHOLE_RECORD,
        "command": job.typed,
        "commit": "0123456789abcdef",
        "dirty": False,
        "seconds": 1800.0,
        "hardware": {"device": "cpu", "cpu": "EPYC"},
        "data_manifest": {job.fold: {"counts.tsv": "hash"}},
    }
    contents = {"metrics": metrics, "provenance": provenance}
    contents["audit"] = {"leaks": 1, "items": [leak], "facts": {**WHOLE_AUDIT, "patient_of": patient_of}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "per_gene.csv").write_text("gene,pearson\n" + "".join(f"{gene},0.1\n" for gene in GENES))
    (folder / "report.html").write_text("")
    write_expression(job, spots, seed, noise)
    return folder


def write_expression(job: Job, spots: int, seed: int, noise: float) -> None:
    random = np.random.default_rng([seed, *job.fold.encode()])
    side = int(np.ceil(np.sqrt(spots)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[:spots]
    field = np.stack([np.sin(grid[:, 0] / 3), np.cos(grid[:, 1] / 4), grid.sum(1) / side - 1], axis=1)
    loading = np.random.default_rng(1).normal(0, 1, (3, len(GENES)))
    observed = 2 + field @ loading + random.normal(0, 0.3, (spots, len(GENES)))
    spread = noise * (1 + np.arange(len(GENES)) / 10)
    predicted = 2 + 0.4 * (observed - 2) + spread * random.normal(0, 1, observed.shape)
    xy = (grid + 2.0) * 240
    pixels = np.full(((side + 4) * 24, (side + 4) * 24, 3), (226, 200, 216), np.uint8)
    obs = pd.DataFrame({"section": job.fold, "patient": job.fold[0], "spot": [f"{x}x{y}" for x, y in grid]})
    obs.index = obs["section"] + ":" + obs["spot"]
    factors = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 150.0}
    adata = ad.AnnData(
        predicted.astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(GENES, name="gene")),
        layers={"observed": observed.astype(np.float32), "predicted": predicted.astype(np.float32)},
        obsm={"spatial": xy},
        uns={
            "spatial": {job.fold: {"images": {"hires": pixels}, "scalefactors": factors}},
            "stexp": {"protocol": json.dumps(asdict(build(job.settings["protocol"])))},
        },
    )
    adata.write_h5ad(job.output_dir / "predictions.h5ad")
    floors = ad.AnnData(obs=adata.obs, var=adata.var)
    tilted = np.tile(grid[:, :1].astype(np.float32), (1, len(GENES)))
    floors.layers[f"{job.protocol}:coordinates"] = tilted
    floors.layers[f"{job.protocol}:depth_oracle"] = observed.astype(np.float32)
    floors.write_h5ad(job.output_dir / "floors.h5ad")
