"""``stexp-table runs=runs``: finished runs of several methods beside floors and ceiling; needs no torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError, did_you_mean
from stexp.files import CONF

log = logging.getLogger(__name__)

Made = TypeVar("Made")


def main() -> None:
    """``stexp-table``: of a sweep, whose other keys are those of ``stexp-train -m``, or of runs as they lie there."""
    if not any(argument.startswith("sweep=") for argument in sys.argv[1:]):
        of_runs()
        return
    with command():
        _paper().main(sys.argv[1:])


def _paper() -> ModuleType:
    """The paper's tables and figures, which a checkout has and an installed package has not."""
    experiments = CONF.parent / "experiments"
    if not (experiments / "paper").is_dir():
        raise InputError("sweep=: the paper's tables are made in a checkout of the repository; runs=FOLDER needs none")
    sys.path.insert(0, str(experiments))
    return import_module("paper.paper")


@entry("table")
def of_runs(cfg: DictConfig) -> None:
    with command():
        if OmegaConf.is_missing(cfg, "runs"):
            raise InputError("which runs? name folders, as in: stexp-table runs=runs")
        if cfg.allow_missing not in (None, True, False):
            raise InputError(f"allow_missing={cfg.allow_missing}: true or false would fit")
        _tabulate(cfg)


def _tabulate(cfg: DictConfig) -> None:
    """Print and write the tables that can be made, and name what they lack; status 2 where a run or table is refused.

    With ``allow_missing=false`` anything missing is an error, and nothing is written.
    """
    # pandas and scipy, which --help does without
    from stexp.reporting.agreement import FINISH
    from stexp.reporting.outside import inside_and_outside
    from stexp.reporting.tables import FILES, METRICS, by_table, markdown, tabulate, write
    from stexp.runs.scored import find_runs, read_scored_run

    if cfg.metric not in METRICS:
        raise InputError(f"metric={cfg.metric}: choose {', '.join(METRICS)}{did_you_mean(str(cfg.metric), METRICS)}")
    patterns = to_plain(cfg.runs) if OmegaConf.is_list(cfg.runs) else [cfg.runs]
    folders, unfinished = find_runs([str(pattern) for pattern in patterns])
    refused: list[InputError] = []
    lacking = [f"{folder} is not finished; finish it with: {FINISH.format(folder.resolve())}" for folder in unfinished]
    if not folders:
        raise InputError(f"none of these runs is finished: {', '.join(map(str, unfinished))}")
    if lacking and cfg.allow_missing is False:
        raise InputError(lacking[0])

    def made(function: Callable[..., Made], *arguments: object) -> list[Made]:
        try:
            return [function(*arguments)]
        except InputError as error:
            if cfg.allow_missing is False:
                raise
            refused.append(error)
            return []

    scored_as = OmegaConf.select(cfg, "protocol.name")
    runs = [run for folder in folders for run in made(read_scored_run, folder, scored_as)]
    options = cfg.metric, cfg.baseline, cfg.allow_missing is not False
    groups = [(group, table) for group in by_table(runs) for table in made(tabulate, *group, *options)]
    if not groups:
        raise refused[0]
    tables = [table for _, table in groups]
    text = "\n\n".join([*map(markdown, tables), *inside_and_outside([group for group, _ in groups])])
    if unfinished:
        text += f"\n\nNot finished, left out: {', '.join(folder.name for folder in unfinished)}."
    name = "+".join(dict.fromkeys(f"{run.metrics['data']}-{run.scored_as}" for run in runs))
    folder = Path(cfg.output_dir or Path("tables") / name)
    write(tables, text, folder)
    print(text)
    print(f"\nwrote {', '.join(FILES)} in {folder}")
    lacking += [f"{gap.method} lacks {gap.missing}; {gap.fill}" for table in tables for gap in table.gaps]
    for line in lacking:
        log.warning("left out: %s", line)
    for error in refused:
        log.error("%s", error)
    if refused:
        sys.exit(2)


if __name__ == "__main__":
    main()
