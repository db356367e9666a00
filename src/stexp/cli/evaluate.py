"""``stexp-evaluate predictions=theirs.h5ad fold=B name=theirs``: another tool's predictions, scored as ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from stexp.arguments import Seed, SeveralSeeds, check
from stexp.config import build, command, to_plain
from stexp.config.compose import entry
from stexp.errors import InputError, did_you_mean
from stexp.protocol import Protocol

if TYPE_CHECKING:  # which --help does without, here and in functions: pandas, anndata, torch
    import anndata as ad

    from stexp.data.section import Section

log = logging.getLogger(__name__)

GENES = ("panel", "predicted")


@entry("evaluate")
def main(cfg: DictConfig) -> None:
    with command():
        for key, example in (("predictions", "theirs.h5ad"), ("name", "theirs")):
            if OmegaConf.is_missing(cfg, key) or cfg[key] is None:
                raise InputError(f"{key} is not given; as in: stexp-evaluate {key}={example} (--help says more)")
        from stexp.data.dataset import DataSet
        from stexp.data.splits import check_fold, folds
        from stexp.evaluation.foreign.files import find_files
        from stexp.evaluation.score import summary

        check_options(cfg)
        files = find_files(_names(cfg.predictions) or [])
        protocol, dataset = build(cfg.protocol), DataSet(to_plain(cfg.data))
        sections = dataset.read_sections(protocol)
        if cfg.fold is None:
            raise InputError(f"which fold was predicted? fold= names one of {', '.join(folds(sections, protocol))}")
        check_fold(sections, protocol, str(cfg.fold))  # before there is a folder
        metrics = score_files(cfg, files, sections, protocol)
        report = Path(cfg.output_dir) / "report.html"
        print(f"wrote {cfg.output_dir}; look at {report}")
        print(summary(metrics, bool(cfg.verbose)))


def check_options(cfg: DictConfig) -> None:
    """What would else be refused after the sections are read."""
    from stexp.data.section import check_name
    from stexp.evaluation.foreign.scales import check_scale

    check_name(str(cfg.name), "name")
    check("seed", cfg.seed, Seed)
    check("random_features", cfg.random_features, SeveralSeeds)
    if cfg.scale is not None:
        check_scale(str(cfg.scale))
    if cfg.genes not in GENES:
        raise InputError(f"genes={cfg.genes}: choose {' or '.join(GENES)}{did_you_mean(str(cfg.genes), GENES)}")


def score_files(cfg: DictConfig, files: list[Path], sections: list[Section], protocol: Protocol) -> dict:
    """Read predictions, serve the fold that they are of, and score them.

    Returns
    -------
    dict
        ``metrics.json``.
    """
    # imports torch and Lightning
    from stexp.api.evaluate import score_predictions
    from stexp.api.features import frozen_encoder
    from stexp.data.dataset import DataSet
    from stexp.evaluation.foreign.files import read_predictions
    from stexp.evaluation.foreign.names import check_sections, names_of, rename_genes
    from stexp.runs.folder import PREDICTIONS
    from stexp.training.machine import Machine

    names = names_of(sections)
    for key in ("trained_on", "genes_chosen_on"):
        check_sections(key, _names(cfg[key]), list(names.sections))
    predicted = read_predictions(files, names, None if cfg.layer is None else str(cfg.layer))
    log.info("read predictions of %d spots x %d genes", *predicted.shape)
    config: dict[str, Any] = to_plain(cfg)
    dataset, panel = DataSet(config["data"]), None
    gene_table = config["gene_table"] or config["data"].get("gene_table")
    if cfg.genes == "predicted":
        panel = panel_of(rename_genes(predicted, names, gene_table)[0], sections)
        dataset = DataSet({**config["data"], "panel_saw_test": False})  # who chose them is stated, or not known
    machine = Machine({"accelerator": config["device"], "devices": 1}, config["precision"])
    machine.set_threads()
    encoder = frozen_encoder(config, machine)
    data = dataset.serve(sections, protocol, str(config["fold"]), config["seed"], panel, encoder=encoder)
    for line in data.summary():
        log.info("%s", line)
    config["fold"] = str(config["fold"])
    config[PREDICTIONS] = {"files": list(map(str, files)), "layer": config["layer"]}
    return score_predictions(
        predicted,
        data,
        config,
        sections=sections,
        machine=machine,
        name=str(config["name"]),
        trained_on=_names(config["trained_on"]),
        scale=config["scale"],
        genes_chosen_on=_names(config["genes_chosen_on"]),
        own_panel=panel is not None,
        gene_table=gene_table,
        overwrite=bool(config["overwrite"]),
    )


def panel_of(predicted: ad.AnnData, sections: list[Section]) -> list[str]:
    """Predicted genes that every section with an image measures, in their order; the others are said."""
    import pandas as pd

    common = set.intersection(*(set(section.genes) for section in sections if section.slide is not None))
    genes = pd.Index(predicted.var_names)
    panel = [str(gene) for gene in genes if gene in common]
    if not panel:
        raise InputError(
            f"genes=predicted: none of {len(genes)} predicted genes ({', '.join(genes[:3])}, ...) is measured in every "
            f"section with an image"
        )
    if len(panel) < len(genes):
        other = genes.difference(pd.Index(panel), sort=False)
        some = ", ".join(other[:5])
        log.warning("%d predicted genes are not measured in every section, and are not scored: %s", len(other), some)
    return panel


def _names(value: Any) -> list[str] | None:
    """A list of names, one name, or None."""
    if value is None:
        return None
    value = to_plain(value) if OmegaConf.is_list(value) else value
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


if __name__ == "__main__":
    main()
