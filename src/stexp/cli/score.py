"""``stexp-score run=runs/x``: metrics, floors and ceiling from the files of a run, without torch."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError
from stexp.files import alone_in


@entry("score")
def main(cfg: DictConfig) -> None:
    with command():
        if OmegaConf.is_missing(cfg, "run"):
            raise InputError("which run? give its folder, as in: stexp-score run=runs/x")
        # pandas and anndata, which --help does without
        from stexp.data.readers.gene_sets import read_gene_sets
        from stexp.evaluation.score import summary
        from stexp.reporting.report import write_report
        from stexp.runs.folder import RunFolder
        from stexp.runs.scoring import score_run

        run = Path(cfg.run)
        RunFolder(run).require()
        changes = {key: value for key, value in to_plain(cfg.model).items() if value is not None}
        if not changes and cfg.genes == "panel" and cfg.output_dir is not None:
            raise InputError(
                "output_dir is for new predictions; change something, as in model.k=50 or genes=all, or leave it out"
            )
        sets = read_gene_sets(cfg.gene_sets) if cfg.gene_sets else None
        folder, again = run, bool(changes) or cfg.genes != "panel"
        if again:
            # these import torch, which scoring does without
            from stexp.runs.rescore import predict_again, rescored_folder
            from stexp.training.machine import take_free_threads

            take_free_threads()
            new = (run, changes, to_plain(cfg).get("genes"), cfg.output_dir)
            folder = rescored_folder(*new)
        with alone_in(folder, wait=True):  # a second command like this one waits, and finds it done
            if again:
                predict_again(*new)
            metrics, report = score_run(folder, sets), write_report(folder)
        print(f"wrote {folder / 'metrics.json'}, {folder / 'per_gene.csv'} and {report}")
        print(summary(metrics, bool(cfg.verbose)))


if __name__ == "__main__":
    main()
