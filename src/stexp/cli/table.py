"""``stexp-table runs=runs``: finished runs of several methods beside floors and ceiling; needs no torch."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError, did_you_mean
from stexp.files import CONF
from stexp.reporting.agreement import FINISH
from stexp.reporting.tables import FILES, METRICS, markdown, tabulate_all, write
from stexp.runs.scored import find_runs, read_scored_run


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
        if cfg.metric not in METRICS:
            raise InputError(
                f"metric={cfg.metric}: choose {', '.join(METRICS)}{did_you_mean(str(cfg.metric), METRICS)}"
            )
        patterns = to_plain(cfg.runs) if OmegaConf.is_list(cfg.runs) else [cfg.runs]
        folders, unfinished = find_runs([str(pattern) for pattern in patterns])
        if unfinished and not cfg.allow_missing:
            raise InputError(
                f"{unfinished[0]} is not finished; finish it with: {FINISH.format(unfinished[0].resolve())}"
            )
        if not folders:
            raise InputError(f"none of these runs is finished: {', '.join(map(str, unfinished))}")
        scored_as = OmegaConf.select(cfg, "protocol.name")
        runs = [read_scored_run(folder, scored_as) for folder in folders]
        tables = tabulate_all(runs, cfg.metric, cfg.baseline, cfg.allow_missing)
        text = "\n\n".join(markdown(table) for table in tables)
        if unfinished:
            text += f"\n\nNot finished, left out: {', '.join(folder.name for folder in unfinished)}."
        name = "+".join(dict.fromkeys(f"{run.metrics['data']}-{run.scored_as}" for run in runs))
        folder = Path(cfg.output_dir or Path("tables") / name)
        write(tables, text, folder)
        print(text)
        print(f"\nwrote {', '.join(FILES)} in {folder}")


if __name__ == "__main__":
    main()
