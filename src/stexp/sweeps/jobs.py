"""The jobs that a sweep consists of: a training for every cell, fold and seed, or a retrieval from one."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stexp.config.compose import listed_names, quoted, unquoted
from stexp.errors import InputError
from stexp.runs.folder import RESULTS, RunFolder, config_of_run
from stexp.sweeps.folds import folds_of
from stexp.sweeps.names import fold_name, method_name, rescored_name
from stexp.sweeps.plan import Plan, make_plan
from stexp.sweeps.settings import config_of, flat, plain, sources_in, typed

NAMED = ("data", "protocol", "model", "image_encoder")
"""Groups whose configs have a name."""


@dataclass(frozen=True, eq=False)
class Job:
    """One cell of a sweep: a training, or a finished run retrieved again.

    Parameters
    ----------
    command
        ``"train"`` or ``"score"``.
    overrides
        Arguments of the command; with ``stexp-`` before it, this can be typed.
    output_dir
        ``<root>/<data>-<protocol>/<method>/<fold>-s<seed>``, below that ``rescored/<changes>``. The method's name
        holds its model and every setting that differs from the defaults of this data, protocol and model, so that
        sweeps share what is the same run.
    cell
        Axis -> value, for all axes of the sweep besides fold and seed, as the sweep writes them.
    settings
        The resolved config, but for fold, seed and output_dir.
    needs
        The training that is retrieved from again.
    """

    command: str
    overrides: tuple[str, ...]
    output_dir: Path
    data: str
    protocol: str
    model: str
    fold: str
    seed: int
    cell: dict[str, str]
    settings: Mapping[str, Any] = field(repr=False)
    needs: Job | None = None

    @property
    def done(self) -> bool:
        """Whether the folder holds all of the results."""
        return all((self.output_dir / name).exists() for name in (*RESULTS, "metrics.json"))

    def check(self) -> None:
        """InputError where the folder holds a run with other settings, whose name does not say them."""
        of_run = {"fold": self.fold, "seed": self.seed, "output_dir": str(self.output_dir)}
        RunFolder(self.output_dir).check(config_of_run({**self.settings, **of_run}))

    @property
    def method(self) -> str:
        """The method's name in the folder's path, and what was retrieved again."""
        folder = (self.needs or self).output_dir.parent.name
        if self.model not in folder:  # a folder of the user's choice
            varied = [key for key in self.cell if key not in ("data", "protocol", "model", "fold", "seed")]
            folder = " ".join([self.model, *(f"{key}={self.cell[key]}" for key in varied)])
        return " ".join([folder, *([self.output_dir.name] if self.needs else [])])

    @property
    def label(self) -> str:
        return f"{self.data} {self.protocol} {self.method} fold {self.fold} seed {self.seed}"

    @property
    def typed(self) -> str:
        """The command as it would be typed."""
        return shlex.join([f"stexp-{self.command}", *self.overrides])

    @property
    def logs(self) -> Path:
        """Folder of what the job prints, and of why it failed."""
        return self.output_dir / "logs"

    @property
    def arguments(self) -> list[str]:
        """The same as a process that ends with the one that started it."""
        return [sys.executable, "-m", "stexp.cli.job", str(self.logs), self.command, *self.overrides]


def jobs(name: str | None, overrides: Sequence[str] = ()) -> list[Job]:
    """The jobs of a sweep, cell by cell and fold by fold.

    Parameters
    ----------
    name, overrides
        See :func:`~stexp.sweeps.plan.make_plan`. ``output_dir`` is the folder above the runs (default ``runs``);
        without a sweep, a job's own.

    Raises
    ------
    InputError
        No such sweep, key or choice; no job is left; or two jobs would write into one folder.
    """
    plan = make_plan(name, overrides)
    return _jobs_of_sweep(plan) if name else _jobs_of_lists(plan)


def with_needs(cells: Iterable[Job]) -> list[Job]:
    """Every folder's job once, the trainings before what is retrieved from them."""
    by_folder: dict[Path, Job] = {}
    for job in cells:
        for each in (job.needs, job):
            if each is not None:
                by_folder.setdefault(each.output_dir, each)
    return list(by_folder.values())


def _jobs_of_sweep(plan: Plan) -> list[Job]:
    fixed = dict(plan.fixed)
    root = Path(unquoted(fixed.pop("output_dir", "runs")))
    sections = listed_names(fixed.get("data.sections", "null"))
    names: set[str] = set()  # of sections and folds in any of the cells
    out: list[Job] = []
    for cell in plan.cells():
        chosen = {**plan.published_settings(cell), **cell, **fixed}
        if sections and (listed := config_of(chosen)[0].data.sections_of) is not None:
            in_data = list(itertools.chain(*listed.values()))
            names |= set(in_data)
            in_both = [section for section in sections if section in in_data]
            if not in_both:
                continue
            chosen["data.sections"] = f"[{','.join(map(quoted, in_both))}]"
        cfg, _ = config_of(chosen)
        folds = folds_of(cfg, plan.test)
        names |= set(folds)
        folds = [fold for fold in folds if plan.folds == ["all"] or fold in plan.folds]
        for training in _trainings(root, cell, chosen, itertools.product(plan.seeds, folds)):
            out += [_retrieved(training, changes) for changes in plan.retrievals(cell["data"])]
    for key, asked in (("data.sections", sections), ("fold", plan.folds)):
        absent = [each for each in asked if each not in names and each != "all"]
        if absent and names:
            raise InputError(f"{key}: {', '.join(absent)} is in none of the data sets of sweep={plan.name}")
    if not out:
        raise InputError(f"sweep={plan.name}: no job is left")
    return out


def _trainings(
    root: Path, cell: dict[str, str], chosen: Mapping[str, str], runs: Iterable[tuple[str, str]]
) -> Iterator[Job]:
    """The trainings of one cell, for every seed and fold of `runs`."""
    cfg, choices = config_of(chosen)
    settings = plain(cfg)
    folder = root / f"{cfg.data.name}-{cfg.protocol.name}" / method_name(settings, choices, sources_in(chosen))
    for seed, fold in runs:
        output_dir = folder / fold_name(fold, seed)
        texts = typed({**chosen, "seed": seed, "fold": quoted(fold), "output_dir": quoted(output_dir)})
        what = (cfg.data.name, cfg.protocol.name, cfg.model.name, fold, int(seed))
        yield Job("train", tuple(texts), output_dir, *what, cell, settings)


def _retrieved(run: Job, changes: Mapping[str, str]) -> Job:
    """A run retrieved again; the run itself where nothing would change.

    Raises
    ------
    InputError
        Something would, of a run that corrects: retrieved again it would stand uncorrected beside corrected ones.
    """
    cell = {**run.cell, **changes}
    settings = flat(run.settings)
    corrected = bool(settings.get("model.correct"))
    if corrected:
        settings["model.weighting"] = "similarity"  # whatever the config says
    changes = {key: value for key, value in changes.items() if unquoted(value) != str(settings.get(key))}
    if not changes:
        return replace(run, cell=cell)
    if corrected:
        key, value = next(iter(changes.items()))
        raise InputError(
            f"model.correct=true: {key}={value} is retrieved again in this sweep, which leaves the correction out; "
            f"model.correct=false would fit, or {key}={value} without a sweep, which trains with it"
        )
    folder = run.output_dir / "rescored" / rescored_name(changes)
    sources = typed(sources_in(dict(text.split("=", 1) for text in run.overrides)))
    texts = (f"run={quoted(run.output_dir)}", *typed(changes), *sources)
    return replace(run, command="score", overrides=texts, output_dir=folder, cell=cell, needs=run)


def _jobs_of_lists(plan: Plan) -> list[Job]:
    """The jobs of lists of values without a sweep: each in the folder that the config says."""
    by_folder: dict[Path, Job] = {}
    for cell in replace(plan, axes={**plan.axes, "seed": plan.seeds, "fold": plan.folds}).cells():
        chosen = {**plan.fixed, **cell, "fold": "null"}
        cfg, _ = config_of(chosen)
        settings, folds = plain(cfg), [cell["fold"]]
        if cell["fold"] in ("all", "None"):
            folds = folds_of(cfg)
            if not folds:
                raise InputError(f"no section of {cfg.data.name} is left to hold out")
        for fold in folds if cell["fold"] == "all" else folds[:1]:
            chosen["fold"] = quoted("all" if cell["fold"] == "all" else fold)
            output_dir = Path(config_of(chosen)[0].output_dir)
            if cell["fold"] == "all":
                output_dir /= fold
            if output_dir in by_folder:
                raise InputError(_one_folder_for_two(output_dir, cell))
            texts = typed({**chosen, "fold": quoted(fold), "output_dir": quoted(output_dir)})
            what = (cfg.data.name, cfg.protocol.name, cfg.model.name, fold, int(cfg.seed))
            by_folder[output_dir] = Job("train", tuple(texts), output_dir, *what, dict(cell), settings)
    return list(by_folder.values())


def _one_folder_for_two(folder: Path, cell: Mapping[str, str]) -> str:
    varied = [f"{key}.name" if key in NAMED else key for key in cell if key not in ("fold", "seed")]
    name = "-".join(f"${{{key}}}" for key in varied)
    return (
        f"two jobs would write into {folder}; give output_dir what varies, as in "
        f"output_dir='runs/{name}-${{fold}}-s${{seed}}'"
    )
