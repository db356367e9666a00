"""``stexp-train -m``: what a sweep consists of, and what is done of it; needs no torch."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from stexp.cli.train import FINISHED
from stexp.config import CONF, build, load_sections
from stexp.config.compose import compose, meant, parse, quoted
from stexp.errors import InputError
from stexp.evaluation.predictions import read_json

NOT_IN_NAME = (
    *("fold", "seed", "output_dir", "overwrite", "sweep", "hydra.", "hardware.", "logger.", "callbacks."),
    *("data.name", "data.cache_dir", "data.placement", "data.eval_batch_size", "data.sections_of", "data.download"),
    *("data.mirror", "data.keep_archives", "trainer.accelerator", "trainer.devices", "trainer.log_every_n_steps"),
)
"""How keys begin that say where and how fast a run is made, not what it is."""
TWINS = {"data.reader.": "data.", "model.image_encoder.": "image_encoder."}
"""Where the same settings stand a second time."""


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
        return all((self.output_dir / name).exists() for name in (*FINISHED, "metrics.json"))

    @property
    def method(self) -> str:
        """The method's name in the folder's path, and what was retrieved again."""
        folder = (self.needs or self).output_dir.parent.name
        if self.model not in folder:  # given by hand
            rest = (
                f"{key}={value}"
                for key, value in self.cell.items()
                if key not in ("data", "protocol", "model", "fold", "seed")
            )
            folder = " ".join([self.model, *rest])
        return " ".join([folder, *([self.output_dir.name] if self.needs else [])])

    @property
    def label(self) -> str:
        return f"{self.data} {self.protocol} {self.method} fold {self.fold} seed {self.seed}"

    @property
    def typed(self) -> str:
        """The command as it would be typed."""
        return shlex.join([f"stexp-{self.command}", *self.overrides])

    @property
    def arguments(self) -> list[str]:
        """The same as a process that ends with the sweep."""
        return [sys.executable, "-m", "stexp.sweeps.launching", self.command, *self.overrides]


NAMED = ("data", "protocol", "model", "image_encoder")
"""Groups whose configs have a name."""


def names() -> list[str]:
    """The sweeps there are."""
    return [path.stem for path in sorted((CONF / "sweep").glob("*.yaml"))]


def read_plan(name: str) -> dict[str, Any]:
    """``conf/sweep/<name>.yaml`` over the one that it says it is made ``of``."""
    if name not in names():
        raise InputError(f"sweep={name}: choose {', '.join(names())}{meant(str(name), names())}")
    plan = OmegaConf.to_container(OmegaConf.load(CONF / "sweep" / f"{name}.yaml"))
    return {**(read_plan(plan.pop("of")) if "of" in plan else {}), **plan}


def jobs(name: str | None, overrides: Sequence[str] = ()) -> list[Job]:
    """The jobs of a sweep, cell by cell and fold by fold.

    Parameters
    ----------
    name
        One of :func:`names`, or None for the values that `overrides` list.
    overrides
        Arguments of the command line. A key that is an axis of the sweep takes the place of its values
        (``model=bleep,stnet``, ``protocol=strict``, ``fold=B4``), every other list of values is an axis of its own,
        and all else applies to every job. ``output_dir`` is the folder above the runs (default ``runs``).

    Raises
    ------
    InputError
        No such sweep, key or choice; no job is left; or two jobs would write into one folder.
    """
    plan = read_plan(name) if name else {}
    axes = {key: plan[key] for key in ("data", "protocol", "model") if key in plan} | plan.get("grid", {})
    again = dict(plan.get("rescore", {}))
    fixed: dict[str, str] = {}
    for override in parse(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
        else:
            raise InputError(f"{override.input_line}: give a list of values, choice() or range()")
        where = again if key in again else axes if key in axes or len(values) > 1 or key in ("seed", "fold") else None
        if where is None:
            fixed[key] = values[0]
        else:
            where[key] = values
    seeds = axes.pop("seed", ["0"])
    if wrong := [seed for seed in seeds if not str(seed).isdigit()]:
        raise InputError(f"seed={wrong[0]}: a whole number of at least 0 would fit")
    folds = [_text(fold) for fold in axes.pop("fold", ["all" if name else "null"])]
    if not name:
        return _plain({**axes, "seed": seeds, "fold": folds}, fixed)

    root = Path(_text(fixed.pop("output_dir", "runs")))
    wanted, known, out = _names(fixed.get("data.sections", "null")), set(), []
    for cell in _product(axes):
        chosen = {**_published(plan, cell), **cell, **fixed}
        cfg, choices = _config(chosen)
        if wanted and cfg.data.sections_of is not None:
            listed = list(itertools.chain(*cfg.data.sections_of.values()))
            known |= set(listed)
            here = [section for section in wanted if section in listed]
            if not here:
                continue
            chosen["data.sections"] = f"[{','.join(map(quoted, here))}]"
            cfg, choices = _config(chosen)
        settings = OmegaConf.to_container(cfg, resolve=True)
        there = folds_of(cfg, plan.get("test"))
        known |= set(there)
        folder = root / f"{cfg.data.name}-{cfg.protocol.name}" / _method_name(settings, choices)
        lists = {
            key: values.get(cell["data"], values["default"]) if isinstance(values, dict) else values
            for key, values in again.items()
        }
        for seed, fold in itertools.product(seeds, there):
            if folds != ["all"] and fold not in folds:
                continue
            output_dir = folder / f"{fold.replace('/', '_')}-s{seed}"
            texts = _texts({**chosen, "seed": seed, "fold": quoted(fold), "output_dir": quoted(output_dir)})
            what = (cfg.data.name, cfg.protocol.name, cfg.model.name, fold, int(seed))
            run = Job("train", tuple(texts), output_dir, *what, cell, settings)
            out += [_again(run, changes) for changes in _product(lists)]
    for key, asked in (("data.sections", wanted), ("fold", folds)):
        lacking = [each for each in asked if each not in known and each != "all"]
        if lacking and known:
            raise InputError(f"{key}: {', '.join(lacking)} is in none of the data sets of sweep={name}")
    if not out:
        raise InputError(f"sweep={name}: no job is left")
    return out


def with_needs(cells: Iterable[Job]) -> list[Job]:
    """Every folder's job once, the trainings before what is retrieved from them."""
    out: dict[Path, Job] = {}
    for job in cells:
        for each in (job.needs, job):
            if each is not None:
                out.setdefault(each.output_dir, each)
    return list(out.values())


def _product(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, str]]:
    return [dict(zip(axes, map(_written, values), strict=True)) for values in itertools.product(*axes.values())]


def _written(value: Any) -> str:
    """A value of a yaml as it stands on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _text(value: str) -> str:
    """A value of a command line without the quotes that it may need there."""
    return str(parse([f"x={value}"])[0].value())


def _texts(chosen: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in chosen.items()]


def _names(value: str) -> list[str]:
    """Names that a command line lists: a list, one, or null for none."""
    read = parse([f"x={value}"])[0].value()
    return [str(name) for name in read] if isinstance(read, list) else [] if read is None else [str(read)]


def _published(plan: Mapping[str, Any], cell: Mapping[str, str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for condition, overrides in plan.get("where", {}).items():
        if all(cell.get(key) == value for key, value in (part.split("=") for part in condition.split())):
            out |= dict(text.split("=", 1) for text in overrides)
    return out


def folds_of(cfg: DictConfig, test: list[str] | None = None) -> list[str]:
    """Every fold of a config: from the listed sections where the data set lists them, else from the data.

    Parameters
    ----------
    test
        Sections that a fold has to hold out; None: any.
    """
    from stexp.data.splits import folds

    protocol = build(cfg.protocol)
    listed = cfg.data.sections_of
    if listed is None:
        return folds(load_sections(cfg, protocol), protocol)
    if protocol.hold_out == "block":
        return [f"block{i + 1}" for i in range(protocol.blocks)]
    patient_of = {str(name): str(patient) for patient, sections in listed.items() for name in sections}
    wanted = cfg.data.sections
    if wanted is None and protocol.published:
        wanted = cfg.data.published_sections
    wanted = [wanted] if isinstance(wanted, str | int) else wanted
    tested = [name for name in patient_of if wanted is None or name in map(str, wanted)]
    tested = [name for name in tested if test is None or name in test]
    return tested if protocol.hold_out == "section" else list(dict.fromkeys(patient_of[name] for name in tested))


@functools.lru_cache(maxsize=256)
def _of_groups(*groups: str) -> tuple[DictConfig, dict[str, str]]:
    cfg = compose("train", groups, with_hydra=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _config(chosen: Mapping[str, str]) -> tuple[DictConfig, dict[str, str]]:
    """The config of a job, and the choice of every group; composed once for all jobs with the same choices."""
    groups = {key for key in chosen if (CONF / key).is_dir()}
    cfg, choices = _of_groups(*(text for text in _texts(chosen) if text.partition("=")[0] in groups))
    cfg = copy.deepcopy(cfg)
    try:
        for override in parse(_texts({key: value for key, value in chosen.items() if key not in groups})):
            OmegaConf.update(cfg, override.get_key_element(), override.value())
    except OmegaConfBaseException:  # Hydra knows more kinds of keys, and says which there is not
        cfg = compose("train", _texts(chosen))
    return cfg, choices


@functools.lru_cache(maxsize=256)
def _defaults(*groups: str) -> tuple[dict[str, Any], str]:
    cfg, choices = _of_groups(*groups)
    return _flat(OmegaConf.to_container(cfg, resolve=True)), choices["image_encoder"]


def _method_name(settings: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    groups = [f"{group}={choices[group]}" for group in ("data", "protocol", "model")]
    (before, encoder), now, parts = _defaults(*groups), _flat(settings), []
    if choices["image_encoder"] != encoder:
        parts = [f"image_encoder_{choices['image_encoder']}"]
        before, _ = _defaults(*groups, f"image_encoder={choices['image_encoder']}")
    differing = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith((*NOT_IN_NAME, "model.name"))
    ]
    for twin, original in TWINS.items():
        kept = {key.removeprefix(original) for key in differing if key.startswith(original)}
        differing = [key for key in differing if not (key.startswith(twin) and key.removeprefix(twin) in kept)]
    # what model takes over from protocol is named once, in full
    same = {key for key in differing if key.startswith("model.") and f"protocol.{key[6:]}" in differing}
    differing = [key for key in differing if key not in same]
    short = {key: key if key.startswith("protocol.") else key.rpartition(".")[2] for key in differing}
    for key in differing:
        name = short[key] if list(short.values()).count(short[key]) == 1 else key
        value = now.get(key)
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(f"{name}_{f'{Path(text).name}.{_digest(text)}' if '/' in text else text}")
    text = "-".join([str(now["model.name"]), *parts])
    # long ones are cut, and kept apart by a digest
    return text if len(text) <= 120 else f"{text[:100]}..{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return out


def _again(run: Job, changes: Mapping[str, str]) -> Job:
    """A run retrieved again; the run itself where nothing would change."""
    cell = {**run.cell, **changes}
    flat = _flat(run.settings)
    real = {key: value for key, value in changes.items() if _text(value) != str(flat.get(key))}
    if not real:
        return replace(run, cell=cell)
    folder = run.output_dir / "rescored" / ",".join(f"{key.rpartition('.')[2]}={v}" for key, v in real.items())
    texts = (f"run={quoted(run.output_dir)}", *(f"{key}={value}" for key, value in real.items()))
    return replace(run, command="score", overrides=texts, output_dir=folder, cell=cell, needs=run)


def _plain(axes: Mapping[str, list[str]], fixed: Mapping[str, str]) -> list[Job]:
    """The jobs of lists of values without a sweep: each in the folder that the config says."""
    out: dict[Path, Job] = {}
    for cell in _product(axes):
        chosen = {**fixed, **cell, "fold": "null"}
        cfg, _ = _config(chosen)
        settings = OmegaConf.to_container(cfg, resolve=True)
        folds = [cell["fold"]]
        if cell["fold"] in ("all", "None"):
            folds = folds_of(cfg)
            if not folds:
                raise InputError(f"no section of {cfg.data.name} is left to hold out")
        for fold in folds if cell["fold"] == "all" else folds[:1]:
            chosen["fold"] = quoted("all" if cell["fold"] == "all" else fold)
            output_dir = Path(_config(chosen)[0].output_dir)
            if cell["fold"] == "all":
                output_dir /= fold
            if output_dir in out:
                varied = [f"{key}.name" if key in NAMED else key for key in cell if key not in ("fold", "seed")]
                raise InputError(
                    f"two jobs would write into {output_dir}; give output_dir what varies, as in "
                    f"output_dir='runs/{'-'.join(f'${{{key}}}' for key in varied)}-${{fold}}-s${{seed}}'"
                )
            texts = _texts({**chosen, "fold": quoted(fold), "output_dir": quoted(output_dir)})
            what = (cfg.data.name, cfg.protocol.name, cfg.model.name, fold, int(cfg.seed))
            out[output_dir] = Job("train", tuple(texts), output_dir, *what, dict(cell), settings)
    return list(out.values())


def choose(cells: Sequence[Job], by: str) -> pd.DataFrame:
    """The best cell of every fold by a value of ``provenance.json``, with its scores on the held-out side.

    Returns
    -------
    DataFrame
        A row for each data set, protocol, model, seed and fold: the values of the axes that were chosen, `by`,
        and ``pearson_acg`` and ``pearson_heg50`` of the test spots, which had no part in the choice.
    """
    rows = []
    for job in cells:
        value = read_json(job.output_dir / "provenance.json").get(by)
        if value is None:
            raise InputError(f"{job.output_dir} has no {by}; protocol={job.protocol} keeps no validation spots")
        scores = read_json(job.output_dir / "metrics.json", "scores")["scores"]
        where = {"data": job.data, "protocol": job.protocol, "model": job.model, "seed": job.seed, "fold": job.fold}
        rows.append({**where, **job.cell, by: value, **{key: scores[key] for key in ("pearson_acg", "pearson_heg50")}})
    table = pd.DataFrame(rows)
    best = table.groupby(["data", "protocol", "model", "seed", "fold"], sort=False)[by].idxmax()
    return table.loc[best].reset_index(drop=True)
