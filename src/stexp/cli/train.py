"""``stexp-train``: fit, predict the held-out section(s), score, report. One run folder."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from stexp.config import build, command, dataset_of, to_plain
from stexp.config.compose import entry, is_of_test
from stexp.errors import InputError

log = logging.getLogger(__name__)

DEMO = (
    "this is the demo, on generated sections: 90 epochs, a few minutes on an idle CPU core; "
    "trainer.max_epochs=20 is enough for a look, data= names a data set, --help says more"
)


def _sweep(arguments: list[str]) -> int:
    from stexp.sweeps.launching import sweep  # a sweep's jobs come back here

    if any(is_of_test(argument) for argument in arguments):
        raise InputError("test_data= is of a single run; give it without -m")
    return sweep(arguments)


@entry("train", multirun=_sweep, bare=DEMO)
def main(cfg: DictConfig) -> None:
    with command():
        _train(cfg)


def _train(cfg: DictConfig) -> None:
    """Train a fold, or all; what is wrong whatever the data are is refused before sections are read."""
    # pandas and anndata, which --help does without
    from stexp.api.settings import check_numbers
    from stexp.cli.fold import config_of, train
    from stexp.data.splits import check_fold, folds
    from stexp.evaluation.score import folds_table
    from stexp.runs.folder import RunFolder, config_of_run

    check_numbers(to_plain(cfg))
    protocol, dataset = build(cfg.protocol), dataset_of(cfg)
    begins_at_model = cfg.get("from") is not None  # whose digest the folder's config holds
    if cfg.fold is not None and str(cfg.fold) != "all" and not cfg.overwrite and not begins_at_model:
        folder = RunFolder(Path(cfg.output_dir))
        folder.check(config_of_run(config_of(cfg, str(cfg.fold), folder.path)))
    dataset.panel(protocol)
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


if __name__ == "__main__":
    main()
