"""Finished runs as their scores tell of them; needs no torch."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stexp.errors import InputError
from stexp.evaluation.coverage import FOREIGN
from stexp.evaluation.predictions import changed_since_run
from stexp.evaluation.records import (
    AGAIN,
    Audit,
    ForeignAudit,
    Metrics,
    Provenance,
    read_audit,
    read_genes,
    read_metrics,
    read_provenance,
)
from stexp.protocol import Protocol
from stexp.runs.folder import PREDICTIONS, RunFolder

log = logging.getLogger(__name__)

NO_METHOD = (
    *("random_features", "test_data", "fold", "seed", "output_dir", "overwrite", "verbose", "experiment"),
    *("protocol.", "hardware.", "logger.", "callbacks.", "model.image_encoder.", "data.reader."),
    *("data.name", "data.root", "data.sheet", "data.cache_dir", "data.placement", "data.eval_batch_size"),
    *("data.published_", "data.panel_"),
    *("trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.log_every_n_steps"),
)
"""Beginnings of config keys that say where, when and on what a method ran, not what it is."""


@dataclass(frozen=True)
class ScoredRun:
    """A finished run, scored as one protocol.

    Parameters
    ----------
    settings
        What the method is: dotted config key -> value.
    scored_as
        Name of the protocol that `sections` were scored under: its own or another.
    sections
        Section -> ``scores``, ``floors``, ``ceiling``.
    changed
        Whether its predictions are others than its method wrote.
    """

    folder: Path
    fold: str
    seed: int
    settings: dict[str, Any]
    protocol: Protocol
    scored_as: str
    sections: Mapping[str, Any]
    genes: frozenset[str]
    metrics: Metrics
    audit: Audit | ForeignAudit
    provenance: Provenance
    changed: bool

    @property
    def is_foreign(self) -> bool:
        """Whether its predictions were made by another tool."""
        return FOREIGN in self.metrics

    @property
    def patient_of(self) -> dict[str, str]:
        return self.audit["facts"]["patient_of"]


def find_runs(patterns: list[str]) -> tuple[list[Path], list[Path]]:
    """Run folders that paths, folders above them or glob patterns name: finished ones, and the others."""
    finished: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
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
                log.info("%s never came to train and is left out", folder)
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


def read_scored_run(folder: Path, scored_as: str | None = None) -> ScoredRun:
    """Read a finished run under its own protocol, or under `scored_as`.

    Raises
    ------
    InputError
        A file is missing or damaged, or the run is not scored as `scored_as`, section by section.
    """
    run = RunFolder(folder)
    metrics = read_metrics(folder)
    genes = frozenset(row["gene"] for row in read_genes(folder / "per_gene.csv"))
    if len(genes) != metrics["n_genes"]:
        raise InputError(
            f"{folder / 'per_gene.csv'} has {len(genes)} of {metrics['n_genes']} genes; write it again with "
            f"stexp-score run={folder}"
        )
    audit = read_audit(folder)
    if not set(metrics["sections"]) <= set(audit["facts"]["patient_of"]):
        raise InputError(f"{folder}: metrics.json and audit.json are of different sections; {AGAIN}")
    return ScoredRun(
        folder=folder,
        fold=str(metrics["fold"]),
        seed=run.config["seed"],
        settings=settings_of(run.config, metrics["chosen"]),
        protocol=run.protocol,
        scored_as=scored_as or metrics["protocol"],
        sections=_sections_under(folder, metrics, scored_as),
        genes=genes,
        metrics=metrics,
        audit=audit,
        provenance=read_provenance(folder),
        changed=changed_since_run(folder),
    )


def settings_of(config: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a method is, of the config of a run and of what it chose: dotted key -> value."""
    if PREDICTIONS in config:  # whose encoder is that of the floors alone
        return {"model.name": config["model"]["name"]}
    encoder = config.get("model", {}).get("image_encoder") or config.get("image_encoder") or {}
    settings = _flat(config) | _flat({"image_encoder": encoder})
    settings = {key: value for key, value in settings.items() if not key.startswith(NO_METHOD)}
    if settings.get("image_encoder.checkpoint"):
        settings["image_encoder.checkpoint"] = Path(settings["image_encoder.checkpoint"]).name
    if "k_validation_pearson" in chosen and "k" not in chosen.get("changed", {}):
        settings["model.k"] = "auto"  # a re-scored run holds what was chosen, another number in every fold
    return settings


def _sections_under(folder: Path, metrics: Metrics, scored_as: str | None) -> Mapping[str, Any]:
    """Scores by section under a protocol; None: that of the run."""
    sections = metrics["sections"]
    if scored_as in (None, metrics["protocol"]):
        return sections
    scores = metrics["scored_as"].get(scored_as)
    if scores is None:
        names = ", ".join([metrics["protocol"], *metrics["scored_as"]])
        raise InputError(f"{folder} is not scored as {scored_as}, only as {names}; stexp-score run={folder} may help")
    if "sections" not in scores and len(sections) > 1:
        raise InputError(
            f"{folder}: the scores as {scored_as} are not kept by section; do that with stexp-score run={folder}"
        )
    return scores.get("sections") or {next(iter(sections)): scores}


def _flat(config: dict, prefix: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in config.items():
        settings |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return settings
