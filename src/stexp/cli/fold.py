"""One fold of ``stexp-train``, as its command line has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from stexp import hardware
from stexp.api.settings import check_numbers
from stexp.cli import large_imports
from stexp.config import to_plain
from stexp.data.section import Section
from stexp.evaluation.score import summary


def config_of(cfg: DictConfig, fold: str, folder: Path) -> dict[str, Any]:
    """The config of one fold in its folder, checked; plain data."""
    cfg = cfg.copy()
    cfg.fold, cfg.output_dir = fold, str(folder)
    config = to_plain(cfg)
    check_numbers(config)
    return config


def train(cfg: DictConfig, sections: list[Section], fold: str, folder: Path) -> dict | None:
    """One fold, from sections to report; see :func:`stexp.api.train.train_run`.

    Returns
    -------
    dict
        ``metrics.json``; None in a process of another rank than the first, which only takes part in the fit.
    """
    config = config_of(cfg, fold, folder)
    if config["hardware"]["keep_memory"]:
        hardware.keep_freed_memory()  # before torch takes any
    with large_imports():  # torch and Lightning, which --help and refusals do without
        from stexp.api.train import train_run

    run = train_run(config, sections, overwrite=config["overwrite"])
    if run is None:
        return None
    if run.method is not None:  # else it was finished before
        print(f"wrote {run.folder}; look at {run.folder / 'report.html'}")
        print(summary(run.metrics, config["verbose"]))
    return run.metrics
