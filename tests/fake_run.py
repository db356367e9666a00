"""A run folder with made-up numbers, for tests of what is made of runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd


def scores(acg: float | None, heg: float | None, mse: float | None = 0.41) -> dict[str, float | None]:
    rest = {key: mse for key in ("mse", "mae", "rmse", "r2", "ccc", "rvd")}
    return {"pearson_acg": acg, "pearson_heg50": heg, "spearman_acg": acg, **rest}


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
    observed, predicted, spatial, rows = [], [], {}, []
    for number_, section in enumerate(sections):
        xy = (grid + 2.0) * pitch + random.normal(0, 6, grid.shape)
        field = np.stack(
            [np.sin(grid[:, 0] / (3 + k) + number_) + np.cos(grid[:, 1] / (4 + k)) for k in range(4)], axis=1
        )
        loading = np.random.default_rng(1).gamma(0.5, 0.5, (4, len(names)))
        rate = np.exp(field @ loading - 1) * random.lognormal(0, 0.4, (spots, 1))
        counts = random.poisson(rate)
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
            },
        },
    )
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
                "floors": {name: moved(floor, 0.02 - 0.04 * i) for name, floor in floors.items()},
            }
            for i, section in enumerate(sections)
        },
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
                "hardware": {"cpu": "8 cores", "gpu": "H200"},
                "versions": {"python": "3.11.9", "stexp": "0.1.0"},
                "data_manifest": {"B1": "sha256:abc", "B2": "sha256:def"},
            }
        )
    )
    return folder
