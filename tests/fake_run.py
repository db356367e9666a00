"""A run folder with made-up numbers, for tests of what is made of runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.slides.pictures import CELL, NAME, Level, SlidePicture, sheet, to_jpeg, write
from stexp.evaluation.predictions import add_neighbours


def scores(acg: float | None, heg: float | None, mse: float | None = 0.41) -> dict[str, float | None]:
    rest = {key: mse for key in ("mse", "mae", "rmse", "r2", "ccc", "rvd")}
    return {"pearson_acg": acg, "pearson_heg50": heg, "spearman_acg": acg, **rest}


def _add_neighbours(predictions: ad.AnnData, random: np.random.Generator) -> None:
    names = [f"{section}:{i}" for section in ("A1", "C2") for i in range(40)]
    table = pd.DataFrame([name.split(":") for name in names], columns=["section", "spot"], index=names)
    table["patient"] = table["section"].str[0]
    rows = random.permuted(np.tile(np.arange(80), (predictions.n_obs, 1)), axis=1)[:, :5]
    weights = np.sort(random.dirichlet(np.ones(6), predictions.n_obs)[:, :5])[:, ::-1]
    add_neighbours(predictions, table, rows, weights)


def write_pictures(folder: Path) -> None:
    """The images of a run as slides, three levels of them, and a tile of each reference but one."""
    predictions, slides = ad.read_h5ad(folder / "predictions.h5ad"), {}
    for section, held in predictions.uns["spatial"].items():
        if "images" not in held:
            continue
        image = np.kron(held["images"]["hires"], np.ones((2, 2, 1), np.uint8))
        height, width = image.shape[:2]
        levels = []
        for factor in (4, 2, 1):
            small = image[::factor, ::factor]
            cells = {
                (x // CELL, y // CELL): to_jpeg(small[y : y + CELL, x : x + CELL])
                for y in range(0, small.shape[0], CELL)
                for x in range(0, small.shape[1], CELL)
            }
            levels.append(Level(5 * factor, cells))
        slides[section] = SlidePicture(5 * width, 5 * height, 224.0, levels)
    names = list(predictions.uns["references"].index)[:-1]
    tiles = np.random.default_rng(2).integers(0, 255, (len(names), 3))
    write(folder / NAME, slides, sheet(names, (np.full((48, 48, 3), colour, np.uint8) for colour in tiles)))


def write_prediction(folder: Path, *, spots: int = 300, genes: int = 120, checks: bool = True) -> Path:
    """The folder of a slide that was predicted; the third gene was never measured on a held-out section."""
    predictions = ad.read_h5ad(write_run(folder, sections=("S1",), spots=spots, genes=genes) / "predictions.h5ad")
    for path in folder.iterdir():
        if path.name not in ("predictions.h5ad", "provenance.json"):
            path.unlink()
    del predictions.layers["observed"]
    predictions.obs = predictions.obs.drop(columns=["patient", "total_counts"])
    random = np.random.default_rng(3)
    expected, floor = random.normal(0.3, 0.1, genes), random.normal(0.2, 0.1, genes)
    expected[2] = floor[2] = np.nan
    predictions.var = pd.DataFrame(
        {
            "in_panel": True,
            "expected_pearson": expected,
            "expected_floor": floor,
            "expected_floor_name": np.where(np.isnan(floor), "", "colour_ridge"),
            "beats_floor": expected > floor,
            "n_held_out_sections": np.where(np.isnan(floor), 0, 4),
        },
        index=predictions.var_names,
    )
    facts = predictions.uns["stexp"]
    predictions.uns["stexp"] = {
        **{key: facts[key] for key in ("protocol", "model", "data", "fold")},
        "kind": "prediction",
        "slide": "S1.svs",
        "um_per_px": 0.5,
        "grid": "hexagonal",
        "expected": json.dumps({"runs": ["x"], "sections": ["B1", "B2"]}),
    }
    if checks:
        told = [
            {"check": "scale", "verdict": "ok", "text": "0.5 um a pixel, as in training."},
            {"check": "stain", "verdict": "do_not_trust", "text": "Far from that of <b>training</b>."},
        ]
        predictions.uns["stexp"] |= {"checks": json.dumps(told), "verdict": "Do not trust this prediction."}
    predictions.write_h5ad(folder / "predictions.h5ad")
    return folder


def write_run(
    folder: Path,
    *,
    sections: tuple[str, ...] = ("B1", "B2"),
    spots: int = 300,
    genes: int = 120,
    acg: float = 0.213,
    names: tuple[str, ...] = (),
    retrieval: bool = True,
) -> Path:
    """A run folder as stexp-train and stexp-score leave it, with expression that follows the tissue.

    The last section has no image, and the second gene is not measured in it; the third gene is constant.
    """
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    side = int(np.ceil(np.sqrt(spots)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[:spots]
    pitch, scale = 240.0, 0.1
    names = (*names, *(f"GENE{i}" for i in range(genes - len(names))))
    observed, predicted, raw, spatial, rows = [], [], [], {}, []
    for number_, section in enumerate(sections):
        xy = (grid + 2.0) * pitch + random.normal(0, 6, grid.shape)
        field = np.stack(
            [np.sin(grid[:, 0] / (3 + k) + number_) + np.cos(grid[:, 1] / (4 + k)) for k in range(4)], axis=1
        )
        loading = np.random.default_rng(1).gamma(0.5, 0.5, (4, len(names)))
        rate = np.exp(field @ loading - 1) * random.lognormal(0, 0.4, (spots, 1))
        counts = random.poisson(rate)
        raw.append(counts.astype(np.float32))
        observed.append(np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)).astype(np.float32))
        predicted.append((0.5 * np.log1p(rate) + random.normal(0, 0.1, rate.shape)).astype(np.float32))
        px = int((side + 4) * pitch * scale)
        y, x = np.mgrid[:px, :px] / (pitch * scale) - 2
        tone = np.sin(x / 3 + number_) + np.cos(y / 4)
        nuclei = random.random((px, px)) < 0.03 + 0.03 * (tone > 0.5)
        image = np.stack([225 - 25 * tone, 170 - 35 * tone, 205 - 15 * tone], axis=-1) + random.normal(
            0, 8, (px, px, 1)
        )
        image[nuclei] = (95, 60, 140)
        factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": 150.0}
        spatial[section] = {"images": {"hires": image.clip(0, 255).astype(np.uint8)}, "scalefactors": factors}
        rows.append(
            pd.DataFrame(
                {
                    "section": section,
                    "patient": section[0],
                    "spot": [f"{a}x{b}" for a, b in grid],
                    "array_x": grid[:, 0],
                    "array_y": grid[:, 1],
                    "total_counts": counts.sum(1),
                    "x": xy[:, 0],
                    "y": xy[:, 1],
                    "neighbour_section": random.choice(["A1", "C2"], spots),
                    "neighbour_section_weight": random.random(spots),
                }
            )
        )
    if len(sections) > 1:
        del spatial[sections[-1]]["images"]
        observed[-1][:, 1] = np.nan
    observed[0][:, 2] = 0
    obs = pd.concat(rows, ignore_index=True)
    obs.index = obs["section"] + ":" + obs["spot"]
    spatial_px = obs[["x", "y"]].to_numpy()
    obs = obs.drop(columns=["x", "y"] + ["neighbour_section", "neighbour_section_weight"] * (not retrieval))
    layers = {"observed": np.concatenate(observed), "predicted": np.concatenate(predicted)}
    layers["counts"] = np.concatenate(raw)
    layers["uncertainty"] = (
        np.abs(layers["predicted"]) * 0.2 if retrieval else np.full_like(layers["predicted"], np.nan)
    )
    protocol = {"name": "strict", "log": "natural", "target_sum": 1e4, "truth": "spot", "library": "transcriptome"}
    predictions = ad.AnnData(
        layers["predicted"],
        obs=obs,
        var=pd.DataFrame(index=pd.Index(names, name="gene")),
        layers=layers,
        obsm={"spatial": spatial_px},
        uns={
            "spatial": spatial,
            "stexp": {
                "protocol": json.dumps(protocol),
                "model": "mclstexp",
                "fold": "B",
                "data": "her2st",
                "config": "model:\n  dim: 256  # <b>\n",
                "chosen": "{}",
            },
        },
    )
    if retrieval:
        _add_neighbours(predictions, random)
    predictions.write_h5ad(folder / "predictions.h5ad")

    floors = {
        "mean": scores(None, None),
        "nearest_section": scores(0.04, 0.09),
        "coordinates": scores(0.08, 0.12),
        "colour_ridge": scores(0.189, 0.301),
        "knn_features": scores(0.121, 0.2),
        "ridge_features": scores(0.17, 0.25),
        "depth_oracle": scores(0.304, 0.581, None),
    }
    ceiling = {"pearson_acg": 0.41, "pearson_heg50": 0.72}
    own = scores(acg, 1.5 * acg)

    def moved(values: dict, by: float) -> dict:
        return {key: None if value is None else value + by for key, value in values.items()}

    metrics = {
        "protocol": "strict",
        "fold": "B",
        "model": "mclstexp",
        "data": "her2st",
        "scores": own,
        "floors": floors,
        "ceiling": ceiling,
        "n_spots": len(obs),
        "n_genes": len(names),
        "n_constant_genes": 1,
        "sections": {
            section: {
                "scores": moved(own, 0.02 * i - 0.01),
                "ceiling": ceiling,
                "n_spots": spots,
                "n_constant_genes": 1,
                "patient": section[0],
                "floors": {name: moved(floor, 0.02 - 0.04 * i) for name, floor in floors.items()},
            }
            for i, section in enumerate(sections)
        },
        "oracle_floors": ["depth_oracle"],
        "chosen": {},
        "scored_as": {"paper": {"scores": moved(own, 0.05), "floors": floors, "ceiling": ceiling}},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    with (folder / "per_gene.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            [
                "gene",
                "pearson",
                "spearman",
                "mse",
                "mean_observed",
                "heg50",
                "n_sections",
                "ceiling",
                *(f"floor_{name}" for name in floors),
            ]
        )
        for i, gene in enumerate(names):
            pearson, spearman, *others = random.normal(acg, 0.12, 2 + len(floors)).round(4)
            scored = ["", "", 0.4, 1.2, i < 50, 0] if i == 2 else [pearson, spearman, 0.4, 1.2, i < 50, len(sections)]
            table.writerow([gene, *scored, 0.5, "", *others[1:]])
    (folder / "audit.json").write_text(
        json.dumps(
            {
                "protocol": "strict",
                "leaks": 1,
                "items": [
                    {
                        "name": "same_patient_in_training",
                        "leak": False,
                        "detail": "No section of patient B is in training or reference.",
                    },
                    {
                        "name": "panel_chosen_with_test",
                        "leak": True,
                        "detail": "The panel was chosen on all sections, B1 and B2 too.",
                    },
                    {
                        "name": "checkpoint_chosen_on_test",
                        "leak": False,
                        "detail": "The checkpoint was chosen on patient C.",
                    },
                ],
                "facts": {
                    "patient_of": {section: section[0] for section in sections},
                    **{key: [] for key in ("train", "validation", "reference", "panel_saw_test")},
                    "test": list(sections),
                    "checkpoint": "best",
                    "k_chosen_on": "validation",
                    "published_settings": False,
                    "spot_context": None,
                },
            }
        )
    )
    (folder / "provenance.json").write_text(
        json.dumps(
            {
                "command": "stexp-train data=her2st fold=B",
                "commit": "0123abc",
                "dirty": True,
                "date": "2025-01-31T12:00:00+00:00",
                "seconds": 812.3,
                "stages": {"fit": 700.1, "predict": 60.0},
                "peak_memory_gb": 7.9,
                "precision": "bf16-mixed",
                "hardware": {"device": "cuda", "cpu": "8 cores", "gpu": ["H200"]},
                "versions": {"python": "3.11.9", "stexp": "0.1.0"},
                "data_manifest": {section: {f"{section}.jpg": "abc"} for section in sections},
                "settings": {},
            }
        )
    )
    return folder
