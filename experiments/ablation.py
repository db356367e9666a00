"""What each part of model=consensus adds: left out, or alone, paired over sections; and random weights beside it.

python experiments/ablation.py --folds B C --seeds 0 1 2 data=her2st image_encoder=mobilenetv2 \
    image_encoder.checkpoint=mobilenetv2_100_imagenet.safetensors

Keys are those of stexp-train. Features are computed once and kept in the cache; the rest is seconds. Each line is the
difference to the whole method, mean over the test sections of all folds with a 95 % interval, and the seconds of its
fits beyond those of its features. Of several data sets, run it once for each: a part stays that helps on more than one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stexp import hardware
from stexp.config import build, dataset_of, to_plain
from stexp.config.compose import compose
from stexp.data.datamodule import SpotDataModule
from stexp.data.section import Section
from stexp.evaluation.compare import compare
from stexp.evaluation.metrics import score_section, top_genes
from stexp.models import consensus
from stexp.models.closed_form import LEARNT_FROM
from stexp.models.consensus import Consensus, Table
from stexp.models.encoders.frozen import UNTUNED, FrozenEncoder
from stexp.runs.provenance import git_state, manifest, now, versions
from stexp.training.machine import Machine

SCORES = ("pearson_acg", "pearson_given_depth", "mse")
WHOLE = "whole"
FULL_RANK: dict[str, Any] = {"ranks": [1024]}
UNSMOOTHED: dict[str, Any] = {"radii_um": [0]}
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "without ridges": {"penalties": []},
    "without neighbours": {"neighbours": []},
    "without low rank": FULL_RANK,
    "without smoothing": UNSMOOTHED,
    "without learned weights": {"trust": 1e9},
    "without turned views": {"turns": 1},
    "ridges alone, one scale": {"neighbours": [], "scale": 1, "turns": 1, **FULL_RANK, **UNSMOOTHED},
    "neighbours alone, one scale": {"penalties": [], "scale": 1, "turns": 1, **FULL_RANK, **UNSMOOTHED},
}
"""Arguments of the method that differ; ``scale``: the only one whose features are read; ``trust``: in equal weights."""


@contextmanager
def trusting(trust: float) -> Iterator[None]:
    """`stexp.models.consensus.TRUST` at another value."""
    before, consensus.TRUST = consensus.TRUST, trust
    try:
        yield
    finally:
        consensus.TRUST = before


def columns(scales: list[float], n_features: int, kept: list[float]) -> np.ndarray:
    """Columns of the features that are of some scales."""
    return np.flatnonzero(np.isin(np.repeat(scales, n_features // len(scales)), kept))


def score(data: SpotDataModule, scales: list[float], changes: dict[str, Any]) -> tuple[dict, float]:
    """Scores of each test section, by `SCORES`, and the seconds of fit and prediction."""
    changes = dict(changes)
    kept = columns(scales, data.tile_features.shape[1], changes.pop("only", scales))
    trust = changes.pop("trust", consensus.TRUST)
    start = time.perf_counter()
    table = Table.of(data, data.rows(*LEARNT_FROM))
    method = Consensus(len(data.panel), len(kept), **changes)
    with trusting(trust):
        method.fit_table(replace(table, features=table.features[:, kept]))
    heg = top_genes(table.expression.mean(axis=0))
    names, found = data.spots["section"].to_numpy(str), {}
    for name in data.names("test"):
        rows = np.intersect1d(np.flatnonzero(names == name), data.rows("test"))
        features = torch.from_numpy(data.tile_features[rows][:, kept])
        predicted = method.predict_together(method.embed_features(features), torch.from_numpy(data.xy_um[rows]))
        depth = data.spots["total_counts"].to_numpy()[rows]
        scores = score_section(data.target[rows], predicted.predicted.numpy(), heg, total_counts=depth)
        found[name] = {key: scores[key] for key in SCORES} | {"patient": data.spots["patient"].iloc[rows[0]]}
    return found, time.perf_counter() - start


def serve(keys: list[str], folds: list[str], sections: list[Section]) -> Iterator[tuple[str, SpotDataModule]]:
    """The data of each fold with frozen features, as ``stexp-train`` has them under some keys."""
    cfg = compose("train", ["model=consensus", "image_encoder.frozen=true", *keys])
    machine = Machine(to_plain(cfg.trainer), cfg.hardware.precision, cfg.hardware.channels_last, cfg.hardware.threads)
    machine.set_threads()
    torch.manual_seed(cfg.seed)
    encoder = build({**to_plain(cfg.image_encoder), **UNTUNED})
    cache = (cfg.data.cache_dir, cfg.data.eval_batch_size)
    frozen = FrozenEncoder(encoder, machine.device, machine.autocast(), *cache)
    for fold in folds:
        yield fold, dataset_of(cfg).serve(sections, build(cfg.protocol), fold, cfg.seed, encoder=frozen)


def measure(keys: list[str], folds: list[str], seeds: list[int], sections: list[Section]) -> dict[str, dict]:
    """Variant -> fold and section -> scores, with the seconds under ``seconds``."""
    scales = list(to_plain(compose("train", ["model=consensus", *keys]).model)["scales"])
    variants = dict(VARIANTS)
    if len(scales) > 1:
        variants |= {f"without scale {scale:g}": {"only": [s for s in scales if s != scale]} for scale in scales}
        variants |= {f"scale {scale:g} alone": {"only": [scale]} for scale in scales}
    random = ["image_encoder.pretrained=false", "image_encoder.checkpoint=null"]
    encoders: dict[int | str, list[str]] = {2: [], 1: ["model.turns=1"]} | {
        f"seed {seed}": [*random, f"seed={seed}"] for seed in seeds
    }
    found: dict[str, dict] = {}
    for encoder, more in encoders.items():
        for fold, data in serve([*keys, *more], folds, sections):
            for name, changes in variants.items():
                label = f"random weights, {encoder}" if isinstance(encoder, str) else name
                if (name != WHOLE) if isinstance(encoder, str) else (changes.get("turns", 2) != encoder):
                    continue
                changes = dict(changes)
                if "scale" in changes:
                    changes["only"] = [changes.pop("scale")]
                scores, seconds = score(data, scales, changes)
                part = found.setdefault(label, {"seconds": 0.0})
                part["seconds"] = round(part["seconds"] + seconds, 2)
                part |= {f"{fold}:{section}": values for section, values in scores.items()}
                print(f"{fold}  {label:<32}", *(f"{v['pearson_acg']:.4f}" for v in scores.values()), flush=True)
    return found


def compared(found: dict[str, dict]) -> dict[str, dict]:
    """Each variant's mean scores, and its paired differences to the whole method."""
    whole = found[WHOLE]
    keys = [key for key in whole if key != "seconds"]
    patients = [whole[key]["patient"] for key in keys]
    out = {}
    for name, part in found.items():
        out[name] = {"seconds": part["seconds"]}
        for score in SCORES:
            differences = [part[key][score] - whole[key][score] for key in keys]
            out[name][score] = {"mean": float(np.mean([part[key][score] for key in keys]))}
            if name != WHOLE:
                out[name][score] |= asdict(compare(differences, patients))
    return out


def lines(table: dict[str, dict]) -> list[str]:
    """The table in Markdown."""
    rows = ["| | " + " | ".join(f"{name}, difference" for name in SCORES) + " | s |", "|---|" + "---|" * 4]
    for name, part in table.items():
        cells = []
        for score in SCORES:
            value = part[score]
            cell = f"{value['mean']:.4f}"
            if "difference" in value:
                cell += f", {value['difference']:+.4f}"
            if value.get("low") is not None:
                cell += f" [{value['low']:+.4f}, {value['high']:+.4f}]"
            cells.append(cell)
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {part['seconds']:.1f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="of encoders with random weights")
    parser.add_argument("--output", type=Path, help="default: experiments/results/ablation-<data>-<protocol>.json")
    args, keys = parser.parse_known_args()
    cfg = compose("train", ["model=consensus", *keys])
    output = args.output or Path(__file__).parent / "results" / f"ablation-{cfg.data.name}-{cfg.protocol.name}.json"
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    found = measure(keys, args.folds, args.seeds, sections)
    table = compared(found)
    record = {
        # folders of the machine that ran it say nothing to others
        "command": re.sub(
            r"(?<![^\s=])/\S*/([^/\s]+)", r"\1", " ".join(["python experiments/ablation.py", *sys.argv[1:]])
        ),
        **git_state(),
        "date": now(),
        "hardware": hardware.describe(),
        "versions": versions(),
        "data_manifest": manifest(sections),
        "table": table,
        "sections": found,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([*lines(table), f"wrote {output}"]))


if __name__ == "__main__":
    main()
