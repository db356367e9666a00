"""``stexp-train``: fit, predict the held-out section(s), score, report. One run folder."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from stexp import hardware
from stexp.api.settings import check_numbers
from stexp.config import build, command, to_plain
from stexp.config.compose import entry
from stexp.data.dataset import DataSet
from stexp.data.section import Section
from stexp.data.splits import check_fold, folds
from stexp.errors import InputError
from stexp.evaluation.score import folds_table, summary

log = logging.getLogger(__name__)

DEMO = (
    "this is the demo, on generated sections: 90 epochs, about 3 minutes on two idle CPU cores; "
    "trainer.max_epochs=20 is enough for a look, data= names a data set, --help says more"
)


def _sweep(arguments: list[str]) -> int:
    from stexp.sweeps.launching import sweep  # a sweep's jobs come back here

    return sweep(arguments)


@entry("train", multirun=_sweep, bare=DEMO)
def main(cfg: DictConfig) -> None:
    with command():
        check_numbers(to_plain(cfg))  # before sections are read
        protocol, dataset = build(cfg.protocol), DataSet(to_plain(cfg.data))
        sections = dataset.read_sections(protocol)
        names = folds(sections, protocol)
        if not names:
            raise InputError(f"no section of {dataset.name} under {dataset.root} has an image; nothing can be trained")
        if str(cfg.fold) == "all":
            runs = [train(cfg, sections, fold, Path(cfg.output_dir) / fold) for fold in names]
            finished = [metrics for metrics in runs if metrics is not None]
            if finished:  # in the first process, all of them
                print(folds_table(finished))
            return
        if cfg.fold is None:
            log.info("fold=%s: the first of %s", names[0], ", ".join(names))
            cfg.fold = names[0]  # output_dir, unless it was given, holds its name
        check_fold(sections, protocol, str(cfg.fold))  # before there is a folder
        train(cfg, sections, str(cfg.fold), Path(cfg.output_dir))


def train(cfg: DictConfig, sections: list[Section], fold: str, folder: Path) -> dict | None:
    """One fold, from sections to report; see :func:`stexp.api.train.train_run`.

    Returns
    -------
    dict
        ``metrics.json``; None in a process of another rank than the first, which only takes part in the fit.
    """
    cfg = cfg.copy()
    cfg.fold, cfg.output_dir = fold, str(folder)
    config = to_plain(cfg)
    check_numbers(config)
    if config["hardware"]["keep_memory"]:
        hardware.keep_freed_memory()  # before torch takes any
    # imports torch and Lightning, which --help and refusals do without
    from stexp.api.train import train_run

    run = train_run(config, sections, overwrite=config["overwrite"])
    if run is None:
        return None
    if run.method is not None:  # else it was finished before
        print(f"wrote {run.folder}; look at {run.folder / 'report.html'}")
        print(summary(run.metrics, config["verbose"]))
    return run.metrics


if __name__ == "__main__":
    main()
