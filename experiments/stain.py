"""What stain normalisation changes on the HER2+ sections with images: colours of two patients, and floors.

STEXP_DATA=data python experiments/stain.py --weights mobilenetv2_100_imagenet.safetensors

For the folds B and C of protocol strict, without and with stain normalisation: the distance between the mean colours
of the two patients (of tiles, of their tissue, of what is lighter), and the scores of what reads the tiles without
training an encoder. Mean tile colours differ by how much tissue a tile shows too; the same pixels count as tissue in
every row. What Reinhard's method gave (results/stain-her2st.json) was measured before it left.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from stexp import hardware
from stexp.config import build, dataset_of
from stexp.data.datamodule import SpotDataModule
from stexp.data.slides.stain import METHODS, TISSUE
from stexp.evaluation.floors import colour_statistics
from stexp.evaluation.metrics import mean_over_sections, score_section, top_genes
from stexp.files import CONF
from stexp.models.encoders.frozen import FrozenEncoder
from stexp.runs.comparison import floors_under
from stexp.runs.provenance import git_state, manifest, now, versions

FLOORS = ("colour_ridge", "knn_features", "ridge_features")
PIXELS = ("tiles", "tissue", "lighter")
SCORES = ("pearson_acg", "pearson_heg50")


def measure(data: SpotDataModule, raw: SpotDataModule, glass: torch.Tensor) -> dict:
    """Colours and floors of one fold under one setting; `raw` has no stain normalisation."""
    colour = np.full((len(data.spots), 9), np.nan)
    patients: dict[str, list] = {}
    for section, light in zip((s for s in data.sections if s.slide is not None), glass.mean(1), strict=True):
        rows = np.flatnonzero(data.spots["section"] == section.name)
        sums, n = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 1)
        for part in np.array_split(rows, len(rows) // 32 + 1):
            tiles, tissue = data.tiles(part), raw.tiles(part).float().mean(3) < light * TISSUE
            colour[part] = colour_statistics(tiles.numpy())
            for i, pixels in enumerate((tiles.flatten(0, 2), tiles[tissue], tiles[~tissue])):
                sums[i] += pixels.sum(0)
                n[i] += len(pixels)
        patients.setdefault(section.patient, []).append((sums / n).numpy())
    means = {patient: np.mean(sections, axis=0) for patient, sections in patients.items()}
    distance = np.linalg.norm(means["B"] - means["C"], axis=1)

    floors, _ = floors_under(data.protocol, data, data.features, colour)
    test, names = data.target[data.rows("test")], data.spots["section"].iloc[data.rows("test")].to_numpy(str)
    heg = top_genes(floors["mean"][0])  # of the training spots, as strict ranks them
    scores = {
        floor: mean_over_sections(
            [score_section(test[names == s], floors[floor][names == s], heg) for s in data.names("test")]
        )
        for floor in FLOORS
    }
    return {
        "mean_rgb": {
            patient: dict(zip(PIXELS, mean.round(2).tolist(), strict=True)) for patient, mean in means.items()
        },
        "distance_b_c": dict(zip(PIXELS, distance.round(2).tolist(), strict=True)),
        "target": data.normaliser and data.normaliser.state()["target"],
        "floors": {floor: {key: scores[floor][key] for key in SCORES} for floor in FLOORS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="MobileNetV2 of timm, ImageNet weights, .safetensors")
    parser.add_argument("--cache", help="data.cache_dir")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "stain-her2st.json")
    args = parser.parse_args()
    start = time.perf_counter()
    keys = ["data=her2st", "image_encoder=mobilenetv2", f"image_encoder.checkpoint={args.weights}"]
    keys += [f"data.cache_dir={args.cache}"] if args.cache else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = {method: compose("train", [*keys, f"data.stain={method}"]) for method in ("null", *METHODS)}
    cfg = configs["null"]
    protocol, device = build(cfg.protocol), torch.device(hardware.accelerator_of("auto"))
    encoder = FrozenEncoder(build(cfg.image_encoder), device, None, cfg.data.cache_dir, cfg.data.eval_batch_size)
    sections = dataset_of(cfg).read_sections(protocol)
    folds: dict[str, dict] = {}
    print(
        f"{'fold':<6}{'stain':<10}{'B - C in levels: ' + ', '.join(PIXELS):>40}" + "".join(f"{x:>18}" for x in FLOORS)
    )
    for fold in ("B", "C"):
        datas = {
            method: dataset_of(cfg).serve(sections, protocol, fold, cfg.seed, encoder=encoder)
            for method, cfg in configs.items()
        }
        for method, data in datas.items():
            found = measure(data, datas["null"], datas["macenko"].normaliser.glass)
            folds.setdefault(fold, {})[method] = found
            cells = ("{:.3f} / {:.3f}".format(*found["floors"][name].values()) for name in FLOORS)
            colours = ", ".join(f"{value:.1f}" for value in found["distance_b_c"].values())
            print(f"{fold:<6}{method:<10}{colours:>40}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    record = {
        # folders of the machine that ran it say nothing to others
        "command": re.sub(
            r"(?<![^\s=])/\S*/([^/\s]+)", r"\1", " ".join(["python experiments/stain.py", *sys.argv[1:]])
        ),
        **git_state(),
        "date": now(),
        "seconds": round(time.perf_counter() - start, 1),
        "hardware": {"device": hardware.accelerator_of("auto"), **hardware.describe()},
        "versions": versions(),
        "data_manifest": manifest(sections),
        "protocol": protocol.name,
        "folds": folds,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
