"""``stexp-analyse run=runs/x``: other formats and downstream analysis of what was predicted, without torch."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from stexp.config import command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError


@entry("analyse")
def main(cfg: DictConfig) -> None:
    with command():
        if OmegaConf.is_missing(cfg, "run"):
            raise InputError("run is not given: run= names a run, or a slide that stexp-predict predicted")
        # pandas and anndata, which --help does without
        from stexp.reporting.downstream import analyse, check, folders, wanted

        plain = to_plain(cfg)
        if not wanted(plain):
            raise InputError("nothing is asked for; give exports=[geojson], downstream.domains=joint, or see --help")
        check(plain)
        for folder in folders(Path(str(plain["run"]))):
            print("\n".join(analyse(folder, plain)))


if __name__ == "__main__":
    main()
