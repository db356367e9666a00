"""What each part of model=consensus adds: left out, or alone, paired over sections; and random weights beside it.

python experiments/ablation.py --folds B C --seeds 0 1 2 data=her2st image_encoder=mobilenetv2 \
    image_encoder.checkpoint=mobilenetv2_100_imagenet.safetensors

Keys are those of stexp-train, `model.*` among them: they change the whole method. Features are computed once and kept
in the cache; the rest is seconds. Parts are judged on the training side: its patients (of fewer than three its
sections, of one its blocks) are left out in turn, the method is fitted to the others, all that it chooses included, and
predicts them. Scores of the test sections stand beside these and decide nothing. Each is the difference to the whole
method, or of a part alone to plain ridges, mean over sections of all folds with a 95 % interval; a section that trains
in several folds counts once. --inputs tries other features of the same tiles; --seeds are of the control, the whole
method at random weights; with --control-only nothing else stands beside the whole method. Of several data sets, run it
once for each: a part stays that helps on more than one. experiments/results.py writes the tables of what is kept in
experiments/results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ablation_table import SCORES, SIDES, lines
from ablation_table import cell as cell
from keyed_arguments import parse

from stexp import hardware
from stexp.config import build, dataset_of, to_plain
from stexp.config.compose import compose
from stexp.data.datamodule import SpotDataModule
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation.compare import compare
from stexp.evaluation.metrics import score_section, top_genes
from stexp.models.closed_form import LEARNT_FROM
from stexp.models.consensus import Consensus
from stexp.models.encoders.frozen import UNTUNED, FrozenEncoder
from stexp.models.table import Table
from stexp.runs.provenance import git_state, manifest, now, versions
from stexp.training.machine import Machine

WHOLE, PLAIN = "whole", "plain"
FULL_RANK: dict[str, Any] = {"ranks": [1024]}
UNSMOOTHED: dict[str, Any] = {"radii_um": [0]}
RIDGES: dict[str, Any] = {"penalties": [1, 3, 10, 30]}
ALONE: dict[str, Any] = {"neighbours": [], "only": [1], "turns": 1, **RIDGES, **FULL_RANK, **UNSMOOTHED}
"""Ridges of the tile itself, which all that the method adds is left out of."""
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "without ridges": {"penalties": []},
    "with ridges": RIDGES,
    "without neighbours": {"neighbours": []},
    "without low rank": FULL_RANK,
    "without smoothing": UNSMOOTHED,
    "without learned weights": {"trust": None},
    "with learned weights": {"trust": 1.0},
    "without turned views": {"turns": 1},
    PLAIN: ALONE,
    "plain, with neighbours": {key: value for key, value in ALONE.items() if key != "neighbours"},
    "plain, with low rank": {key: value for key, value in ALONE.items() if key != "ranks"},
    "plain, with smoothing": {key: value for key, value in ALONE.items() if key != "radii_um"},
    "plain, with all scales": {key: value for key, value in ALONE.items() if key != "only"},
    "plain, with turned views": {key: value for key, value in ALONE.items() if key != "turns"},
    "plain, neighbours for ridges": {key: value for key, value in ALONE.items() if key != "neighbours"}
    | {"penalties": []},
}
"""Arguments of the method that differ; ``only``: the scales whose features are read."""
INPUTS: dict[str, list[str]] = {
    "levels": ["image_encoder.output=levels"],
    "macenko": ["data.stain=macenko"],
    "levels, macenko": ["image_encoder.output=levels", "data.stain=macenko"],
}
"""Keys of other features, for the whole method."""


def columns(scales: list[float], n_features: int, kept: list[float]) -> np.ndarray:
    """Columns of the features that are of some scales."""
    return np.flatnonzero(np.isin(np.repeat(scales, n_features // len(scales)), kept))


def predict(method: Consensus, table: Table) -> np.ndarray:
    """Expression of the spots of a table, each section together."""
    out = np.empty((len(table), len(method.mean)), dtype=np.float32)
    for name in np.unique(table.section):
        rows = np.flatnonzero(table.section == name)
        own = table.take(rows)
        embedding = method.embed_features(torch.from_numpy(own.read(own.features)))
        out[rows] = method.predict_together(embedding, torch.from_numpy(own.xy_um)).predicted.numpy()
    return out


def left_out(table: Table, sizes: tuple[int, int], arguments: dict[str, Any]) -> np.ndarray:
    """Expression of the spots of a table, each group predicted by a method that was fitted to the others.

    Parameters
    ----------
    sizes
        Genes and features.
    """
    out = np.empty((len(table), sizes[0]), dtype=np.float32)
    for group in np.unique(table.group):
        own, rest = np.flatnonzero(table.group == group), table.take(np.flatnonzero(table.group != group))
        if len(np.unique(rest.group)) < 2:
            raise InputError("two groups on the training side: three patients, sections or blocks at least would fit")
        method = Consensus(*sizes, **arguments)
        method.fit_table(rest)
        out[own] = predict(method, table.take(own))
    return out


def score(data: SpotDataModule, kept: np.ndarray, arguments: dict[str, Any]) -> dict[str, dict[str, dict]]:
    """Scores by `SCORES` of each section of each of `SIDES`, from the columns `kept` of the features."""
    learnt, test = data.rows(*LEARNT_FROM), data.rows("test")
    used, sizes = np.concatenate([learnt, test]), (len(data.panel), len(kept))
    features, expression = data.tile_features[used][:, kept], data.target[used]
    rows = np.split(np.arange(len(used)), [len(learnt)])
    table = replace(Table.of(data, learnt), features=features, expression=expression, rows=rows[0])
    method = Consensus(*sizes, **arguments)
    method.fit_table(table)
    spots = data.spots.iloc[test]
    names = spots["section"].to_numpy(str)
    of_test = Table(features, expression, data.xy_um[test], names, names, rows[1])
    heg = top_genes(table.read(table.expression).mean(axis=0))
    scores: dict[str, dict[str, dict]] = {}
    for side, places, own, predicted in (
        (SIDES[0], learnt, table, left_out(table, sizes, arguments)),
        (SIDES[1], test, of_test, predict(method, of_test)),
    ):
        scores[side], observed = {}, own.read(own.expression)
        for name in np.unique(own.section):
            mine = own.section == name
            spots = data.spots.iloc[places[mine]]
            depth = spots["total_counts"].to_numpy()
            all_scores = score_section(observed[mine], predicted[mine], heg, total_counts=depth)
            scores[side][name] = {key: all_scores[key] for key in SCORES} | {"patient": str(spots["patient"].iloc[0])}
    return scores


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


def measure(
    keys: list[str],
    folds: list[str],
    seeds: list[int],
    sections: list[Section],
    inputs: Sequence[str] = (),
    control_only: bool = False,
) -> dict[str, dict]:
    """Variant -> side -> fold and section -> scores, with the processor's seconds under ``seconds``.

    Parameters
    ----------
    inputs
        Some of `INPUTS`.
    control_only
        Leave out no part: the whole method and its control.
    """
    whole = to_plain(compose("train", ["model=consensus", *keys]).model)
    arguments = {key: value for key, value in whole.items() if key not in ("_target_", "name")}
    scales, turns = list(arguments["scales"]), arguments["turns"]
    has = {"ridges": bool(arguments["penalties"]), "learned weights": arguments["trust"] is not None}
    absent = [f"{'with' if present else 'without'} {part}" for part, present in has.items()]
    variants = {
        name: part
        for name, part in VARIANTS.items()
        if name not in absent and (not part or arguments | part != arguments)
    }
    if turns == 1:
        variants.pop("plain, with turned views")
    if len(scales) > 1:
        variants |= {f"without scale {scale:g}": {"only": [s for s in scales if s != scale]} for scale in scales}
        variants |= {f"scale {scale:g} alone": {"only": [scale]} for scale in scales}
    else:
        variants.pop("plain, with all scales")
    if control_only:
        variants = {WHOLE: {}}
    random = ["image_encoder.pretrained=false", "image_encoder.checkpoint=null"]
    encoders: dict[int | str, list[str]] = {turns: []}
    if turns != 1 and not control_only:
        encoders[1] = ["model.turns=1"]
    encoders |= {f"whole, {name}": INPUTS[name] for name in inputs}
    encoders |= {f"random weights, seed {seed}": [*random, f"seed={seed}"] for seed in seeds}
    measured: dict[str, dict] = {}
    for encoder, more in encoders.items():
        for fold, data in serve([*keys, *more], folds, sections):
            for name, part in variants.items():
                label = encoder if isinstance(encoder, str) else name
                if (name != WHOLE) if isinstance(encoder, str) else (part.get("turns", turns) != encoder):
                    continue
                changes = dict(part)
                only = [scale for scale in changes.pop("only", scales) if scale in scales] or scales
                kept = columns(scales, data.tile_features.shape[1], only)
                start = time.process_time()
                scores = score(data, kept, arguments | changes)
                record = measured.setdefault(label, {"seconds": 0.0, **{side: {} for side in SIDES}})
                record["seconds"] = round(record["seconds"] + time.process_time() - start, 2)
                for side in SIDES:
                    record[side] |= {f"{fold}:{section}": values for section, values in scores[side].items()}
                means = (np.mean([each["pearson_acg"] for each in scores[side].values()]) for side in SIDES)
                print(f"{fold}  {label:<32}", *(f"{mean:.4f}" for mean in means), flush=True)
    return measured


def compared(measured: dict[str, dict]) -> dict[str, dict]:
    """Each variant's mean scores on both sides, and its paired differences to the whole method, or to plain ridges."""
    out: dict[str, dict] = {}
    for name, part in measured.items():
        other = PLAIN if name.startswith(f"{PLAIN},") else WHOLE
        out[name] = {"seconds": part["seconds"], "beside": other}
        for side in SIDES:
            own, beside = (_of_sections(each[side]) for each in (part, measured[other]))
            out[name][side] = {}
            for score in SCORES:
                out[name][side][score] = {"mean": float(own[score].mean())}
                if name != WHOLE:
                    differences = own[score] - beside[score]
                    out[name][side][score] |= asdict(compare(differences, own.index.get_level_values("patient")))
    return out


def _of_sections(scores: dict[str, dict]) -> pd.DataFrame:
    """Mean over folds of each section, whose fits share most of what they learn from: (patient, section) -> scores."""
    table = pd.DataFrame(scores.values(), index=[key.partition(":")[2] for key in scores]).rename_axis("section")
    return table.reset_index().groupby(["patient", "section"])[list(SCORES)].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", required=True, metavar="FOLD", help="held out in turn")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="of encoders with random weights")
    parser.add_argument("--inputs", nargs="*", choices=INPUTS, default=[], help="other features for the whole method")
    parser.add_argument("--control-only", action="store_true", help="the whole method and the control alone")
    parser.add_argument("--output", type=Path, help="default: experiments/results/ablation-<data>-<protocol>.json")
    args, keys = parse(parser)
    cfg = compose("train", ["model=consensus", *keys])
    kind = "control" if args.control_only else "ablation"
    output = args.output or Path(__file__).parent / "results" / f"{kind}-{cfg.data.name}-{cfg.protocol.name}.json"
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    measured = measure(keys, args.folds, args.seeds, sections, args.inputs, args.control_only)
    table = compared(measured)
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
        "sections": measured,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([*lines(table), f"wrote {output}"]))


if __name__ == "__main__":
    main()
