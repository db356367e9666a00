"""Whether runs belong into one table, and which of them it lacks."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from stexp.errors import InputError
from stexp.runs.scored import ScoredRun

FINISH = (
    "stexp-train -cp {} -cn config +overwrite=false hydra.run.dir=. hydra.output_subdir=null hydra/job_logging=none"
)
"""Command that goes on with the config of a run folder as it stands."""


class Gap(NamedTuple):
    """What a method, with one of its seeds, has no run of.

    Parameters
    ----------
    method
        Label and seed.
    missing
        Fold, or sections of one.
    fill
        What to do, with the command.
    n_runs
        Runs of it that are there, none of which goes before another.
    """

    method: str
    missing: str
    fill: str
    n_runs: int = 0


def check_agreement(runs: list[ScoredRun]) -> None:
    """InputError where two runs mean something else by one section: other files, patient, spots or genes."""
    first: dict[tuple, tuple[Any, ScoredRun]] = {}

    def agree(what: tuple, value: Any, run: ScoredRun, otherwise: str) -> None:
        before, other = first.setdefault(what, (value, run))
        if before != value:
            raise InputError(f"{other.folder} and {run.folder} do not belong into one table: {otherwise}")

    for run in runs:
        for section, files in run.provenance["data_manifest"].items():
            for file, digest in files.items():
                agree((section, file), digest, run, f"section {section} was read from another {file}")
        for section in run.sections:
            cell, scored = f"fold {run.fold}, section {section}", run.metrics["sections"][section]
            n_spots = scored.get("n_test_spots", scored["n_spots"])  # of which predictions made elsewhere may lack some
            agree((section,), run.patient_of[section], run, f"section {section} is of different patients")
            agree((cell, "spots"), n_spots, run, f"they predict other spots ({cell})")
            agree((cell, "genes"), run.genes, run, f"they predict other genes ({cell}); a table has one panel")


def find_copies(runs: list[ScoredRun], labels: list[str]) -> dict[Gap, list[ScoredRun]]:
    """Cells of which there are several runs: the same method, seed and fold, none of which goes before another."""
    cells: dict[tuple[str, int, str], list[ScoredRun]] = {}
    for run, label in zip(runs, labels, strict=True):
        cells.setdefault((label, run.seed, run.fold), []).append(run)
    copies: dict[Gap, list[ScoredRun]] = {}
    for (label, seed, fold), alike in cells.items():
        if len(alike) > 1:
            folders = " and ".join(str(run.folder) for run in alike)
            fill = f"{folders} are the same method, seed {seed} and fold {fold}; name one of them in runs=[...]"
            copies[Gap(f"{label}, seed {seed},", f"fold {fold}", fill, len(alike))] = alike
    return copies


def leave_out_copies(runs: list[ScoredRun], labels: list[str]) -> tuple[list[ScoredRun], list[str], list[Gap]]:
    """Runs of whose cell there is no other, with their labels; and all gaps, those of cells with copies first."""
    copies = find_copies(runs, labels)
    copied = {run.folder for alike in copies.values() for run in alike}
    labels = [label for run, label in zip(runs, labels, strict=True) if run.folder not in copied]
    runs = [run for run in runs if run.folder not in copied]
    cells = {gap[:2] for gap in copies}
    return runs, labels, [*copies, *(gap for gap in find_gaps(runs, labels) if gap[:2] not in cells)]


def find_gaps(runs: list[ScoredRun], labels: list[str]) -> list[Gap]:
    """Folds and sections that other runs have and a method, with one of its seeds, has not."""
    cells: dict[tuple[str, int], dict[str, ScoredRun]] = {}
    tested: dict[str, dict[str, ScoredRun]] = {}
    for run, label in zip(runs, labels, strict=True):
        cells.setdefault((label, run.seed), {})[run.fold] = run
        for section in run.sections:
            tested.setdefault(run.fold, {}).setdefault(section, run)
    gaps = []
    for (label, seed), by_fold in sorted(cells.items()):
        method = f"{label}, seed {seed},"
        for fold in sorted(tested):
            if fold not in by_fold:
                gaps.append(Gap(method, f"fold {fold}", _fill(next(iter(by_fold.values())), fold)))
            elif missing := [section for section in tested[fold] if section not in by_fold[fold].sections]:
                other = tested[fold][missing[0]].folder
                anew = "predict them, and evaluate" if by_fold[fold].is_foreign else "train"
                fill = f"{other} has; {anew} {by_fold[fold].folder} anew with the same data.sections"
                gaps.append(Gap(method, f"section {', '.join(missing)} of fold {fold}", fill))
    return gaps


def describe_gaps(gaps: list[Gap]) -> list[str]:
    """A sentence a method."""
    missing: dict[str, list[str]] = {}
    for gap in gaps:
        several = f" (it has {gap.n_runs} runs of it; runs=[...] names one)" if gap.n_runs else ""
        missing.setdefault(gap.method, []).append(gap.missing + several)
    return [f"Gap: {method} lacks {', '.join(parts)}." for method, parts in missing.items()]


def _fill(run: ScoredRun, fold: str) -> str:
    """How to fill another fold as a run filled its own: by its command, or as it was done in Python."""
    command = run.provenance.get("trained_by", run.provenance["command"])
    if command.startswith("stexp-"):
        return f"fill it with: {_command(run, command, fold)}"
    verb, done = ("evaluate", "evaluated") if run.is_foreign else ("fit", "fitted")
    return f"{verb} fold {fold} in Python as {run.folder} was {done}, with stexp.SpotDataModule(..., fold={fold!r})"


def _command(run: ScoredRun, command: str, fold: str) -> str:
    """The command of a run, for another fold, into a folder of its own."""
    words = command.split()
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
