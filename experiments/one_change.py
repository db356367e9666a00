"""Where mclSTExp as published loses: its settings with one change at a time, over folds and seeds.

python experiments/one_change.py --folds B C --seeds 0 1 2 data=her2st data.augmentation=none trainer.max_epochs=30 \
    image_encoder=mobilenetv2 image_encoder.checkpoint=mobilenetv2_100_imagenet.safetensors

Keys are those of stexp-train; the image encoder is frozen. Each line is the difference to the published settings,
paired over the test sections of all folds with a 95 % interval, seeds averaged before; with the lowest loss beside
log(batch) and the most matches beside chance. `validation` is the Pearson correlation on the validation spots, which
are of the training side: settings are chosen by it, never by the test sections beside it. What is finished stays in the
output, and the same command goes on from there; --only NAME ... measures some of the changes.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ablation
import numpy as np
import torch
from keyed_arguments import over_folds_and_seeds, parse, unfinished

from stexp import hardware
from stexp.api.features import frozen_encoder, machine_of
from stexp.config import build, dataset_of, to_plain
from stexp.config.compose import compose
from stexp.data.datamodule import SpotDataModule
from stexp.data.section import Section
from stexp.evaluation.compare import compare
from stexp.evaluation.contrast import read_contrast
from stexp.evaluation.metrics import mean_pearson, score_section, top_genes
from stexp.models.method import Method, Prediction
from stexp.models.retrieval_method import RetrievalMethod
from stexp.runs.provenance import git_state, manifest, now, versions
from stexp.training.fit import build_method, fit, predict

SCORES = ("pearson_acg", "pearson_given_depth", "mse")
CONTRAST = ("loss", "log_batch", "matched", "chance")
PUBLISHED = "as published"
SETTINGS = ["model=mclstexp", "model.spot_context=batch", "model.k=200", "data.batch_size=128"]
NORMALISED = ["model.normalise=true", "model.temperature=0.1"]
ALONE = [*NORMALISED, "model.position=none", "model.depth=0"]
CHANGES: dict[str, list[str]] = {
    PUBLISHED: [],
    "normalised embeddings": ["model.normalise=true"],
    "normalised, temperature 0.1": NORMALISED,
    "normalised, temperature learned": [*NORMALISED, "model.learn_temperature=true"],
    "temperature 16": ["model.temperature=16"],
    "batches of 32": ["data.batch_size=32"],
    "batches of 512": ["data.batch_size=512"],
    "no position table": ["model.position=none"],
    "no attention over spots": ["model.depth=0"],
    "4 attention layers": ["model.depth=4"],
    "context: 6 neighbours": ["model.spot_context=neighbours"],
    "neighbours count alike": ["model.weighting=mean"],
    "corrected by a residual": ["model.correct=true"],
    "soft targets": ["model.objective=soft"],
    "Jensen-Shannon": ["model.objective=jsd"],
    "Donsker-Varadhan": ["model.objective=dv"],
    "512 earlier negatives": ["model.negatives_memory=512"],
    "no negatives within 300 um": ["model.mask_within_um=300"],
    # combinations; without attention and positions a spot is embedded by its expression alone
    "normalised, soft targets": [*NORMALISED, "model.objective=soft"],
    "normalised, Jensen-Shannon": [*NORMALISED, "model.objective=jsd"],
    "normalised, Donsker-Varadhan": [*NORMALISED, "model.objective=dv"],
    "normalised, NWJ": [*NORMALISED, "model.objective=nwj"],
    "normalised, 512 earlier negatives": [*NORMALISED, "model.negatives_memory=512"],
    "normalised, masked": [*NORMALISED, "model.mask_within_um=300"],
    "normalised, no positions": [*NORMALISED, "model.position=none"],
    "normalised, corrected": [*NORMALISED, "model.correct=true"],
    "normalised, no positions, corrected": [*NORMALISED, "model.position=none", "model.correct=true"],
    "normalised, neighbours, masked, corrected": [
        *(*NORMALISED, "model.position=none", "model.spot_context=neighbours", "model.mask_within_um=300"),
        "model.correct=true",
    ],
    "alone": [*ALONE],
    "alone, corrected": [*ALONE, "model.correct=true"],
    "alone, masked, corrected": [*ALONE, "model.mask_within_um=300", "model.correct=true"],
    "alone, soft targets, corrected": [*ALONE, "model.objective=soft", "model.correct=true"],
    "alone, learning rate 1e-3, corrected": [*ALONE, "model.lr=1e-3", "model.correct=true"],
    "alone, batches of 512, corrected": [*ALONE, "data.batch_size=512", "model.correct=true"],
}
"""Keys that differ from `SETTINGS`. Scalar products of 256 normalised dimensions are of the order of 16."""


def measure(keys: list[str], fold: str, seed: int, data: SpotDataModule, change: str) -> dict[str, Any]:
    """Train and score one change on one fold: ``sections``, ``validation``, ``contrast`` and ``seconds``."""
    start = time.perf_counter()
    method, prediction, contrast = trained([*SETTINGS, *keys, *CHANGES[change]], seed, data)
    return {
        "sections": scored(prediction.predicted.numpy(), data, fold),
        "validation": validation_score(method, data),
        "contrast": {key: contrast[key] for key in (*CONTRAST, "left_chance")},
        "seconds": round(time.perf_counter() - start, 1),
    }


def trained(keys: list[str], seed: int, data: SpotDataModule) -> tuple[Method, Prediction, dict[str, Any]]:
    """A method trained and its prediction of the test spots, with what its contrastive loss came to."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose("train", [*keys, f"seed={seed}", f"output_dir={folder}"])
        config = to_plain(cfg)
        machine = machine_of(config)
        data.seed, data.batch_size = seed, config["data"]["batch_size"]
        method = build_method(config["model"], data, machine, seed)
        callbacks = [build(node) for node in config["callbacks"].values()]
        trainer = fit(method, data, Path(folder), machine, callbacks=callbacks)
        best, last = (Path(folder) / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
        prediction, _ = predict(method, data, machine, trainer, best if best.exists() else last)
        contrast = read_contrast(Path(folder))
    assert contrast is not None
    return method, prediction, dict(contrast)


def scored(predicted: np.ndarray, data: SpotDataModule, fold: str) -> dict[str, dict]:
    """Scores of every test section, by fold and section, with its patient."""
    rows = data.rows("test")
    heg = top_genes(data.target[data.rows("train", "validation")].mean(axis=0))
    names, sections = data.spots["section"].to_numpy(str)[rows], {}
    for name in data.names("test"):
        own = names == name
        depth = data.spots["total_counts"].to_numpy()[rows[own]]
        scores = score_section(data.target[rows[own]], predicted[own], heg, total_counts=depth)
        patient = data.spots["patient"].iloc[rows[own][0]]
        sections[f"{fold}:{name}"] = {key: scores[key] for key in SCORES} | {"patient": patient}
    return sections


@torch.no_grad()
def validation_score(method: Method, data: SpotDataModule) -> float | None:
    """Pearson correlation on the validation spots, as the method predicts test spots; None where there are none."""
    rows = data.rows("validation")
    if not len(rows):
        return None
    assert isinstance(method, RetrievalMethod)
    method.eval()
    method.set_reference(data, *method.validation_roles())
    parts = [method.predict_step(data.batch(index, method.device)).predicted for index in data.loader("validation")]
    predicted = torch.cat(parts).cpu().numpy()
    return mean_pearson(data.target[rows], predicted, data.spots["section"].to_numpy(str)[rows])


def compared(runs: dict[str, dict[str, dict]], base_name: str = PUBLISHED) -> dict[str, dict]:
    """Each change's mean scores and its paired differences to the published settings, or to `base_name`.

    Parameters
    ----------
    runs
        Change -> fold and seed -> what `measure` says; ``contrast`` and ``validation`` may be missing. A change is
        compared on the folds and seeds that both have.
    """
    table: dict[str, dict] = {}
    for change, own in runs.items():
        both = [key for key in own if key in runs[base_name]]
        if not both:
            continue
        means, base = _over_seeds(own, both), _over_seeds(runs[base_name], both)
        patients = [value["patient"] for value in means.values()]
        seconds = float(np.mean([own[key]["seconds"] for key in both]))
        entry: dict[str, Any] = {"runs": len(both), "seconds": round(seconds, 1)}
        for score in SCORES:
            entry[score] = {"mean": float(np.mean([value[score] for value in means.values()]))}
            if change != base_name:
                differences = [means[section][score] - base[section][score] for section in means]
                entry[score] |= asdict(compare(differences, patients))
        if all("validation" in own[run] and own[run]["validation"] is not None for run in both):
            entry["validation"] = float(np.mean([own[run]["validation"] for run in both]))
        if all("contrast" in own[run] for run in both):
            for key in CONTRAST:
                entry[key] = float(np.mean([own[run]["contrast"][key] for run in both]))
            entry["left_chance"] = sum(own[run]["contrast"]["left_chance"] for run in both)
        table[change] = entry
    return table


def _over_seeds(runs: dict[str, dict], keys: list[str]) -> dict[str, dict]:
    """Section -> scores, means over the runs `keys`."""
    of_section: dict[str, list[dict]] = {}
    for key in keys:
        for section, scores in runs[key]["sections"].items():
            of_section.setdefault(section, []).append(scores)
    out = {}
    for section, seeds in of_section.items():
        means = {score: float(np.mean([each[score] for each in seeds])) for score in SCORES}
        out[section] = {**means, "patient": seeds[0]["patient"]}
    return out


def lines(table: dict[str, dict]) -> list[str]:
    """The table in Markdown."""
    heads = [
        "validation",
        *(f"{name}, difference" for name in SCORES),
        "loss / log(batch)",
        "matched / chance",
        "left chance",
        "s",
    ]
    rows = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name, part in table.items():
        cells = [f"{part['validation']:.4f}" if "validation" in part else ""]
        cells += [ablation.cell(part[score]) for score in SCORES]
        cells.append(f"{part['loss']:.3f} / {part['log_batch']:.3f}")
        cells.append(f"{part['matched']:.4f} / {part['chance']:.4f}")
        cells += [f"{part['left_chance']} of {part['runs']}", f"{part['seconds']:.1f}"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = over_folds_and_seeds(__doc__, CHANGES, "one-change-<data>-<protocol>.json")
    args, keys = parse(parser)
    keys = ["image_encoder.frozen=true", *keys]
    cfg = compose("train", [*SETTINGS, *keys])
    output = args.output or Path(__file__).parent / "results" / f"one-change-{cfg.data.name}-{cfg.protocol.name}.json"
    config, state = to_plain(cfg), git_state()
    machine_of(config).set_threads()
    runs: dict[str, dict[str, dict]] = unfinished(output, elsewhere(keys), state["commit"])
    sections = dataset_of(cfg).read_sections(build(cfg.protocol))
    served: dict[str, SpotDataModule] = {}
    for seed in args.seeds:
        for fold in args.folds:
            for change in [PUBLISHED, *(each for each in args.only if each != PUBLISHED)]:
                if f"{fold} s{seed}" in runs.get(change, {}):
                    continue
                if fold not in served:
                    frozen = frozen_encoder(config, machine_of(config))
                    served[fold] = dataset_of(cfg).serve(sections, build(cfg.protocol), fold, cfg.seed, encoder=frozen)
                made = measure(keys, fold, seed, served[fold], change)
                runs.setdefault(change, {})[f"{fold} s{seed}"] = made
                scores = [made["validation"], *(own["pearson_acg"] for own in made["sections"].values())]
                print(f"{fold} s{seed}  {change:<40}", *("" if each is None else f"{each:.4f}" for each in scores))
                _write(output, keys, state, sections, runs)
    print("\n".join([*lines(compared(runs)), f"wrote {output}"]))


def elsewhere(keys: list[str]) -> list[str]:
    """Keys without the folders of this machine, which say nothing to others."""
    return [re.sub(r"(?<![^=])/\S*/([^/\s]+)", r"\1", key) for key in keys]


def _write(output: Path, keys: list[str], state: dict, sections: list[Section], runs: dict) -> None:
    record = {
        "command": shlex.join(["python", "experiments/one_change.py", *elsewhere(sys.argv[1:])]),
        "keys": elsewhere(keys),
        **state,
        "date": now(),
        "hardware": hardware.describe(),
        "versions": versions(),
        "data_manifest": manifest(sections),
        "changes": {change: CHANGES[change] for change in runs},
        "table": compared(runs),
        "runs": runs,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
