"""Finished runs: found, read, told apart, and checked to belong into one table; needs no torch."""

from __future__ import annotations

import csv
import glob
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stexp.config import build, load_run, to_plain
from stexp.errors import InputError
from stexp.evaluation.predictions import read_json
from stexp.protocol import Protocol

log = logging.getLogger(__name__)

NO_METHOD = (
    *("fold", "seed", "output_dir", "overwrite", "experiment"),
    *("protocol.", "hardware.", "logger.", "callbacks.", "model.image_encoder.", "data.reader."),
    *("data.name", "data.root", "data.sheet", "data.cache_dir", "data.placement", "data.eval_batch_size"),
    *(
        "data.published_",
        "data.panel_",
        "trainer.accelerator",
        "trainer.devices",
        "trainer.strategy",
        "trainer.log_every_n_steps",
    ),
)
"""How config keys begin that say where, when and on what a method ran, not what it is."""
SAME_FLOOR = 1e-3
"""Floors of one name that differ by less in every section are one row: rounding differs between machines."""
FINISH = (
    "stexp-train -cp {} -cn config +overwrite=false hydra.run.dir=. hydra.output_subdir=null hydra/job_logging=none"
)
"""Goes on with the config of a run folder as it stands."""


@dataclass(frozen=True)
class Run:
    """A finished run, scored as one protocol.

    Parameters
    ----------
    settings
        What the method is: dotted config key -> value.
    scored_as
        Name of the protocol that `sections` were scored under: its own or another.
    sections
        Section -> ``scores``, ``floors``, ``ceiling``.
    """

    folder: Path
    fold: str
    seed: int
    settings: dict[str, Any]
    protocol: Protocol
    scored_as: str
    sections: dict[str, dict]
    genes: frozenset[str]
    metrics: dict
    audit: dict
    provenance: dict

    @property
    def patient_of(self) -> dict[str, str]:
        return self.audit["facts"]["patient_of"]


def find_runs(patterns: list[str]) -> tuple[list[Path], list[Path]]:
    """Run folders that paths, folders above them or glob patterns name: finished ones, and the others."""
    finished, unfinished = {}, {}
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else [Path(match) for match in sorted(glob.glob(pattern))]
        if not paths:
            raise InputError(f"runs: nothing is called {pattern}")
        if paths[0].suffix == ".json":
            raise InputError(f"{paths[0]} holds no scores of floors per section and no config; name the run's folder")
        folders = [folder for path in paths if path.is_dir() for folder in _run_folders(path)]
        if not folders:
            raise InputError(f"runs: {pattern} holds no run (a folder with config.yaml and metrics.json)")
        for folder in folders:
            whole = all((folder / f"{name}.json").is_file() for name in ("metrics", "audit", "provenance"))
            if not whole and not (folder / "checkpoints").is_dir() and folder not in paths:
                log.warning("%s never came to train and is left out", folder)
                continue
            (finished if whole else unfinished)[folder.resolve()] = folder
    return list(finished.values()), list(unfinished.values())


def _run_folders(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    if (folder / "config.yaml").is_file():
        yield folder
        return
    if folder.resolve() in above:
        return  # a link that leads back
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            yield from _run_folders(inner, (*above, folder.resolve()))


def read_run(folder: Path, scored_as: str | None = None) -> Run:
    """A finished run under its own protocol, or under `scored_as`.

    Raises
    ------
    InputError
        A file is missing or damaged, or the run is not scored as `scored_as`, section by section.
    """
    config = to_plain(load_run(folder))
    cut = [key for key in ("seed", "protocol", "data", "model") if key not in config]
    if cut:
        raise InputError(f"{folder / 'config.yaml'} lacks {', '.join(cut)}: it is not whole")
    needs = {
        "metrics": ("protocol", "n_genes", "fold", "data", "sections", "scored_as", "chosen", "oracle_floors"),
        "audit": ("leaks", "items", "facts"),
        "provenance": ("command", "seconds", "data_manifest"),
    }
    metrics, audit, provenance = (read_json(folder / f"{name}.json", *keys) for name, keys in needs.items())
    own, sections = metrics["protocol"], metrics["sections"]
    if scored_as not in (None, own):
        other = metrics["scored_as"].get(scored_as)
        if other is None:
            known = ", ".join([own, *metrics["scored_as"]])
            raise InputError(
                f"{folder} is not scored as {scored_as}, only as {known}; stexp-score run={folder} may help"
            )
        if "sections" not in other and len(sections) > 1:
            raise InputError(
                f"{folder}: the scores as {scored_as} are not kept by section; do that with stexp-score run={folder}"
            )
        sections = other.get("sections") or {next(iter(sections)): other}
    try:
        with open(folder / "per_gene.csv", newline="") as file:
            genes = frozenset(row["gene"] for row in csv.DictReader(file))
        if len(genes) != metrics["n_genes"]:
            raise ValueError(f"{len(genes)} genes")
    except (KeyError, ValueError, csv.Error):
        raise InputError(
            f"{folder / 'per_gene.csv'} cannot be read; write it again with stexp-score run={folder}"
        ) from None
    settings = _flat(config)
    encoder = config.get("model", {}).get("image_encoder") or config.get("image_encoder") or {}
    settings |= _flat({"image_encoder": encoder})
    settings = {key: value for key, value in settings.items() if not key.startswith(NO_METHOD)}
    if settings.get("image_encoder.checkpoint"):
        settings["image_encoder.checkpoint"] = Path(settings["image_encoder.checkpoint"]).name
    if "k_validation_pearson" in metrics["chosen"] and "k" not in metrics["chosen"].get("changed", {}):
        settings["model.k"] = "auto"  # a re-scored run holds what was chosen, another number in every fold
    return Run(
        folder=folder,
        fold=str(metrics["fold"]),
        seed=config["seed"],
        settings=settings,
        protocol=build(config["protocol"]),
        scored_as=scored_as or own,
        sections=sections,
        genes=genes,
        metrics=metrics,
        audit=audit,
        provenance=provenance,
    )


def _flat(config: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def label_methods(settings: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Name every run's method by what differs between the runs.

    The model; its image encoder and whether that is frozen, fine-tuned or from scratch, where these differ; then as
    few other settings as tell the rest apart.

    Returns
    -------
    labels
        One a run; equal for equal methods.
    besides
        Settings of data and training that differ and are in no label.
    """
    differing = [
        key
        for key in dict.fromkeys(key for each in settings for key in each)
        # a key that only some have came with another version or model, and tells nothing by itself
        if len({json.dumps(each[key]) for each in settings if key in each}) > 1
    ]
    words = [(each.get("model.name"), each.get("image_encoder.name"), _training(each)) for each in settings]
    shown = [i for i in range(3) if i == 0 or len({word[i] for word in words}) > 1]
    methods = [json.dumps([each.get(key) for key in differing]) for each in settings]
    rest = sorted(
        (key for key in differing if key.split(".")[0] != "image_encoder"), key=lambda k: k.split(".")[0] != "model"
    )
    rest += [key for key in differing if key not in rest]
    choices = [keys for n in range(min(len(rest), 3) + 1) for keys in combinations(rest, n)] + [tuple(rest)]
    for keys in choices:
        labels = [
            " ".join(
                [str(word[i]) for i in shown if word[i]]
                + [f"{key.split('.')[-1]}={_plain(each[key])}" for key in keys if each.get(key) is not None]
            )
            for word, each in zip(words, settings, strict=True)
        ]
        if len(set(zip(labels, methods, strict=True))) == len(set(labels)):
            break
    return labels, [key for key in rest if key not in keys and key.startswith(("data.", "trainer."))]


def _training(settings: dict[str, Any]) -> str | None:
    if "image_encoder.name" not in settings:
        return None
    frozen, pretrained = settings.get("image_encoder.frozen"), settings.get("image_encoder.pretrained")
    if frozen:
        return "frozen" if pretrained else "random, frozen"
    if settings.get("image_encoder.tuning", "all") == "last":
        return f"last {settings['image_encoder.last_blocks']} blocks fine-tuned"
    if settings.get("image_encoder.tuning", "all") == "lora":
        return "LoRA"
    return "fine-tuned" if pretrained else "from scratch"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def check_agreement(runs: list[Run]) -> None:
    """InputError where two runs mean something else by one section: other files, patient, spots or genes."""
    seen: dict[tuple, tuple] = {}

    def agree(what: tuple, value: Any, run: Run, otherwise: str) -> None:
        before, other = seen.setdefault(what, (value, run))
        if before != value:
            raise InputError(f"{other.folder} and {run.folder} do not belong into one table: {otherwise}")

    for run in runs:
        for section, files in run.provenance["data_manifest"].items():
            for file, digest in files.items():
                agree((section, file), digest, run, f"section {section} was read from another {file}")
        for section in run.sections:
            here, n_spots = f"fold {run.fold}, section {section}", run.metrics["sections"][section]["n_spots"]
            agree((section,), run.patient_of[section], run, f"section {section} is of different patients")
            agree((here, "spots"), n_spots, run, f"they predict other spots ({here})")
            agree((here, "genes"), run.genes, run, f"they predict other genes ({here}); a table has one panel")


def find_gaps(runs: list[Run], labels: list[str]) -> list[tuple[str, str, str]]:
    """What other runs have and a method, with one of its seeds, has not: who, what, and what fills it.

    Raises
    ------
    InputError
        Two runs of the same method, seed and fold.
    """
    cells: dict[tuple[str, int], dict[str, Run]] = {}
    tested: dict[str, dict[str, Run]] = {}
    for run, label in zip(runs, labels, strict=True):
        before = cells.setdefault((label, run.seed), {}).setdefault(run.fold, run)
        if before is not run:
            raise InputError(
                f"{before.folder} and {run.folder} are the same method, seed {run.seed} and fold {run.fold}; name one"
            )
        for section in run.sections:
            tested.setdefault(run.fold, {}).setdefault(section, run)
    gaps = []
    for (label, seed), have in sorted(cells.items()):
        for fold in sorted(tested):
            if fold not in have:
                fill = f"fill it with: {_command(next(iter(have.values())), fold)}"
                gaps.append((f"{label}, seed {seed},", f"fold {fold}", fill))
            elif lacks := [section for section in tested[fold] if section not in have[fold].sections]:
                other = tested[fold][lacks[0]].folder
                fill = f"{other} has; train {have[fold].folder} anew with the same data.sections"
                gaps.append((f"{label}, seed {seed},", f"section {', '.join(lacks)} of fold {fold}", fill))
    return gaps


def _command(run: Run, fold: str) -> str:
    """The command of a run, for another fold, into a folder of its own."""
    words = run.provenance.get("trained_by", run.provenance["command"]).split()
    named = any(word.startswith("output_dir=") for word in words)
    dropped = ("-m", "--multirun", "fold=", "seed=", "output_dir=", "overwrite=")
    words = [word for word in words if not word.startswith(dropped)] + [f"fold={fold}"]
    if run.seed:
        words.append(f"seed={run.seed}")
    if named:
        name = re.sub(rf"(?<![^\W_]){re.escape(run.fold)}(?![^\W_])", fold, run.folder.name)
        words.append(f"output_dir={run.folder.parent / (name if name != run.folder.name else f'{name}-{fold}')}")
    if "trained_by" in run.provenance:
        words += ["and then", re.sub(r"run=\S+", "run=<that run>", run.provenance["command"])]
    return " ".join(words)


def scores_of(runs: list[Run], labels: list[str], metrics: list[str]) -> pd.DataFrame:
    """Every score of every run, of the method, floors, oracles and ceiling.

    Returns
    -------
    DataFrame
        ``kind`` (method, floor, oracle, ceiling), ``name``, ``of`` (the method of the run), ``fold``, ``seed``,
        ``section``, ``patient`` and `metrics`. A floor that differs between methods has one name for each value.
    """
    rows = []
    for run, label in zip(runs, labels, strict=True):
        oracles = run.metrics["oracle_floors"]
        for section, part in run.sections.items():
            predictors = [("method", label, part["scores"])]
            predictors += [
                ("oracle" if floor in oracles else "floor", floor.replace("_", " "), scores)
                for floor, scores in part["floors"].items()
            ]
            predictors.append(("ceiling", "counting noise", part["ceiling"]))
            where = {"of": label, "fold": run.fold, "seed": run.seed, "section": section}
            where["patient"] = run.patient_of[section]
            for kind, name, scores in predictors:
                rows.append({"kind": kind, "name": name, **where, **{key: scores.get(key) for key in metrics}})
    table = pd.DataFrame(rows).astype(dict.fromkeys(metrics, np.float64))
    encoders = {label: str(run.settings.get("image_encoder.name")) for run, label in zip(runs, labels, strict=True)}
    _name_floors(table, encoders)
    return table


def _name_floors(scores: pd.DataFrame, encoders: dict[str, str]) -> None:
    """Rename floors that differ between methods, by image encoder, or by method where that does not tell them apart."""
    for name in scores.loc[scores["kind"] == "floor", "name"].unique():
        part = scores[(scores["kind"] == "floor") & (scores["name"] == name)]
        values = part.groupby(["fold", "section", "of"])["pearson_acg"].mean().unstack("of")
        alike: list[list[str]] = []
        for method in sorted(values.columns):
            for methods in alike:
                off = (values[method] - values[methods].mean(axis=1)).abs().dropna()
                if off.max() <= SAME_FLOOR if len(off) else encoders[method] == encoders[methods[0]]:
                    methods.append(method)
                    break
            else:
                alike.append([method])
        tags = [", ".join(sorted({encoders[method] for method in methods})) for methods in alike]
        if len(set(tags)) < len(tags):
            tags = [", ".join(methods) for methods in alike]
        for tag, methods in zip(tags, alike, strict=True):
            if len(alike) > 1:
                scores.loc[part.index[part["of"].isin(methods)], "name"] = f"{name} ({tag})"


def cost_of(runs: list[Run]) -> dict:
    """Seeds, leaks, and what one run of a method took: means of seconds, the highest of the rest."""
    records = [run.provenance for run in runs]

    def highest(*keys: str) -> float | None:
        values = []
        for record in records:
            for key in keys:
                record = (record or {}).get(key)
            values.append(record)
        return max((value for value in values if value is not None), default=None)

    return {
        "n_seeds": len({run.seed for run in runs}),
        "leaks": span(run.audit["leaks"] for run in runs),
        "epochs": highest("epochs") or max(run.settings.get("trainer.max_epochs") or 0 for run in runs),
        "seconds": float(np.mean([record["seconds"] for record in records])),
        "peak_memory_gb": highest("peak_memory_gb"),
        "peak_gpu_memory_gb": highest("peak_gpu_memory_gb"),
        "parameters": highest("parameters", "total"),
        "trained_parameters": highest("parameters", "trained"),
        "hardware": ", ".join(sorted({_hardware(record.get("hardware", {})) for record in records})),
    }


def _hardware(facts: dict) -> str:
    gpus = facts.get("gpu") or []
    return (
        ", ".join(sorted(set(gpus)))
        if facts.get("device") == "cuda" and gpus
        else f"CPU {facts.get('cpu', '')}".strip()
    )


def span(values: Iterable[Any]) -> str:
    """Lowest and highest of some values, or the only one."""
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"
