"""``stexp-score run=runs/x``: metrics, floors and ceiling from the files of a run, without torch."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, load_run, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError
from stexp.evaluation.score import summary
from stexp.reporting.report import write_report
from stexp.runs.scoring import score_run


@entry("score")
def main(cfg: DictConfig) -> None:
    with command():
        if OmegaConf.is_missing(cfg, "run"):
            raise InputError("which run? give its folder, as in: stexp-score run=runs/x")
        run = Path(cfg.run)
        load_run(run)
        changes = {key: value for key, value in to_plain(cfg.model).items() if value is not None}
        if not changes and cfg.genes == "panel" and cfg.output_dir is not None:
            raise InputError(
                "output_dir is for new predictions; change something, as in model.k=50 or genes=all, or leave it out"
            )
        if changes or cfg.genes != "panel":
            from stexp.runs.rescore import predict_again  # imports torch, which scoring alone does not need

            run = predict_again(run, changes, to_plain(cfg).get("genes"), cfg.output_dir)
        metrics = score_run(run)
        print(summary(metrics))
        print(f"wrote {run / 'metrics.json'}, {run / 'per_gene.csv'} and {write_report(run)}")


if __name__ == "__main__":
    main()
